//! The network of a guest on the host's KVM: an unmodified Debian kernel with `virtio_net`.

use crate::engines::{kvm_is_here, take_turn};
use crate::linux::{LIMIT, obstacle};
use crate::station::{NET, Station, WORDS};
use std::ffi::OsString;
use std::path::Path;
use vmft::pair::{SideProcess, Which, prefixed};
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
