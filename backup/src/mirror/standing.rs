//! Whether a guest may begin on a copy of its disk.

use super::record::{CopyState, Record};
use crate::arbiter::Candidate;
use vmft_log::entry::Generation;

/// Why a guest does not begin on a copy, and what would be lost if it did.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// There is no record of it.
    #[error(
        "it is not known as a copy of this pair, whose guest has run before (up to generation {latest}): all \
         that the guest has written would be missing"
    )]
    Unknown {
        /// The arbiter's last generation.
        latest: u64,
    },
    /// It is another pair's.
    #[error(
        "it is a copy of another pair ({theirs}; this is {ours}): what that pair's guest has written would \
         go on as this one's"
    )]
    OtherPair {
        /// Whose it is.
        theirs: String,
        /// This pair.
        ours: String,
    },
    /// It was being copied.
    #[error(
        "it was being filled when that was interrupted: parts of it are as old as they were before"
    )]
    Filling,
    /// It was a backup's in the last generation.
    #[error(
        "it is the copy of a backup of generation {generation}, whose primary may have completed more: \
         flushed writes of its last moments would be lost"
    )]
    Follower {
        /// The generation.
        generation: u64,
    },
    /// Another side has gone on without it.
    #[error(
        "it was left behind in generation {generation}; generation {latest}{} went on without it: all that \
         was written since would be lost",
        whose(winner.as_ref())
    )]
    Behind {
        /// Where it was left.
        generation: u64,
        /// The arbiter's last generation.
        latest: u64,
        /// Whose that was.
        winner: Option<Candidate>,
    },
    /// The arbiter knows less than the copy.
    #[error(
        "it is of generation {generation}, and the arbiter knows of {latest} alone: it is another arbiter, or \
         was made anew; whether another copy has gone on further is not known"
    )]
    ArbiterBehind {
        /// The copy's.
        generation: u64,
        /// The arbiter's last generation.
        latest: u64,
    },
}

fn whose(winner: Option<&Candidate>) -> String {
    winner.map_or_else(String::new, |winner| format!(" ({winner})"))
}

/// A guest may begin on a copy with this `record`, in a pair whose last generation is `latest`, won by
/// `winner`.
///
/// A live side writes its record once, before the first generation that it wins with this copy, and may win
/// more: its name tells. Nobody else has those, and its copy has all that was written in them.
///
/// # Errors
/// Why not.
pub fn may_begin(
    record: Option<&Record>,
    pair: &str,
    latest: Generation,
    winner: Option<&Candidate>,
) -> Result<(), Unfit> {
    let Some(record) = record else {
        // A pair that begins, on whatever disk its operator has for it.
        return if latest == Generation(0) {
            Ok(())
        } else {
            Err(Unfit::Unknown { latest: latest.0 })
        };
    };
    if record.pair != pair {
        return Err(Unfit::OtherPair { theirs: record.pair.clone(), ours: pair.to_owned() });
    }
    let (generation, latest) = (record.generation.0, latest.0);
    if generation > latest {
        return Err(Unfit::ArbiterBehind { generation, latest });
    }
    let is_last = generation == latest;
    let won_all = winner.is_some_and(|winner| !winner.id.is_empty() && winner.id == record.side);
    match record.state {
        CopyState::Filling => Err(Unfit::Filling),
        CopyState::Following if is_last => Err(Unfit::Follower { generation }),
        CopyState::Live if is_last || won_all => Ok(()),
        CopyState::Stopped if is_last => Ok(()),
        CopyState::Live | CopyState::Following | CopyState::Stopped => {
            Err(Unfit::Behind { generation, latest, winner: winner.cloned() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmft_log::disk_copy::CopyId;

    fn candidate(id: &str) -> Candidate {
        Candidate { id: id.into(), host: "h".into(), pid: 1, role: "primary".into() }
    }

    fn record(state: CopyState, generation: u64, side: &str) -> Record {
        let (generation, pair, side) = (Generation(generation), "pair".into(), side.into());
        Record { state, generation, pair, side, copy: CopyId([1; 16]) }
    }

    fn ask(record: &Record, latest: u64, winner: &str) -> Result<(), Unfit> {
        may_begin(Some(record), "pair", Generation(latest), Some(&candidate(winner)))
    }

    #[test]
    fn of_two_copies_at_most_one_may_begin_unless_both_have_everything() {
        use CopyState::{Filling, Following, Live, Stopped};
        // A began the pair in generation 1; then each line is how far A and B have come.
        let cases = [
            // Both hosts are lost while B follows A.
            (record(Live, 0, "a"), record(Following, 1, "b"), 1, "a", [true, false]),
            // A has won another generation after B was lost, and B joined again.
            (record(Live, 0, "a"), record(Following, 1, "b"), 2, "a", [true, false]),
            // B was being filled.
            (record(Live, 0, "a"), record(Filling, 1, "b"), 1, "a", [true, false]),
            // A is lost, B went live.
            (record(Live, 0, "a"), record(Live, 2, "b"), 2, "b", [false, true]),
            // B has won, and was lost before it went live.
            (record(Live, 0, "a"), record(Following, 1, "b"), 2, "b", [false, false]),
            // A follows B.
            (record(Following, 2, "a"), record(Live, 2, "b"), 3, "b", [false, true]),
            // The guest has ended.
            (record(Stopped, 1, "a"), record(Stopped, 1, "b"), 1, "a", [true, true]),
            // B began it again, alone.
            (record(Stopped, 1, "a"), record(Live, 1, "b"), 2, "b", [false, true]),
            // A has stopped alone, B was lost before.
            (record(Stopped, 2, "a"), record(Following, 1, "b"), 2, "a", [true, false]),
        ];
        for (a, b, latest, winner, expected) in cases {
            let may = [&a, &b].map(|copy| ask(copy, latest, winner).is_ok());
            assert_eq!(may, expected, "{a:?}, {b:?}, {latest} by {winner}");
        }
    }

    #[test]
    fn a_new_pair_begins_on_any_disk_and_an_old_one_only_on_its_copies() {
        let ask = |latest| may_begin(None, "pair", Generation(latest), None);
        assert_eq!(ask(0), Ok(()));
        assert_eq!(ask(3), Err(Unfit::Unknown { latest: 3 }));
        let other = Record { pair: "another".into(), ..record(CopyState::Live, 0, "a") };
        let asked = may_begin(Some(&other), "pair", Generation(0), None);
        assert!(matches!(asked, Err(Unfit::OtherPair { .. })));
        let ahead = record(CopyState::Live, 5, "a");
        let asked = may_begin(Some(&ahead), "pair", Generation(2), None);
        assert_eq!(asked, Err(Unfit::ArbiterBehind { generation: 5, latest: 2 }));
    }

    #[test]
    fn whoever_has_no_name_is_nobody() {
        let nameless = record(CopyState::Live, 1, "");
        assert!(ask(&nameless, 2, "").is_err());
    }
}
