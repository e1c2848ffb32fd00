//! A log recorded once and kept: `tests/vectors/probe.log`, and what its replay came to then.

use crate::recording::{Outcome, record, replay};
use std::fs::File;
use std::path::{Path, PathBuf};
use vmft_backup::identity::check_version;
use vmft_backup::recorded::RecordedLog;
use vmft_log::point::ExecutionPoint;
use vmft_vmm::engine::EngineKind;

const HOW_TO_RENEW: &str = "the vector was recorded by a program that executes differently. If that \
    is meant, record it anew: VMFT_RECORD_VECTORS=1 cargo test --test probe vector";

fn vector(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(name)
}

fn describe(outcome: &Outcome, digests: u64) -> String {
    let Outcome { state, point } = outcome;
    format!("point {point}\nstate {state:016x}\ndigests {digests}\n")
}

#[test]
fn a_log_recorded_earlier_replays_to_the_state_it_had_then() {
    let (log, outcome) = (vector("probe.log"), vector("probe.outcome"));
    if std::env::var_os("VMFT_RECORD_VECTORS").is_some() {
        let recorded = record(&log);
        let (replayed, digests) = replay(&log, u64::MAX);
        assert_eq!(replayed, recorded);
        std::fs::write(&outcome, describe(&recorded, digests)).unwrap();
    }
    let file = File::open(&log).unwrap();
    let (header, _, _) = match RecordedLog::open(file, ExecutionPoint::NEVER) {
        Ok(opened) => opened,
        Err(error) => panic!("{error}: {HOW_TO_RENEW}"),
    };
    if let Err(mismatch) = check_version(&header.identity.fingerprint, EngineKind::Soft) {
        panic!("{mismatch}: {HOW_TO_RENEW}");
    }
    let (replayed, digests) = replay(&log, u64::MAX);
    let expected = std::fs::read_to_string(&outcome).unwrap();
    assert_eq!(describe(&replayed, digests), expected, "{HOW_TO_RENEW}");
}
