//! Faults planted on a backup on `kvm`: one that diverges is mended, and one that is far behind goes on from a
//! checkpoint; both take over.

use crate::checkpoints::{LIMIT, read_until, start};
use crate::engines::{Engine, expected, held_probe, take_turn, write_probe};
use std::ffi::OsString;
use std::path::Path;
use vmft::pair::{PairConsole, SideProcess, Which, prefixed};
use vmft_backup::fault::{Fault, FaultOrder};
use vmft_backup::status::{Role, SideStatus};

/// Lines of this guest: a digest comes every seventy or so.
const LINES: u32 = 500;
/// Memory of the guest that the probe leaves alone.
const SPARE: u64 = 0x300_0000;

/// A probe at exit points, and the backup that follows it.
struct Followed {
    primary: SideProcess,
    backup: SideProcess,
    console: PairConsole,
    text: String,
}

impl Followed {
    fn start(directory: &Path, more: &[&str]) -> Self {
        let arbiter = ["--arbiter".into(), prefixed("dir=", &directory.join("arbiter"))];
        let both = || arbiter.iter().cloned().chain(more.iter().map(OsString::from));
        // It ends when its primary has.
        let kernel = write_probe(directory, &held_probe(LINES, 1_000, [LINES - 20, 0]));
        let mut words =
            vec!["--memory".into(), "size=64M".into(), "--kernel".into(), kernel.into()];
        words.extend(Engine::KvmExit.options().iter().map(OsString::from));
        words.extend(["--no-wait".into(), "--listen".into(), "tcp:127.0.0.1:0".into()]);
        words.extend(both());
        let (mut primary, mut console, text) = start(directory, "primary", &words);
        let address = primary.status().unwrap().listening.unwrap();
        let words = ["--primary".into(), format!("tcp:{address}").into()];
        let words: Vec<OsString> = words.into_iter().chain(both()).collect();
        let program = Path::new(env!("CARGO_BIN_EXE_vmft"));
        let mut backup = SideProcess::start(program, Which::Backup, directory, &words).unwrap();
        console.attach(&mut backup).unwrap();
        primary.wait_status(LIMIT, |status| status.role == Role::Primary).unwrap();
        backup.wait_status(LIMIT, |status| status.role == Role::Backup).unwrap();
        Self { primary, backup, console, text }
    }

    fn plant(&self, fault: Fault) {
        vmft::api_client::fault(&self.backup.api(), FaultOrder { fault, live: false }).unwrap();
    }

    /// The primary is killed, and the guest ends on the backup. What that says once it is live.
    fn kill_and_finish(mut self) -> SideStatus {
        self.primary.kill().unwrap();
        let live = self.backup.wait_status(LIMIT, |status| status.role == Role::Alone).unwrap();
        self.console.type_in(b"\n");
        read_until(&mut self.console, &mut self.text, "vmft-done\r\n");
        assert_eq!(self.text, expected(LINES), "{}", self.backup.messages());
        let exit = self.backup.wait_exit(LIMIT).unwrap();
        assert!(exit.success(), "{}", self.backup.messages());
        assert_eq!(self.console.merger().missing(), 0);
        live
    }
}

#[test]
fn a_backup_at_exit_points_that_diverges_is_mended_and_takes_over() {
    if !Engine::KvmExit.is_here() {
        return;
    }
    let _turn = take_turn();
    let directory = tempfile::tempdir().unwrap();
    let mut followed = Followed::start(directory.path(), &[]);
    followed.plant(Fault::FlipBit { address: SPARE, bit: 0 });
    let mended = |status: &SideStatus| status.divergences_mended == 1;
    for side in [&mut followed.backup, &mut followed.primary] {
        let status = side.wait_status(LIMIT, mended).unwrap();
        assert_eq!(status.divergence.unwrap().page, Some(SPARE));
    }
    let protected = |status: &SideStatus| status.role == Role::Primary;
    followed.primary.wait_status(LIMIT, protected).unwrap();
    followed.kill_and_finish();
}

#[test]
fn a_backup_at_exit_points_that_is_far_behind_goes_live_from_a_checkpoint() {
    if !Engine::KvmExit.is_here() {
        return;
    }
    let _turn = take_turn();
    let directory = tempfile::tempdir().unwrap();
    let more = ["--bound-replay", "50ms", "--max-lag", "60s"];
    let mut followed = Followed::start(directory.path(), &more);
    followed.plant(Fault::HoldReplay { ms: 600_000 });
    let behind = |status: &SideStatus| {
        status.channel.as_ref().is_some_and(|channel| channel.execution_lag_ms > 1_500.0)
    };
    followed.primary.wait_status(LIMIT, behind).unwrap();
    let live = followed.kill_and_finish();
    assert!(live.replay_skips > 0 && live.points_skipped > 0, "{live:?}");
    assert_eq!(live.divergences, 0, "{live:?}");
}
