//! A backup on `kvm` that is made to diverge is mended, and takes over.

use crate::checkpoints::{LIMIT, read_until, start};
use crate::engines::{Engine, expected, probe, take_turn, write_probe};
use std::ffi::OsString;
use std::path::Path;
use vmft::pair::{SideProcess, Which, prefixed};
use vmft_backup::fault::{Fault, FaultOrder};
use vmft_backup::status::{Role, SideStatus};

/// Lines of this guest: a digest comes every seventy or so.
const LINES: u32 = 500;
/// Memory of the guest that the probe leaves alone.
const SPARE: u64 = 0x300_0000;

#[test]
fn a_backup_at_exit_points_that_diverges_is_mended_and_takes_over() {
    let engine = Engine::KvmExit;
    if !engine.is_here() {
        return;
    }
    let _turn = take_turn();
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let arbiter = ["--arbiter".into(), prefixed("dir=", &directory.join("arbiter"))];
    let kernel = write_probe(directory, &probe(LINES, 1_000));
    let mut words = vec!["--memory".into(), "size=64M".into(), "--kernel".into(), kernel.into()];
    words.extend(engine.options().iter().map(OsString::from));
    words.extend(["--no-wait".into(), "--listen".into(), "tcp:127.0.0.1:0".into()]);
    words.extend(arbiter.clone());
    let (mut primary, mut console, mut text) = start(directory, "primary", &words);
    let address = primary.status().unwrap().listening.unwrap();
    let words = ["--primary".into(), format!("tcp:{address}").into()];
    let words: Vec<OsString> = words.into_iter().chain(arbiter).collect();
    let program = Path::new(env!("CARGO_BIN_EXE_vmft"));
    let mut backup = SideProcess::start(program, Which::Backup, directory, &words).unwrap();
    console.attach(&mut backup).unwrap();
    primary.wait_status(LIMIT, |status| status.role == Role::Primary).unwrap();
    backup.wait_status(LIMIT, |status| status.role == Role::Backup).unwrap();

    let fault = Fault::FlipBit { address: SPARE, bit: 0 };
    vmft::api_client::fault(&backup.api(), FaultOrder { fault, live: false }).unwrap();
    let mended = |status: &SideStatus| status.divergences_mended == 1;
    for side in [&mut backup, &mut primary] {
        let status = side.wait_status(LIMIT, mended).unwrap();
        assert_eq!(status.divergence.unwrap().page, Some(SPARE));
    }
    primary.wait_status(LIMIT, |status| status.role == Role::Primary).unwrap();
    primary.kill().unwrap();
    read_until(&mut console, &mut text, "vmft-done\r\n");
    assert_eq!(text, expected(LINES), "{}", backup.messages());
    assert!(backup.wait_exit(LIMIT).unwrap().success(), "{}", backup.messages());
    assert_eq!(console.merger().missing(), 0);
}
