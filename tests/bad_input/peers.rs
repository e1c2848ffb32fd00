//! Strangers at a primary's port, and backups that do not fit: the primary goes on.

use crate::harness::{Place, Running, assert_refused, run, strings};
use nix::sys::signal::Signal;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;
use vmft_fuzzing::Random;
use vmft_log::entry::Generation;
use vmft_logging_channel::fingerprint::{Fingerprint, Identity};
use vmft_logging_channel::frame::{Frame, PROTOCOL_VERSION};
use vmft_logging_channel::handshake::{Hello, Nonce, Role};
use vmft_logging_channel::session::SessionId;

const SEED: u64 = 0x0BAD_9EE5;
/// How long a test waits for the primary's answer.
const ANSWER: Duration = Duration::from_secs(30);

fn hello(pair: &str) -> Vec<u8> {
    let identity = Identity {
        pair: pair.parse().unwrap(),
        generation: Generation(1),
        fingerprint: Fingerprint::new().with("engine", "soft"),
    };
    let hello = Hello { role: Role::Backup, identity, nonce: Nonce([7; 16]) };
    Frame::Hello(hello).encode(SessionId::HANDSHAKE).unwrap().seal()
}

/// Connects, sends, says that nothing follows, and reads what comes to its end.
fn knock(address: &str, bytes: &[u8]) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(ANSWER)).unwrap();
    // The primary may close before it has taken everything.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
}

fn unprotected(place: &Place) -> (Running, String) {
    let mut primary = place.primary(&["--no-wait"]);
    let address = primary.address();
    place.wait_console_grows("primary.console");
    (primary, address)
}

#[test]
fn strangers_of_every_kind_leave_the_primary_and_its_guest_alone() {
    let place = Place::new();
    let (mut primary, address) = unprotected(&place);
    let arbiter = fs::read_dir(place.path("disk.vmft")).unwrap().count();
    let hello = hello("another-pair");

    // One that stalls in the middle of its hello, and one that says nothing at all.
    let mut stalled = TcpStream::connect(&address).unwrap();
    stalled.write_all(&hello[..hello.len() / 2]).unwrap();
    let _silent = TcpStream::connect(&address).unwrap();

    let mut seeded = Random::new(SEED);
    for _ in 0..20 {
        let garbage: Vec<u8> = (0..seeded.index(5000)).map(|_| seeded.index(256) as u8).collect();
        knock(&address, &garbage);
        knock(&address, &hello[..seeded.index(hello.len())]);
        let mut damaged = hello.clone();
        damaged[seeded.index(hello.len())] ^= 1 << seeded.index(8);
        knock(&address, &damaged);
    }
    primary.wait_says("does not speak this protocol");
    knock(&address, b"GET / HTTP/1.1\r\n\r\n");
    knock(&address, &[hello.clone(), hello.clone()].concat());
    primary.wait_says("belongs to pair");
    let mut newer = hello.clone();
    newer[3] = PROTOCOL_VERSION + 1;
    knock(&address, &newer);
    primary.wait_says("run the same vmft on both sides");

    primary.assert_runs();
    place.wait_console_grows("primary.console");
    assert_eq!(fs::read_dir(place.path("disk.vmft")).unwrap().count(), arbiter);
    for line in primary.messages().lines() {
        assert!(line.starts_with("vmft: "), "{line}");
    }
    place.assert_disk_unchanged();
    primary.assert_stops_cleanly(Signal::SIGINT);
}

#[test]
fn a_backup_of_another_machine_or_another_pair_is_refused_and_the_primary_goes_on() {
    let place = Place::new();
    let (mut primary, address) = unprotected(&place);
    fs::write(place.path("small"), vec![0; 4096]).unwrap();
    let backup = |disk: &str, arbiter: &str| {
        let words = ["backup", "--serial", "null", "--connect-timeout", "0", "--primary"];
        let disk = ["--disk", &format!("path={}", place.text(disk))].map(str::to_owned);
        let arbiter = ["--arbiter", &format!("dir={}", place.text(arbiter))].map(str::to_owned);
        let peer = vec![format!("tcp:{address}")];
        run([strings(&words), peer, disk.to_vec(), arbiter.to_vec()].concat())
    };
    let other_size = backup("small", "disk.vmft");
    // Somebody without a certificate hears that he is refused; the primary's operator hears why.
    assert_refused(&other_size, &["its log says why", "the primary's own disks"]);
    primary.wait_says("disk 0 is \"65536 bytes, writable\" on the primary and \"4096 bytes");

    fs::create_dir(place.path("other.vmft")).unwrap();
    fs::write(place.path("other.vmft/pair"), "other-pair").unwrap();
    let other_pair = backup("disk", "other.vmft");
    assert_refused(&other_pair, &["its log says why", "the primary's own disks"]);
    primary.wait_says("and the backup to pair other-pair");
    assert_eq!(fs::read_dir(place.path("other.vmft")).unwrap().count(), 1);

    fs::write(place.path("other.vmft/pair"), "no name\n").unwrap();
    assert_refused(&backup("disk", "other.vmft"), &["other.vmft is damaged", "remove"]);
    assert_refused(&backup("disk", "none.vmft"), &["none.vmft", "start the primary first"]);
    assert!(!place.path("none.vmft").exists());

    primary.assert_runs();
    place.wait_console_grows("primary.console");
    place.assert_disk_unchanged();
    primary.assert_stops_cleanly(Signal::SIGINT);
}

#[test]
fn a_backup_on_a_copy_of_the_storage_is_refused_and_leaves_nothing_there() {
    let place = Place::new();
    let (mut primary, address) = unprotected(&place);
    fs::create_dir_all(place.path("copy/disk.vmft")).unwrap();
    for name in ["disk", "disk.vmft/pair", "disk.vmft/lock"] {
        fs::copy(place.path(name), place.path(&format!("copy/{name}"))).unwrap();
    }
    let backup = |disk: &str, arbiter: &str| {
        let words = ["backup", "--serial", "null", "--connect-timeout", "0", "--primary"];
        let disk = ["--disk", &format!("path={}", place.text(disk))].map(str::to_owned);
        let arbiter = ["--arbiter", &format!("dir={}", place.text(arbiter))].map(str::to_owned);
        let peer = vec![format!("tcp:{address}")];
        run([strings(&words), peer, disk.to_vec(), arbiter.to_vec()].concat())
    };
    let files = |arbiter: &str| fs::read_dir(place.path(arbiter)).unwrap().count();
    let before = files("disk.vmft");
    // Without TLS only the primary's log has what differs.
    for arbiter in ["disk.vmft", "copy/disk.vmft"] {
        let told = ["its log says why", "name the primary's own disks and arbiter"];
        assert_refused(&backup("copy/disk", arbiter), &told);
    }
    primary.wait_says("disk 0 image");
    let told = ["arbiter is not the primary's", "copy", "both"];
    assert_refused(&backup("disk", "copy/disk.vmft"), &told);
    assert_eq!((files("disk.vmft"), files("copy/disk.vmft")), (before, 2));
    primary.assert_runs();
    place.wait_console_grows("primary.console");
    place.assert_disk_unchanged();
    primary.assert_stops_cleanly(Signal::SIGINT);
}

#[test]
fn a_disk_and_an_arbiter_of_a_living_pair_are_refused_to_others() {
    let place = Place::new();
    let (mut primary, _) = unprotected(&place);
    let before = fs::read_dir(place.path("disk.vmft")).unwrap().count();
    for command in [&["run"][..], &["primary", "--listen", "tcp:127.0.0.1:0"]] {
        let words = [strings(command), strings(&["--serial", "null"]), place.machine()].concat();
        assert_refused(&run(words), &["/disk is used by another machine", "stop that one"]);
    }
    fs::write(place.path("other"), vec![0; 4096]).unwrap();
    let words = strings(&["primary", "--listen", "tcp:127.0.0.1:0", "--serial", "null"]);
    let disk = ["--disk", &format!("path={}", place.text("other"))].map(str::to_owned);
    let arbiter = ["--arbiter", &format!("dir={}", place.text("disk.vmft"))].map(str::to_owned);
    let output = run([words, place.probe(), disk.to_vec(), arbiter.to_vec()].concat());
    assert_refused(&output, &["disk.vmft is used by another pair", "an arbiter of its own"]);
    assert_eq!(fs::read_dir(place.path("disk.vmft")).unwrap().count(), before);
    primary.assert_runs();
    place.wait_console_grows("primary.console");
    place.assert_disk_unchanged();
}

#[test]
fn a_primary_that_is_none_is_refused_by_its_backup_in_time() {
    let place = Place::new();
    let (_primary, _) = unprotected(&place);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap());
    let answer = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let words = strings(&["backup", "--serial", "null", "--primary", &address]);
    let output = run([words, place.disk()].concat());
    assert_refused(&output, &["does not speak this protocol", "--primary"]);
    answer.join().unwrap();
    place.assert_disk_unchanged();
}
