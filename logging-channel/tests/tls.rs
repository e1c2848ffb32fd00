//! Mutual TLS on the loopback: who may talk to whom.

mod common;

use common::{
    PATIENCE, ToyMemory, backup_config, chain, mark, primary, primary_config, wait_for_refusal,
};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use vmft_logging_channel::transport::{
    BackupChannel, BackupConfig, Delivery, PrimaryChannel, PrimaryConfig, TransportError,
    create_tls_directories,
};

fn directories() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    create_tls_directories(dir.path()).expect("certificates");
    dir
}

fn secured_primary(dir: &Path) -> PrimaryConfig {
    let mut config = primary_config();
    config.listen.tls_dir = Some(dir.join("primary"));
    config
}

fn secured_backup(primary: &PrimaryChannel, dir: &Path) -> BackupConfig {
    let mut config = backup_config(primary);
    config.primary.tls_dir = Some(dir.join("backup"));
    config
}

/// Why joining fails, with all causes.
fn join_error(config: BackupConfig) -> (TransportError, String) {
    let error = BackupChannel::join(config, ToyMemory::default()).expect_err("not to be trusted");
    let text = chain(&error);
    (error, text)
}

#[test]
fn sides_with_certificates_made_together_talk() {
    let dir = directories();
    let (primary, _told) = primary(secured_primary(dir.path()));
    let joined = BackupChannel::join(secured_backup(&primary, dir.path()), ToyMemory::default())
        .expect("trusted");
    assert!(primary.wait_protected(PATIENCE));
    primary.push(&mark(60, 1)).expect("room");
    assert!(
        matches!(joined.channel.recv(PATIENCE), Delivery::Entry(_, entry) if entry == mark(60, 1))
    );
}

#[test]
fn a_backup_with_a_strangers_certificate_is_refused() {
    let (ours, theirs) = (directories(), directories());
    let (primary, told) = primary(secured_primary(ours.path()));
    // It trusts our authority, but was certified by another.
    let mixed = tempfile::tempdir().expect("a temporary directory");
    let side = mixed.path().join("backup");
    std::fs::create_dir(&side).expect("fresh");
    for (from, file) in [(&ours, "ca.pem"), (&theirs, "cert.pem"), (&theirs, "key.pem")] {
        std::fs::copy(from.path().join("backup").join(file), side.join(file)).expect("copied");
    }
    let (_, text) = join_error(secured_backup(&primary, mixed.path()));
    assert!(text.contains("alert"), "{text}");
    let text = wait_for_refusal(&told);
    assert!(text.starts_with("TLS handshake failed: invalid peer certificate"), "{text}");
    assert!(primary.protected_by() == 0);
}

#[test]
fn a_primary_with_a_strangers_certificate_is_refused() {
    let (ours, theirs) = (directories(), directories());
    let (primary, told) = primary(secured_primary(theirs.path()));
    let (_, text) = join_error(secured_backup(&primary, ours.path()));
    assert!(text.contains("TLS handshake failed: invalid peer certificate"), "{text}");
    wait_for_refusal(&told);
}

#[test]
fn a_plain_backup_is_refused_by_a_primary_with_tls() {
    let dir = directories();
    let (primary, told) = primary(secured_primary(dir.path()));
    join_error(backup_config(&primary));
    let text = wait_for_refusal(&told);
    assert!(text.starts_with("the peer does not use TLS"), "{text}");
    let secured = secured_backup(&primary, dir.path());
    let _joined = BackupChannel::join(secured, ToyMemory::default()).expect("it goes on listening");
    assert!(primary.wait_protected(PATIENCE));
}

#[test]
fn a_backup_with_tls_is_refused_by_a_plain_primary() {
    let dir = directories();
    let (primary, told) = primary(primary_config());
    let (error, text) = join_error(secured_backup(&primary, dir.path()));
    assert!(matches!(error, TransportError::Connect { .. }), "{text}");
    let text = wait_for_refusal(&told);
    assert!(text.starts_with("the peer uses TLS"), "{text}");
}

#[test]
fn a_directory_without_certificates_names_the_file() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (tell, _) = std::sync::mpsc::channel();
    let config = secured_primary(dir.path());
    let error = PrimaryChannel::listen(config, common::Scribe::new(tell)).expect_err("no files");
    let text = chain(&error);
    assert!(text.contains("primary/ca.pem"), "{text}");
}

#[test]
fn keys_are_for_their_owner_only_and_never_overwritten() {
    let dir = directories();
    let key = dir.path().join("primary/key.pem");
    let mode = std::fs::metadata(&key).expect("made").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let before = std::fs::read(&key).expect("made");
    create_tls_directories(dir.path()).expect_err("there are some already");
    assert_eq!(std::fs::read(&key).expect("still there"), before);
}
