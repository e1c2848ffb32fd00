//! Guests that are reset: why, and what becomes of those that never start.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::process::{Command, Output};
use vmft_guest_images::{Cache, NoProgress, default_guest};

/// Runs the default guest's kernel without an initramfs, so that it finds no root.
fn rootless(more: &[&str]) -> (Output, String) {
    let guest = default_guest(&Cache::from_environment().unwrap(), &mut NoProgress).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let console = directory.path().join("console");
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmft"));
    command.args(["run", "--memory", "size=96M", "--cmdline", "root=/dev/nothing quiet"]);
    command.arg("--kernel").arg(guest.kernel).args(more);
    let output = command.arg("--serial").arg(format!("file={}", console.display())).output();
    (output.unwrap(), std::fs::read_to_string(console).unwrap())
}

#[test]
fn a_guest_that_never_starts_is_stopped_with_its_last_words_and_what_they_mean() {
    let (output, console) = rootless(&[]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    for part in [
        "the guest starts again, by the keyboard controller",
        "the guest was reset 5 times within a minute and wrote to no disk",
        "its console: ",
        "Unable to mount root fs",
        "the likely cause: no root",
    ] {
        assert!(said.contains(part), "{part:?} is not said: {said}");
    }
    assert_eq!(console.matches("Kernel panic - not syncing: VFS").count(), 5, "{console}");
}

#[test]
fn a_machine_ends_with_its_guests_first_reset_if_it_is_told_to() {
    let (output, console) = rootless(&["--on-reboot", "exit"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("by the keyboard controller"), "{said}");
    assert_eq!(console.matches("Kernel panic - not syncing: VFS").count(), 1, "{console}");
}
