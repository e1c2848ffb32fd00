//! Pairs under test: the guest with servers is booted once in a lab and saved; pairs start from there.

use crate::lab::{GUEST, LOG_A, Lab, LogLink, MAC, Place, TAP};
use nix::sys::signal::Signal;
use std::ffi::OsString;
use std::io::Read;
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vmft::pair::{SideProcess, Which, prefixed};
use vmft_backup::status::{Role, SideStatus};
use vmft_guest_images::{Cache, NoProgress, cmdline, server_guest};

/// How long anything may take that must come: booting on a busy host included.
pub const LIMIT: Duration = Duration::from_secs(300);
const MEMORY: &str = "size=160M";

/// One pair at a time.
static TURN: Mutex<()> = Mutex::new(());

/// Waits for this test's turn, with the saved guest ready.
pub fn turn() -> MutexGuard<'static, ()> {
    booted();
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn vmft() -> &'static str {
    env!("CARGO_BIN_EXE_vmft")
}

/// Starts a side on one of the lab's hosts.
fn start_side(
    lab: &Lab,
    which: Which,
    subcommand: &str,
    directory: &Path,
    arguments: &[OsString],
) -> SideProcess {
    let place = if which == Which::Primary { Place::HostA } else { Place::HostB };
    let mut all: Vec<OsString> =
        ["exec", &lab.name(place), vmft(), subcommand].map(Into::into).into();
    all.extend_from_slice(arguments);
    all.extend(["--net".into(), format!("tap={TAP}").into()]);
    SideProcess::start_as(Path::new("ip"), "netns", which, directory, &all).unwrap()
}

/// The saved guest, all of its servers running; booted when first asked for.
fn booted() -> &'static Path {
    static BOOTED: OnceLock<PathBuf> = OnceLock::new();
    BOOTED.get_or_init(boot)
}

fn boot() -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("net-booted");
    if directory.exists() {
        std::fs::remove_dir_all(&directory).unwrap();
    }
    std::fs::create_dir_all(&directory).unwrap();
    let guest = server_guest(&Cache::from_environment().unwrap(), &mut NoProgress).unwrap();
    let lab = Lab::new(LogLink::Cable);
    let words = format!("{} vmft.run=idle ip={GUEST}/24", cmdline::DEFAULT);
    let mac = MAC.map(|byte| format!("{byte:02x}")).join(":");
    let arguments: Vec<OsString> = vec![
        "exec".into(),
        lab.name(Place::HostA).into(),
        vmft().into(),
        "run".into(),
        "--kernel".into(),
        guest.kernel.into(),
        "--initramfs".into(),
        guest.initramfs.into(),
        "--cmdline".into(),
        words.into(),
        "--memory".into(),
        MEMORY.into(),
        "--net".into(),
        format!("tap={TAP},mac={mac}").into(),
    ];
    let mut side =
        SideProcess::start_as(Path::new("ip"), "netns", Which::Primary, &directory, &arguments)
            .unwrap();
    // iperf3 ends its listening with each client and begins anew: it has time while others are asked.
    wait_servers(&lab, &mut side, &[5201, 7, 80, 22]);
    let snapshot = directory.join("snapshot");
    vmft::api_client::snapshot(&side.api(), &snapshot).unwrap();
    side.kill().unwrap();
    snapshot
}

/// Starts the saved guest on one of the lab's hosts.
pub fn start_restored(
    lab: &Lab,
    which: Which,
    subcommand: &str,
    directory: &Path,
    arguments: &[OsString],
) -> SideProcess {
    let mut all: Vec<OsString> = vec!["--restore".into(), booted().into()];
    all.extend_from_slice(arguments);
    start_side(lab, which, subcommand, directory, &all)
}

/// True if a server at the guest's port takes a connection, and has seen its end: one of which it has not
/// would be open for ever in a guest that is saved now.
fn serves(lab: &Lab, port: u16) -> bool {
    lab.within(Place::Client, || {
        let address = format!("{GUEST}:{port}").parse().unwrap();
        let limit = Duration::from_secs(5);
        let Ok(mut stream) = TcpStream::connect_timeout(&address, limit) else { return false };
        stream.set_read_timeout(Some(limit)).unwrap();
        let ended = stream.shutdown(Shutdown::Write);
        ended.and_then(|()| stream.read_to_end(&mut Vec::new())).is_ok()
    })
}

/// Waits until the servers of the guest at these ports answer.
pub fn wait_servers(lab: &Lab, side: &mut SideProcess, ports: &[u16]) {
    let deadline = Instant::now() + LIMIT;
    for port in ports {
        while !serves(lab, *port) {
            assert!(side.try_exit().unwrap().is_none(), "the side ended: {}", side.messages());
            assert!(Instant::now() < deadline, "port {port} of the guest: {}", side.messages());
        }
    }
}

/// How a pair is set up.
#[derive(Debug, Clone)]
pub struct Setup {
    pub log: LogLink,
    /// More for both sides.
    pub both: Vec<&'static str>,
    /// More for the backup.
    pub backup: Vec<&'static str>,
}

impl Default for Setup {
    fn default() -> Self {
        Self { log: LogLink::Cable, both: Vec::new(), backup: Vec::new() }
    }
}

/// A pair under test, with its lab.
#[derive(Debug)]
pub struct Pair {
    pub primary: SideProcess,
    pub backup: SideProcess,
    pub lab: Lab,
    pub directory: TempDir,
    /// Whatever must last as long as the pair.
    _turn: MutexGuard<'static, ()>,
}

impl Pair {
    /// Starts a pair; it is protected when this returns.
    pub fn start(setup: &Setup) -> Self {
        Self::start_in(setup, |_| ())
    }

    /// Starts a pair in a lab that `prepare` has seen before.
    pub fn start_in(setup: &Setup, prepare: impl FnOnce(&Lab)) -> Self {
        let turn = turn();
        let lab = Lab::new(setup.log);
        prepare(&lab);
        let directory = tempfile::tempdir().unwrap();
        // Each side reaches the storage by a way of its own, which can be cut.
        let storage = directory.path().join("storage");
        std::fs::create_dir(&storage).unwrap();
        for side in ["a", "b"] {
            symlink(&storage, directory.path().join(side)).unwrap();
        }
        let arbiter =
            |side: &str| ["--arbiter".into(), prefixed("dir=", &directory.path().join(side))];
        let mut arguments: Vec<OsString> =
            vec!["--insecure".into(), "--listen".into(), format!("tcp:{LOG_A}:7000").into()];
        arguments.extend(setup.both.iter().map(Into::into));
        arguments.extend(arbiter("a"));
        let mut primary =
            start_restored(&lab, Which::Primary, "primary", directory.path(), &arguments);
        primary.wait_status(LIMIT, |status| status.listening.is_some()).unwrap();
        let mut arguments: Vec<OsString> =
            vec!["--insecure".into(), "--primary".into(), format!("tcp:{LOG_A}:7000").into()];
        arguments.extend(setup.both.iter().chain(&setup.backup).map(Into::into));
        arguments.extend(arbiter("b"));
        let mut backup = start_side(&lab, Which::Backup, "backup", directory.path(), &arguments);
        backup.wait_status(LIMIT, |status| status.role == Role::Backup).unwrap();
        primary.wait_status(LIMIT, |status| status.role == Role::Primary).unwrap();
        Self { primary, backup, lab, directory, _turn: turn }
    }

    /// A side.
    pub fn side(&mut self, which: Which) -> &mut SideProcess {
        match which {
            Which::Primary => &mut self.primary,
            Which::Backup => &mut self.backup,
        }
    }

    /// Waits until a side has a role.
    pub fn wait_role(&mut self, which: Which, role: Role) -> SideStatus {
        self.side(which).wait_status(LIMIT, |status| status.role == role).unwrap()
    }

    /// Kills a side as a power failure would, and waits until the other runs alone.
    pub fn kill(&mut self, which: Which) -> SideStatus {
        self.side(which).kill().unwrap();
        self.wait_role(which.other(), Role::Alone)
    }

    pub fn signal(&mut self, which: Which, signal: Signal) {
        self.side(which).signal(signal).unwrap();
    }

    /// Cuts a side's way to the storage, or mends it.
    pub fn set_storage(&self, which: Which, reachable: bool) {
        let name = if which == Which::Primary { "a" } else { "b" };
        let (here, away) = (self.directory.path().join(name), self.directory.path().join("away"));
        let away = away.with_extension(name);
        let (from, to) = if reachable { (&away, &here) } else { (&here, &away) };
        std::fs::rename(from, to).unwrap();
    }

    /// A client's program.
    pub fn client(&self, program: &str) -> Command {
        self.lab.command(Place::Client, program)
    }

    /// What everybody says, for a failure's message.
    pub fn report(&self) -> String {
        format!("primary:\n{}backup:\n{}", self.primary.messages(), self.backup.messages())
    }
}

/// Bytes of the guest's pattern.
pub fn pattern(len: usize) -> impl Iterator<Item = u8> {
    const LINE: &[u8] = b"vmft: 0123456789 abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ\n";
    LINE.iter().copied().cycle().take(len)
}

/// Reads a child's output to its end.
pub fn read_all(mut from: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).unwrap();
    bytes
}
