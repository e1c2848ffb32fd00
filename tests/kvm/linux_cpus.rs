//! Guests of several CPUs: an unmodified Debian kernel on the host's KVM, where the doctor says that it can
//! run; and what is refused everywhere.

use crate::engines::{kvm_is_here, said, take_turn, vmft};
use crate::linux::{LIMIT, assert_clean, obstacle, read_until, start};
use std::ffi::OsString;
use vmft::pair::prefixed;
use vmft_backup::status::Role;
use vmft_guest_images::disk::{DiskSize, make_disk};
use vmft_guest_images::workload::{SHELL_PROMPT, Workload};

/// Two loops at once; the guest says how many CPUs it has, and how many of them have run programs since.
const WORK: &[u8] = b"spin() { n=0; while [ $n -lt 8000 ]; do n=$((n+1)); done; }; \
    spin & spin & wait; echo cpus $(nproc) at wo''rk $(awk '/^cpu[0-9]/ && $2 > 4' /proc/stat | wc -l)\n";

/// What the guest reads the time from.
const CLOCK: &[u8] =
    b"echo clo''ck $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)\n";

#[test]
fn an_unmodified_linux_with_two_cpus_works_on_both_is_restored_from_a_snapshot_and_switches_off() {
    if !kvm_is_here() || obstacle().is_some() {
        return;
    }
    let _turn = take_turn();
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("disk.img");
    make_disk(&disk, DiskSize::DEMO, "vmft-test").unwrap();
    let cmdline = Workload::Shell.cmdline() + " quiet";
    let words = ["--engine", "kvm", "--cpus", "boot=2", "--cmdline", &cmdline, "--disk"];
    let mut words: Vec<OsString> = words.iter().map(OsString::from).collect();
    words.push(prefixed("path=", &disk));
    let (mut side, mut console) = start(directory.path(), &words, 0);
    read_until(&mut console, SHELL_PROMPT);
    console.type_in(WORK);
    read_until(&mut console, "cpus 2 at work 2");
    console.type_in(CLOCK);
    read_until(&mut console, "clock acpi_pm");
    let snapshot = directory.path().join("snapshot");
    vmft::api_client::snapshot(&side.api(), &snapshot).unwrap();
    side.kill().unwrap();
    side.wait_exit(LIMIT).unwrap();

    let place = directory.path().join("restored");
    std::fs::create_dir(&place).unwrap();
    let refused =
        vmft(
            ["run".into(), "--engine".into(), "soft".into(), "--restore".into()].into_iter().chain(
                [snapshot.clone().into_os_string(), "--disk".into(), prefixed("path=", &disk)],
            ),
        );
    assert!(!refused.status.success());
    let text = said(&refused);
    assert!(text.contains("2 CPUs need --engine kvm"), "{text}");
    let state = std::fs::read(snapshot.join("state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_slice(&state).unwrap();
    let shown = state["console_offset"].as_u64().unwrap();
    let words = ["--restore".into(), snapshot.into(), "--disk".into(), prefixed("path=", &disk)];
    let (mut side, mut console) = start(&place, &words, shown);
    // Keys that come before the guest is live are nobody's.
    side.wait_status(LIMIT, |status| status.role == Role::Unprotected).unwrap();
    console.type_in(b"echo again $((6 * 7)) of $(nproc)\n");
    read_until(&mut console, "again 42 of 2");
    console.type_in(b"poweroff\n");
    assert!(side.wait_exit(LIMIT).unwrap().success(), "{}", side.messages());
    assert_clean(&disk);
}

#[test]
fn several_cpus_are_refused_wherever_a_guest_is_to_be_replayed() {
    let kernel = ["--kernel", "/nonexistent", "--serial", "null", "--cpus", "boot=2"];
    let refuse = |words: &[&str], says: &[&str]| {
        let output = vmft(words.iter().chain(&kernel));
        let text = said(&output);
        assert!(!output.status.success(), "{words:?}");
        assert!(says.iter().all(|word| text.contains(word)), "{words:?}: {text}");
    };
    let free = ["2 CPUs need --engine kvm", "--protect checkpoint"];
    refuse(&["run"], &free);
    refuse(&["run", "--engine", "soft"], &free);
    for points in ["exit", "step", "pmu"] {
        refuse(&["run", "--engine", "kvm", "--points", points], &free);
    }
    let replayed = ["cannot be replayed", "--engine kvm --protect checkpoint"];
    refuse(&["record", "--engine", "kvm", "--log", "/nonexistent/log"], &replayed);
    let listen = ["primary", "--listen", "tcp:127.0.0.1:0", "--arbiter", "dir=/nonexistent/x"];
    refuse(&listen, &replayed);
    refuse(&[&listen[..], &["--engine", "kvm"]].concat(), &replayed);
    refuse(&[&listen[..], &["--protect", "checkpoint"]].concat(), &free);
}
