//! An arbiter in an etcd: a consensus engine that others keep decides the generations.
//!
//! | key, behind `vmft/NAME/` | what |
//! |---|---|
//! | `pair` | the pair's name |
//! | `generation-NNNNNNNNNN` | who won it, put where there was none |
//! | `sides/DIGITS` | a side is there; hangs on its lease |
//! | `join/TOKEN` | left by a side that joins, for the other to find; hangs on its lease |
//! | `candidate-N/ID` | how far that side's log goes |
//!
//! Whatever is asked of a pair is a transaction with a comparison of its name: it is done in no other that
//! has its place meanwhile. All reads are linearizable, as etcd's are that are not asked to be otherwise:
//! what a majority has decided is what is read. A transaction whose answer does not come may have been
//! done, so each is one that can be asked twice.

mod lease;
mod members;
mod wire;

pub use lease::LEASE_SECONDS;

use super::directory::{announced_number, fresh_digits, is_token};
use super::{Arbiter, ArbiterError, Candidate, Verdict};
use lease::{KEEP_EVERY, Lease, unexpected};
use members::{CALL_LIMIT, Members};
use std::fmt;
use std::io;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use vmft_log::entry::{EntrySequence, Generation};
use vmft_log::wire::MAX_COUNT;
use vmft_logging_channel::transport::PeerAddress;
use vmft_sandbox::Task;
use vmft_threads::Mutex;
use wire::{Answer, Compare, LIST_LIMIT, LeaseId, Operation, Pair, Question, Transaction};

/// Most members of an etcd that are named: it has five or seven.
pub const MAX_MEMBERS: usize = 9;

const GENERATION: &str = "generation-";

/// Where a pair's arbiter is in an etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdPlace {
    /// Where etcd's members take clients, at least one and at most [`MAX_MEMBERS`].
    pub members: Vec<PeerAddress>,
    /// What the pair is called there: a name of its own, without `/`.
    pub name: String,
}

impl EtcdPlace {
    /// Makes sure that all members may be asked as it is said. Blocks.
    ///
    /// # Errors
    /// [`ExposedMember`]
    pub fn check(&self) -> Result<(), ExposedMember> {
        let exposed = self.members.iter().find(|member| member.check().is_err());
        exposed.map_or(Ok(()), |member| Err(ExposedMember { member: member.place.to_string() }))
    }
}

/// A member on another host that would be asked without TLS.
#[derive(Debug, thiserror::Error)]
#[error(
    "the etcd member {member} is not of this host, and without TLS whoever is between decides which side \
     goes on: add tls_dir=DIR with certificates of etcd's authority, or insecure=on"
)]
pub struct ExposedMember {
    member: String,
}

impl fmt::Display for EtcdPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let members: Vec<_> = self.members.iter().map(|member| member.place.to_string()).collect();
        write!(f, "etcd={},name={}", members.join(","), self.name)
    }
}

/// The arbiter that a pair has in an etcd. Etcd decides who reigns; it fences no disk.
#[derive(Debug)]
pub struct EtcdArbiter {
    place: EtcdPlace,
    keys: Keys,
    members: Arc<Members>,
    lease: Arc<Lease>,
    /// The pair's name, once it is known.
    pair: OnceLock<String>,
    /// The last generation that another side is known to have won.
    lost: Mutex<Option<(Generation, Candidate)>>,
    /// Ends the thread that keeps the lease.
    keeper: Option<Sender<()>>,
}

/// The keys of a pair.
#[derive(Debug, Clone)]
struct Keys {
    root: String,
    side: String,
}

impl Keys {
    fn of(place: &EtcdPlace) -> io::Result<Self> {
        let root = format!("vmft/{}/", place.name);
        let side = format!("{root}sides/{}", fresh_digits()?);
        Ok(Self { root, side })
    }

    fn pair(&self) -> String {
        format!("{}pair", self.root)
    }

    fn sides(&self) -> String {
        format!("{}sides/", self.root)
    }

    fn generations(&self) -> String {
        format!("{}{GENERATION}", self.root)
    }

    fn generation(&self, generation: Generation) -> String {
        format!("{}{:010}", self.generations(), generation.0)
    }

    fn token(&self, token: &str) -> String {
        format!("{}join/{token}", self.root)
    }

    fn candidates(&self, generation: Generation) -> String {
        format!("{}candidate-{}/", self.root, generation.0)
    }

    /// True for a pair's own.
    fn is(&self, pair: &str) -> Compare {
        Compare::Is { key: self.pair(), value: pair.to_owned() }
    }

    /// What says that this side is there, where the pair is still the one of this name.
    fn be_there(&self, pair: &str) -> impl Fn(LeaseId) -> Transaction + Send + use<> {
        let (ours, key) = (self.is(pair), self.side.clone());
        let get = Operation::Get { key: self.pair() };
        move |lease| Transaction {
            compare: vec![ours.clone()],
            success: vec![Operation::Put {
                key: key.clone(),
                value: String::new(),
                lease: Some(lease),
            }],
            failure: vec![get.clone()],
        }
    }
}

/// What a transaction of a pair has read, or who has its place.
enum OfPair {
    Ours(Vec<Vec<Pair>>),
    /// What was to be so besides is not.
    Otherwise(Vec<Vec<Pair>>),
    Others,
}

/// The name of the pair there is, of a transaction that has read that.
fn pair_there(read: &[Pair]) -> io::Result<&str> {
    let nobody = || io::Error::other("the pair's keys are not there any more");
    read.first().map(|pair| pair.value.as_str()).ok_or_else(nobody)
}

fn winner_there(read: Option<&Vec<Pair>>) -> io::Result<Option<Candidate>> {
    let parse = |pair: &Pair| serde_json::from_str(&pair.value).map_err(io::Error::from);
    read.and_then(|read| read.first()).map(parse).transpose()
}

/// The generation of such a key, if that is one of a pair's.
fn generation_of(keys: &Keys, pair: &Pair) -> Option<u64> {
    let number = pair.key.strip_prefix(&keys.generations())?.parse().ok()?;
    let is_ours = number <= MAX_COUNT && pair.key == keys.generation(Generation(number));
    is_ours.then_some(number)
}

impl EtcdArbiter {
    fn at(place: &EtcdPlace) -> Result<Self, ArbiterError> {
        let unreachable = |source| ArbiterError::Unreachable { place: place.to_string(), source };
        let members = Arc::new(Members::start(&place.members).map_err(unreachable)?);
        let lease = Arc::new(Lease::new(Arc::clone(&members)));
        let (keeper, end) = channel();
        let kept = Arc::clone(&lease);
        let keep = move || {
            while end.recv_timeout(KEEP_EVERY) == Err(RecvTimeoutError::Timeout) {
                kept.keep();
            }
        };
        vmft_sandbox::spawn(Task::Arbiter, "etcd-lease", keep).map_err(unreachable)?;
        Ok(Self {
            place: place.clone(),
            keys: Keys::of(place).map_err(unreachable)?,
            members,
            lease,
            pair: OnceLock::new(),
            lost: Mutex::default(),
            keeper: Some(keeper),
        })
    }

    /// Takes the place for a new pair, where no side is there.
    ///
    /// # Errors
    /// [`ArbiterError::InUse`], [`ArbiterError::Unreachable`].
    pub fn create(place: &EtcdPlace) -> Result<Self, ArbiterError> {
        let arbiter = Self::at(place)?;
        let keys = &arbiter.keys;
        let take = |lease| Transaction {
            compare: vec![Compare::NoneUnder { prefix: keys.sides() }],
            success: vec![Operation::Put {
                key: keys.side.clone(),
                value: String::new(),
                lease: Some(lease),
            }],
            failure: vec![Operation::Get { key: keys.side.clone() }],
        };
        match arbiter.lease.ask(take) {
            Ok(Answer::Transaction { succeeded: true, .. }) => Ok(arbiter),
            // Asked twice, because the answer was lost.
            Ok(Answer::Transaction { read, .. }) if read.iter().any(|read| !read.is_empty()) => {
                Ok(arbiter)
            }
            Ok(Answer::Transaction { .. }) => Err(ArbiterError::InUse { place: arbiter.place() }),
            Ok(_) => Err(arbiter.unreachable(unexpected())),
            Err(error) => Err(arbiter.unreachable(error)),
        }
    }

    /// Finds the pair there is. Nothing changes.
    ///
    /// # Errors
    /// [`ArbiterError::Absent`], [`ArbiterError::Unreachable`].
    pub fn open(place: &EtcdPlace) -> Result<Self, ArbiterError> {
        let arbiter = Self::at(place)?;
        let is_there = arbiter.name_there().map_err(|error| arbiter.unreachable(error))?.is_some();
        if is_there { Ok(arbiter) } else { Err(ArbiterError::Absent { place: arbiter.place() }) }
    }

    fn unreachable(&self, source: io::Error) -> ArbiterError {
        ArbiterError::Unreachable { place: self.place(), source }
    }

    fn ask(&self, transaction: Transaction) -> io::Result<(bool, Vec<Vec<Pair>>)> {
        match self.members.ask(&Question::Transaction(transaction), CALL_LIMIT)? {
            Answer::Transaction { succeeded, read, .. } => Ok((succeeded, read)),
            _ => Err(unexpected()),
        }
    }

    fn name_there(&self) -> io::Result<Option<String>> {
        let success = vec![Operation::Get { key: self.keys.pair() }];
        let (_, read) = self.ask(Transaction { success, ..Transaction::default() })?;
        Ok(read.into_iter().flatten().next().map(|pair| pair.value))
    }

    /// The name of the pair that this side belongs to.
    fn ours(&self) -> io::Result<&str> {
        if let Some(name) = self.pair.get() {
            return Ok(name);
        }
        let name = self.name_there()?.map(|value| Pair { key: String::new(), value });
        let name = pair_there(name.as_slice())?.to_owned();
        Ok(self.pair.get_or_init(|| name))
    }

    /// Does something where the pair is ours, and `also` is so; else reads the pair's name and `instead`.
    fn of_pair(
        &self,
        also: Vec<Compare>,
        success: Vec<Operation>,
        instead: Vec<Operation>,
    ) -> io::Result<OfPair> {
        let ours = self.ours()?;
        let compare = [vec![self.keys.is(ours)], also].concat();
        let name = Operation::Get { key: self.keys.pair() };
        let failure = [vec![name], instead].concat();
        let (succeeded, mut read) = self.ask(Transaction { compare, success, failure })?;
        if succeeded {
            return Ok(OfPair::Ours(read));
        }
        let name = read.remove(0);
        if pair_there(&name)? == ours { Ok(OfPair::Otherwise(read)) } else { Ok(OfPair::Others) }
    }

    /// The same where another pair makes the answer useless.
    fn of_ours(&self, success: Vec<Operation>) -> io::Result<Vec<Vec<Pair>>> {
        match self.of_pair(Vec::new(), success, Vec::new())? {
            OfPair::Ours(read) => Ok(read),
            OfPair::Others => Err(io::Error::other("another pair has it now")),
            OfPair::Otherwise(_) => Err(unexpected()),
        }
    }

    fn note(&self, generation: Generation, winner: &Candidate) {
        *self.lost.lock() = Some((generation, winner.clone()));
    }

    fn decide(&self, generation: Generation, who: &Candidate) -> io::Result<Verdict> {
        let key = self.keys.generation(generation);
        let free = vec![Compare::Absent { key: key.clone() }];
        let value = serde_json::to_string(who)?;
        let put = vec![Operation::Put { key: key.clone(), value, lease: None }];
        let winner = match self.of_pair(free, put, vec![Operation::Get { key }])? {
            OfPair::Ours(_) => return Ok(Verdict::Won),
            // It is there already: whose it is counts, also if it is ours because an answer was lost.
            OfPair::Otherwise(read) => winner_there(read.first())?.ok_or_else(unexpected)?,
            OfPair::Others => Candidate::another_pair(&self.place()),
        };
        if winner.id == who.id {
            return Ok(Verdict::Won);
        }
        self.note(generation, &winner);
        Ok(Verdict::Lost { winner })
    }

    fn look(&self, generation: Generation) -> io::Result<Option<Candidate>> {
        let get = vec![Operation::Get { key: self.keys.generation(generation) }];
        let winner = match self.of_pair(Vec::new(), get, Vec::new())? {
            OfPair::Ours(read) => winner_there(read.first())?,
            OfPair::Others => Some(Candidate::another_pair(&self.place())),
            OfPair::Otherwise(_) => return Err(unexpected()),
        };
        if let Some(winner) = &winner {
            self.note(generation, winner);
        }
        Ok(winner)
    }
}

impl Drop for EtcdArbiter {
    fn drop(&mut self) {
        drop(self.keeper.take());
        self.lease.revoke();
    }
}

impl Arbiter for EtcdArbiter {
    fn place(&self) -> String {
        self.place.to_string()
    }

    fn pair_name(&self) -> Result<String, ArbiterError> {
        let name = || -> io::Result<String> {
            let there = self.name_there()?.map(|value| Pair { key: String::new(), value });
            let name = pair_there(there.as_slice())?.to_owned();
            Ok(self.pair.get_or_init(|| name).clone())
        };
        name().map_err(|source| self.unreachable(source))
    }

    fn pair(&self, fresh: &str) -> Result<String, ArbiterError> {
        let key = self.keys.pair();
        let transaction = Transaction {
            compare: vec![Compare::Absent { key: key.clone() }],
            success: vec![Operation::Put { key, value: fresh.to_owned(), lease: None }],
            failure: Vec::new(),
        };
        self.ask(transaction).map_err(|source| self.unreachable(source))?;
        self.pair_name()
    }

    fn share(&self, _: &Candidate) -> Result<(), ArbiterError> {
        let unreachable = |source| self.unreachable(source);
        let pair = self.ours().map_err(unreachable)?;
        match self.lease.ask(self.keys.be_there(pair)) {
            Ok(Answer::Transaction { succeeded: true, .. }) => {
                self.lease.stand(self.keys.be_there(pair));
                Ok(())
            }
            Ok(Answer::Transaction { .. }) => Err(ArbiterError::InUse { place: self.place() }),
            Ok(_) => Err(unreachable(unexpected())),
            Err(error) => Err(unreachable(error)),
        }
    }

    fn leave(&self) {
        self.lease.revoke();
    }

    fn leave_token(&self, _: &Candidate) -> Result<String, ArbiterError> {
        let leave = || -> io::Result<String> {
            let (digits, ours) = (fresh_digits()?, self.keys.is(self.ours()?));
            let leave = |lease| Transaction {
                compare: vec![ours.clone()],
                success: vec![Operation::Put {
                    key: self.keys.token(&digits),
                    value: String::new(),
                    lease: Some(lease),
                }],
                failure: Vec::new(),
            };
            match self.lease.ask(leave)? {
                Answer::Transaction { succeeded: true, .. } => Ok(digits),
                Answer::Transaction { .. } => Err(io::Error::other("another pair has it now")),
                _ => Err(unexpected()),
            }
        };
        leave().map_err(|source| self.unreachable(source))
    }

    fn take_token(&self, token: &str) {
        if is_token(token) {
            let success = vec![Operation::Delete { key: self.keys.token(token) }];
            // One that stays says nothing to anybody, and runs out.
            let _ = self.ask(Transaction { success, ..Transaction::default() });
        }
    }

    fn finds(&self, token: &str) -> Result<bool, ArbiterError> {
        if !is_token(token) {
            return Ok(false);
        }
        let read = self.of_ours(vec![Operation::Get { key: self.keys.token(token) }]);
        let read = read.map_err(|source| self.unreachable(source))?;
        Ok(read.iter().any(|read| !read.is_empty()))
    }

    fn try_win(&self, generation: Generation, who: &Candidate) -> Result<Verdict, ArbiterError> {
        self.decide(generation, who).map_err(|source| self.unreachable(source))
    }

    fn announce(
        &self,
        generation: Generation,
        who: &Candidate,
        last: EntrySequence,
    ) -> Result<Vec<EntrySequence>, ArbiterError> {
        let prefix = self.keys.candidates(generation);
        let mine = format!("{prefix}{}", who.id);
        let put = Operation::Put { key: mine.clone(), value: last.0.to_string(), lease: None };
        let read = self.of_ours(vec![put, Operation::List { prefix }]);
        let read = read.map_err(|source| self.unreachable(source))?;
        let others = read.into_iter().flatten().filter(|pair| pair.key != mine);
        Ok(others.filter_map(|pair| announced_number(&pair.value)).collect())
    }

    fn latest(&self) -> Result<Generation, ArbiterError> {
        let read = self.of_ours(vec![Operation::List { prefix: self.keys.generations() }]);
        let read = read.map_err(|source| self.unreachable(source))?;
        let latest = read.iter().flatten().filter_map(|pair| generation_of(&self.keys, pair)).max();
        let is_hidden = latest.is_none() && read.iter().any(|read| read.len() >= LIST_LIMIT);
        match latest {
            None if is_hidden => {
                let why = "keys that no pair makes hide the pair's generations";
                Err(self.unreachable(io::Error::new(io::ErrorKind::InvalidData, why)))
            }
            latest => Ok(Generation(latest.unwrap_or(0))),
        }
    }

    fn winner(&self, generation: Generation) -> Result<Option<Candidate>, ArbiterError> {
        self.look(generation).map_err(|source| self.unreachable(source))
    }

    fn known_winner(&self, generation: Generation) -> Result<Option<Candidate>, ArbiterError> {
        let lost = self.lost.lock();
        Ok(lost.as_ref().filter(|(known, _)| *known == generation).map(|(_, who)| who.clone()))
    }
}
