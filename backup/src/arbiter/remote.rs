//! An arbiter that a disk's server keeps.

use super::calls::{Answer, Call, PairCall};
use super::{Arbiter, ArbiterError, Candidate, Verdict};
use std::io;
use std::sync::OnceLock;
use vmft_log::entry::{EntrySequence, Generation};
use vmft_nbd::{CallError, Control, NegotiationError};
use vmft_threads::Mutex;

/// Why the arbiter of an export cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The server's, or there is none.
    #[error(transparent)]
    Arbiter(#[from] ArbiterError),
    /// What is there does not serve pairs, or not this side.
    #[error("the disk server at {place}: {problem}")]
    Server {
        /// Where.
        place: String,
        /// What is wrong.
        problem: String,
    },
}

/// The arbiter that goes with an export of `vmft disk serve`. The server refuses the writes of
/// older generations by itself; what this side asks before its writes only tells it to halt.
#[derive(Debug)]
pub struct RemoteArbiter {
    place: String,
    export: String,
    control: Control,
    pair: OnceLock<String>,
    /// The last generation that another side is known to have won.
    lost: Mutex<Option<(Generation, Candidate)>>,
}

impl RemoteArbiter {
    /// Takes the arbiter of `export` for a new pair. `place` is for people.
    ///
    /// # Errors
    /// [`RemoteError`]
    pub fn create(control: Control, place: String, export: &str) -> Result<Self, RemoteError> {
        Self::begin(control, place, export, Call::Create { export: export.to_owned() })
    }

    /// Opens the arbiter of a pair there is.
    ///
    /// # Errors
    /// [`RemoteError`]
    pub fn open(control: Control, place: String, export: &str) -> Result<Self, RemoteError> {
        Self::begin(control, place, export, Call::Open { export: export.to_owned() })
    }

    fn begin(
        control: Control,
        place: String,
        export: &str,
        call: Call,
    ) -> Result<Self, RemoteError> {
        let (pair, lost) = (OnceLock::new(), Mutex::default());
        let arbiter = Self { place, export: export.to_owned(), control, pair, lost };
        let place = || arbiter.place.clone();
        match arbiter.control.call(call.encode()) {
            Ok(answer) => match Answer::decode(&answer) {
                Ok(Answer::Done) => Ok(arbiter),
                Ok(Answer::Failed(failure)) => Err(failure.at(place()).into()),
                Ok(_) => Err(arbiter.unreachable(unexpected()).into()),
                Err(error) => {
                    Err(RemoteError::Server { place: place(), problem: error.to_string() })
                }
            },
            Err(CallError::Unreachable(source)) => Err(arbiter.unreachable(source).into()),
            Err(CallError::Negotiation(NegotiationError::Unsupported)) => {
                Err(RemoteError::Server {
                    place: place(),
                    problem: "it keeps no arbiters; `vmft disk serve` does".to_owned(),
                })
            }
            Err(CallError::Negotiation(error)) => {
                Err(RemoteError::Server { place: place(), problem: error.to_string() })
            }
        }
    }

    fn unreachable(&self, source: io::Error) -> ArbiterError {
        ArbiterError::Unreachable { place: self.place.clone(), source }
    }

    fn another_pair(&self) -> Candidate {
        Candidate::another_pair(&self.place)
    }

    /// `None` if another pair has the arbiter now.
    fn ask(&self, call: PairCall) -> Result<Option<Answer>, ArbiterError> {
        let answer = match self.control.call(Call::OfPair(call).encode()) {
            Ok(answer) => answer,
            Err(CallError::Unreachable(source)) => return Err(self.unreachable(source)),
            Err(CallError::Negotiation(NegotiationError::Refused(_))) => return Ok(None),
            Err(CallError::Negotiation(error)) => {
                return Err(self.unreachable(io::Error::other(error)));
            }
        };
        match Answer::decode(&answer) {
            Ok(Answer::Failed(failure)) => Err(failure.at(self.place.clone())),
            Ok(answer) => Ok(Some(answer)),
            Err(error) => Err(self.unreachable(io::Error::other(error))),
        }
    }

    /// The same where another pair makes an answer useless.
    fn ask_ours(&self, call: PairCall) -> Result<Answer, ArbiterError> {
        let taken = || self.unreachable(io::Error::other("another pair has it now"));
        self.ask(call)?.ok_or_else(taken)
    }

    fn text(&self, call: PairCall) -> Result<String, ArbiterError> {
        match self.ask_ours(call)? {
            Answer::Text(text) => Ok(text),
            _ => Err(self.unreachable(unexpected())),
        }
    }

    /// From now on, a connection begins with the pair's name.
    fn know(&self, pair: String) -> String {
        self.pair
            .get_or_init(|| {
                let resume = Call::Resume { export: self.export.clone(), pair: pair.clone() };
                self.control.stand(resume.encode());
                pair
            })
            .clone()
    }

    fn note(&self, generation: Generation, winner: &Candidate) {
        let mut lost = self.lost.lock();
        *lost = Some((generation, winner.clone()));
    }
}

fn unexpected() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "an answer to another question")
}

impl Arbiter for RemoteArbiter {
    fn place(&self) -> String {
        self.place.clone()
    }

    fn pair_name(&self) -> Result<String, ArbiterError> {
        Ok(self.know(self.text(PairCall::Name)?))
    }

    fn pair(&self, fresh: &str) -> Result<String, ArbiterError> {
        Ok(self.know(self.text(PairCall::Take(fresh.to_owned()))?))
    }

    fn share(&self, who: &Candidate) -> Result<(), ArbiterError> {
        let call = PairCall::Share(who.clone());
        match self.ask_ours(call.clone())? {
            Answer::Done => {
                self.control.stand(Call::OfPair(call).encode());
                Ok(())
            }
            _ => Err(self.unreachable(unexpected())),
        }
    }

    fn leave(&self) {
        // What is held goes with the process.
    }

    fn leave_token(&self, who: &Candidate) -> Result<String, ArbiterError> {
        self.text(PairCall::LeaveToken(who.clone()))
    }

    fn take_token(&self, token: &str) {
        // One that stays says nothing to anybody.
        let _ = self.ask(PairCall::TakeToken(token.to_owned()));
    }

    fn finds(&self, token: &str) -> Result<bool, ArbiterError> {
        match self.ask_ours(PairCall::Finds(token.to_owned()))? {
            Answer::Flag(found) => Ok(found),
            _ => Err(self.unreachable(unexpected())),
        }
    }

    fn try_win(&self, generation: Generation, who: &Candidate) -> Result<Verdict, ArbiterError> {
        let winner = match self.ask(PairCall::TryWin(generation.0, who.clone()))? {
            Some(Answer::Done) => return Ok(Verdict::Won),
            Some(Answer::Winner(Some(winner))) => winner,
            Some(_) => return Err(self.unreachable(unexpected())),
            None => self.another_pair(),
        };
        self.note(generation, &winner);
        Ok(Verdict::Lost { winner })
    }

    fn announce(
        &self,
        generation: Generation,
        who: &Candidate,
        last: EntrySequence,
    ) -> Result<Vec<EntrySequence>, ArbiterError> {
        match self.ask_ours(PairCall::Announce(generation.0, who.clone(), last.0))? {
            Answer::Entries(entries) => Ok(entries.into_iter().map(EntrySequence).collect()),
            _ => Err(self.unreachable(unexpected())),
        }
    }

    fn latest(&self) -> Result<Generation, ArbiterError> {
        match self.ask_ours(PairCall::Latest)? {
            Answer::Generation(latest) => Ok(Generation(latest)),
            _ => Err(self.unreachable(unexpected())),
        }
    }

    fn winner(&self, generation: Generation) -> Result<Option<Candidate>, ArbiterError> {
        let winner = match self.ask(PairCall::Winner(generation.0))? {
            Some(Answer::Winner(winner)) => winner,
            Some(_) => return Err(self.unreachable(unexpected())),
            None => Some(self.another_pair()),
        };
        if let Some(winner) = &winner {
            self.note(generation, winner);
        }
        Ok(winner)
    }

    fn known_winner(&self, generation: Generation) -> Result<Option<Candidate>, ArbiterError> {
        let lost = self.lost.lock();
        Ok(lost.as_ref().filter(|(known, _)| *known == generation).map(|(_, who)| who.clone()))
    }
}
