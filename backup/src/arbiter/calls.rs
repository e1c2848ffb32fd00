//! What a side says to a server that keeps a disk and its arbiter: calls, each with one answer.
//!
//! They travel as NBD options ([`vmft_nbd::wire::OPTION_VMFT`]), encoded with postcard behind a byte with the
//! version of this list.

use super::{ArbiterError, Candidate, Verdict};
use serde::{Deserialize, Serialize};
use std::io;
use vmft_log::foreign::ForeignText;

/// Version of the calls and answers.
const VERSION: u8 = 1;

/// What is asked. [`Self::OfPair`] comes after [`Self::Create`], [`Self::Open`] or [`Self::Resume`]
/// on the same connection, and what it holds is held for as long as that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Call {
    /// A new pair takes the arbiter of this export ([`super::DirectoryArbiter::create`]).
    Create {
        /// The export's name.
        export: String,
    },
    /// A side finds the pair there is ([`super::DirectoryArbiter::open`]).
    Open {
        /// The export's name.
        export: String,
    },
    /// The same for a side that was connected before: refused if another pair is there now.
    Resume {
        /// The export's name.
        export: String,
        /// The pair's name.
        pair: String,
    },
    /// Something of the arbiter that was taken or found.
    OfPair(PairCall),
    /// Shares the export's disk ([`vmft_vmm::world::Storage::join`]).
    JoinDisk {
        /// The export's name.
        export: String,
        /// Nobody else may have it.
        first: bool,
    },
    /// What tells the export's disk from a copy of it.
    DiskIdentity {
        /// The export's name.
        export: String,
    },
    /// This connection writes in this generation, until a later one is won.
    Write {
        /// The export's name.
        export: String,
        /// The generation, which has been won.
        generation: u64,
    },
    /// Which of its host's lives the server is in: what was completed and not flushed may be lost
    /// between two. The answer to [`Self::Write`] is the same.
    Life,
}

/// What is asked of a pair's arbiter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PairCall {
    /// [`super::Arbiter::pair_name`]
    Name,
    /// [`super::Arbiter::pair`]
    Take(String),
    /// [`super::Arbiter::share`]
    Share(Candidate),
    /// [`super::Arbiter::leave_token`]
    LeaveToken(Candidate),
    /// [`super::Arbiter::take_token`]
    TakeToken(String),
    /// [`super::Arbiter::finds`]
    Finds(String),
    /// [`super::Arbiter::try_win`]
    TryWin(u64, Candidate),
    /// [`super::Arbiter::announce`]
    Announce(u64, Candidate, u64),
    /// [`super::Arbiter::latest`]
    Latest,
    /// [`super::Arbiter::winner`]
    Winner(u64),
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It is done.
    Done,
    /// A name, a token, an identity.
    Text(String),
    /// Yes or no.
    Flag(bool),
    /// The winner of a generation, if there is one.
    Winner(Option<Candidate>),
    /// A generation.
    Generation(u64),
    /// How far other candidates are.
    Entries(Vec<u64>),
    /// It could not be done.
    Failed(Failure),
}

/// An [`ArbiterError`] of the server's arbiter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Failure {
    /// [`ArbiterError::Unreachable`], and why.
    Unreachable(ForeignText),
    /// [`ArbiterError::Absent`]
    Absent,
    /// [`ArbiterError::InUse`]
    InUse,
}

/// Bytes that are no call, or no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CallFormatError {
    /// Of another version.
    #[error("version {0} of the calls to a disk's server, where version {VERSION} is spoken")]
    Version(u8),
    /// Damaged.
    #[error("a call to a disk's server, or its answer, that cannot be read")]
    Damaged,
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let bytes = postcard::to_extend(value, vec![VERSION]);
    bytes.expect("postcard writes whatever has a fixed shape")
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, CallFormatError> {
    match bytes.split_first() {
        Some((&VERSION, rest)) => {
            let (value, rest) =
                postcard::take_from_bytes(rest).map_err(|_| CallFormatError::Damaged)?;
            if rest.is_empty() { Ok(value) } else { Err(CallFormatError::Damaged) }
        }
        Some((other, _)) => Err(CallFormatError::Version(*other)),
        None => Err(CallFormatError::Damaged),
    }
}

impl Call {
    /// As it is sent.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`CallFormatError`]
    pub fn decode(bytes: &[u8]) -> Result<Self, CallFormatError> {
        decode(bytes)
    }
}

impl Answer {
    /// As it is sent.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`CallFormatError`]
    pub fn decode(bytes: &[u8]) -> Result<Self, CallFormatError> {
        decode(bytes)
    }
}

impl From<ArbiterError> for Answer {
    fn from(error: ArbiterError) -> Self {
        Self::Failed(match error {
            ArbiterError::Unreachable { source, .. } => {
                Failure::Unreachable(source.to_string().into())
            }
            ArbiterError::Absent { .. } => Failure::Absent,
            ArbiterError::InUse { .. } => Failure::InUse,
        })
    }
}

impl From<Verdict> for Answer {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Won => Self::Done,
            Verdict::Lost { winner } => Self::Winner(Some(winner)),
        }
    }
}

impl Failure {
    /// The same error, of the arbiter at `place`.
    pub(super) fn at(self, place: String) -> ArbiterError {
        match self {
            Self::Unreachable(why) => {
                ArbiterError::Unreachable { place, source: io::Error::other(why.to_string()) }
            }
            Self::Absent => ArbiterError::Absent { place },
            Self::InUse => ArbiterError::InUse { place },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_and_answers_come_back_and_nothing_else_is_read() {
        let who = Candidate { id: "a".into(), host: "h".into(), pid: 1, role: "primary".into() };
        let of_pair =
            [PairCall::Latest, PairCall::TryWin(7, who.clone()), PairCall::Finds("x".into())];
        for call in of_pair.map(Call::OfPair) {
            assert_eq!(Call::decode(&call.encode()), Ok(call.clone()));
            let mut long = call.encode();
            long.push(0);
            assert_eq!(Call::decode(&long), Err(CallFormatError::Damaged));
        }
        let answer = Answer::Winner(Some(who));
        assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
        assert_eq!(Call::decode(&[]), Err(CallFormatError::Damaged));
        assert_eq!(Call::decode(&[9, 0]), Err(CallFormatError::Version(9)));
        assert_eq!(Answer::decode(&[VERSION, 200]), Err(CallFormatError::Damaged));
    }

    #[test]
    fn what_is_damaged_is_refused_or_is_another_call() {
        let who = Candidate { id: "a".into(), host: "h".into(), pid: 1, role: "backup".into() };
        let calls = [
            Call::Create { export: "web".into() },
            Call::Resume { export: "web".into(), pair: "p".into() },
            Call::OfPair(PairCall::Announce(7, who.clone(), 9)),
            Call::JoinDisk { export: "web".into(), first: true },
            Call::Write { export: "web".into(), generation: 7 },
        ];
        let answers = [Answer::Winner(Some(who)), Answer::Entries(vec![1, 2])];
        let calls = calls.map(|call| call.encode());
        let answers = answers.map(|answer| answer.encode());
        vmft_fuzzing::cases(2_000, |mut random| {
            let mut bytes = random.pick(&calls).clone();
            vmft_fuzzing::damage(&mut random, &mut bytes, &calls);
            if let Ok(call) = Call::decode(&bytes) {
                assert_eq!(Call::decode(&call.encode()), Ok(call));
            }
            let mut bytes = random.pick(&answers).clone();
            vmft_fuzzing::damage(&mut random, &mut bytes, &answers);
            if let Ok(answer) = Answer::decode(&bytes) {
                assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
            }
        });
    }
}
