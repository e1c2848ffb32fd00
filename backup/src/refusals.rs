//! What a side that looks for a primary was refused for, told once and not at each try.

use crate::events::{self, Event};
use std::collections::BTreeMap;

/// Why this side was not let join, by whom: for the event log.
#[derive(Debug, Default)]
pub(crate) struct Refusals(BTreeMap<String, String>);

impl Refusals {
    /// True if it is not what it was the last time there.
    fn is_news(&mut self, with: &str, why: &str) -> bool {
        self.0.insert(with.to_owned(), why.to_owned()).is_none_or(|last| last != why)
    }

    /// Notes it, if it is news.
    pub(crate) fn note(&mut self, with: String, why: String) {
        if self.is_news(&with, &why) {
            events::note(|| Event::JoinRefused { with: with.into(), why: why.into(), untold: 0 });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standby_that_asks_in_turn_again_and_again_notes_each_refusal_once() {
        let mut refusals = Refusals::default();
        assert!(refusals.is_news("a", "refused") && refusals.is_news("b", "no place"));
        for _ in 0..100 {
            assert!(!refusals.is_news("a", "refused") && !refusals.is_news("b", "no place"));
        }
        assert!(refusals.is_news("a", "no place") && !refusals.is_news("b", "no place"));
    }
}
