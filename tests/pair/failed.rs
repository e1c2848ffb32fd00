//! A side whose machine meets a fault of the program.

use crate::stage::{Pair, Setup, records_script};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use vmft::pair::Which;
use vmft_backup::fault::{Fault, FaultOrder};

/// What a message says between two others.
fn between<'a>(text: &'a str, before: &str, after: &str) -> &'a str {
    let (_, rest) = text.split_once(before).expect(text);
    rest.split_once(after).expect(text).0
}

#[test]
fn a_machine_that_fails_on_one_host_is_reported_and_goes_on_on_the_other() {
    let records = 8;
    let mut pair = Pair::start(&Setup::default());
    pair.type_in(&records_script(records));
    pair.read_text("vmft-record 000003 synced");
    let order = FaultOrder { fault: Fault::Fail, live: true };
    let refused = vmft::api_client::fault(&pair.backup.api(), order).unwrap_err();
    assert!(refused.to_string().contains("does not run the guest"), "{refused:#}");
    vmft::api_client::fault(&pair.primary.api(), order).unwrap();
    assert_eq!(pair.wait_exit(Which::Primary).code(), Some(1), "{}", pair.report());
    let said = pair.primary.messages();
    let report = Path::new(between(&said, "all registers are in ", ";"));
    let kept = std::fs::read_to_string(report).expect(&said);
    let mode = std::fs::metadata(report).unwrap().permissions().mode();
    std::fs::remove_file(report).unwrap();
    assert_eq!(mode & 0o777, 0o600);
    let point = between(&said, "the machine failed at point ", ",");
    assert!(kept.contains(&format!("point: {point}")) && kept.contains("rflags: 0x"), "{kept}");
    assert!(!said.contains("panicked"), "{said}");

    pair.read_to_end();
    assert_eq!(pair.wait_exit(Which::Backup).code(), Some(0), "{}", pair.report());
    assert_eq!(pair.generation(), 2, "{}", pair.report());
    let told = pair.backup.messages();
    let known = format!("the peer's machine failed: the machine failed at point {point}");
    assert!(told.contains(&known), "{told}");
    pair.check_records(Which::Backup, records);
}
