//! The directory of a snapshot: every file of it, with a digest that was made good again and with
//! one that was not.

use crate::inputs::{Gate, World};
use crate::machine::{probe, run_on};
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use vmft_cpu::memory::{MIN_MEMORY, PAGE_SIZE};
use vmft_fuzzing::{Random, change, damage, large_cases, peak_of};
use vmft_vmm::snapshot::{self, SnapshotError};

/// Cases of a quick run.
const CASES: u64 = 100;
/// So many ordinary cases one of these takes as long as.
const WORTH: u64 = 10;
/// How many bad snapshots are made in a case.
const EACH: usize = 5;
const FILES: [&str; 4] = ["config.json", "state.json", "memory", "kernel"];
/// What a snapshot of so many bytes may take of this process's memory, beside the guest's.
fn worth(bytes: u64) -> usize {
    (8 << 20) + usize::try_from(bytes).unwrap() * 64
}

/// A snapshot, written once.
fn good(at: &Path) {
    let mut machine = probe();
    let mut world = World::new(Random::new(1), 20);
    machine.run(&mut world, &Gate::default()).unwrap();
    snapshot::save(&mut machine, at).unwrap();
}

/// Writes the digest that the files have now into their configuration, where that still can be read. The
/// refusal of a wrong one says the right one.
fn make_good(directory: &Path) {
    for field in ["boot_digest", "digest"] {
        let Err(SnapshotError::Damaged { what, .. }) = snapshot::restore(directory, None) else {
            return;
        };
        let Some((_, found)) = what.split_once("digest ") else { return };
        let found = found.split(',').next().unwrap_or_default();
        let path = directory.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let field = if what.starts_with("boot") { "boot_digest" } else { field };
        config[field] = found.into();
        fs::write(path, serde_json::to_vec(&config).unwrap()).unwrap();
    }
}

/// Does something to one file of the snapshot.
fn alter(random: &mut Random, directory: &Path) {
    let name = *random.pick(&FILES);
    let path = directory.join(name);
    if name == "memory" {
        return alter_memory(random, &path);
    }
    let mut bytes = fs::read(&path).unwrap();
    match serde_json::from_slice::<Value>(&bytes) {
        Ok(mut value) if random.chance(85) => {
            change(random, &mut value);
            bytes = serde_json::to_vec(&value).unwrap();
        }
        _ => damage(random, &mut bytes, &[]),
    }
    fs::write(path, bytes).unwrap();
}

/// Other bytes where the guest's code is, or another length.
fn alter_memory(random: &mut Random, path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    match random.below(4) {
        0 => file.set_len(random.below(2 * MIN_MEMORY)).unwrap(),
        _ => file.write_all_at(&random.bytes(8), 0x10_0000 + random.below(0x1000)).unwrap(),
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for name in FILES {
        let (from, to) = (from.join(name), to.join(name));
        if name != "memory" {
            fs::copy(from, to).unwrap();
            continue;
        }
        // But for the holes.
        let (from, to) = (File::open(from).unwrap(), File::create(to).unwrap());
        to.set_len(MIN_MEMORY).unwrap();
        let mut page = [0; PAGE_SIZE as usize];
        for at in (0..4 << 20).step_by(page.len()) {
            from.read_exact_at(&mut page, at).unwrap();
            if page.iter().any(|byte| *byte != 0) {
                to.write_all_at(&page, at).unwrap();
            }
        }
    }
}

#[test]
fn a_snapshot_gone_bad_is_refused_or_runs() {
    let place = tempfile::tempdir().unwrap();
    let whole = place.path().join("whole");
    good(&whole);
    let mut ran = 0u64;
    large_cases(CASES, WORTH, |mut random| {
        for _ in 0..EACH {
            let directory = place.path().join("bad");
            copy(&whole, &directory);
            alter(&mut random, &directory);
            if random.chance(75) {
                make_good(&directory);
            }
            let len = |name| fs::metadata(directory.join(name)).unwrap().len();
            // Guest memory is mapped, and is no allocation.
            let bytes = len("config.json") + len("state.json") + len("kernel");
            let (machine, peak) = peak_of(|| snapshot::restore(&directory, None));
            assert!(peak <= worth(bytes), "{peak} bytes for {bytes}");
            match machine {
                Ok(mut machine) => {
                    run_on(&mut random, &mut machine);
                    ran += 1;
                }
                Err(error) => assert!(!error.to_string().is_empty()),
            }
            fs::remove_dir_all(directory).unwrap();
        }
    });
    println!("{ran} ran");
}
