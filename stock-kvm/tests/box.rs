//! The box, started as users start it. What a command does in it is what comes out of it.

use kvm_ioctls::{Cap, Kvm};
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};

/// Time limit of a box that is expected to end by itself, in seconds.
const LONG: &str = "240";

fn stock_kvm(words: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_stock-kvm");
    let output = Command::new(program).args(words).output().expect("cargo has built it");
    eprintln!("{}", String::from_utf8_lossy(&output.stderr));
    output
}

#[test]
fn output_passes_byte_for_byte_and_so_does_the_exit_status() {
    let octal: String = (0..=255).map(|byte| format!("\\{byte:03o}")).collect();
    // Four thousand times all bytes: longer than any buffer on the way.
    let script = format!(
        "printf '{octal}' >/tmp/a; for doubling in 1 2 3 4 5 6 7 8 9 10 11 12; do \
         cat /tmp/a /tmp/a >/tmp/b; mv /tmp/b /tmp/a; done; \
         cat /tmp/a; printf 'no\\r\\nend\\0' >&2; exit 3"
    );
    let output = stock_kvm(&["--timeout", LONG, "sh", "-c", &script]);
    assert_eq!(output.status.code(), Some(3));
    let all: Vec<u8> = (0..=255).collect();
    assert!(output.stdout == all.repeat(4096), "{} bytes came out", output.stdout.len());
    assert!(output.stderr.ends_with(b"no\r\nend\0"));
}

#[test]
fn a_signal_is_told_and_what_a_command_leaves_running_holds_nothing_up() {
    // Also a file that is brought in, from a directory that the box has too.
    let mut script = tempfile::NamedTempFile::new().unwrap();
    script.write_all(b"sleep 100000 & kill -9 $$\n").unwrap();
    let path = script.path().to_str().unwrap();
    let output = stock_kvm(&["--timeout", LONG, "--with", path, "sh", path]);
    assert_eq!(output.status.code(), Some(128 + 9));
    assert!(String::from_utf8_lossy(&output.stderr).contains("sh was ended by signal 9"));
}

#[test]
fn a_panic_of_the_boxs_kernel_is_the_boxs_failure_and_shown() {
    let script = "echo before; echo c >/proc/sysrq-trigger";
    let output = stock_kvm(&["--timeout", LONG, "sh", "-c", script]);
    assert_eq!(output.status.code(), Some(125));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("the box ended before the command did"));
    assert!(errors.contains("Kernel panic - not syncing: sysrq triggered crash"));
}

#[test]
fn a_box_whose_time_is_up_ends() {
    let output = stock_kvm(&["--timeout", "1", "sleep", "100000"]);
    assert_eq!(output.status.code(), Some(124));
    assert!(String::from_utf8_lossy(&output.stderr).contains("the time is up"));
}

#[test]
fn a_command_that_is_not_there_and_a_file_that_is_not_there_are_told_apart() {
    let output = stock_kvm(&["--with", "no/such/file", "true"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no/such/file"));
}

#[test]
fn a_test_binary_runs_in_the_box_on_stock_kvm() {
    let program = std::env::current_exe().unwrap();
    let program = program.to_str().unwrap();
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let words = ["--timeout", LONG, "--with", manifest, program];
    let test = ["--exact", "--ignored", "inside_there_is_stock_kvm"];
    let output = stock_kvm(&[words.as_slice(), &test].concat());
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("test inside_there_is_stock_kvm ... ok"), "{text}");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
#[ignore = "runs in the box, started by a_test_binary_runs_in_the_box_on_stock_kvm"]
fn inside_there_is_stock_kvm() {
    assert!(Path::new("/box/job.json").exists(), "this is for the inside of the box");
    let modules = fs::read_to_string("/proc/modules").unwrap();
    assert!(modules.contains("kvm_amd") && !modules.contains("kvm_pvm"), "{modules}");

    let kvm = Kvm::new().unwrap();
    assert_eq!(kvm.get_api_version(), 12);
    assert!(kvm.check_extension(Cap::ImmediateExit));
    let vm = kvm.create_vm().unwrap();
    let cpu = vm.create_vcpu(0).unwrap();
    assert_eq!(cpu.get_regs().unwrap().rip, 0xFFF0, "a CPU at its reset");

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    sender.write_all(b"x").unwrap();
    let mut byte = [0];
    listener.accept().unwrap().0.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"x", "the loopback is up");

    assert!(fs::metadata(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).unwrap().is_file());
    let file = tempfile::NamedTempFile::new().unwrap();
    assert!(file.path().starts_with("/tmp"));
}
