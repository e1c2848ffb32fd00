//! The network of a guest on the host's KVM: an unmodified Debian kernel with `virtio_net`.

use crate::engines::{kvm_is_here, take_turn};
use crate::linux::{LIMIT, obstacle};
use crate::station::{NET, Station, WORDS};
use std::ffi::OsString;
use std::path::Path;
use vmft::pair::{SideProcess, Which, prefixed};
use vmft_backup::status::{Role, SideStatus};
use vmft_guest_images::workload::Workload;

#[test]
fn an_unmodified_linux_on_kvm_answers_its_network_with_every_byte() {
    if !kvm_is_here() || obstacle().is_some() {
        return;
    }
    let _turn = take_turn();
    let directory = tempfile::tempdir().unwrap();
    let wire = directory.path().join("wire");
    let mut station = Station::listen(&wire);
    let mut net = prefixed("socket=", &wire);
    net.push(format!(",{NET}"));
    let words = format!("{} {WORDS}", Workload::Idle.cmdline());
    let mut arguments: Vec<OsString> = ["--engine", "kvm", "--cmdline"].map(Into::into).into();
    arguments.extend([words.into(), "--net".into(), net]);
    let program = Path::new(env!("CARGO_BIN_EXE_vmft"));
    let side = SideProcess::start_as(program, "run", Which::Primary, directory.path(), &arguments)
        .unwrap();
    for number in 1..=30 {
        let answered = station.ping(number, 1 + usize::from(number) * 48, LIMIT);
        assert!(answered, "question {number}: {}", side.messages());
    }
    let counts = side.status().unwrap().network.unwrap();
    assert!(counts.sent >= 30 && counts.received >= 30, "{counts:?}");
}

/// A pair whose guest answers pings; its primary is killed, and the guest answers on. Both sides name the
/// same socket, which only the live one opens.
fn answers_on(options: &[&str], both: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let wire = directory.path().join("wire");
    let mut station = Station::listen(&wire);
    let program = Path::new(env!("CARGO_BIN_EXE_vmft"));
    let start = |which: Which, words: &[&str]| {
        let mut net = prefixed("socket=", &wire);
        net.push(format!(",{NET}"));
        let mut all: Vec<OsString> = words.iter().chain(both).map(Into::into).collect();
        all.extend(["--listen", "tcp:127.0.0.1:0", "--suspect-after", "5000"].map(Into::into));
        let arbiter = prefixed("dir=", &directory.path().join("arbiter"));
        all.extend(["--net".into(), net, "--arbiter".into(), arbiter]);
        SideProcess::start(program, which, directory.path(), &all).unwrap()
    };
    let command_line = format!("{} {WORDS}", Workload::Idle.cmdline());
    let words = ["--engine", "kvm", "--no-wait", "--memory", "size=96M", "--cmdline"];
    let words: Vec<&str> = words.iter().chain(options).copied().collect();
    let at = words.len() - options.len();
    let mut words = words;
    words.insert(at, &command_line);
    let mut primary = start(Which::Primary, &words);
    assert!(station.ping(1, 100, LIMIT), "{}", primary.messages());
    let status = primary.wait_status(LIMIT, |status| status.listening.is_some()).unwrap();
    let address = format!("tcp:{}", status.listening.unwrap());
    let mut backup = start(Which::Backup, &["--primary", &address]);
    primary.wait_status(LIMIT, |status| status.role == Role::Primary).unwrap();
    for number in 2..=12 {
        assert!(station.ping(number, 1_000, LIMIT), "{}{}", primary.messages(), backup.messages());
    }
    primary.kill().unwrap();
    for number in 13..=24 {
        assert!(station.ping(number, 1_000, LIMIT), "question {number}: {}", backup.messages());
    }
    let live = |status: &SideStatus| status.role == Role::Alone;
    let status = backup.wait_status(LIMIT, live).unwrap();
    assert_eq!((status.generation, status.divergence), (2, None), "{}", backup.messages());
    assert!(status.network.unwrap().sent >= 12);
}

#[test]
fn an_unmodified_linux_on_kvm_answers_on_when_its_primary_is_killed() {
    if kvm_is_here() && obstacle().is_none() {
        let _turn = take_turn();
        answers_on(&[], &["--protect", "checkpoint,interval=100ms"]);
    }
}

#[test]
#[ignore = "needs a KVM that runs Linux, and the lockstep kernel: scripts/stock-kvm"]
fn the_lockstep_kernel_on_kvm_answers_on_when_its_primary_is_killed() {
    let _turn = take_turn();
    answers_on(&["--lockstep-kernel", "--points", "exit"], &[]);
}
