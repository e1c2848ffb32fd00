//! The schema of an event log: JSON, one record a line. `docs/operating.md` says it for readers.

use crate::arbiter::Verdict;
use crate::bounds::BoundChange;
use crate::fault::Fault;
use crate::reign::{FollowAction, FollowEvent, LiveAction, LiveEvent};
use crate::status::{DivergenceReport, Role};
use serde::{Deserialize, Serialize};
use vmft_log::entry::{Generation, OutputSequence, StopReason};
use vmft_log::foreign::ForeignText;
use vmft_logging_channel::backups::BackupKey;
use vmft_logging_channel::time::MonotonicTime;

/// The schema's version. A change that older readers would misread takes the next.
pub const VERSION: u32 = 1;
/// Longest line that is read, in bytes. The longest that is written is far below.
pub const MAX_LINE: usize = 1 << 20;
/// Numbers of generations and records end here: no side comes so far, and whoever counts on has room.
pub const LOWEST_UNUSED_NUMBER: u64 = 1 << 62;

/// A line of an event log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The schema's version.
    pub v: u32,
    /// The record's number in its process, from zero. A gap means that records are lost.
    pub number: u64,
    /// The host's date and time, in microseconds since 1970.
    pub wall_us: u64,
    /// The host's clock since it was booted (CLOCK_BOOTTIME), in nanoseconds: comparable between processes
    /// of one host.
    pub boot_ns: u64,
    /// The side's name.
    pub side: ForeignText,
    /// What it is doing.
    pub role: Role,
    /// Its generation.
    pub generation: u64,
    /// What has happened.
    #[serde(flatten)]
    pub event: Event,
}

/// Who was lost, or has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Peer {
    /// The side that this one followed.
    Primary,
    /// One that followed this side.
    Backup(BackupKey),
}

/// How a side ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// On purpose.
    Stopped(StopReason),
    /// Another side goes on.
    Halted(ForeignText),
    /// It could not go on.
    Failed(ForeignText),
}

/// A judge at its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Judge {
    /// Of a live side.
    Live {
        /// The generation that it has won.
        generation: Generation,
    },
    /// Of a side that follows, for one session.
    Follow {
        /// Its primary's generation.
        generation: Generation,
        /// There may be other backups.
        several: bool,
        /// It joins again instead of halting.
        standby: bool,
    },
}

/// What a judge is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JudgeInput {
    /// The time that it asked for has come.
    Timeout,
    /// To that of a live side.
    Live(LiveEvent),
    /// To that of one that follows.
    Follow(FollowEvent),
}

/// What a judge orders.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JudgeOrder {
    /// That of a live side.
    Live(LiveAction),
    /// That of one that follows.
    Follow(FollowAction),
}

/// What has happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "fields", rename_all = "kebab-case")]
pub enum Event {
    /// The process has begun: the first record of each.
    Begin {
        /// Which program.
        program: ForeignText,
        /// The host's name.
        host: ForeignText,
        /// The host's boot (`/proc/sys/kernel/random/boot_id`): records of one boot share their `boot_ns`.
        boot_id: ForeignText,
        /// The process there.
        pid: u32,
        /// What the arbiter knows it by.
        id: ForeignText,
    },
    /// Its role or its generation has changed; the record has the new ones.
    Role {
        /// What it was.
        from: Role,
    },
    /// Somebody is being sent the machine, to follow this side.
    JoinBegun {
        /// Which.
        backup: BackupKey,
    },
    /// A backup has the machine, and protects this side; or this side has joined a primary.
    JoinComplete {
        /// Which backup, on the side that was joined.
        backup: Option<BackupKey>,
        /// Where the log begins, on the side that has joined.
        point: Option<u64>,
    },
    /// A join came to nothing.
    JoinRefused {
        /// Who was to join, or to be joined.
        with: ForeignText,
        /// Why not.
        why: ForeignText,
        /// How many others are not recorded one by one.
        untold: u64,
    },
    /// A peer must be taken to have failed.
    PeerLost {
        /// Who.
        peer: Peer,
        /// What made this side suspect it.
        why: ForeignText,
        /// Its last sign, on this host's clock since boot.
        last_sign: MonotonicTime,
        /// When this side knew, on the same clock.
        suspected: MonotonicTime,
    },
    /// A session ended, and nobody is lost.
    PeerLeft {
        /// Who.
        peer: Peer,
        /// Why.
        why: ForeignText,
    },
    /// The arbiter is asked for a generation.
    ArbiterAsked {
        /// For this one.
        generation: Generation,
    },
    /// It has answered.
    ArbiterAnswered {
        /// For this one.
        generation: Generation,
        /// What.
        verdict: Verdict,
    },
    /// It cannot be asked now.
    ArbiterUnreachable {
        /// Why.
        why: ForeignText,
    },
    /// A winner has replayed what it had received.
    ReplayDone {
        /// The guest's point.
        point: u64,
        /// The last output that the guest has made.
        marked: OutputSequence,
        /// Of these, how many are not known to be out: they are let out again.
        not_out: u64,
    },
    /// A winner runs the guest.
    Live {
        /// The guest's point.
        point: u64,
        /// Requests to disks and the like that were issued again.
        requests_again: u64,
    },
    /// The first output since then is out.
    FirstOutput {
        /// Which.
        output: OutputSequence,
    },
    /// This side's state, or that of its backup, is not what the log says.
    Diverged(DivergenceReport),
    /// A backup has joined from a checkpoint after that.
    Mended,
    /// A backup is so far behind that its primary is slowed.
    Slowed {
        /// How far, in milliseconds.
        lag_ms: f64,
    },
    /// It is not any more.
    FullSpeed,
    /// An operator has changed how far a backup may be behind.
    BoundChanged(BoundChange),
    /// The channel's thread was late with what was due, heartbeats among it: with as much again, the other side
    /// suspects this one.
    HeartbeatLate {
        /// By how much, in milliseconds.
        late_ms: f64,
    },
    /// A request of a disk has failed at its storage, and is kept: the guest is not told.
    DiskFailed {
        /// The disk, as its operator knows it.
        disk: ForeignText,
        /// What could not be done.
        what: ForeignText,
        /// The storage's reason.
        error: ForeignText,
    },
    /// A request of a disk has been under way for too long.
    DiskHangs {
        /// The disk.
        disk: ForeignText,
        /// What it is that hangs.
        what: ForeignText,
    },
    /// A request that hung has ended.
    DiskAnswers {
        /// The disk.
        disk: ForeignText,
        /// After how long, in milliseconds.
        after_ms: f64,
    },
    /// The guest stands still until an operator resumes it.
    GuestStopped {
        /// Why.
        why: ForeignText,
    },
    /// It goes on.
    GuestResumed {
        /// After how long, in milliseconds.
        after_ms: f64,
    },
    /// Something else that operators are warned of: a disk that fails, a network that is lost.
    Trouble {
        /// The part of the program that says so.
        part: ForeignText,
        /// What.
        text: ForeignText,
    },
    /// Something was made to go wrong.
    FaultPlanted {
        /// What.
        fault: Fault,
        /// Where.
        point: u64,
    },
    /// So many records are missing before this one: the file took nothing.
    EventsLost {
        /// How many.
        count: u64,
    },
    /// A judge begins its work. Its inputs and orders follow.
    JudgeBegins {
        /// Names it in this process.
        number: u64,
        /// Of which kind it is, and what it knows.
        judge: Judge,
    },
    /// A judge is told something.
    Heard {
        /// Which.
        judge: u64,
        /// The time that it is told.
        at: MonotonicTime,
        /// What.
        input: JudgeInput,
    },
    /// A judge orders something.
    Ordered {
        /// Which.
        judge: u64,
        /// What.
        order: JudgeOrder,
    },
    /// The side is over: the last record of each that does not die.
    End {
        /// How.
        how: Ending,
    },
}

/// Why a line is no record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It is longer than any.
    #[error("a line of {0} bytes: a record has at most {MAX_LINE}")]
    TooLong(usize),
    /// Of another version.
    #[error("a record of schema {0}; this program reads schema {VERSION}")]
    Version(u32),
    /// It is nothing of the kind.
    #[error("no record of an event log: {0}")]
    Format(#[from] serde_json::Error),
    /// A number that no side comes to.
    #[error("a {what} of {number}: there is none")]
    Number {
        /// Which.
        what: &'static str,
        /// The number.
        number: u64,
    },
}

/// What is looked at before everything else.
#[derive(Deserialize)]
struct Versioned {
    v: u32,
}

impl Record {
    /// As a line, with its end.
    pub fn to_line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).expect("a record has no map with odd keys");
        line.push(b'\n');
        line
    }

    /// A line without its end.
    ///
    /// # Errors
    /// [`RecordError`]
    pub fn from_line(line: &[u8]) -> Result<Self, RecordError> {
        if line.len() > MAX_LINE {
            return Err(RecordError::TooLong(line.len()));
        }
        let Versioned { v } = serde_json::from_slice(line)?;
        if v != VERSION {
            return Err(RecordError::Version(v));
        }
        let record: Self = serde_json::from_slice(line)?;
        record.check()?;
        Ok(record)
    }

    /// Numbers that are counted on from.
    fn check(&self) -> Result<(), RecordError> {
        let numbers = [("number", self.number), ("generation", self.generation)];
        let inner = match &self.event {
            Event::JudgeBegins {
                judge: Judge::Live { generation } | Judge::Follow { generation, .. },
                ..
            }
            | Event::Heard {
                input:
                    JudgeInput::Live(
                        LiveEvent::Protecting(_, generation)
                        | LiveEvent::Overtaken { generation, .. },
                    )
                    | JudgeInput::Follow(FollowEvent::GenerationChanged(generation)),
                ..
            } => Some(("generation", generation.0)),
            _ => None,
        };
        let wrong =
            numbers.into_iter().chain(inner).find(|(_, number)| *number >= LOWEST_UNUSED_NUMBER);
        wrong.map_or(Ok(()), |(what, number)| Err(RecordError::Number { what, number }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arbiter::Candidate;

    fn record(event: Event) -> Record {
        Record {
            v: VERSION,
            number: 7,
            wall_us: 1_790_000_000_000_000,
            boot_ns: 5_000_000_000,
            side: "b".into(),
            role: Role::Deciding,
            generation: 1,
            event,
        }
    }

    #[test]
    fn a_record_is_one_line_of_json_that_does_not_change() {
        let lost = record(Event::PeerLost {
            peer: Peer::Primary,
            why: "connection closed".into(),
            last_sign: MonotonicTime::from_ns(4_999_000_000),
            suspected: MonotonicTime::from_ns(5_000_000_000),
        });
        let line = String::from_utf8(lost.to_line()).expect("JSON");
        let golden = r#"{"v":1,"number":7,"wall_us":1790000000000000,"boot_ns":5000000000,"side":"b","role":"deciding","generation":1,"kind":"peer-lost","fields":{"peer":"primary","why":"connection closed","last_sign":4999000000,"suspected":5000000000}}"#;
        assert_eq!(line, format!("{golden}\n"));
        assert_eq!(Record::from_line(golden.as_bytes()).expect("a record"), lost);
        let mended = String::from_utf8(record(Event::Mended).to_line()).expect("JSON");
        assert!(mended.ends_with("\"kind\":\"mended\"}\n"), "{mended}");
        let winner = Candidate { id: "i".into(), host: "h".into(), pid: 3, role: "primary".into() };
        let input = JudgeInput::Follow(FollowEvent::Verdict(Verdict::Lost { winner }));
        let heard = record(Event::Heard { judge: 2, at: MonotonicTime::from_ns(9), input });
        let line = heard.to_line();
        let text = String::from_utf8_lossy(&line).into_owned();
        let golden = r#""kind":"heard","fields":{"judge":2,"at":9,"input":{"follow":{"verdict":{"lost":{"winner":{"id":"i","host":"h","pid":3,"role":"primary"}}}}}}}"#;
        assert!(text.trim_end().ends_with(golden), "{text}");
        assert_eq!(Record::from_line(&line[..line.len() - 1]).expect("a record"), heard);
    }

    #[test]
    fn foreign_text_stays_in_its_line() {
        let why = "\x1b[2J\n{\"v\":1}\u{202e}";
        let event = Event::JoinRefused { with: why.into(), why: why.into(), untold: 0 };
        let line = record(event).to_line();
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        let text = String::from_utf8(line).expect("JSON");
        assert!(text.trim_end().chars().all(|c| !c.is_control() && c.is_ascii()), "{text}");
    }

    #[test]
    fn what_is_no_record_is_refused_with_its_reason() {
        let error = |line: &str| Record::from_line(line.as_bytes()).expect_err("no record");
        assert!(error("{\"v\":2,\"x\":1}").to_string().contains("schema 2"));
        assert!(matches!(error("hello"), RecordError::Format(_)));
        assert!(matches!(error("{\"v\":1}"), RecordError::Format(_)));
        let line = String::from_utf8(record(Event::Mended).to_line()).expect("JSON");
        let far = line.replace("\"generation\":1", "\"generation\":18446744073709551615");
        assert!(matches!(error(far.trim_end()), RecordError::Number { what: "generation", .. }));
        let odd = line.replace("mended", "dreamt");
        assert!(error(odd.trim_end()).to_string().contains("dreamt"));
    }
}
