//! What must never happen, as seen by somebody who sees everything.

use crate::guest::{Guest, Write};
use crate::models::Storage;
use std::collections::BTreeMap;
use vmft_log::entry::{Generation, OutputSequence, RequestId};

/// Sees everything, and says the first thing that is wrong.
#[derive(Debug, Default)]
pub struct Oracle {
    /// What the world has seen of each output.
    seen: BTreeMap<OutputSequence, u64>,
    /// The last output that each process has let out.
    last: BTreeMap<(usize, u32), OutputSequence>,
    /// Who has let outputs out in each generation.
    reigns: BTreeMap<Generation, (usize, u32)>,
    /// Who went live last, in which generation.
    pub reigning: Option<(usize, Generation)>,
    /// Writes that the guest had begun before that, and waits for.
    inherited: Vec<RequestId>,
    /// The machine was stopped on purpose.
    pub stopped: bool,
    /// What was wrong.
    pub failure: Option<String>,
}

impl Oracle {
    /// Something is wrong. The first counts.
    pub fn fail(&mut self, text: String) {
        self.failure.get_or_insert(text);
    }

    /// How many outputs the world has seen.
    pub fn released(&self) -> usize {
        self.seen.len()
    }

    /// A side goes live with this guest.
    pub fn goes_live(&mut self, side: usize, generation: Generation, guest: &Guest) {
        if self.stopped {
            self.fail(format!("side {side} goes live after a clean stop"));
        }
        if let Some((other, reign)) = self.reigning
            && reign >= generation
        {
            self.fail(format!(
                "side {side} goes live in {generation:?}, side {other} is of {reign:?}"
            ));
        }
        let missing = self.seen.iter().find(|(output, said)| guest.said(**output) != Some(**said));
        if let Some((output, _)) = missing {
            let text =
                format!("{output:?} is out and not in the history of side {side}, which goes live");
            self.fail(text);
        }
        self.reigning = Some((side, generation));
        self.inherited = guest.outstanding().keys().copied().collect();
    }

    /// True if every write that a predecessor may have left is done.
    pub fn is_all_done(&self, guest: &Guest) -> bool {
        self.inherited.iter().all(|request| !guest.outstanding().contains_key(request))
    }

    /// A side is of a later generation from now on.
    pub fn goes_on(&mut self, side: usize, generation: Generation) {
        self.reigning = Some((side, generation));
    }

    /// The world sees an output.
    pub fn sees(
        &mut self,
        from: (usize, u32),
        generation: Generation,
        output: OutputSequence,
        said: u64,
    ) {
        let reign = *self.reigns.entry(generation).or_insert(from);
        if reign != from {
            self.fail(format!("{from:?} and {reign:?} let outputs out in {generation:?}"));
        }
        let last = self.last.insert(from, output);
        if let Some(last) = last.filter(|last| *last >= output) {
            self.fail(format!("side {} lets {output:?} out after {last:?}", from.0));
        }
        let before = *self.seen.entry(output).or_insert(said);
        if before != said {
            self.fail(format!("{output:?} of side {} is not what another said", from.0));
        }
    }

    /// No output may be missing among those seen, as far as they go.
    pub fn check_nothing_is_missing(&mut self, guest: &Guest) {
        let last = self.seen.last_key_value().map_or(0, |(output, _)| output.0);
        let missing = (1..last)
            .map(OutputSequence)
            .find(|output| !guest.is_write(*output) && !self.seen.contains_key(output));
        if let Some(output) = missing {
            self.fail(format!("{output:?} was never let out, later ones were"));
        }
    }

    /// What the guest has been told is on its disk must be there, as the live side reads it: by `sector`.
    pub fn check_disk(&mut self, guest: &Guest, sector: impl Fn(u64) -> Option<u64>) {
        for (at, value) in guest.completed() {
            let busy = guest.outstanding().values().any(|write| write.sector == *at);
            if !busy && sector(*at) != Some(*value) {
                self.fail(format!("sector {at} does not hold what its write completed with"));
            }
        }
    }

    /// A flush is answered: what it covers must be on the storage, or something newer.
    pub fn check_flush(&mut self, guest: &Guest, covers: usize, storage: &Storage) {
        let (covered, later) = guest.uncovered().split_at(covers);
        for (index, write) in covered.iter().enumerate() {
            let newer =
                covered[index + 1..].iter().chain(later).chain(guest.outstanding().values());
            let newer: Vec<_> = newer
                .filter(|other| other.sector == write.sector)
                .map(|other| other.value)
                .collect();
            let found = storage.sector(write.sector);
            if found.is_none_or(|value| value != write.value && !newer.contains(&value)) {
                let Write { sector, value } = *write;
                self.fail(format!(
                    "a flush is answered, and sector {sector}, written as {value:#x}, is \
                     {found:#x?} on the storage"
                ));
            }
        }
    }
}
