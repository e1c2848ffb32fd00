//! A run with traffic, recorded and replayed: the same on a machine without any network.

use crate::echo::Echo;
use crate::lab::{self, GUEST, Lab, LogLink, Place};
use crate::stage::{LIMIT, start_restored, turn, wait_servers};
use std::process::Command;
use vmft::pair::Which;

#[test]
fn traffic_in_both_directions_replays_to_the_same_digests_without_a_network() {
    if lab::is_missing() {
        return;
    }
    let _turn = turn();
    let lab = Lab::new(LogLink::Cable);
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("traffic.log");
    let arguments = ["--log".into(), log.clone().into()];
    let mut side = start_restored(&lab, Which::Primary, "record", directory.path(), &arguments);
    wait_servers(&lab, &mut side);
    let echo = Echo::start(&lab);
    // Both at once: a server that is still busy with one test takes no other.
    let mut iperf = lab.command(Place::Client, "iperf3");
    let output = iperf.args(["-c", GUEST, "-t", "2", "--bidir"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    echo.wait(20);
    echo.finish();
    let traffic = side.status().unwrap().network.unwrap();
    assert!(traffic.sent > 100 && traffic.received > 100, "{traffic:?}");
    vmft::api_client::shutdown(&side.api()).unwrap();
    assert!(side.wait_exit(LIMIT).unwrap().success(), "{}", side.messages());
    let mut replay = Command::new(env!("CARGO_BIN_EXE_vmft"));
    let output = replay.arg("replay").arg(&log).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
}
