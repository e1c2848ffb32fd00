//! Messages about what happens again and again: said once, then counted.
//!
//! A guest, a peer, a disk or a stranger can make the same thing happen many thousand times a second.
//! Whoever tells the operator of such things asks [`Repeats`] first:
//!
//! ```
//! use vmft_vmm::world::Repeats;
//!
//! static REFUSED: Repeats = Repeats::new();
//! for _ in 0..1000 {
//!     if let Some(times) = REFUSED.note("no certificate") {
//!         println!("somebody was turned away: no certificate{times}");
//!     }
//! }
//! ```
//! prints four lines: the first time, and the 10th, 100th and 1000th, with their count.

use std::fmt;
use std::time::{Duration, Instant};
use vmft_threads::Mutex;

/// After so long without it, what happens is news again.
const QUIET: Duration = Duration::from_secs(60);
/// Kinds told apart at a time. Whoever makes up more of them shares one count for all those: what a
/// stranger sends must not decide how much is said.
const MAX_KINDS: usize = 16;
/// Said again whenever there were so many times more.
const FACTOR: u64 = 10;

/// How often it has happened, for the end of the message: nothing for the first time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    count: u64,
    /// Times before the last silence that were counted and not said.
    unsaid: u64,
    /// The count is of several kinds together.
    is_mixed: bool,
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self { count, is_mixed: true, .. } => write!(f, " (and others: {count} in all)"),
            Self { unsaid: 1.., .. } => write!(f, " (and {} times before)", self.unsaid),
            Self { count: 0..=1, .. } => Ok(()),
            Self { count, .. } => write!(f, " ({count} times now)"),
        }
    }
}

/// Happenings of one kind that follow each other without a silence.
#[derive(Debug)]
struct Run {
    kind: Option<String>,
    count: u64,
    /// The count that was said last.
    said: u64,
    last: Instant,
}

impl Run {
    fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.last) >= QUIET
    }

    fn note(&mut self, now: Instant) -> Option<Times> {
        let mut unsaid = 0;
        if self.is_over(now) {
            unsaid = self.count - self.said;
            (self.count, self.said) = (0, 0);
        }
        self.last = now;
        self.count += 1;
        let is_due = self.said == 0 || self.count >= self.said.saturating_mul(FACTOR);
        is_due.then(|| {
            self.said = self.count;
            Times { count: self.count, unsaid, is_mixed: self.kind.is_none() }
        })
    }
}

/// Decides when something that happens again and again is said. May be shared by threads, and be a
/// `static`; see the module's example.
#[derive(Debug, Default)]
pub struct Repeats {
    runs: Mutex<Vec<Run>>,
}

impl Repeats {
    /// Nothing has happened yet.
    pub const fn new() -> Self {
        Self { runs: Mutex::new(Vec::new()) }
    }

    /// It has happened now. If it is to be said, how often it was, for the end of the message. `kind`
    /// says what counts as the same: no numbers that differ from time to time.
    #[expect(clippy::disallowed_methods, reason = "messages are for people only")]
    pub fn note(&self, kind: &str) -> Option<Times> {
        self.note_at(kind, Instant::now())
    }

    fn note_at(&self, kind: &str, now: Instant) -> Option<Times> {
        let mut runs = self.runs.lock();
        let known = runs.iter().position(|run| run.kind.as_deref() == Some(kind));
        let index = known.unwrap_or_else(|| {
            let run = |kind| Run { kind, count: 0, said: 0, last: now };
            let kinds = runs.iter().filter(|run| run.kind.is_some()).count();
            if kinds < MAX_KINDS {
                runs.push(run(Some(kind.to_owned())));
                return runs.len() - 1;
            }
            let over = runs.iter().position(|run| run.kind.is_some() && run.is_over(now));
            let index = over.or_else(|| runs.iter().position(|run| run.kind.is_none()));
            let index = index.unwrap_or_else(|| {
                runs.push(run(None));
                runs.len() - 1
            });
            if over.is_some() {
                runs[index] = run(Some(kind.to_owned()));
            }
            index
        });
        runs[index].note(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> Instant {
        #[expect(clippy::disallowed_methods, reason = "a place on the clock to count from")]
        Instant::now()
    }

    fn said(times: Option<Times>) -> Option<String> {
        times.map(|times| times.to_string())
    }

    #[test]
    fn a_flood_is_a_handful_of_lines_that_say_how_many_there_were() {
        let (repeats, now) = (Repeats::new(), start());
        let lines: Vec<String> =
            (0..336_548).filter_map(|_| said(repeats.note_at("full", now))).collect();
        assert_eq!(lines.len(), 6);
        assert_eq!((&*lines[0], &*lines[5]), ("", " (100000 times now)"));
    }

    #[test]
    fn kinds_are_counted_apart() {
        let (repeats, now) = (Repeats::new(), start());
        assert_eq!(said(repeats.note_at("read", now)), Some(String::new()));
        assert_eq!(repeats.note_at("read", now), None);
        assert_eq!(said(repeats.note_at("write", now)), Some(String::new()));
    }

    #[test]
    fn after_a_silence_it_is_news_again_and_what_was_only_counted_is_told() {
        let (repeats, now) = (Repeats::new(), start());
        for _ in 0..5 {
            repeats.note_at("full", now);
        }
        let later = now + QUIET;
        assert_eq!(said(repeats.note_at("full", later)), Some(" (and 4 times before)".into()));
        assert_eq!(repeats.note_at("full", later), None);
    }

    #[test]
    fn whoever_makes_up_kinds_gets_no_more_lines_for_it() {
        let (repeats, now) = (Repeats::new(), start());
        let lines = (0..10_000).filter_map(|kind| repeats.note_at(&kind.to_string(), now)).count();
        assert_eq!(lines, MAX_KINDS + 4);
        // A known kind is not lost among them, and one that is over makes room.
        assert_eq!(repeats.note_at("3", now), None);
        assert_eq!(said(repeats.note_at("new", now + QUIET)), Some(String::new()));
        assert_eq!(repeats.runs.lock().len(), MAX_KINDS + 1);
    }
}
