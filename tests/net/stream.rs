//! The guest on `passt`: a network for a user without privileges, port forwarding included.

use crate::lab::{self, CLIENT, Lab, LogLink, Place, run};
use crate::stage::{LIMIT, pattern, turn};
use std::ffi::OsString;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Instant;
use vmft::pair::{SideProcess, Which, prefixed};
use vmft_guest_images::Workload;

/// A process that is killed when dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_guest_on_passt_gets_an_address_and_serves_a_forwarded_port() {
    if lab::is_missing() {
        return;
    }
    let _turn = turn();
    let lab = Lab::new(LogLink::Cable);
    lab.ip(Place::HostA, "address add 10.99.0.9/24 dev br0");
    lab.ip(Place::HostA, &format!("route add default via {CLIENT}"));
    let directory = tempfile::tempdir().unwrap();
    // passt lays its privileges down, and is to make its socket there.
    run("chmod", &["0777", directory.path().to_str().unwrap()]);
    let socket = directory.path().join("passt.sock");
    let mut passt = lab.command(Place::HostA, "passt");
    passt.args(["--foreground", "--quiet", "-t", "8080:80", "-i", "br0", "--socket"]).arg(&socket);
    let log = directory.path().join("passt.log");
    let messages = std::fs::File::create(&log).unwrap();
    let passt = Killed(passt.stderr(messages).stdout(Stdio::null()).spawn().unwrap());
    let deadline = Instant::now() + LIMIT;
    while !socket.exists() {
        let said = std::fs::read_to_string(&log).unwrap();
        assert!(Instant::now() < deadline, "passt makes no socket: {said}");
        std::thread::yield_now();
    }
    let arguments: Vec<OsString> = vec![
        "exec".into(),
        lab.name(Place::HostA).into(),
        env!("CARGO_BIN_EXE_vmft").into(),
        "run".into(),
        "--memory".into(),
        "size=96M".into(),
        "--cmdline".into(),
        Workload::Idle.cmdline().into(),
        "--net".into(),
        prefixed("socket=", &socket),
    ];
    let mut side = SideProcess::start_as(
        Path::new("ip"),
        "netns",
        Which::Primary,
        directory.path(),
        &arguments,
    )
    .unwrap();
    const BODY: usize = 1 << 20;
    let url = format!("http://10.99.0.9:8080/cgi-bin/pattern?{BODY}");
    let body = loop {
        let output = lab.command(Place::Client, "curl").args(["-sS", &url]).output().unwrap();
        if output.status.success() && output.stdout.len() == BODY {
            break output.stdout;
        }
        assert!(side.try_exit().unwrap().is_none(), "{}", side.messages());
        let said = std::fs::read_to_string(&log).unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(Instant::now() < deadline, "{error}\n{}\n{said}", side.messages());
    };
    assert!(body.into_iter().eq(pattern(BODY)), "other bytes than were sent");
    drop(passt);
}
