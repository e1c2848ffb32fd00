//! What cannot be run or followed is refused before anything is changed, with what to do instead.

use crate::engines::{Engine, kvm_is_here, probe, said, take_turn, vmft, write_probe};
use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;
use vmft::pair::{SideProcess, Which, prefixed};
use vmft_vmm::doctor::verdict::{Choice, Purpose, Wanted};

const LIMIT: Duration = Duration::from_secs(60);

/// The program must refuse, in one line that says all of `wanted`.
fn refuse(arguments: Vec<OsString>, wanted: &[&str]) {
    let output = vmft(&arguments);
    let said = said(&output);
    assert!(!output.status.success(), "{arguments:?} was not refused");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    for text in wanted {
        assert!(said.contains(text), "{text:?} is not said: {said}");
    }
}

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

/// A kernel like the probe, for which nobody vouches: the note's owner has another name.
pub fn stranger(directory: &Path) -> OsString {
    let mut image = probe(2, 10).image();
    let at = image.windows(5).position(|bytes| bytes == b"vmft\0").unwrap();
    image[at] = b'w';
    let path = directory.join("stranger.elf");
    std::fs::write(&path, image).unwrap();
    path.into()
}

#[test]
fn lockstep_on_kvm_is_refused_for_a_kernel_nobody_vouches_for() {
    if !kvm_is_here() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let mut arguments = words(&["record", "--engine", "kvm", "--serial", "null", "--kernel"]);
    arguments.extend([stranger(directory.path()), "--log".into(), log.clone().into()]);
    refuse(arguments, &["known not to can be followed", "no note", "--engine soft", "--lockstep"]);
    assert!(!log.exists(), "a log was begun");

    let arbiter = directory.path().join("arbiter");
    let mut arguments = words(&["primary", "--engine", "kvm", "--serial", "null", "--listen"]);
    arguments.extend(words(&["tcp:127.0.0.1:0", "--kernel"]));
    arguments.extend([stranger(directory.path()), "--arbiter".into(), prefixed("dir=", &arbiter)]);
    refuse(arguments, &["known not to can be followed", "no note", "--engine soft"]);
    assert!(!arbiter.exists(), "the shared storage was changed");
}

#[test]
fn the_demos_linux_on_kvm_needs_a_kernel_that_was_built_before() {
    let cache = tempfile::tempdir().unwrap();
    let mut demo = std::process::Command::new(env!("CARGO_BIN_EXE_vmft"));
    demo.env("VMFT_CACHE", cache.path()).args(["demo", "--engine", "kvm"]);
    let output = demo.output().unwrap();
    let said = said(&output);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("vmft guest --lockstep") && said.contains("--guest probe"), "{said}");
    assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0, "something was fetched");
}

#[test]
fn a_kernel_nobody_vouches_for_is_recorded_on_soft() {
    let directory = tempfile::tempdir().unwrap();
    let mut arguments = words(&["record", "--serial", "null", "--memory", "size=64M", "--kernel"]);
    arguments.extend([stranger(directory.path()), "--log".into()]);
    arguments.push(directory.path().join("log").into());
    let output = vmft(&arguments);
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn points_are_for_kvm_and_engines_are_known_by_name() {
    for (arguments, wanted) in [
        (&["run", "--engine", "soft", "--points", "exit"][..], "soft always counts instructions"),
        (&["run", "--points", "exit"], "--engine"),
        (&["run", "--engine", "xen"], "'xen'"),
        (&["run", "--restore", "snap", "--memory", "size=64M"], "cannot be used with"),
    ] {
        refuse(words(arguments), &[wanted]);
    }
}

/// Points at branches need a counter that the doctor trusts; its sentence says why there is none.
#[test]
fn points_at_branches_are_refused_with_the_doctors_sentence() {
    if !kvm_is_here() {
        return;
    }
    let report = vmft_vmm::doctor::Examination::of_this_host().examine(|_| {});
    let wanted = Wanted { purpose: Purpose::Probe, choice: Choice::Pmu };
    let Some(why) = report.verdict.refusal(wanted) else {
        eprintln!("not run: this host has a counter that passes its test");
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let kernel = write_probe(directory.path(), &probe(2, 10));
    let log = directory.path().join("log");
    let mut arguments =
        words(&["record", "--engine", "kvm", "--points", "pmu", "--serial", "null"]);
    arguments.extend(["--memory", "size=64M", "--kernel"].map(OsString::from));
    arguments.extend([kernel.into(), "--log".into(), log.clone().into()]);
    refuse(arguments, &[&why]);
    assert!(!log.exists(), "a log was begun");
}

#[test]
fn a_host_without_kvm_refuses_the_engine_with_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = write_probe(directory.path(), &probe(2, 10));
    let program = env!("CARGO_BIN_EXE_vmft");
    // A mount namespace in which the device, if there is one, is something else.
    let script = "if [ -e /dev/kvm ]; then mount --bind /dev/null /dev/kvm; fi; exec \"$@\"";
    let output = std::process::Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", script, "sh", program, "run"])
        .args(["--engine", "kvm", "--serial", "null", "--memory", "size=64M", "--kernel"])
        .arg(kernel)
        .output()
        .unwrap();
    let said = said(&output);
    assert!(!output.status.success(), "not refused");
    for text in ["the kvm engine cannot run this on this host", "/dev/kvm", "--engine soft"] {
        assert!(said.contains(text), "{text:?} is not said: {said}");
    }
}

#[test]
fn a_user_who_may_not_open_kvm_is_told_so() {
    // Only a superuser can become somebody else.
    if !kvm_is_here() || !nix::unistd::geteuid().is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let kernel = write_probe(directory.path(), &probe(2, 10));
    let program = directory.path().join("vmft");
    std::fs::copy(env!("CARGO_BIN_EXE_vmft"), &program).unwrap();
    for path in [directory.path(), &kernel, &program] {
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(path, permissions).unwrap();
    }
    // In a namespace of its own, the device is a node that nobody else sees and only its owner opens.
    let script = "cp -a /dev/kvm \"$0\" && chmod 600 \"$0\" && mount --bind \"$0\" /dev/kvm && \
                  exec setpriv --reuid=65534 --clear-groups \"$@\"";
    let output = std::process::Command::new("unshare")
        .args(["--mount", "sh", "-c", script])
        .arg(directory.path().join("kvm"))
        .arg(program)
        .args(["run", "--engine", "kvm", "--serial", "null", "--memory", "size=64M", "--kernel"])
        .arg(kernel)
        .output()
        .unwrap();
    let said = said(&output);
    assert!(!output.status.success(), "not refused");
    assert!(said.contains("may not open /dev/kvm") && said.contains("--engine soft"), "{said}");
}

#[test]
fn what_kvm_cannot_execute_ends_the_run_with_the_address_and_what_to_do() {
    if !kvm_is_here() {
        return;
    }
    let _turn = take_turn();
    let directory = tempfile::tempdir().unwrap();
    let mut image = probe(2, 10).image();
    // mov eax, 0xC0000000; jmp rax: no memory is there, so KVM has no instruction to execute.
    image[0x100..0x107].copy_from_slice(&[0xB8, 0, 0, 0, 0xC0, 0xFF, 0xE0]);
    let kernel = directory.path().join("lost.elf");
    std::fs::write(&kernel, image).unwrap();
    let mut arguments = words(&["run", "--engine", "kvm", "--serial", "null", "--memory"]);
    arguments.extend(["size=64M".into(), "--kernel".into(), kernel.into()]);
    let output = vmft(&arguments);
    let said = said(&output);
    assert!(!output.status.success(), "it ran on");
    for text in ["KVM internal error", "0xc0000000", "bytes", "vmft doctor", "--engine soft"] {
        assert!(said.contains(text), "{text:?} is not said: {said}");
    }
}

/// A primary with the probe guest, waiting for its backup.
fn waiting_primary(directory: &Path, engine: Engine) -> (SideProcess, String) {
    let kernel = write_probe(directory, &probe(4, 10));
    let mut arguments = words(&["--listen", "tcp:127.0.0.1:0", "--memory", "size=64M"]);
    arguments.extend(["--kernel".into(), kernel.into(), "--arbiter".into()]);
    arguments.push(prefixed("dir=", &directory.join("arbiter")));
    arguments.extend(words(engine.options()));
    let program = Path::new(env!("CARGO_BIN_EXE_vmft"));
    let mut primary = SideProcess::start(program, Which::Primary, directory, &arguments).unwrap();
    let status = primary.wait_status(LIMIT, |status| status.listening.is_some()).unwrap();
    (primary, status.listening.unwrap())
}

/// A backup that insists on an engine the primary does not have.
fn mismatched_backup(primary: Engine, backup: Engine, wanted: &[&str]) {
    if !primary.is_here() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let _turn = take_turn();
    let (mut side, address) = waiting_primary(directory.path(), primary);
    let mut arguments = words(&["backup", "--serial", "null", "--primary"]);
    arguments.extend([format!("tcp:{address}").into(), "--arbiter".into()]);
    arguments.push(prefixed("dir=", &directory.path().join("arbiter")));
    arguments.extend(words(backup.options()));
    refuse(arguments, &["its log says why", "--engine"]);
    side.wait_says(LIMIT, |said| wanted.iter().all(|wanted| said.contains(wanted))).unwrap();
    assert!(side.try_exit().unwrap().is_none(), "the primary must wait on");
}

#[test]
fn a_peer_with_another_engine_is_refused_with_both_sides_named() {
    let soft = "\"soft\" on the primary";
    mismatched_backup(
        Engine::Soft,
        Engine::KvmExit,
        &[soft, "\"kvm, points at exits\" on the backup"],
    );
    let kvm = "\"kvm, points at exits\" on the primary";
    mismatched_backup(Engine::KvmExit, Engine::Soft, &[kvm, "\"soft\" on the backup"]);
}

#[test]
fn a_peer_with_another_kind_of_point_is_refused_with_both_sides_named() {
    let kvm = "\"kvm, points at exits\" on the primary";
    let wanted = [kvm, "\"kvm, points at single steps\" on the backup"];
    mismatched_backup(Engine::KvmExit, Engine::KvmStep, &wanted);
}
