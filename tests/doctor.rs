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

#[test]
fn a_disk_is_examined_and_left_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let (good, odd) = (directory.path().join("good.img"), directory.path().join("odd.img"));
    std::fs::write(&good, vec![1; 65_536]).unwrap();
    std::fs::write(&odd, vec![1; 1_000]).unwrap();
    let words = [&good, &odd].map(|path| format!("path={}", path.display()));
    let output = doctor(&["--disk", &words[0], "--disk", &words[1]]);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.lines().skip(1).all(|line| line.chars().count() <= 120), "{text}");
    let (of_good, of_odd) = text.split_at(text.find("odd.img").unwrap());
    assert!(of_good.contains("65536 bytes") && of_good.contains("arbiter beside it"), "{text}");
    assert!(of_odd.contains("NO size") && of_odd.contains("truncate -s %512"), "{text}");
    assert_eq!(std::fs::read(&good).unwrap(), vec![1; 65_536]);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
    let output = doctor(&["--json", "--disk", "nbd=tcp:127.0.0.1:9/none"]);
    let reports: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(reports[0]["findings"][0]["grade"], "bad", "{reports}");
}
