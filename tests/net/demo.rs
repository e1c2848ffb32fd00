//! `vmft demo --net`: what its client saw, and what it says where nobody may make a network.

use crate::lab;
use crate::stage::turn;
use std::process::{Command, Output};

/// A short demo with a network.
fn demo(program: &str, before: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(before).args(["demo", "--net", "--json", "--lines", "30", "--pause", "40"]);
    command.output().unwrap()
}

fn said(output: &Output) -> String {
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    format!("{out}{err}")
}

/// The report, which ends the output.
fn report(output: &Output) -> serde_json::Value {
    let text = String::from_utf8_lossy(&output.stdout);
    let start = text.rfind("\n{\n").expect("a report in JSON");
    serde_json::from_str(&text[start..]).unwrap()
}

#[test]
fn the_demos_client_keeps_its_connection_through_the_kill() {
    if lab::is_missing() {
        return;
    }
    let _turn = turn();
    let output = demo(env!("CARGO_BIN_EXE_vmft"), &[]);
    assert!(output.status.success(), "{}", said(&output));
    let client = &report(&output)["client"];
    println!("{client}");
    assert_eq!(client["wrong"], false);
    assert!(client["answers_after_kill"].as_u64() > Some(10), "{client}");
    assert!(said(&output).contains("connection"), "{}", said(&output));
}

#[test]
fn where_nobody_may_make_a_network_the_demo_says_so_and_goes_on_without() {
    if lab::is_missing() {
        return;
    }
    let _turn = turn();
    let without = ["--bounding-set=-sys_admin,-net_admin", env!("CARGO_BIN_EXE_vmft")];
    let output = demo("setpriv", &without);
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("the demo goes on without a network"), "{}", said(&output));
    assert!(report(&output)["client"].is_null());
}
