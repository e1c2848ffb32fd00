//! A toy guest: a deterministic function of what arrives, with a console, a network and a disk.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use vmft_fuzzing::mix;
use vmft_log::entry::{Arrival, OutputSequence, Packet, RequestId};
use vmft_log::point::ExecutionPoint;
use vmft_vmm::board::DiskOperation;
use vmft_vmm::outputs::{Output, OutputKind};

/// Sectors the guest writes to.
pub const SECTORS: u64 = 8;

/// What a write puts where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Write {
    /// Where.
    pub sector: u64,
    /// What: no two writes put the same.
    pub value: u64,
}

/// A flush that the guest's disk has asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flush {
    /// Its number.
    pub request: RequestId,
    /// It covers the first so many of the writes that no flush has covered.
    pub covers: usize,
}

/// The guest's whole state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    point: ExecutionPoint,
    state: u64,
    /// What each of its outputs said, by number, and whether it was for the disk.
    history: Vec<(u64, bool)>,
    console: u64,
    requests: u64,
    outstanding: BTreeMap<RequestId, Write>,
    /// What the guest has been told is on its disk.
    completed: BTreeMap<u64, u64>,
    /// Its disk asks for a flush when so many completed writes are covered by none; never, with 0.
    flushes_after: usize,
    /// Completed writes that no flush has covered, oldest first.
    uncovered: Vec<Write>,
    flushing: Option<Flush>,
}

impl Guest {
    /// One that has just begun, whose disk flushes after so many writes.
    pub const fn new(seed: u64, flushes_after: usize) -> Self {
        Self {
            point: ExecutionPoint::START,
            state: mix(seed),
            history: Vec::new(),
            console: 0,
            requests: 0,
            outstanding: BTreeMap::new(),
            completed: BTreeMap::new(),
            flushes_after,
            uncovered: Vec::new(),
            flushing: None,
        }
    }

    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("plain state always encodes")
    }

    /// From bytes, whatever comes after them.
    pub fn decode(bytes: &[u8]) -> Result<Self, postcard::Error> {
        postcard::take_from_bytes(bytes).map(|(guest, _)| guest)
    }

    /// Where it is.
    pub const fn point(&self) -> ExecutionPoint {
        self.point
    }

    /// It runs on by itself, up to `point`.
    pub const fn run_to(&mut self, point: ExecutionPoint) {
        self.point = point;
    }

    /// Its last output.
    pub const fn outputs(&self) -> OutputSequence {
        OutputSequence(self.history.len() as u64)
    }

    /// What output number `output` said.
    pub fn said(&self, output: OutputSequence) -> Option<u64> {
        let index = usize::try_from(output.0).ok()?.checked_sub(1)?;
        self.history.get(index).map(|(said, _)| *said)
    }

    /// True if that output was for the disk, which the world sees on the disk only.
    pub fn is_write(&self, output: OutputSequence) -> bool {
        let index = usize::try_from(output.0).ok().and_then(|number| number.checked_sub(1));
        index.and_then(|index| self.history.get(index)).is_some_and(|(_, write)| *write)
    }

    /// Writes whose completion it waits for.
    pub const fn outstanding(&self) -> &BTreeMap<RequestId, Write> {
        &self.outstanding
    }

    /// What it knows to be on its disk.
    pub const fn completed(&self) -> &BTreeMap<u64, u64> {
        &self.completed
    }

    /// What it knows to be done, and no flush has covered, oldest first.
    pub fn uncovered(&self) -> &[Write] {
        &self.uncovered
    }

    /// The flush it waits for.
    pub const fn flushing(&self) -> Option<Flush> {
        self.flushing
    }

    /// An input arrives; what the guest puts out for it.
    pub fn arrive(&mut self, arrival: &Arrival) -> Vec<Output> {
        match arrival {
            Arrival::DiskCompletion { request, .. } => {
                if let Some(write) = self.outstanding.remove(request) {
                    self.completed.insert(write.sector, write.value);
                    if self.flushes_after > 0 {
                        self.uncovered.push(write);
                    }
                }
                if let Some(flush) = self.flushing.take_if(|flush| flush.request == *request) {
                    self.uncovered.drain(..flush.covers);
                }
                self.state = mix(self.state ^ request.0);
                let due = self.flushes_after > 0 && self.uncovered.len() >= self.flushes_after;
                (due && self.flushing.is_none()).then(|| self.flush()).into_iter().collect()
            }
            Arrival::ConsoleInput(bytes) => {
                for byte in bytes {
                    self.state = mix(self.state ^ u64::from(*byte));
                }
                (0..1 + self.state % 2).map(|_| self.put_out()).collect()
            }
            Arrival::ClockSync { .. }
            | Arrival::Entropy { .. }
            | Arrival::WallClock { .. }
            | Arrival::Packets(_) => Vec::new(),
        }
    }

    fn flush(&mut self) -> Output {
        self.requests += 1;
        let request = RequestId(self.requests);
        self.flushing = Some(Flush { request, covers: self.uncovered.len() });
        self.history.push((self.state, true));
        let kind = OutputKind::Disk { disk: 0, request, operation: DiskOperation::Flush };
        Output { sequence: self.outputs(), kind }
    }

    fn put_out(&mut self) -> Output {
        self.state = mix(self.state);
        let value = self.state;
        let sector = value % SECTORS;
        let busy = self.outstanding.values().any(|write| write.sector == sector);
        let kind = match (value >> 8) % 4 {
            0 if !busy => {
                self.requests += 1;
                let request = RequestId(self.requests);
                self.outstanding.insert(request, Write { sector, value });
                let data = value.to_le_bytes().to_vec();
                let operation = DiskOperation::Write { offset: sector, data };
                OutputKind::Disk { disk: 0, request, operation }
            }
            1 => {
                let frame = value.to_le_bytes().to_vec();
                OutputKind::Packet(Packet { frame, ..Packet::default() })
            }
            _ => {
                let (offset, bytes) = (self.console, value.to_le_bytes().to_vec());
                self.console += bytes.len() as u64;
                OutputKind::Console { offset, bytes }
            }
        };
        self.history.push((value, matches!(kind, OutputKind::Disk { .. })));
        Output { sequence: self.outputs(), kind }
    }
}
