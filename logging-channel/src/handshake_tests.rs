use super::*;
use crate::fingerprint::Fingerprint;

fn identity(generation: u64) -> Identity {
    Identity {
        pair: "demo".parse().expect("a good name"),
        generation: Generation(generation),
        fingerprint: Fingerprint::new().with("engine", "soft").with("memory size", "256 MiB"),
    }
}

const BACKUP_NONCE: Nonce = Nonce([1; 16]);
const PRIMARY_NONCE: Nonce = Nonce([2; 16]);

type Sides = (Result<SessionTerms, HandshakeError>, Result<SessionTerms, HandshakeError>);

/// Runs a handshake to its end on both sides; a side that is not reached reports the refusal.
fn shake(primary: Identity, backup: Identity, admission: &Admission) -> Sides {
    let (offered, hello) = Offered::new(backup, BACKUP_NONCE);
    let (answered, reply) = match Answered::new(&hello, primary, PRIMARY_NONCE, admission) {
        Ok(answer) => answer,
        Err(HandshakeError::Refused(refusal)) => {
            let theirs = offered.handle_frame(&Frame::Refusal(refusal.clone()));
            return (Err(HandshakeError::Refused(refusal)), theirs.map(|(terms, _)| terms));
        }
        Err(other) => panic!("only refusals are expected: {other}"),
    };
    match offered.handle_frame(&reply) {
        Ok((terms, confirm)) => (answered.handle_frame(&confirm), Ok(terms)),
        Err(HandshakeError::Refused(refusal)) => (
            answered.handle_frame(&Frame::Refusal(refusal.clone())),
            Err(HandshakeError::Refused(refusal)),
        ),
        Err(other) => panic!("only refusals are expected: {other}"),
    }
}

fn assert_refused(sides: Sides, refusal: Refusal) {
    assert_eq!(sides.0, Err(HandshakeError::Refused(refusal.clone())));
    assert_eq!(sides.1, Err(HandshakeError::RefusedByPeer(refusal)));
}

#[test]
fn equal_machines_agree_on_a_session_in_the_primarys_generation() {
    let (primary, backup) = shake(identity(3), identity(1), &Admission::Open);
    let (primary, backup) = (primary.expect("agreed"), backup.expect("agreed"));
    assert_eq!(primary.session, backup.session);
    assert_ne!(primary.session, SessionId::HANDSHAKE);
    assert_eq!((primary.generation, backup.generation), (Generation(3), Generation(3)));
    assert_eq!((primary.peer, backup.peer), (identity(1), identity(3)));
}

#[test]
fn another_nonce_on_either_side_makes_another_session() {
    let pair = "demo".parse().expect("a good name");
    let session = |backup, primary| {
        session_of(&pair, Generation(1), Nonce([backup; 16]), Nonce([primary; 16]))
    };
    assert_ne!(session(1, 2), session(1, 3));
    assert_ne!(session(1, 2), session(3, 2));
    assert_ne!(session(1, 2), session(2, 1));
}

#[test]
fn a_mismatch_names_the_field_and_both_values() {
    let mut backup = identity(1);
    backup.fingerprint = backup.fingerprint.with("memory size", "512 MiB");
    let sides = shake(identity(1), backup, &Admission::Open);
    let text = "refused the peer: the machines differ: memory size is \"256 MiB\" on the primary and \
                \"512 MiB\" on the backup";
    assert_eq!(sides.0.expect_err("refused").to_string(), text);
    assert!(matches!(
        sides.1,
        Err(HandshakeError::RefusedByPeer(Refusal::Fingerprint(Mismatch { field, .. })))
            if field == "memory size"
    ));
}

#[test]
fn a_backup_of_another_pair_is_refused() {
    let mut backup = identity(1);
    backup.pair = "other".parse().expect("a good name");
    let refusal = Refusal::WrongPair { primary: identity(1).pair, backup: backup.pair.clone() };
    assert_refused(shake(identity(1), backup, &Admission::Open), refusal);
}

#[test]
fn a_primary_whose_reign_is_over_is_refused() {
    let refusal = Refusal::WrongGeneration { primary: Generation(2), backup: Generation(3) };
    assert_refused(shake(identity(2), identity(3), &Admission::Open), refusal);
}

#[test]
fn a_second_backup_is_refused() {
    assert_refused(shake(identity(1), identity(1), &Admission::HasBackup), Refusal::HasBackup);
}

#[test]
fn a_primary_that_wants_no_backup_says_why() {
    let closed = Admission::Closed("unprotected".to_owned());
    let refusal = Refusal::NotAccepting("unprotected".into());
    assert_refused(shake(identity(1), identity(1), &closed), refusal);
}

#[test]
fn two_primaries_or_two_backups_refuse_each_other() {
    let hello = Hello { role: Role::Primary, identity: identity(1), nonce: BACKUP_NONCE };
    let answer = Answered::new(&Frame::Hello(hello), identity(1), PRIMARY_NONCE, &Admission::Open);
    let refusal = HandshakeError::Refused(Refusal::WrongRole(Role::Backup));
    assert_eq!(answer.expect_err("two primaries"), refusal);

    let (offered, _) = Offered::new(identity(1), BACKUP_NONCE);
    let reply = HelloReply {
        role: Role::Backup,
        identity: identity(1),
        nonce: PRIMARY_NONCE,
        echo: BACKUP_NONCE,
    };
    let refusal = HandshakeError::Refused(Refusal::WrongRole(Role::Primary));
    assert_eq!(offered.handle_frame(&Frame::HelloReply(reply)).expect_err("two backups"), refusal);
}

#[test]
fn a_replayed_reply_or_confirmation_is_refused() {
    let replayed = HandshakeError::Refused(Refusal::Replayed);
    let (_, old_hello) = Offered::new(identity(1), Nonce([7; 16]));
    let (_, old_reply) = Answered::new(&old_hello, identity(1), PRIMARY_NONCE, &Admission::Open)
        .expect("a good hello");
    let (offered, hello) = Offered::new(identity(1), BACKUP_NONCE);
    assert_eq!(offered.handle_frame(&old_reply).expect_err("another's reply"), replayed);

    let (answered, _) =
        Answered::new(&hello, identity(1), PRIMARY_NONCE, &Admission::Open).expect("a good hello");
    let old = Frame::HelloConfirm(HelloConfirm { echo: Nonce([9; 16]) });
    assert_eq!(answered.handle_frame(&old).expect_err("another's confirmation"), replayed);
}

#[test]
fn a_frame_out_of_place_is_named() {
    let (offered, hello) = Offered::new(identity(1), BACKUP_NONCE);
    let error = offered.handle_frame(&hello).expect_err("a hello is no reply");
    assert_eq!(error.to_string(), "Hello came where HelloReply was due");
}
