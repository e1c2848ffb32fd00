use super::*;
use crate::arbiter::{ANNOUNCE, Candidate, HEAD_START, RETRY, Verdict};
use vmft_log::entry::{EntrySequence, Generation, StopReason};
use vmft_logging_channel::time::MonotonicTime;

const NOW: MonotonicTime = MonotonicTime::from_ns(7);
const RECEIVED: EntrySequence = EntrySequence(70);
const NEXT: Generation = Generation(2);

fn lost() -> FollowEvent {
    over(SessionOver::Lost("silent".into()))
}

fn over(over: SessionOver) -> FollowEvent {
    FollowEvent::SessionOver { over, received: RECEIVED, heard: true }
}

fn winner() -> Candidate {
    Candidate { id: "a".into(), host: "there".into(), pid: 1, role: "primary".into() }
}

/// What the judge orders for an event, without what people are told and shown.
fn orders(reign: &mut FollowReign, event: FollowEvent) -> Vec<FollowAction> {
    reign.handle_event(NOW, event);
    drain(reign)
}

fn at(reign: &mut FollowReign, now: MonotonicTime) -> Vec<FollowAction> {
    reign.handle_timeout(now);
    drain(reign)
}

fn drain(reign: &mut FollowReign) -> Vec<FollowAction> {
    let actions = std::iter::from_fn(|| reign.poll_action());
    let for_people =
        |action: &FollowAction| matches!(action, FollowAction::Tell(_) | FollowAction::Show(_));
    actions.filter(|action| !for_people(action)).collect()
}

fn backup() -> FollowReign {
    FollowReign::new(Generation(1), false, false)
}

#[test]
fn a_backup_goes_live_when_it_has_won_and_has_replayed_everything() {
    let mut reign = backup();
    assert_eq!(orders(&mut reign, lost()), [FollowAction::Ask(NEXT)]);
    assert_eq!(reign.ruling(), Ruling::Wait);
    assert!(orders(&mut reign, FollowEvent::Verdict(Verdict::Won)).is_empty());
    assert_eq!(reign.ruling(), Ruling::GoOn);
    let decided = FollowAction::Decide(Fate::GoLive(NEXT));
    assert_eq!(orders(&mut reign, FollowEvent::LogEnded), [decided]);
}

#[test]
fn the_generation_asked_for_follows_the_last_one_the_primary_told_of() {
    let mut reign = backup();
    orders(&mut reign, FollowEvent::GenerationChanged(Generation(4)));
    assert_eq!(orders(&mut reign, lost()), [FollowAction::Ask(Generation(5))]);
}

#[test]
fn a_backup_that_is_beaten_stops_replaying_and_halts_and_a_standby_joins_again() {
    for standby in [false, true] {
        let mut reign = FollowReign::new(Generation(1), false, standby);
        orders(&mut reign, lost());
        orders(&mut reign, FollowEvent::Verdict(Verdict::Lost { winner: winner() }));
        assert_eq!(reign.ruling(), Ruling::Stop);
        let fate = orders(&mut reign, FollowEvent::LogEnded);
        match &fate[..] {
            // It knows that the generation it asked for is somebody's.
            [FollowAction::Decide(Fate::JoinAgain(known))] => assert!(standby && *known == NEXT),
            [FollowAction::Decide(Fate::Halt(_))] => assert!(!standby),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_backup_that_was_turned_away_while_it_joined_joins_again() {
    let mut reign = backup();
    let over = SessionOver::Lost("connection closed".into());
    orders(&mut reign, FollowEvent::SessionOver { over, received: RECEIVED, heard: false });
    orders(&mut reign, FollowEvent::Verdict(Verdict::Lost { winner: winner() }));
    let again = FollowAction::Decide(Fate::JoinAgain(NEXT));
    assert_eq!(orders(&mut reign, FollowEvent::LogEnded), [again]);
}

#[test]
fn where_others_follow_one_that_is_behind_lets_them_go_first() {
    let mut reign = FollowReign::new(Generation(1), true, false);
    let announce = FollowAction::Announce(NEXT, RECEIVED);
    assert_eq!(orders(&mut reign, lost()), std::slice::from_ref(&announce));
    orders(&mut reign, FollowEvent::Announced { ahead: true });
    assert!(at(&mut reign, NOW).is_empty(), "the others may not have announced yet");
    assert_eq!(at(&mut reign, NOW.after(ANNOUNCE)), [announce]);
    orders(&mut reign, FollowEvent::Announced { ahead: true });
    assert_eq!(at(&mut reign, NOW), [FollowAction::Look(NEXT)]);
    assert!(orders(&mut reign, FollowEvent::Looked { free: true }).is_empty());
    let late = NOW.after(HEAD_START);
    assert_eq!(at(&mut reign, late), [FollowAction::Look(NEXT)]);
    reign.handle_event(late, FollowEvent::Looked { free: true });
    assert_eq!(drain(&mut reign), [FollowAction::Ask(NEXT)]);
}

#[test]
fn one_that_is_not_behind_asks_at_once() {
    let mut reign = FollowReign::new(Generation(1), true, false);
    orders(&mut reign, lost());
    orders(&mut reign, FollowEvent::Announced { ahead: false });
    at(&mut reign, NOW.after(ANNOUNCE));
    let asks = orders(&mut reign, FollowEvent::Announced { ahead: false });
    assert_eq!(asks, [FollowAction::Ask(NEXT)]);
}

#[test]
fn an_arbiter_that_is_away_is_asked_again_until_the_operator_stops_the_side() {
    let mut reign = backup();
    orders(&mut reign, lost());
    orders(&mut reign, FollowEvent::Unreachable("away".into()));
    assert_eq!(at(&mut reign, NOW.after(RETRY)), [FollowAction::Ask(NEXT)]);
    orders(&mut reign, FollowEvent::Unreachable("away".into()));
    orders(&mut reign, FollowEvent::Leave);
    let stopped = FollowAction::Decide(Fate::Stop(StopReason::Operator));
    assert_eq!(orders(&mut reign, FollowEvent::LogEnded), [stopped]);
}

#[test]
fn a_clean_stop_starts_no_race() {
    let mut reign = backup();
    orders(&mut reign, over(SessionOver::Stopped));
    let reason = StopReason::GuestPowerOff;
    let stop = FollowEvent::MachineStopped { reason, owes: false };
    assert_eq!(orders(&mut reign, stop), [FollowAction::Decide(Fate::Stop(reason))]);
}

#[test]
fn what_a_primary_that_died_while_stopping_may_have_left_is_let_out_by_one_side() {
    let mut reign = backup();
    orders(&mut reign, over(SessionOver::Stopped));
    let reason = StopReason::Operator;
    let stop = FollowEvent::MachineStopped { reason, owes: true };
    assert_eq!(orders(&mut reign, stop), [FollowAction::Ask(NEXT)]);
    let fate = orders(&mut reign, FollowEvent::Verdict(Verdict::Won));
    assert_eq!(fate, [FollowAction::Decide(Fate::FinishOutputs(NEXT, reason))]);
}

#[test]
fn a_side_that_has_diverged_never_goes_live() {
    let mut early = backup();
    orders(&mut early, FollowEvent::Diverged("page 7".into()));
    let mut retrying = backup();
    orders(&mut retrying, lost());
    orders(&mut retrying, FollowEvent::Unreachable("away".into()));
    let again = FollowAction::Decide(Fate::JoinAgain(Generation(1)));
    assert_eq!(orders(&mut retrying, FollowEvent::Diverged("page 7".into())), [again]);
    assert!(at(&mut retrying, NOW.after(RETRY)).is_empty());
    let mut asking = backup();
    orders(&mut asking, lost());
    assert!(orders(&mut asking, FollowEvent::Diverged("page 7".into())).is_empty());
    let fate = orders(&mut asking, FollowEvent::Verdict(Verdict::Won));
    assert!(matches!(&fate[..], [FollowAction::Decide(Fate::Halt(_))]), "{fate:?}");
}

#[test]
fn a_side_that_diverges_while_it_asks_does_not_ask_an_arbiter_again_that_was_away() {
    let mut reign = backup();
    orders(&mut reign, lost());
    assert!(orders(&mut reign, FollowEvent::Diverged("page 7".into())).is_empty());
    let again = FollowAction::Decide(Fate::JoinAgain(Generation(1)));
    assert_eq!(orders(&mut reign, FollowEvent::Unreachable("away".into())), [again]);
    assert!(at(&mut reign, NOW.after(RETRY)).is_empty());
}
