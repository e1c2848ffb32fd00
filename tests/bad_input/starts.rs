//! Sides that must not start: nothing is changed on disk, and the arbiter is left alone.

use crate::harness::{Place, assert_refused, run, strings, vmft};
use nix::sys::signal::Signal;
use std::fs;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;

/// Runs a command on a fresh place, and asserts that it is refused and leaves everything as it was.
fn assert_start_refused(arguments: impl Fn(&Place) -> Vec<String>, says: &[&str]) {
    let place = Place::new();
    fs::write(place.path("text"), "#!/bin/sh\necho no kernel\n").unwrap();
    fs::write(place.path("large"), vec![0; 60 << 20]).unwrap();
    fs::write(place.path("odd"), vec![0; 1000]).unwrap();
    let before = place.listing();
    assert_refused(&run(arguments(&place)), says);
    assert_eq!(place.listing(), before, "something was left behind");
    place.assert_disk_unchanged();
}

fn with_kernel(place: &Place, command: &str, kernel: &str) -> Vec<String> {
    let words = ["--serial", "null", "--memory", "size=64M", "--kernel", &place.text(kernel)];
    [strings(&[command]), strings(&words), place.disk()].concat()
}

/// Words that make a command complete.
fn command(place: &Place, command: &str) -> Vec<String> {
    match command {
        "primary" => strings(&["--listen", "tcp:127.0.0.1:0"]),
        "record" => place.file("--log", "", "log"),
        _ => Vec::new(),
    }
}

#[test]
fn a_kernel_that_is_no_kernel_is_refused_by_every_command() {
    for name in ["run", "record", "primary"] {
        let start = |kernel: &'static str| {
            move |place: &Place| [with_kernel(place, name, kernel), command(place, name)].concat()
        };
        assert_start_refused(start("text"), &["/text", "not a 64-bit x86 Linux kernel", "bzImage"]);
        assert_start_refused(start("missing"), &["/missing", "No such file", "--kernel"]);
        assert_start_refused(start("."), &["Is a directory", "--kernel"]);
    }
}

#[test]
fn an_initramfs_too_large_for_the_memory_is_refused() {
    for name in ["run", "primary"] {
        let start = |place: &Place| {
            let initramfs = place.file("--initramfs", "", "large");
            [with_kernel(place, name, "kernel"), command(place, name), initramfs].concat()
        };
        assert_start_refused(start, &["/large", "62914560 bytes", "--memory"]);
    }
}

#[test]
fn a_missing_or_broken_disk_is_refused() {
    for name in ["run", "record", "primary", "backup"] {
        let start = |disk: &'static str| {
            move |place: &Place| {
                let disk = vec!["--disk".to_owned(), format!("path={}", place.text(disk))];
                let peer = strings(&["--primary", "tcp:127.0.0.1:1"]);
                let rest = if name == "backup" { peer } else { place.probe() };
                [strings(&[name, "--serial", "null"]), disk, rest, command(place, name)].concat()
            }
        };
        let remedy = if name == "backup" { "the primary uses" } else { "truncate" };
        assert_start_refused(start("missing"), &["/missing", "No such file", remedy]);
        assert_start_refused(start("odd"), &["/odd has 1000 bytes", "512", "truncate"]);
        assert_start_refused(start("."), &["Is a directory", "--disk"]);
    }
}

#[test]
fn a_command_line_that_makes_no_sense_is_refused_in_one_line() {
    let refused = |words: &[&str], says: &[&str]| {
        let output = run(words);
        assert_refused(&output, says);
        assert_eq!(output.status.code(), Some(2));
    };
    refused(&["run", "--cpus", "boot=5"], &["5 guest CPUs", "1 to 4"]);
    refused(&["run", "--memory", "size=63M"], &["at least 64M"]);
    refused(&["run", "--memory", "size=5G"], &["at most 4G"]);
    refused(&["run", "--memory", "256M"], &["no key=value"]);
    refused(&["run", "--disk", "path="], &["path"]);
    refused(&["run", "--serial", "pty"], &["tty, null, file=PATH, socket=PATH"]);
    refused(&["run", "--initramfs", "x"], &["--kernel"]);
    refused(&["run", "--restore", "x", "--memory", "size=64M"], &["--memory"]);
    refused(&["primary"], &["--listen", "vmft primary --help"]);
    refused(&["backup", "--primary", "somewhere:1"], &["tcp:HOST:PORT"]);
    refused(&["backup", "--connect-timeout", "99999999999999"], &["--connect-timeout"]);
    refused(&["nonsense"], &["nonsense", "vmft --help"]);
}

#[test]
fn a_log_file_that_cannot_be_written_is_refused_by_name() {
    let output = run(["--log-file", "/nonexistent/log", "tls-init", "/nonexistent/dir"]);
    assert_refused(&output, &["/nonexistent/log", "--log-file"]);
}

#[test]
fn a_port_in_use_is_refused_before_the_arbiter_is_touched() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", taken.local_addr().unwrap());
    let listen = strings(&["--listen", &address, "--serial", "null"]);
    let primary = |place: &Place| [strings(&["primary"]), listen.clone(), place.machine()].concat();
    assert_start_refused(primary, &[&address, "Address already in use", "--listen"]);
    let backup = |place: &Place| {
        let peer = strings(&["backup", "--primary", "tcp:127.0.0.1:1"]);
        [peer, listen.clone(), place.disk()].concat()
    };
    assert_start_refused(backup, &[&address, "Address already in use", "--listen"]);
}

#[test]
fn missing_certificates_are_refused_before_the_arbiter_is_touched() {
    let primary = |place: &Place| {
        let listen = format!("tcp:127.0.0.1:0,tls_dir={}", place.text("no-tls"));
        [strings(&["primary", "--serial", "null", "--listen", &listen]), place.machine()].concat()
    };
    assert_start_refused(primary, &["no-tls/ca.pem", "vmft keys"]);
}

#[test]
fn an_address_of_other_hosts_without_tls_is_refused_before_the_arbiter_is_touched() {
    let place = Place::new();
    let before = place.listing();
    let refused = |words: &[&str], machine: Vec<String>| {
        let words = [strings(words), strings(&["--serial", "null"]), machine].concat();
        assert_refused(&run(words), &["without TLS", "vmft keys", "--insecure"]);
    };
    for open in ["tcp:0.0.0.0:0", "tcp:[::]:0", "tcp:192.0.2.1:0"] {
        refused(&["primary", "--listen", open], place.machine());
        refused(&["backup", "--listen", open, "--primary", "tcp:127.0.0.1:1"], place.disk());
        refused(&["standby", "--listen", open, "--join", "tcp:127.0.0.1:1"], place.disk());
    }
    let away = "tcp:192.0.2.1:1";
    refused(&["backup", "--primary", away], place.disk());
    refused(&["standby", "--listen", "tcp:127.0.0.1:0", "--join", away], place.disk());
    assert_eq!(place.listing(), before, "something was left behind");
    place.assert_disk_unchanged();
}

#[test]
fn a_pair_without_a_writable_disk_needs_an_arbiter() {
    let primary = |place: &Place| {
        [strings(&["primary", "--serial", "null"]), command(place, "primary"), place.probe()]
            .concat()
    };
    assert_start_refused(primary, &["--arbiter dir=PATH"]);
    let unmounted = |place: &Place| {
        [primary(place), vec!["--arbiter".into(), format!("dir={}", place.text("no/such"))]]
            .concat()
    };
    assert_start_refused(unmounted, &["no/such", "No such file", "--arbiter"]);
}

#[test]
fn sockets_in_use_and_other_files_are_refused_and_left_alone() {
    for option in [("--serial", "socket="), ("--api-socket", "")] {
        let place = Place::new();
        let _taken = UnixListener::bind(place.path("taken")).unwrap();
        let before = place.listing();
        for command_name in ["run", "primary"] {
            let start = |name: &str| {
                let socket = place.file(option.0, option.1, name);
                let serial =
                    if option.0 == "--serial" { vec![] } else { strings(&["--serial", "null"]) };
                let words = [strings(&[command_name]), command(&place, command_name)].concat();
                run([words, place.machine(), serial, socket].concat())
            };
            assert_refused(&start("taken"), &["/taken", "in use", "stop that one"]);
            assert_refused(&start("disk"), &["/disk", "something else is there", option.0]);
            assert_refused(&start("no/such"), &["/no/such", option.0]);
            assert_eq!(place.listing(), before, "something was left behind");
            place.assert_disk_unchanged();
        }
    }
}

#[test]
fn a_console_file_in_a_missing_directory_is_refused() {
    for name in ["run", "record", "primary"] {
        let start = |place: &Place| {
            let serial = place.file("--serial", "file=", "no/such");
            [strings(&[name]), command(place, name), place.machine(), serial].concat()
        };
        assert_start_refused(start, &["no/such", "No such file", "--serial"]);
    }
}

#[test]
fn a_log_is_not_overwritten() {
    let place = Place::new();
    fs::write(place.path("log"), "precious").unwrap();
    let words = [strings(&["record", "--serial", "null"]), place.machine()].concat();
    let output = run([words, place.file("--log", "", "log")].concat());
    assert_refused(&output, &["/log", "not overwritten"]);
    assert_eq!(fs::read(place.path("log")).unwrap(), b"precious");
}

#[test]
fn what_is_no_snapshot_and_disks_of_another_size_are_refused() {
    let place = Place::new();
    let restore = |name: &str, more: &[String]| {
        let words = strings(&["run", "--serial", "null", "--restore", &place.text(name)]);
        run([words, more.to_vec()].concat())
    };
    fs::create_dir(place.path("empty")).unwrap();
    assert_refused(&restore("empty", &[]), &["empty/config.json", "vmft snapshot"]);
    assert_refused(&restore("missing", &[]), &["missing", "vmft snapshot"]);

    let api = place.file("--api-socket", "", "api");
    let console = place.file("--serial", "file=", "console");
    let words = [strings(&["run"]), place.machine(), console, api.clone()].concat();
    let running = place.start("run", &[words]);
    place.wait_console_grows("console");
    let snapshot = run([strings(&["snapshot"]), api, vec![place.text("snap")]].concat());
    assert!(snapshot.status.success(), "{}", String::from_utf8_lossy(&snapshot.stderr));
    assert_refused(&restore("snap", &place.disk()), &["/disk is used by another machine"]);
    running.assert_stops_cleanly(Signal::SIGTERM);

    assert_refused(&restore("snap", &[]), &["has 1 disks, 0 are given", "--disk"]);
    fs::write(place.path("grown"), vec![0; 128 << 10]).unwrap();
    let grown = vec!["--disk".to_owned(), format!("path={}", place.text("grown"))];
    assert_refused(&restore("snap", &grown), &["131072 bytes", "65536", "when the snapshot"]);
    fs::write(place.path("snap/config.json"), "{}").unwrap();
    assert_refused(&restore("snap", &place.disk()), &["config.json is damaged", "vmft snapshot"]);
    place.assert_disk_unchanged();
}

#[test]
fn without_a_package_manager_the_options_that_replace_it_are_named() {
    let place = Place::new();
    fs::create_dir(place.path("bin")).unwrap();
    let child = vmft(["run", "--serial", "null"])
        .env("PATH", place.path("bin"))
        .env("VMFT_CACHE", place.path("cache"))
        .output()
        .unwrap();
    assert_refused(&child, &["--kernel", "--initramfs", "apt-get"]);
}

#[test]
fn programs_that_nobody_answers_say_what_to_start() {
    let place = Place::new();
    for command in ["status", "stop"] {
        let output = run(strings(&[command, "--api-socket", &place.text("none")]));
        assert_refused(&output, &["/none", "--api-socket"]);
    }
    let output = run(strings(&["console", &place.text("none")]));
    assert_refused(&output, &["/none", "--serial socket="]);
}

#[test]
fn help_has_an_example_for_whoever_begins_with_it() {
    let long = |command: &str| String::from_utf8(run([command, "--help"]).stdout).unwrap();
    for command in [
        "demo",
        "run",
        "primary",
        "backup",
        "record",
        "replay",
        "status",
        "stop",
        "snapshot",
        "console",
        "dashboard",
    ] {
        let help = long(command);
        assert!(help.contains("Example"), "{command}: {help}");
        assert!(help.contains(&format!("vmft {command}")), "{command}: {help}");
        let wide = help.lines().find(|line| line.chars().count() > 100);
        assert_eq!(wide, None, "{command}");
    }
}
