//! The requests of one disk that are on their way, and which of them have to wait.
//!
//! A request waits while an earlier one is on its way that it must not overtake: one that
//! overlaps it, if either writes; for a flush, any earlier write. The order of requests and of
//! completions is the same on both sides of a pair, so both sides send out the same requests
//! at the same points, and a request that is repeated after a failover cannot change its
//! outcome.

use crate::board::DiskOperation;
use crate::devices::virtio::queue::{MAX_CHAIN_DESCRIPTORS, Segment, total_len};
use crate::devices::{InvalidState, require};
use crate::memory::GuestMemoryMmap;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use vmft_logging_channel::entry::RequestId;

/// Most requests on their way at a time: what the queue holds.
pub const MAX_IN_FLIGHT: usize = 256;
/// Data bytes on their way beyond which no further request is taken.
pub const MAX_IN_FLIGHT_BYTES: u64 = 8 << 20;

/// One request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Its name to the outside world.
    pub id: RequestId,
    /// Its chain's name to the driver.
    pub head: u16,
    /// Where the data of a read goes.
    pub buffers: Vec<Segment>,
    /// Guest-physical address of the status byte.
    pub status: u64,
    /// What it does; a write keeps its data to be repeated after a failover.
    pub operation: DiskOperation,
    /// It was sent out.
    pub issued: bool,
    /// The driver has reset the device since: nobody waits for the answer.
    pub abandoned: bool,
}

/// Everything a restored disk needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestsState {
    /// The name of the last request.
    pub last: RequestId,
    /// The requests, oldest first.
    pub requests: VecDeque<Request>,
}

/// The requests of one disk, oldest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requests {
    state: RequestsState,
    /// Data bytes of all requests.
    bytes: u64,
    /// Requests not yet sent out.
    waiting: usize,
}

impl Default for Requests {
    fn default() -> Self {
        let state = RequestsState { last: RequestId(0), requests: VecDeque::new() };
        Self { state, bytes: 0, waiting: 0 }
    }
}

/// The bytes of the disk an operation touches: first, one beyond the last, and whether it writes.
fn extent(operation: &DiskOperation) -> Option<(u64, u64, bool)> {
    match operation {
        DiskOperation::Read { offset, len } => Some((*offset, offset + u64::from(*len), false)),
        DiskOperation::Write { offset, data } => Some((*offset, offset + data.len() as u64, true)),
        DiskOperation::Flush => None,
    }
}

/// True if `later` must not overtake `earlier`.
fn must_wait(later: &DiskOperation, earlier: &DiskOperation) -> bool {
    match (extent(later), extent(earlier)) {
        (None, Some((_, _, writes))) => writes,
        (Some((start, end, writes)), Some((other_start, other_end, other_writes))) => {
            (writes || other_writes) && start < other_end && other_start < end
        }
        (_, None) => false,
    }
}

fn data_len(operation: &DiskOperation) -> u64 {
    extent(operation).map_or(0, |(start, end, _)| end - start)
}

impl Requests {
    /// True if another request may be taken.
    pub fn have_room(&self) -> bool {
        self.state.requests.len() < MAX_IN_FLIGHT && self.bytes < MAX_IN_FLIGHT_BYTES
    }

    /// The request of that name, if it was sent out.
    pub fn find(&self, id: RequestId) -> Option<&Request> {
        self.position(id).map(|index| &self.state.requests[index])
    }

    /// The requests that were sent out, oldest first.
    pub fn issued(&self) -> impl Iterator<Item = &Request> {
        self.state.requests.iter().filter(|request| request.issued)
    }

    fn position(&self, id: RequestId) -> Option<usize> {
        let index = self.state.requests.binary_search_by_key(&id, |request| request.id).ok()?;
        self.state.requests[index].issued.then_some(index)
    }

    pub(super) fn add(
        &mut self,
        head: u16,
        buffers: Vec<Segment>,
        status: u64,
        operation: DiskOperation,
    ) {
        self.state.last.0 += 1;
        self.bytes += data_len(&operation);
        self.waiting += 1;
        let id = self.state.last;
        let (issued, abandoned) = (false, false);
        // Only a read's answer goes there; other requests have no use for the addresses.
        let buffers = match operation {
            DiskOperation::Read { .. } => buffers,
            _ => Vec::new(),
        };
        let request = Request { id, head, buffers, status, operation, issued, abandoned };
        self.state.requests.push_back(request);
    }

    pub(super) fn remove(&mut self, id: RequestId) -> Option<Request> {
        let request = self.state.requests.remove(self.position(id)?)?;
        self.bytes -= data_len(&request.operation);
        Some(request)
    }

    /// Marks every request that need not wait as sent out, and shows it to `send`.
    pub(super) fn issue(&mut self, mut send: impl FnMut(RequestId, &DiskOperation)) {
        if self.waiting == 0 {
            return;
        }
        let requests = &mut self.state.requests;
        for index in 0..requests.len() {
            let request = &requests[index];
            let overtakes = |earlier: &Request| must_wait(&request.operation, &earlier.operation);
            if request.issued || requests.iter().take(index).any(overtakes) {
                continue;
            }
            send(request.id, &request.operation);
            requests[index].issued = true;
            self.waiting -= 1;
        }
    }

    /// Forgets the requests that were not sent out, and that anybody waits for the others.
    pub(super) fn abandon(&mut self) {
        self.state.requests.retain_mut(|request| {
            request.abandoned = true;
            // An abandoned request needs no addresses: nothing is written for it any more.
            request.buffers = Vec::new();
            request.status = 0;
            request.head = 0;
            request.issued
        });
        self.waiting = 0;
        self.bytes = self.state.requests.iter().map(|request| data_len(&request.operation)).sum();
    }

    pub(super) fn save(&self) -> RequestsState {
        let Self { state, bytes: _, waiting: _ } = self;
        state.clone()
    }

    /// The saved requests. `heads` is the number of descriptors of the queue, or zero if no
    /// request can be waited for; `on_disk` says whether an operation is within the disk.
    pub(super) fn restore(
        state: &RequestsState,
        heads: u16,
        memory: &GuestMemoryMmap,
        on_disk: impl Fn(&DiskOperation) -> bool,
    ) -> Result<Self, InvalidState> {
        let check = |holds, reason| require("disk requests", holds, reason);
        let RequestsState { last, requests } = state;
        check(requests.len() <= MAX_IN_FLIGHT, "too many")?;
        let mut previous = RequestId(0);
        for (index, request) in requests.iter().enumerate() {
            let Request { id, head, buffers, status, operation, issued, abandoned } = request;
            check(previous < *id && *id <= *last, "not numbered in order")?;
            previous = *id;
            check(on_disk(operation), "beyond the disk")?;
            check(buffers.len() <= MAX_CHAIN_DESCRIPTORS, "too many buffers")?;
            let within = |segment: &Segment| segment.len > 0 && segment.is_memory(memory);
            check(buffers.iter().all(within), "a buffer outside memory")?;
            if *abandoned {
                let blank = buffers.is_empty() && *status == 0 && *head == 0;
                check(*issued && blank, "abandoned, but somebody waits for it")?;
            } else {
                check(*head < heads, "no such descriptor")?;
                check(
                    Segment { address: *status, len: 1 }.is_memory(memory),
                    "status outside memory",
                )?;
                let wanted = match operation {
                    DiskOperation::Read { len, .. } => u64::from(*len),
                    _ => 0,
                };
                check(total_len(buffers) == wanted, "buffers and length differ")?;
            }
            let mut earlier = requests.iter().take(index);
            let waits = earlier.any(|earlier| must_wait(operation, &earlier.operation));
            check(*issued != waits, "sent out against the order")?;
        }
        let bytes = requests.iter().map(|request| data_len(&request.operation)).sum();
        let waiting = requests.iter().filter(|request| !request.issued).count();
        Ok(Self { state: state.clone(), bytes, waiting })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(offset: u64, len: u32) -> DiskOperation {
        DiskOperation::Read { offset, len }
    }

    fn write(offset: u64, len: usize) -> DiskOperation {
        DiskOperation::Write { offset, data: vec![7; len] }
    }

    /// Adds the operations and returns the numbers sent out by then.
    fn add(requests: &mut Requests, operations: &[DiskOperation]) -> Vec<u64> {
        for operation in operations {
            requests.add(0, Vec::new(), 0, operation.clone());
        }
        issue(requests)
    }

    fn issue(requests: &mut Requests) -> Vec<u64> {
        let mut sent = Vec::new();
        requests.issue(|id, _| sent.push(id.0));
        sent
    }

    fn finish(requests: &mut Requests, id: u64) -> Vec<u64> {
        requests.remove(RequestId(id)).expect("sent out");
        issue(requests)
    }

    #[test]
    fn requests_that_do_not_meet_go_out_at_once() {
        let mut requests = Requests::default();
        let operations = [write(0, 512), write(512, 512), read(1024, 512), read(1024, 4096)];
        assert_eq!(add(&mut requests, &operations), [1, 2, 3, 4]);
    }

    #[test]
    fn an_overlapping_request_waits_for_all_earlier_ones_it_meets() {
        let mut requests = Requests::default();
        let operations = [write(0, 1024), read(512, 1024), write(1024, 512), read(8192, 512)];
        assert_eq!(add(&mut requests, &operations), [1, 4]);
        assert_eq!(finish(&mut requests, 1), [2], "3 would overwrite what 2 reads");
        assert_eq!(finish(&mut requests, 2), [3]);
    }

    #[test]
    fn a_flush_waits_for_earlier_writes_only() {
        let mut requests = Requests::default();
        let operations = [write(0, 512), read(4096, 512), DiskOperation::Flush, write(1024, 512)];
        assert_eq!(add(&mut requests, &operations), [1, 2, 4]);
        assert_eq!(finish(&mut requests, 1), [3]);
    }

    #[test]
    fn a_request_that_waits_cannot_be_completed() {
        let mut requests = Requests::default();
        add(&mut requests, &[write(0, 512), write(0, 512)]);
        assert!(requests.find(RequestId(1)).is_some());
        assert!(requests.find(RequestId(2)).is_none());
        assert!(requests.find(RequestId(3)).is_none());
    }

    #[test]
    fn abandoned_requests_still_hold_back_others() {
        let mut requests = Requests::default();
        add(&mut requests, &[write(0, 512), write(0, 512)]);
        requests.abandon();
        assert_eq!(requests.issued().count(), 1);
        assert_eq!(add(&mut requests, &[read(0, 512)]), [0u64; 0]);
        assert_eq!(finish(&mut requests, 1), [3]);
    }

    #[test]
    fn room_ends_with_bytes_or_requests() {
        let mut requests = Requests::default();
        for index in 0..8 {
            assert!(requests.have_room());
            add(&mut requests, &[write(index << 20, 1 << 20)]);
        }
        assert!(!requests.have_room());
        finish(&mut requests, 3);
        assert!(requests.have_room());
        let mut requests = Requests::default();
        add(&mut requests, &vec![DiskOperation::Flush; MAX_IN_FLIGHT]);
        assert!(!requests.have_room());
    }
}
