//! A machine saved and read again.

use crate::stage::{Pair, Setup, booted};
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use vmft_vmm::snapshot::{SnapshotError, restore, save};

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn a_machine_restored_and_saved_again_is_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let again = directory.path().join("again");
    let mut machine = restore(&booted().snapshot, None).unwrap();
    save(&mut machine, &again).unwrap();
    let mut restored = restore(&again, None).unwrap();
    assert_eq!(restored.full_digest(), machine.full_digest());
    assert_eq!(restored.point(), machine.point());
    for name in ["config.json", "state.json"] {
        let read = |directory: &Path| std::fs::read(directory.join(name)).unwrap();
        assert_eq!(read(&again), read(&booted().snapshot), "{name}");
    }
    assert!(matches!(save(&mut machine, &again), Err(SnapshotError::Exists { .. })));
}

#[test]
fn a_snapshot_with_a_flipped_byte_of_memory_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let damaged = directory.path().join("damaged");
    copy(&booted().snapshot, &damaged);
    let memory = OpenOptions::new().read(true).write(true).open(damaged.join("memory")).unwrap();
    let mut byte = [0];
    memory.read_exact_at(&mut byte, 0x123_4567).unwrap();
    memory.write_all_at(&[byte[0] ^ 1], 0x123_4567).unwrap();
    let error = restore(&damaged, None).unwrap_err();
    assert!(matches!(error, SnapshotError::Damaged { .. }), "{error}");
}

#[test]
fn a_snapshot_with_a_cut_file_is_refused() {
    for name in ["config.json", "state.json", "memory", "kernel", "initramfs"] {
        let directory = tempfile::tempdir().unwrap();
        let damaged = directory.path().join("damaged");
        copy(&booted().snapshot, &damaged);
        let file = OpenOptions::new().write(true).open(damaged.join(name)).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
        let error = restore(&damaged, None).expect_err(name);
        println!("{name}: {error}");
    }
}

#[test]
fn a_snapshot_of_another_version_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let other = directory.path().join("other");
    copy(&booted().snapshot, &other);
    let path = other.join("config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let newer = config.replacen("\"snapshot_version\": ", "\"snapshot_version\": 99", 1);
    assert_ne!(config, newer);
    std::fs::write(&path, newer).unwrap();
    let error = restore(&other, None).unwrap_err();
    assert!(matches!(error, SnapshotError::Version { found: 990.., .. }), "{error}");
}

#[test]
fn a_protected_primary_writes_a_snapshot_and_its_backup_says_that_it_cannot() {
    let pair = Pair::start(&Setup::default());
    let directory = pair.directory.path().join("snapshot");
    let refusal = vmft::api_client::snapshot(&pair.backup.api(), &directory).unwrap_err();
    assert!(refusal.to_string().contains("does not run the guest"), "{refusal:#}");
    assert!(!directory.exists());
    vmft::api_client::snapshot(&pair.primary.api(), &directory).unwrap();
    restore(&directory, None).unwrap();
}
