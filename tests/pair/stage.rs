//! Pairs under test: started from the saved guest or from scratch, watched, and checked at the end.

use crate::proxy::Proxy;
use crate::witness::Witness;
use nix::sys::signal::Signal;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vmft::pair::{Lines, Look, PairConsole, SideProcess, Which, disk_argument, prefixed};
use vmft_backup::status::{Role, SideStatus};
use vmft_guest_images::disk::{DiskSize, check_disk, make_disk, read_disk_file};
use vmft_guest_images::workload::{DemoLine, RECORDS_FILE, SHELL_PROMPT, Workload, count_records};

/// How long anything may take that must come: booting on a busy host included.
pub const LIMIT: Duration = Duration::from_secs(240);
/// Guest memory of these pairs, unless they say otherwise.
const MEMORY: &str = "size=96M";

/// One pair at a time.
pub static TURN: Mutex<()> = Mutex::new(());

/// A guest that sits in its shell, saved; its disk is not mounted.
#[derive(Debug)]
pub struct Booted {
    pub snapshot: PathBuf,
    pub disk: PathBuf,
    /// Console bytes the guest had written.
    pub console_offset: u64,
}

/// The saved guest; booted when first asked for.
pub fn booted() -> &'static Booted {
    static BOOTED: OnceLock<Booted> = OnceLock::new();
    BOOTED.get_or_init(boot)
}

pub fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_vmft"))
}

fn boot() -> Booted {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("booted");
    if directory.exists() {
        std::fs::remove_dir_all(&directory).unwrap();
    }
    std::fs::create_dir_all(&directory).unwrap();
    let (disk, snapshot) = (directory.join("disk.img"), directory.join("snapshot"));
    make_disk(&disk, DiskSize::DEMO, "vmft-test").unwrap();
    let words = Workload::Shell.cmdline();
    let arguments = ["--no-wait", "--listen", "tcp:127.0.0.1:0", "--memory", MEMORY, "--cmdline"];
    let mut arguments: Vec<OsString> = arguments.map(Into::into).into();
    arguments.extend([words.into(), "--disk".into(), prefixed("path=", &disk)]);
    let mut side = SideProcess::start(program(), Which::Primary, &directory, &arguments).unwrap();
    let mut console = PairConsole::default();
    console.attach(&mut side).unwrap();
    let mut text = Vec::new();
    read_until(&mut console, &mut text, |text| contains(text, SHELL_PROMPT));
    text.clear();
    console.type_in(b"cd /; $bb umount $disk && echo un''mounted\n");
    read_until(&mut console, &mut text, |text| {
        let text = String::from_utf8_lossy(text);
        text.split_once("unmounted").is_some_and(|(_, after)| after.contains(SHELL_PROMPT))
    });
    vmft::api_client::snapshot(&side.api(), &snapshot).unwrap();
    side.kill().unwrap();
    let state = std::fs::read(snapshot.join("state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_slice(&state).unwrap();
    let console_offset = state["console_offset"].as_u64().unwrap();
    Booted { snapshot, disk, console_offset }
}

/// True if the console shows `wanted`.
pub fn contains(text: &[u8], wanted: &str) -> bool {
    text.windows(wanted.len()).any(|window| window == wanted.as_bytes())
}

/// Reads until that is there. How long a guest takes is its host's affair: what has a limit is its silence.
pub fn read_until(console: &mut PairConsole, text: &mut Vec<u8>, wanted: impl Fn(&[u8]) -> bool) {
    let mut deadline = Instant::now() + LIMIT;
    while !wanted(text) {
        match console.look(Duration::from_secs(1)) {
            Look::Bytes(bytes) => {
                text.extend(bytes);
                deadline = Instant::now() + LIMIT;
            }
            Look::Nothing => {}
            Look::Closed => panic!("the console closed:\n{}", String::from_utf8_lossy(text)),
        }
        assert!(Instant::now() < deadline, "not seen:\n{}", String::from_utf8_lossy(text));
    }
}

/// What the guest of a pair does, typed at its shell: mounts the disk; then for each number a line,
/// a record and its fsync, a line that says so, some computing, some idling; then switches off.
pub fn records_script(records: u32) -> String {
    script_that_computes(records, 100, "")
}

/// The record behind which a guest of [`held_script`] computes until a line is typed.
pub const HELD_AT: u32 = 8;

/// The same, with so many rounds of computing for each record, but it does not end before
/// [`let_end`]: however fast the guest's CPU is, what a test does meanwhile happens to a guest that
/// computes.
pub fn held_script(records: u32, rounds: u32) -> String {
    let until = format!(
        "[ $n -ne {HELD_AT} ] || until read -r -t 0.02 _; do \
         c=0; while [ $c -lt {rounds} ]; do c=$((c+1)); done; done; "
    );
    script_that_computes(records, rounds, &until)
}

/// Lets a guest of [`held_script`] end, on the side that has survived.
pub fn let_end(pair: &mut Pair, survivor: Which) {
    pair.wait_role(survivor, Role::Alone);
    pair.type_in("\n");
}

fn script_that_computes(records: u32, rounds: u32, after_each: &str) -> String {
    format!(
        "$bb mount -t ext4 /dev/vda $disk; n=0; while [ $n -lt {records} ]; do n=$((n+1)); \
         printf 'vmft-line %06d\\n' $n; \
         printf 'vmft-record %06d %0108d\\n' $n $n >>$disk/records; \
         sync $disk/records; printf 'vmft-record %06d synced\\n' $n; {after_each}\
         c=0; while [ $c -lt {rounds} ]; do c=$((c+1)); done; read -r -t 0.02 -u 9 _; done; \
         echo vmft-done; poweroff\n"
    )
}

/// How a pair is set up.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Boots this instead of restoring the saved guest.
    pub boot: Option<Workload>,
    /// More for both sides.
    pub both: Vec<&'static str>,
    /// Guest memory of one that boots.
    pub memory: Option<&'static str>,
    /// More for the primary.
    pub primary: Vec<&'static str>,
    /// More for the backup.
    pub backup: Vec<&'static str>,
    /// The sides speak through a proxy.
    pub proxied: bool,
}

/// A pair under test.
#[derive(Debug)]
pub struct Pair {
    pub primary: SideProcess,
    pub backup: SideProcess,
    pub console: PairConsole,
    /// What the console has shown since the pair was started.
    pub text: Vec<u8>,
    pub proxy: Option<Proxy>,
    witnesses: [Witness; 2],
    /// Console offset at which the pair was started.
    start: u64,
    pub disk: PathBuf,
    pub directory: TempDir,
    _turn: MutexGuard<'static, ()>,
}

/// What a pair has shown for its records.
#[derive(Debug, PartialEq, Eq)]
pub struct Shown {
    pub lines: Vec<u32>,
    pub synced: Vec<u32>,
    pub done: bool,
}

impl Pair {
    /// Starts a pair; it is protected when this returns.
    pub fn start(setup: &Setup) -> Self {
        let saved = setup.boot.is_none().then(booted);
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path().join("disk.img");
        let mut primary: Vec<OsString> = vec!["--listen".into(), "tcp:127.0.0.1:0".into()];
        match (saved, setup.boot) {
            (Some(saved), _) => {
                std::fs::copy(&saved.disk, &disk).unwrap();
                primary.extend(["--restore".into(), saved.snapshot.clone().into()]);
            }
            (None, Some(workload)) => {
                make_disk(&disk, DiskSize::DEMO, "vmft-test").unwrap();
                let words = workload.cmdline().into();
                let memory = setup.memory.unwrap_or(MEMORY);
                primary.extend(["--memory".into(), memory.into(), "--cmdline".into(), words]);
            }
            (None, None) => unreachable!("a guest is restored or booted"),
        }
        primary.extend(["--disk".into(), disk_argument(&disk)]);
        primary.extend(setup.both.iter().chain(&setup.primary).map(Into::into));
        let mut primary =
            SideProcess::start(program(), Which::Primary, directory.path(), &primary).unwrap();
        let status = primary.wait_status(LIMIT, |status| status.listening.is_some()).unwrap();
        let mut address = status.listening.unwrap();
        let proxy = setup.proxied.then(|| Proxy::to(address.parse().unwrap()));
        if let Some(proxy) = &proxy {
            address = proxy.address().to_string();
        }
        let start = saved.map_or(0, |saved| saved.console_offset);
        let mut console = PairConsole::starting_at(start);
        console.attach(&mut primary).unwrap();
        let arguments: Vec<OsString> = setup
            .both
            .iter()
            .chain(&setup.backup)
            .map(Into::into)
            .chain(["--listen".into(), "tcp:127.0.0.1:0".into()])
            .collect();
        let mut backup = start_backup(directory.path(), &address, &disk, arguments);
        console.attach(&mut backup).unwrap();
        let witnesses = [&primary, &backup].map(|side| Witness::attach(&side.console()));
        backup.wait_status(LIMIT, |status| status.role == Role::Backup).unwrap();
        primary.wait_status(LIMIT, |status| status.role == Role::Primary).unwrap();
        Self {
            primary,
            backup,
            console,
            text: Vec::new(),
            proxy,
            witnesses,
            start,
            disk,
            directory,
            _turn: turn,
        }
    }

    /// A side.
    pub fn side(&mut self, which: Which) -> &mut SideProcess {
        match which {
            Which::Primary => &mut self.primary,
            Which::Backup => &mut self.backup,
        }
    }

    /// What a side alone has shown.
    pub fn witness(&mut self, which: Which) -> &mut Witness {
        &mut self.witnesses[usize::from(which == Which::Backup)]
    }

    /// Types at the console.
    pub fn type_in(&mut self, text: &str) {
        self.console.type_in(text.as_bytes());
    }

    /// Reads the console until it is as wanted.
    pub fn read_until(&mut self, wanted: impl Fn(&[u8]) -> bool) {
        read_until(&mut self.console, &mut self.text, wanted);
    }

    /// Reads the console until it shows `wanted`.
    pub fn read_text(&mut self, wanted: &str) {
        self.read_until(|text| contains(text, wanted));
    }

    /// Takes what the console shows now, without waiting.
    pub fn read_now(&mut self) {
        while let Look::Bytes(bytes) = self.console.look(Duration::ZERO) {
            self.text.extend(bytes);
        }
    }

    /// Reads the console until every side is gone.
    pub fn read_to_end(&mut self) {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.console.look(Duration::from_secs(1)) {
                Look::Bytes(bytes) => self.text.extend(bytes),
                Look::Nothing => {}
                Look::Closed => return,
            }
            assert!(Instant::now() < deadline, "the guest does not end; {}", self.report());
        }
    }

    /// The numbered lines shown so far.
    pub fn shown(&self) -> Shown {
        let mut shown = Shown { lines: Vec::new(), synced: Vec::new(), done: false };
        for line in Lines::default().add(&self.text) {
            match DemoLine::parse(&line) {
                Some(DemoLine::Line(number)) => shown.lines.push(number),
                Some(DemoLine::Synced(number)) => shown.synced.push(number),
                Some(DemoLine::Done) => shown.done = true,
                None => {}
            }
        }
        shown
    }

    /// Status of a side that must be there.
    pub fn status(&mut self, which: Which) -> SideStatus {
        self.side(which).wait_status(LIMIT, |_| true).unwrap()
    }

    /// Waits until a side has a role.
    pub fn wait_role(&mut self, which: Which, role: Role) -> SideStatus {
        self.side(which).wait_status(LIMIT, |status| status.role == role).unwrap()
    }

    /// The generation that was won last.
    pub fn generation(&self) -> u64 {
        let mut directory = self.disk.clone().into_os_string();
        directory.push(".vmft");
        let entries = std::fs::read_dir(directory).unwrap();
        let generation =
            |name: OsString| name.to_str()?.strip_prefix("generation-")?.parse::<u64>().ok();
        entries.filter_map(|entry| generation(entry.unwrap().file_name())).max().unwrap_or(0)
    }

    /// Waits until a side has ended by itself.
    pub fn wait_exit(&mut self, which: Which) -> ExitStatus {
        self.side(which).wait_exit(LIMIT).unwrap()
    }

    /// After both sides have ended: every byte came, once, and both sides agree on all of them.
    pub fn check_console(&mut self, survivor: Which) {
        self.read_to_end();
        let merger = self.console.merger();
        assert_eq!(merger.missing(), 0, "console bytes are missing; {}", self.report());
        let end = self.start + self.text.len() as u64;
        assert_eq!(merger.end(), end, "bytes and offsets do not go together");
        let (text, start) = (std::mem::take(&mut self.text), self.start);
        let last = self.witness(survivor).agrees_with(&text, start, survivor.name());
        let other = survivor.other();
        self.witness(other).agrees_with(&text, start, other.name());
        assert_eq!(last, Some(end), "the survivor has not shown everything");
        self.text = text;
    }

    /// After the guest has run [`records_script`] or the demo to its end: every line and every
    /// record is there, once, in order, and the disk has them all.
    pub fn check_records(&mut self, survivor: Which, records: u32) {
        self.check_console(survivor);
        let numbers: Vec<u32> = (1..=records).collect();
        let wanted = Shown { lines: numbers.clone(), synced: numbers, done: true };
        assert_eq!(self.shown(), wanted, "{}", self.report());
        let file = read_disk_file(&self.disk, RECORDS_FILE).unwrap();
        assert_eq!(count_records(&file), Ok(records), "{}", self.report());
        let check = check_disk(&self.disk).unwrap();
        assert!(check.clean, "{}", check.report);
    }

    /// Sends a side a signal.
    pub fn signal(&mut self, which: Which, signal: Signal) {
        self.side(which).signal(signal).unwrap();
    }

    /// What everybody says, for a failure's message.
    pub fn report(&self) -> String {
        format!(
            "primary:\n{}backup:\n{}console:\n{}",
            self.primary.messages(),
            self.backup.messages(),
            String::from_utf8_lossy(&self.text)
        )
    }
}

/// Starts a backup for the primary at `address`.
pub fn start_backup(
    directory: &Path,
    address: &str,
    disk: &Path,
    more: Vec<OsString>,
) -> SideProcess {
    let mut arguments: Vec<OsString> =
        vec!["--primary".into(), format!("tcp:{address}").into(), "--disk".into()];
    arguments.push(disk_argument(disk));
    arguments.extend(more);
    SideProcess::start(program(), Which::Backup, directory, &arguments).unwrap()
}
