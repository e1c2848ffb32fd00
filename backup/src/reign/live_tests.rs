use super::*;
use crate::arbiter::{Candidate, RETRY, Verdict};
use crate::status::Role;
use vmft_log::entry::{EntrySequence, Generation};
use vmft_logging_channel::backups::{BackupKey, Backups};
use vmft_logging_channel::fingerprint::{Fingerprint, Identity};
use vmft_logging_channel::session::SessionId;
use vmft_logging_channel::time::MonotonicTime;

const NOW: MonotonicTime = MonotonicTime::from_ns(7);

fn keys<const N: usize>() -> [BackupKey; N] {
    let pair = "pair".parse().expect("a good name");
    let identity = Identity { pair, generation: Generation(1), fingerprint: Fingerprint::new() };
    let mut backups = Backups::new(identity, EntrySequence(0));
    std::array::from_fn(|_| backups.enter(SessionId::HANDSHAKE, Generation(1), ()))
}

fn candidate(id: &str) -> Candidate {
    Candidate { id: id.into(), host: "there".into(), pid: 1, role: "backup".into() }
}

fn ended(backup: BackupKey, complete: bool) -> LiveEvent {
    LiveEvent::SessionEnded { backup, complete, left: false, why: "gone".into() }
}

/// What the judge orders for an event, without what people are told.
fn orders(reign: &mut LiveReign, event: LiveEvent) -> Vec<LiveAction> {
    reign.handle_event(NOW, event);
    drain(reign)
}

fn drain(reign: &mut LiveReign) -> Vec<LiveAction> {
    let actions = std::iter::from_fn(|| reign.poll_action());
    actions.filter(|action| !matches!(action, LiveAction::Tell(_))).collect()
}

/// A side that is protected by `backups`.
fn protected_by(backups: &[BackupKey]) -> LiveReign {
    let mut reign = LiveReign::new(Generation(1));
    for backup in backups {
        reign.handle_event(NOW, LiveEvent::LogBegins(*backup));
        reign.handle_event(NOW, LiveEvent::Protecting(*backup, Generation(1)));
    }
    drain(&mut reign);
    reign
}

#[test]
fn outputs_wait_from_the_moment_a_log_begins() {
    let [backup] = keys();
    let mut reign = LiveReign::new(Generation(1));
    assert_eq!(
        orders(&mut reign, LiveEvent::LogBegins(backup)),
        [LiveAction::Protect, LiveAction::Admit(backup)]
    );
    assert_eq!(
        orders(&mut reign, LiveEvent::Protecting(backup, Generation(1))),
        [LiveAction::Show(Role::Primary)]
    );
}

#[test]
fn a_joiner_that_is_lost_early_costs_nothing() {
    let [backup] = keys();
    let mut reign = LiveReign::new(Generation(1));
    orders(&mut reign, LiveEvent::LogBegins(backup));
    assert_eq!(orders(&mut reign, ended(backup, false))[0], LiveAction::Unprotect);
    assert_eq!(*reign.standing(), Standing::Alone);
}

#[test]
fn outputs_wait_on_when_another_log_has_begun_before_the_joiners_end_is_heard_of() {
    let [lost, next] = keys();
    let mut reign = LiveReign::new(Generation(1));
    orders(&mut reign, LiveEvent::LogBegins(lost));
    orders(&mut reign, LiveEvent::LogBegins(next));
    orders(&mut reign, ended(lost, false));
    assert_eq!(*reign.standing(), Standing::Protected);
    assert!(!orders(&mut reign, LiveEvent::NotBegun(lost)).contains(&LiveAction::Unprotect));
}

#[test]
fn what_only_a_lost_joiner_had_not_acknowledged_leaves() {
    let [backup, joiner] = keys();
    let mut reign = protected_by(&[backup]);
    orders(&mut reign, LiveEvent::LogBegins(joiner));
    assert_eq!(orders(&mut reign, ended(joiner, false)), [LiveAction::Release]);
}

#[test]
fn nothing_leaves_from_a_loss_to_the_verdict_and_then_everything() {
    let [backup] = keys();
    let mut reign = protected_by(&[backup]);
    let next = Generation(2);
    assert_eq!(
        orders(&mut reign, ended(backup, true)),
        [LiveAction::Hold, LiveAction::Show(Role::Deciding), LiveAction::Ask(next)]
    );
    assert_eq!(
        orders(&mut reign, LiveEvent::Verdict(Verdict::Won)),
        [
            LiveAction::Advance(next),
            LiveAction::Unprotect,
            LiveAction::Show(Role::Alone),
            LiveAction::Reopen(next)
        ]
    );
}

#[test]
fn an_arbiter_that_is_away_is_asked_again_and_a_backup_is_turned_away_meanwhile() {
    let [backup, other] = keys();
    let mut reign = protected_by(&[backup]);
    orders(&mut reign, ended(backup, true));
    assert!(orders(&mut reign, LiveEvent::Unreachable("away".into())).is_empty());
    assert_eq!(orders(&mut reign, LiveEvent::LogBegins(other)), [LiveAction::TurnAway(other)]);
    assert_eq!(reign.poll_timeout(), Some(NOW.after(RETRY)));
    reign.handle_timeout(NOW);
    assert!(drain(&mut reign).is_empty());
    reign.handle_timeout(NOW.after(RETRY));
    assert_eq!(drain(&mut reign), [LiveAction::Ask(Generation(2))]);
}

#[test]
fn a_side_that_has_lost_its_generation_halts_once_for_the_first_reason() {
    let [backup] = keys();
    let mut reign = protected_by(&[backup]);
    orders(&mut reign, ended(backup, true));
    let verdict = Verdict::Lost { winner: candidate("b") };
    let orders_given = orders(&mut reign, LiveEvent::Verdict(verdict));
    assert_eq!(orders_given[0], LiveAction::Shut);
    let why = "generation 2 was won by the backup on there (process 1)";
    assert_eq!(orders_given[1], LiveAction::Halt(why.into()));
    let winner = candidate("c");
    let later = LiveEvent::Overtaken { generation: Generation(3), winner };
    assert!(orders(&mut reign, later).is_empty());
}

#[test]
fn a_session_that_this_side_left_is_no_loss() {
    let [backup] = keys();
    let mut reign = protected_by(&[backup]);
    let left = LiveEvent::SessionEnded { backup, complete: true, left: true, why: "left".into() };
    assert!(orders(&mut reign, left).is_empty());
}

#[test]
fn a_side_says_that_it_is_protected_only_when_whoever_stays_knows_its_new_generation() {
    let [stays, lost] = keys();
    let mut reign = protected_by(&[stays, lost]);
    orders(&mut reign, ended(lost, true));
    let won = orders(&mut reign, LiveEvent::Verdict(Verdict::Won));
    assert!(won.contains(&LiveAction::Resume) && won.contains(&LiveAction::Show(Role::Alone)));
    assert_eq!(reign.protected_by(), 0);
    // What was heard before the verdict says nothing about the new generation.
    assert!(orders(&mut reign, LiveEvent::Protecting(stays, Generation(1))).is_empty());
    let told = LiveEvent::Protecting(stays, Generation(2));
    assert_eq!(orders(&mut reign, told), [LiveAction::Show(Role::Primary)]);
}

#[test]
fn a_guest_is_handed_over_once_and_only_to_a_backup_that_could_take_it() {
    let [joining, backup] = keys();
    let mut alone = LiveReign::new(Generation(1));
    assert!(orders(&mut alone, LiveEvent::HandOver).is_empty());
    orders(&mut alone, LiveEvent::LogBegins(joining));
    assert!(orders(&mut alone, LiveEvent::HandOver).is_empty(), "it has no checkpoint yet");
    let mut reign = protected_by(&[backup]);
    let held = [LiveAction::Hold, LiveAction::Show(Role::Deciding)];
    assert_eq!(orders(&mut reign, LiveEvent::HandOver), held);
    assert!(orders(&mut reign, LiveEvent::HandOver).is_empty());
    // It has left the session itself: nobody is lost.
    let left = LiveEvent::SessionEnded { backup, complete: true, left: true, why: "left".into() };
    assert!(orders(&mut reign, left).is_empty());
    // The backup is let ask first, and has won.
    assert_eq!(reign.poll_timeout(), Some(NOW.after(HANDED_OVER)));
    reign.handle_timeout(NOW.after(HANDED_OVER));
    assert_eq!(drain(&mut reign), [LiveAction::Ask(Generation(2))]);
    let lost = LiveEvent::Verdict(Verdict::Lost { winner: candidate("b") });
    assert_eq!(orders(&mut reign, lost)[0], LiveAction::Shut);
}

#[test]
fn a_guest_that_nobody_took_runs_on_where_it_was() {
    let [backup] = keys();
    let mut reign = protected_by(&[backup]);
    orders(&mut reign, LiveEvent::HandOver);
    orders(&mut reign, ended(backup, true));
    reign.handle_timeout(NOW.after(HANDED_OVER));
    assert_eq!(drain(&mut reign), [LiveAction::Ask(Generation(2))]);
    let won = orders(&mut reign, LiveEvent::Verdict(Verdict::Won));
    assert!(won.contains(&LiveAction::Unprotect), "{won:?}");
    assert_eq!(*reign.standing(), Standing::Alone);
}
