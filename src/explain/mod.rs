//! What happened to a pair, from the event logs of its sides: `vmft explain`.
//!
//! [`read`] takes a file apart into the lives of the processes that wrote it, [`Story::of`] puts the lives of
//! all files on one clock and finds the failovers, [`text`] and [`svg`] show that.

mod failover;
mod read;
pub mod svg;
pub mod text;

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;

pub use failover::{Failover, Phase};
pub use read::{Life, ReadError, read};

use std::collections::BTreeMap;
use std::path::Path;
use vmft_backup::events::{Event, JudgeMismatch, JudgeReplay, Record};
use vmft_logging_channel::time::MonotonicTime;

/// A moment of a story, in nanoseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub i128);

impl Moment {
    /// Milliseconds from `earlier` to this moment; negative if it is before that.
    pub fn ms_since(self, earlier: Self) -> f64 {
        (self.0 - earlier.0) as f64 / 1e6
    }
}

/// How the records of one boot of one host are put on the clock that all share.
#[derive(Debug, Clone, Copy)]
struct Clock {
    offset_ns: i128,
}

impl Clock {
    fn of(record: &Record) -> Self {
        Self { offset_ns: i128::from(record.wall_us) * 1000 - i128::from(record.boot_ns) }
    }

    fn moment(self, boot_ns: u64) -> Moment {
        Moment(i128::from(boot_ns) + self.offset_ns)
    }

    fn moment_of(self, time: MonotonicTime) -> Moment {
        self.moment(time.as_ns())
    }
}

/// A record of a story.
#[derive(Debug)]
pub struct Happening<'a> {
    /// When.
    pub moment: Moment,
    /// Whose, as an index of [`Story::lives`].
    pub life: usize,
    /// What.
    pub record: &'a Record,
}

/// What the judges of a life come to when they are told again what they were told.
#[derive(Debug, PartialEq, Eq)]
pub enum Judged {
    /// The same.
    Agreed {
        /// What they were told.
        inputs: u64,
        /// What they ordered.
        orders: u64,
    },
    /// It cannot be tried: records are lost.
    Incomplete,
    /// Something else.
    Differ {
        /// The line of the file.
        line: usize,
        /// What.
        mismatch: JudgeMismatch,
    },
}

/// Lives on one clock.
#[derive(Debug)]
pub struct Story<'a> {
    /// The lives, in the order of the files.
    pub lives: &'a [Life],
    /// Everything that happened, in order.
    pub happenings: Vec<Happening<'a>>,
    /// The failovers among it, in order.
    pub failovers: Vec<Failover>,
    /// The lives are of one boot of one host, and their moments can be compared exactly.
    pub has_one_clock: bool,
}

impl<'a> Story<'a> {
    /// Puts lives together.
    pub fn of(lives: &'a [Life]) -> Self {
        // The wall clock may be set meanwhile, so a boot has one offset, that of its first record.
        let mut boots: BTreeMap<&str, Clock> = BTreeMap::new();
        let mut happenings = Vec::new();
        let mut failovers = Vec::new();
        for (index, life) in lives.iter().enumerate() {
            let Some((_, first)) = life.records.first() else { continue };
            let own = Clock::of(first);
            let clock = match life.boot_id.as_str() {
                "" => own,
                boot => *boots.entry(boot).or_insert(own),
            };
            failovers.extend(failover::failovers(index, life, clock));
            happenings.extend(life.records.iter().map(|(_, record)| Happening {
                moment: clock.moment(record.boot_ns),
                life: index,
                record,
            }));
        }
        happenings.sort_by_key(|happening| happening.moment);
        failovers.sort_by_key(|failover| failover.suspected);
        let has_one_clock =
            boots.len() <= 1 && lives.iter().all(|life| lives.len() == 1 || life.has_boot());
        Self { lives, happenings, failovers, has_one_clock }
    }

    /// When it begins, and ends.
    pub fn span(&self) -> Option<(Moment, Moment)> {
        Some((self.happenings.first()?.moment, self.happenings.last()?.moment))
    }
}

/// Has the judges of a life judge again.
pub fn judge_again(life: &Life) -> Judged {
    let mut replay = JudgeReplay::default();
    for (position, (line, record)) in life.records.iter().enumerate() {
        // What was written before the file was cut is not here.
        let is_gap = record.number != position as u64;
        if is_gap || matches!(record.event, Event::EventsLost { .. }) {
            return Judged::Incomplete;
        }
        if let Err(mismatch) = replay.add(&record.event) {
            return Judged::Differ { line: *line, mismatch };
        }
    }
    let (inputs, orders) = replay.counts();
    Judged::Agreed { inputs, orders }
}

/// Reads several files.
///
/// # Errors
/// [`ReadError`], which names file and line.
pub fn read_all<P: AsRef<Path>>(paths: &[P]) -> Result<Vec<Life>, ReadError> {
    let mut lives = Vec::new();
    for path in paths {
        lives.extend(read(path.as_ref())?);
    }
    Ok(lives)
}
