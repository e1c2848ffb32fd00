//! Mutual TLS on the loopback: who may talk to whom.

mod common;

use common::{
    PATIENCE, ToyMemory, backup_config, chain, mark, primary, primary_config, wait_for_refusal,
};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use vmft_logging_channel::handshake::{HandshakeError, Refusal};
use vmft_logging_channel::transport::{
    BackupChannel, BackupConfig, CertificateRefusal, Delivery, KeyStore, KeysError, PrimaryChannel,
    PrimaryConfig, SideName, TransportError, create_tls_directories,
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
    let ours_and_theirs =
        [(&ours, "ca.pem"), (&ours, "revoked.pem"), (&theirs, "cert.pem"), (&theirs, "key.pem")];
    for (from, file) in ours_and_theirs {
        std::fs::copy(from.path().join("backup").join(file), side.join(file)).expect("copied");
    }
    // A side looks at its own certificate first.
    let (_, text) = join_error(secured_backup(&primary, mixed.path()));
    assert!(text.contains("cannot be used: invalid peer certificate"), "{text}");
    // One that is of another pair altogether does not trust the primary, and is not trusted.
    let (_, text) = join_error(secured_backup(&primary, theirs.path()));
    assert!(text.contains("TLS handshake failed: invalid peer certificate"), "{text}");
    let text = wait_for_refusal(&told);
    assert!(text.starts_with("TLS handshake failed"), "{text}");
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

fn name(side: &str) -> SideName {
    side.parse().expect("a good name")
}

/// Carries a file of the primary's or backup's directory to another, as an operator would.
fn carry(from: &Path, to: &Path, file: &str) {
    std::fs::copy(from.join(file), to.join(file)).expect("copied");
}

#[test]
fn any_number_of_sides_talk_and_one_that_is_revoked_does_not_while_the_others_go_on() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut store = KeyStore::open_or_create(dir.path()).expect("a new authority");
    for side in ["primary", "backup", "third"] {
        store.add(&name(side), 30).expect("a new side");
    }
    let (listening, told) = primary(secured_primary(dir.path()));
    let secured = secured_backup(&listening, dir.path());
    let joined = BackupChannel::join(secured.clone(), ToyMemory::default()).expect("trusted");
    assert!(listening.wait_protected(PATIENCE));
    drop(joined);
    common::wait_for_end(&told);
    listening.reopen(vmft_log::entry::Generation(1));

    // What the revoked side has itself, it does not use.
    let stolen = tempfile::tempdir().expect("a temporary directory");
    let copy = stolen.path().join("backup");
    std::fs::create_dir(&copy).expect("fresh");
    for file in ["ca.pem", "cert.pem", "key.pem", "revoked.pem"] {
        carry(&dir.path().join("backup"), &copy, file);
    }
    // Its directory is read again by a primary that listens already.
    KeyStore::open(dir.path()).expect("there").revoke(&name("backup")).expect("a side");
    let (_, text) = join_error(secured);
    assert!(text.contains("was revoked"), "{text}");
    let (_, text) = join_error(secured_backup(&listening, stolen.path()));
    assert_eq!(text, "the peer knows this side's certificate as revoked");
    assert_eq!(wait_for_refusal(&told), "the peer's certificate was revoked");

    let mut third = backup_config(&listening);
    third.primary.tls_dir = Some(dir.path().join("third"));
    let _joined = BackupChannel::join(third, ToyMemory::default()).expect("not revoked");

    let mut store = KeyStore::open(dir.path()).expect("there");
    let revoked = store.sides().iter().filter(|issued| issued.revoked.is_some()).count();
    assert_eq!((store.sides().len(), revoked), (3, 1));
    assert!(matches!(store.renew(&name("backup"), 30), Err(KeysError::Revoked(_))));
    assert!(matches!(store.add(&name("backup"), 30), Err(KeysError::Exists(_))));
    assert!(matches!(store.revoke(&name("nobody")), Err(KeysError::Unknown(_))));
}

#[test]
fn a_primary_that_is_revoked_is_not_followed() {
    let dir = directories();
    let (primary, _told) = primary(secured_primary(dir.path()));
    // The list is carried to the backup only: the primary does not know yet.
    let other = tempfile::tempdir().expect("a temporary directory");
    std::fs::create_dir(other.path().join("backup")).expect("fresh");
    let mut store = KeyStore::open(dir.path()).expect("there");
    let before = std::fs::read(dir.path().join("primary/revoked.pem")).expect("there");
    store.revoke(&name("primary")).expect("a side");
    for file in ["ca.pem", "cert.pem", "key.pem", "revoked.pem"] {
        carry(&dir.path().join("backup"), &other.path().join("backup"), file);
    }
    std::fs::write(dir.path().join("primary/revoked.pem"), before).expect("put back");
    let (error, text) = join_error(secured_backup(&primary, other.path()));
    assert!(text.ends_with("the peer's certificate was revoked"), "{text}");
    let TransportError::Connect { source, .. } = error else { panic!("{text}") };
    assert!(matches!(*source, TransportError::Certificate(CertificateRefusal::Revoked)), "{text}");
}

#[test]
fn a_renewed_certificate_is_taken_up_by_a_primary_that_listens() {
    let dir = directories();
    let (primary, _told) = primary(secured_primary(dir.path()));
    let file = |name: &str| std::fs::read(dir.path().join("primary").join(name)).expect("there");
    let (key, certificate) = (file("key.pem"), file("cert.pem"));
    let mut store = KeyStore::open(dir.path()).expect("there");
    for side in ["primary", "backup"] {
        store.renew(&name(side), 30).expect("a side");
    }
    assert!(file("key.pem") == key && file("cert.pem") != certificate);
    let secured = secured_backup(&primary, dir.path());
    let _joined = BackupChannel::join(secured, ToyMemory::default()).expect("still trusted");
    assert!(primary.wait_protected(PATIENCE));
}

#[test]
fn a_key_that_others_may_read_is_not_used() {
    let dir = directories();
    let key = dir.path().join("primary/key.pem");
    std::fs::set_permissions(&key, PermissionsExt::from_mode(0o640)).expect("ours");
    let (tell, _) = std::sync::mpsc::channel();
    let config = secured_primary(dir.path());
    let error = PrimaryChannel::listen(config, common::Scribe::new(tell)).expect_err("open");
    assert!(chain(&error).contains("mode 640"), "{}", chain(&error));
    for private in ["authority", "primary", "backup"] {
        let directory = std::fs::metadata(dir.path().join(private)).expect("made");
        assert_eq!(directory.permissions().mode() & 0o777, 0o700, "{private}");
    }
    let authority = std::fs::metadata(dir.path().join("authority/ca-key.pem")).expect("made");
    assert_eq!(authority.permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_side_with_a_certificate_is_told_which_field_differs() {
    let dir = directories();
    let (primary, _told) = primary(secured_primary(dir.path()));
    let mut config = secured_backup(&primary, dir.path());
    config.identity.fingerprint =
        vmft_logging_channel::fingerprint::Fingerprint::new().with("engine", "other");
    let (error, text) = join_error(config);
    assert!(text.contains("engine is \"toy\" on the primary"), "{text}");
    assert!(matches!(
        error,
        TransportError::Handshake(HandshakeError::RefusedByPeer(Refusal::Fingerprint(_)))
    ));
}

#[test]
fn a_unix_socket_carries_the_channel_and_is_its_owners_alone() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("log");
    let address = format!("unix:{}", path.display()).parse().expect("an address");
    let mut config = primary_config();
    config.listen = address;
    let mut backup = vmft_logging_channel::transport::BackupConfig::new(
        config.listen.clone(),
        common::identity(),
    );
    backup.detector.suspect_after = common::CALM;
    let (primary, _told) = primary(config);
    let mode = std::fs::metadata(&path).expect("made").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let _joined = BackupChannel::join(backup, ToyMemory::default()).expect("there");
    assert!(primary.wait_protected(PATIENCE));
}
