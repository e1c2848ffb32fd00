//! Judges that are told again what others were told.

use super::schema::{Event, Judge, JudgeInput, JudgeOrder};
use crate::reign::{FollowReign, LiveReign};
use std::collections::{BTreeMap, VecDeque};

#[derive(Debug)]
enum Replayed {
    Live(Box<LiveReign>),
    Follow(Box<FollowReign>),
}

#[derive(Debug)]
struct Running {
    judge: Replayed,
    /// What it orders, and the recorded one is still to be seen to have ordered.
    due: VecDeque<JudgeOrder>,
}

/// Where a recorded judge and the one here differ.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JudgeMismatch {
    /// It ordered something else.
    #[error("judge {judge} is recorded to order {recorded}, and here it orders {here}")]
    Other {
        /// Which.
        judge: u64,
        /// What is recorded.
        recorded: String,
        /// What it should be.
        here: String,
    },
    /// A record of a judge that has not begun.
    #[error("judge {0} has not begun")]
    Unknown(u64),
    /// It is told what is for a judge of the other kind.
    #[error("judge {0} is told what is for a judge of the other kind")]
    Kind(u64),
}

/// Replays the judges of one process: to be given its records in order.
#[derive(Debug, Default)]
pub struct JudgeReplay {
    judges: BTreeMap<u64, Running>,
    inputs: u64,
    orders: u64,
}

fn shown(order: Option<&JudgeOrder>) -> String {
    order.map_or_else(|| "nothing".to_owned(), |order| format!("{order:?}"))
}

impl JudgeReplay {
    /// How many inputs were replayed, and how many orders agreed.
    pub const fn counts(&self) -> (u64, u64) {
        (self.inputs, self.orders)
    }

    /// Another record.
    ///
    /// # Errors
    /// [`JudgeMismatch`]
    pub fn add(&mut self, event: &Event) -> Result<(), JudgeMismatch> {
        match event {
            Event::JudgeBegins { number, judge } => {
                let judge = match *judge {
                    Judge::Live { generation } => {
                        Replayed::Live(Box::new(LiveReign::new(generation)))
                    }
                    Judge::Follow { generation, several, standby } => {
                        Replayed::Follow(Box::new(FollowReign::new(generation, several, standby)))
                    }
                };
                self.judges.insert(*number, Running { judge, due: VecDeque::new() });
            }
            Event::Heard { judge, at, input } => {
                let running = self.judges.get_mut(judge).ok_or(JudgeMismatch::Unknown(*judge))?;
                if let Some(order) = running.due.front() {
                    return Err(JudgeMismatch::Other {
                        judge: *judge,
                        recorded: shown(None),
                        here: shown(Some(order)),
                    });
                }
                match (&mut running.judge, input) {
                    (Replayed::Live(reign), JudgeInput::Timeout) => reign.handle_timeout(*at),
                    (Replayed::Live(reign), JudgeInput::Live(event)) => {
                        reign.handle_event(*at, event.clone());
                    }
                    (Replayed::Follow(reign), JudgeInput::Timeout) => reign.handle_timeout(*at),
                    (Replayed::Follow(reign), JudgeInput::Follow(event)) => {
                        reign.handle_event(*at, event.clone());
                    }
                    _ => return Err(JudgeMismatch::Kind(*judge)),
                }
                match &mut running.judge {
                    Replayed::Live(reign) => {
                        running.due.extend(
                            std::iter::from_fn(|| reign.poll_action()).map(JudgeOrder::Live),
                        );
                    }
                    Replayed::Follow(reign) => {
                        running.due.extend(
                            std::iter::from_fn(|| reign.poll_action()).map(JudgeOrder::Follow),
                        );
                    }
                }
                self.inputs += 1;
            }
            Event::Ordered { judge, order } => {
                let running = self.judges.get_mut(judge).ok_or(JudgeMismatch::Unknown(*judge))?;
                let here = running.due.pop_front();
                if here.as_ref() != Some(order) {
                    return Err(JudgeMismatch::Other {
                        judge: *judge,
                        recorded: shown(Some(order)),
                        here: shown(here.as_ref()),
                    });
                }
                self.orders += 1;
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arbiter::Verdict;
    use crate::reign::{FollowAction, FollowEvent, SessionOver};
    use vmft_log::entry::{EntrySequence, Generation};
    use vmft_logging_channel::time::MonotonicTime;

    fn heard(at: u64, event: FollowEvent) -> Event {
        let input = JudgeInput::Follow(event);
        Event::Heard { judge: 1, at: MonotonicTime::from_ns(at), input }
    }

    fn recorded() -> Vec<Event> {
        let judge = Judge::Follow { generation: Generation(1), several: false, standby: false };
        let mut events = vec![Event::JudgeBegins { number: 1, judge }];
        let mut reign = FollowReign::new(Generation(1), false, false);
        let over = SessionOver::Lost("silence".into());
        let received = EntrySequence(9);
        let lost = FollowEvent::SessionOver { over, received, heard: true };
        for (at, event) in
            [(1, lost), (2, FollowEvent::Verdict(Verdict::Won)), (3, FollowEvent::LogEnded)]
        {
            events.push(heard(at, event.clone()));
            reign.handle_event(MonotonicTime::from_ns(at), event);
            while let Some(action) = reign.poll_action() {
                events.push(Event::Ordered { judge: 1, order: JudgeOrder::Follow(action) });
            }
        }
        events
    }

    #[test]
    fn a_recorded_judge_is_replayed_and_agrees() {
        let mut replay = JudgeReplay::default();
        for event in recorded() {
            replay.add(&event).expect("the same judge");
        }
        let (inputs, orders) = replay.counts();
        assert_eq!(inputs, 3);
        assert!(orders >= 4, "{orders}");
    }

    #[test]
    fn one_that_ordered_anything_else_is_found() {
        let mut events = recorded();
        let last = events.pop().expect("an order");
        let Event::Ordered { order: JudgeOrder::Follow(FollowAction::Decide(_)), .. } = &last
        else {
            panic!("the fate is decided last, not {last:?}")
        };
        let order = JudgeOrder::Follow(FollowAction::Ask(Generation(3)));
        events.push(Event::Ordered { judge: 1, order });
        let mut replay = JudgeReplay::default();
        let found: Result<(), _> = events.iter().try_for_each(|event| replay.add(event));
        assert!(matches!(found, Err(JudgeMismatch::Other { judge: 1, .. })), "{found:?}");
        // What was to be ordered and is not recorded is found by the next input.
        let mut events = recorded();
        events.pop();
        events.push(heard(4, FollowEvent::Leave));
        let mut replay = JudgeReplay::default();
        let found: Result<(), _> = events.iter().try_for_each(|event| replay.add(event));
        assert!(matches!(found, Err(JudgeMismatch::Other { .. })), "{found:?}");
    }
}
