//! `vmft doctor` through the program itself, on whatever host this is.
#![allow(clippy::unwrap_used, missing_docs)]

use std::process::{Command, Output};
use vmft_vmm::doctor::Report;

fn doctor(options: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmft")).arg("doctor").args(options).output().unwrap()
}

#[test]
fn the_report_for_programs_parses_back_to_its_own_verdict() {
    let output = doctor(&["--json"]);
    assert!(output.status.success(), "{output:?}");
    let report: Report = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(Report::of(report.facts.clone()), report);
}

#[test]
fn the_report_for_people_is_a_table_of_120_columns_and_a_verdict() {
    let output = doctor(&[]);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.lines().all(|line| line.chars().count() <= 120), "{text}");
    assert!(text.contains("/dev/kvm") && text.contains("--engine auto takes"), "{text}");
}
