//! What a side tells the service manager that has started it: that it is ready, how it is, and that
//! it is alive (sd_notify(3)).
//!
//! Words on a datagram socket, of which the environment has the name. The socket is opened before
//! the sandbox is entered, and written to from inside: what the sandbox leaves a thread opens none.
//! `vmft up` and the side that it has started both speak: `up` while there is no side, the side of
//! itself.
//!
//! What is said when is [`Speaker`]'s, which has no clock and no socket.

use crate::terminal::printable;
use crate::watch::facts;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use vmft_backup::side::Side;
use vmft_backup::status::{Role, SideStatus};
use vmft_sandbox::Task;
use vmft_vmm::inputs::Asked;

/// Of the environment: where the manager listens, how often it is to hear, and of which process.
const SOCKET: &str = "NOTIFY_SOCKET";
const WATCHDOG_US: &str = "WATCHDOG_USEC";
const WATCHDOG_PID: &str = "WATCHDOG_PID";

/// So often in the time after which its manager takes it to hang, a side says that it is alive.
const SIGNS: u32 = 3;
/// How long one that is not watched waits for news of itself.
const QUIET: Duration = Duration::from_secs(60);
/// How long a manager may take to have room for a word.
const PATIENCE: Duration = Duration::from_secs(1);

static MANAGER: OnceLock<Manager> = OnceLock::new();

/// Who is told.
#[derive(Debug)]
struct Manager {
    /// A file, because every thread may write to files that are open.
    socket: File,
    /// After so long without a sign, it takes this service to hang.
    watchdog: Option<Duration>,
}

/// A connection to the socket of that name: a path, or behind `@` a name in the abstract space.
fn connect(name: &std::ffi::OsStr) -> io::Result<File> {
    let socket = UnixDatagram::unbound()?;
    match name.as_bytes() {
        [b'/', ..] => socket.connect(Path::new(name))?,
        [b'@', name @ ..] => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
        _ => return Err(io::Error::new(io::ErrorKind::Unsupported, "no Unix socket's name")),
    }
    socket.set_write_timeout(Some(PATIENCE))?;
    Ok(File::from(OwnedFd::from(socket)))
}

/// How often the manager wants a sign of one of these processes, if it does.
fn watchdog(microseconds: Option<&str>, of: Option<&str>, processes: [u32; 2]) -> Option<Duration> {
    let is_ours = of.is_none_or(|of| of.parse().is_ok_and(|of| processes.contains(&of)));
    let microseconds: u64 = microseconds?.parse().ok()?;
    (is_ours && microseconds > 0).then(|| Duration::from_micros(microseconds))
}

/// Finds the manager, if one has started this process or the `vmft up` that has. To be called before this
/// process is confined. A side that cannot tell its manager anything runs all the same, and says so: the text
/// is what to say, once threads may be started.
#[must_use]
pub fn open() -> Option<String> {
    let name = std::env::var_os(SOCKET).filter(|name| !name.is_empty())?;
    let word = |name| std::env::var(name).ok();
    let processes = [std::process::id(), std::os::unix::process::parent_id()];
    let watchdog = watchdog(word(WATCHDOG_US).as_deref(), word(WATCHDOG_PID).as_deref(), processes);
    match connect(&name) {
        Ok(socket) => {
            // It is the same for the whole process.
            let _ = MANAGER.set(Manager { socket, watchdog });
            None
        }
        Err(error) => {
            Some(format!("the service manager at {} is told nothing: {error}", name.display()))
        }
    }
}

impl Manager {
    /// Says something; false if the manager has had no room for it. One that is gone needs no words.
    fn say(&self, words: &str) -> bool {
        let said = (&self.socket).write(words.as_bytes());
        !said.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }
}

/// Tells the manager how this process is, in a line: of a `vmft up` without a side.
pub fn tell_alone(how: &str) {
    if let Some(manager) = MANAGER.get() {
        manager.say(&format!("STATUS={}", printable(how)));
    }
}

/// Tells the manager that this process is alive: of a `vmft up` without a side.
pub fn tell_alive() {
    if let Some(manager) = MANAGER.get().filter(|manager| manager.watchdog.is_some()) {
        manager.say("WATCHDOG=1");
    }
}

/// Tells the manager that this service is about to end.
pub fn tell_end() {
    if let Some(manager) = MANAGER.get() {
        manager.say("STOPPING=1");
    }
}

/// How a side is, as far as its manager is told.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    is_ready: bool,
    words: String,
    /// How often the guest's thread has come by, while it is to.
    passes: Option<u64>,
}

impl Seen {
    fn of(status: &SideStatus, passes: Option<u64>) -> Self {
        let is_ready = match status.role {
            Role::Unprotected
            | Role::WaitingForBackup
            | Role::Primary
            | Role::Alone
            | Role::Backup => true,
            Role::Starting | Role::Joining | Role::Deciding | Role::Halted | Role::Stopped => false,
        };
        let (what, how) = (facts::role_and_generation(status), facts::protection(status));
        Self { is_ready, words: format!("{what}: {how}"), passes }
    }
}

/// What is said to the manager, and when.
#[derive(Debug)]
struct Speaker {
    /// From one sign to the next.
    period: Option<Duration>,
    is_ready: bool,
    told: String,
    /// When the next sign is due, since the beginning.
    due: Duration,
    /// When the last sign was given, or was not: how often the thread had come by.
    passes: Option<u64>,
    hangs: bool,
}

impl Speaker {
    fn new(watchdog: Option<Duration>) -> Self {
        let period = watchdog.map(|time| time / SIGNS);
        let (told, due) = (String::new(), Duration::ZERO);
        Self { period, is_ready: false, told, due, passes: None, hangs: false }
    }

    /// What there is to say `now` of a side that is so.
    fn handle(&mut self, now: Duration, seen: &Seen) -> Vec<String> {
        let mut words = Vec::new();
        let is_due = now >= self.due;
        if let Some(period) = self.period.filter(|_| is_due) {
            self.due = now + period;
            self.hangs = seen.passes.is_some() && seen.passes == self.passes;
            self.passes = seen.passes;
            if !self.hangs {
                words.push("WATCHDOG=1".to_owned());
            }
        }
        let hangs = if self.hangs { "; the thread of its guest hangs" } else { "" };
        let status = format!("STATUS={}{hangs}", seen.words);
        if status != self.told {
            words.push(status.clone());
            self.told = status;
        }
        if seen.is_ready && !self.is_ready {
            self.is_ready = true;
            words.push("READY=1".to_owned());
        }
        words
    }

    /// For how long there is nothing to say, if nothing happens.
    fn rest(&self, now: Duration) -> Duration {
        self.period.map_or(QUIET, |_| self.due.saturating_sub(now))
    }
}

/// Tells the manager of a side, on a thread of its own, until the process ends.
///
/// # Errors
/// The host's, where it starts no thread.
pub fn serve(side: &Side) -> io::Result<()> {
    let Some(manager) = MANAGER.get() else { return Ok(()) };
    let (board, mailbox) = (Arc::clone(&side.status), Arc::clone(&side.mailbox));
    let serve = move || {
        let (began, mut speaker) = (Instant::now(), Speaker::new(manager.watchdog));
        loop {
            let (status, passes) = (board.status(), board.liveness().passes());
            let words = speaker.handle(began.elapsed(), &Seen::of(&status, passes));
            let words = words.join("\n");
            // That it is ready is said once, so it has to be heard.
            while !words.is_empty() && !manager.say(&words) {}
            if manager.watchdog.is_some() && passes.is_some() {
                // Whoever runs a guest comes by at once, and has done so before the next sign is due.
                mailbox.ask(Asked::Pause);
            }
            board.wait_changed(&status, speaker.rest(began.elapsed()));
        }
    };
    vmft_sandbox::spawn(Task::Messages, "service", serve).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn seen(words: &str, is_ready: bool, passes: Option<u64>) -> Seen {
        Seen { is_ready, words: words.to_owned(), passes }
    }

    #[test]
    fn a_side_is_ready_once_and_says_how_it_is_when_that_changes() {
        let mut speaker = Speaker::new(None);
        assert_eq!(speaker.handle(ms(0), &seen("joining", false, None)), ["STATUS=joining"]);
        assert!(speaker.handle(ms(10), &seen("joining", false, None)).is_empty());
        let joined = seen("backup", true, Some(1));
        assert_eq!(speaker.handle(ms(20), &joined), ["STATUS=backup", "READY=1"]);
        assert!(speaker.handle(ms(30), &joined).is_empty());
        // One that nobody watches is not looked at: it says nothing of a thread.
        assert!(speaker.handle(ms(900_000), &joined).is_empty());
        let deciding = seen("deciding", false, None);
        assert_eq!(speaker.handle(ms(900_010), &deciding), ["STATUS=deciding"]);
        let alone = seen("alone", true, Some(9));
        assert_eq!(speaker.handle(ms(900_020), &alone), ["STATUS=alone"]);
    }

    #[test]
    fn signs_are_given_while_the_guests_thread_comes_by_and_not_while_it_hangs() {
        let mut speaker = Speaker::new(Some(ms(3000)));
        let at = |passes| seen("x", true, passes);
        // Before it runs a guest, nothing is to be expected of it.
        assert_eq!(speaker.handle(ms(0), &at(None)), ["WATCHDOG=1", "STATUS=x", "READY=1"]);
        assert_eq!(speaker.rest(ms(400)), ms(600));
        assert!(speaker.handle(ms(999), &at(None)).is_empty());
        assert_eq!(speaker.handle(ms(1000), &at(None)), ["WATCHDOG=1"]);
        assert_eq!(speaker.handle(ms(2000), &at(Some(1))), ["WATCHDOG=1"]);
        // Woken between two signs, it gives none, and takes none for missing.
        assert!(speaker.handle(ms(2500), &at(Some(1))).is_empty());
        assert_eq!(speaker.handle(ms(3000), &at(Some(2))), ["WATCHDOG=1"]);
        let hangs = ["STATUS=x; the thread of its guest hangs"];
        assert_eq!(speaker.handle(ms(4000), &at(Some(2))), hangs);
        assert!(speaker.handle(ms(5000), &at(Some(2))).is_empty());
        assert!(speaker.handle(ms(6000), &at(Some(2))).is_empty());
        assert_eq!(speaker.handle(ms(7000), &at(Some(3))), ["WATCHDOG=1", "STATUS=x"]);
        // It has the last outputs let out: that may take as long as it takes.
        for second in 8..20 {
            assert_eq!(speaker.handle(ms(second * 1000), &at(None)), ["WATCHDOG=1"]);
        }
    }

    #[test]
    fn a_side_is_ready_when_it_runs_or_follows_and_not_while_it_looks_for_whom_to_follow() {
        let ready = |role| Seen::of(&SideStatus { role, ..SideStatus::default() }, None).is_ready;
        let are =
            [Role::Primary, Role::Alone, Role::WaitingForBackup, Role::Backup, Role::Unprotected];
        assert!(are.into_iter().all(ready));
        let are_not = [Role::Starting, Role::Joining, Role::Deciding, Role::Halted, Role::Stopped];
        assert!(!are_not.into_iter().any(ready));
        let status = SideStatus {
            role: Role::Halted,
            generation: 3,
            reason: Some("a\nREADY=1".into()),
            ..SideStatus::default()
        };
        assert_eq!(Seen::of(&status, None).words, r"halted, generation 3: a\nREADY=1");
    }

    #[test]
    fn signs_are_wanted_of_this_process_or_of_the_one_that_started_it() {
        let wanted = |time, of| watchdog(time, of, [7, 3]);
        assert_eq!(wanted(Some("3000000"), None), Some(ms(3000)));
        assert_eq!(wanted(Some("3000000"), Some("7")), Some(ms(3000)));
        assert_eq!(wanted(Some("3000000"), Some("3")), Some(ms(3000)));
        for (time, of) in [
            (None, None),
            (Some("0"), None),
            (Some("x"), None),
            (Some("3000000"), Some("8")),
            (Some("3000000"), Some("x")),
        ] {
            assert_eq!(wanted(time, of), None, "{time:?} {of:?}");
        }
    }

    #[test]
    fn a_manager_listens_at_a_path_or_at_an_abstract_name() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("notify");
        let name = format!("vmft-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("a name");
        let listeners = [
            UnixDatagram::bind(&path).expect("a socket"),
            UnixDatagram::bind_addr(&address).expect("a socket"),
        ];
        let names = [path.clone().into_os_string(), format!("@{name}").into()];
        for (listener, name) in listeners.iter().zip(&names) {
            let manager = Manager { socket: connect(name).expect("it listens"), watchdog: None };
            assert!(manager.say("READY=1"));
            let mut bytes = [0; 64];
            let len = listener.recv(&mut bytes).expect("words");
            assert_eq!(&bytes[..len], b"READY=1");
        }
        assert!(connect("vsock:2:1".as_ref()).is_err());
        assert!(connect(directory.path().join("nobody").as_os_str()).is_err());
    }
}
