//! The requests of one disk that are on their way, and which of them have to wait.
//!
//! A request waits while an earlier one is on its way that it must not overtake: one that
//! overlaps it, if either writes; for a flush, any earlier write. The order of requests and of
//! completions is the same on both sides of a pair, so both sides send out the same requests
//! at the same points, and a request that is repeated after a failover cannot change its
//! outcome.

use super::completed::{
    CompletedCounts, CompletedWrite, CompletedWrites, KeepLimit, Kept, WriteCount,
};
use crate::board::DiskOperation;
use crate::devices::virtio::queue::{MAX_CHAIN_DESCRIPTORS, Segment, total_len};
use crate::devices::{InvalidState, require};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use vmft_cpu::memory::GuestMemoryMmap;
use vmft_log::entry::RequestId;
use vmft_log::wire::MAX_COUNT;

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
    /// Nobody waits for the answer: the driver has reset the device since, or it is a flush of the
    /// device's own.
    pub abandoned: bool,
    /// Of a flush that was sent out: the writes completed before, which it covers.
    pub covers: WriteCount,
}

impl Request {
    /// A flush that no driver waits for.
    fn is_own_flush(&self) -> bool {
        self.abandoned && self.operation == DiskOperation::Flush
    }
}

/// Everything a restored disk needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestsState {
    /// The name of the last request.
    pub last: RequestId,
    /// The requests, oldest first.
    pub requests: VecDeque<Request>,
    /// The writes that were completed; their data is apart.
    pub completed: CompletedCounts,
}

/// The requests of one disk, oldest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requests {
    last: RequestId,
    requests: VecDeque<Request>,
    /// Data bytes of all requests.
    bytes: u64,
    /// Requests not yet sent out.
    waiting: usize,
    kept: Kept,
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
    /// No requests yet.
    pub fn new(limit: KeepLimit) -> Self {
        Self {
            last: RequestId(0),
            requests: VecDeque::new(),
            bytes: 0,
            waiting: 0,
            kept: Kept::new(limit),
        }
    }

    /// True if another request may be taken.
    pub fn have_room(&self) -> bool {
        // A full store that no flush is on its way to empty would stop the guest for good.
        let keeps_more = !(self.kept.is_full() && self.own_flush_is_out());
        keeps_more && self.requests.len() < MAX_IN_FLIGHT && self.bytes < MAX_IN_FLIGHT_BYTES
    }

    fn own_flush_is_out(&self) -> bool {
        self.requests.iter().any(Request::is_own_flush)
    }

    /// Completed writes are kept from now on.
    pub(super) fn keep_completed(&mut self) {
        self.kept.begin();
    }

    /// How many writes were completed.
    pub fn completed(&self) -> WriteCount {
        self.kept.counts().completed
    }

    /// The completed writes after the first `known` that no flush has covered.
    pub fn completed_since(&self, known: WriteCount) -> CompletedWrites {
        self.kept.since(known)
    }

    /// True once after a flush of the device's own has failed: the driver's next flush fails instead.
    pub(super) fn take_doubt(&mut self) -> bool {
        self.kept.take_doubt()
    }

    /// The request of that name, if it was sent out.
    pub fn find(&self, id: RequestId) -> Option<&Request> {
        self.position(id).map(|index| &self.requests[index])
    }

    /// The requests that were sent out, oldest first.
    pub fn issued(&self) -> impl Iterator<Item = &Request> {
        self.requests.iter().filter(|request| request.issued)
    }

    fn position(&self, id: RequestId) -> Option<usize> {
        let index = self.requests.binary_search_by_key(&id, |request| request.id).ok()?;
        self.requests[index].issued.then_some(index)
    }

    pub(super) fn add(
        &mut self,
        head: u16,
        buffers: Vec<Segment>,
        status: u64,
        operation: DiskOperation,
    ) {
        self.last.0 += 1;
        self.bytes += data_len(&operation);
        self.waiting += 1;
        let (id, covers) = (self.last, WriteCount(0));
        let (issued, abandoned) = (false, false);
        // Only a read's answer goes there; other requests have no use for the addresses.
        let buffers = match operation {
            DiskOperation::Read { .. } => buffers,
            _ => Vec::new(),
        };
        let request = Request { id, head, buffers, status, operation, issued, abandoned, covers };
        self.requests.push_back(request);
    }

    /// A request has ended, and was done or not. It comes back without its data.
    pub(super) fn remove(&mut self, id: RequestId, done: bool) -> Option<Request> {
        let mut request = self.requests.remove(self.position(id)?)?;
        self.bytes -= data_len(&request.operation);
        match (&mut request.operation, done) {
            (DiskOperation::Write { offset, data }, true) => {
                self.kept.add(*offset, std::mem::take(data));
            }
            (DiskOperation::Flush, true) => self.kept.flushed(request.covers),
            (DiskOperation::Flush, false) if request.abandoned => {
                self.kept.own_flush_failed(request.covers);
            }
            _ => {}
        }
        Some(request)
    }

    /// A flush of the device's own, if it is time for one: sent out from the start, for it covers what is
    /// completed, and need not wait for what is on its way.
    pub(super) fn add_own_flush(&mut self) -> Option<RequestId> {
        if !self.kept.wants_flush() || self.own_flush_is_out() {
            return None;
        }
        self.last.0 += 1;
        self.requests.push_back(Request {
            id: self.last,
            head: 0,
            buffers: Vec::new(),
            status: 0,
            operation: DiskOperation::Flush,
            issued: true,
            abandoned: true,
            covers: self.kept.counts().completed,
        });
        Some(self.last)
    }

    /// Marks every request that need not wait as sent out, and shows it to `send`.
    pub(super) fn issue(&mut self, mut send: impl FnMut(RequestId, &DiskOperation)) {
        if self.waiting == 0 {
            return;
        }
        let requests = &mut self.requests;
        for index in 0..requests.len() {
            let request = &requests[index];
            let overtakes = |earlier: &Request| must_wait(&request.operation, &earlier.operation);
            if request.issued || requests.iter().take(index).any(overtakes) {
                continue;
            }
            send(request.id, &request.operation);
            requests[index].issued = true;
            if requests[index].operation == DiskOperation::Flush {
                requests[index].covers = self.kept.counts().completed;
            }
            self.waiting -= 1;
        }
    }

    /// Forgets the requests that were not sent out, and that anybody waits for the others.
    pub(super) fn abandon(&mut self) {
        self.requests.retain_mut(|request| {
            request.abandoned = true;
            // An abandoned request needs no addresses: nothing is written for it any more.
            request.buffers = Vec::new();
            request.status = 0;
            request.head = 0;
            request.issued
        });
        self.waiting = 0;
        self.bytes = self.requests.iter().map(|request| data_len(&request.operation)).sum();
    }

    pub(super) fn save(&self) -> RequestsState {
        let Self { last, requests, bytes: _, waiting: _, kept } = self;
        RequestsState { last: *last, requests: requests.clone(), completed: kept.counts() }
    }

    /// The saved requests. `heads` is the number of descriptors of the queue, or zero if no
    /// request can be waited for; `on_disk` says whether an operation is within the disk. The data of
    /// completed writes is still to come ([`Self::restore_completed`]), if there are any.
    pub(super) fn restore(
        state: &RequestsState,
        limit: KeepLimit,
        heads: u16,
        memory: &GuestMemoryMmap,
        on_disk: impl Fn(&DiskOperation) -> bool,
    ) -> Result<Self, InvalidState> {
        let check = |holds, reason| require("disk requests", holds, reason);
        let RequestsState { last, requests, completed } = state;
        // One more may be a flush of the device's own.
        check(requests.len() <= MAX_IN_FLIGHT + 1, "too many")?;
        check(last.0 <= MAX_COUNT, "numbered beyond all requests")?;
        let mut previous = RequestId(0);
        for (index, request) in requests.iter().enumerate() {
            let Request { id, head, buffers, status, operation, issued, abandoned, covers } =
                request;
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
            check(*issued != waits || request.is_own_flush(), "sent out against the order")?;
            check(*covers <= completed.completed, "covers writes that are not completed")?;
        }
        let bytes = requests.iter().map(|request| data_len(&request.operation)).sum();
        let waiting = requests.iter().filter(|request| !request.issued).count();
        let kept = Kept::counted(*completed, limit);
        Ok(Self { last: *last, requests: requests.clone(), bytes, waiting, kept })
    }

    /// The data of the completed writes of a restored disk.
    pub(super) fn restore_completed(
        &mut self,
        writes: &CompletedWrites,
        on_disk: impl Fn(&CompletedWrite) -> bool,
    ) -> Result<(), InvalidState> {
        self.kept.restore(writes, on_disk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none_yet() -> Requests {
        Requests::new(KeepLimit::for_disks(1))
    }

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
        requests.remove(RequestId(id), true).expect("sent out");
        issue(requests)
    }

    #[test]
    fn requests_that_do_not_meet_go_out_at_once() {
        let mut requests = none_yet();
        let operations = [write(0, 512), write(512, 512), read(1024, 512), read(1024, 4096)];
        assert_eq!(add(&mut requests, &operations), [1, 2, 3, 4]);
    }

    #[test]
    fn an_overlapping_request_waits_for_all_earlier_ones_it_meets() {
        let mut requests = none_yet();
        let operations = [write(0, 1024), read(512, 1024), write(1024, 512), read(8192, 512)];
        assert_eq!(add(&mut requests, &operations), [1, 4]);
        assert_eq!(finish(&mut requests, 1), [2], "3 would overwrite what 2 reads");
        assert_eq!(finish(&mut requests, 2), [3]);
    }

    #[test]
    fn a_flush_waits_for_earlier_writes_only() {
        let mut requests = none_yet();
        let operations = [write(0, 512), read(4096, 512), DiskOperation::Flush, write(1024, 512)];
        assert_eq!(add(&mut requests, &operations), [1, 2, 4]);
        assert_eq!(finish(&mut requests, 1), [3]);
    }

    #[test]
    fn a_request_that_waits_cannot_be_completed() {
        let mut requests = none_yet();
        add(&mut requests, &[write(0, 512), write(0, 512)]);
        assert!(requests.find(RequestId(1)).is_some());
        assert!(requests.find(RequestId(2)).is_none());
        assert!(requests.find(RequestId(3)).is_none());
    }

    #[test]
    fn abandoned_requests_still_hold_back_others() {
        let mut requests = none_yet();
        add(&mut requests, &[write(0, 512), write(0, 512)]);
        requests.abandon();
        assert_eq!(requests.issued().count(), 1);
        assert_eq!(add(&mut requests, &[read(0, 512)]), [0u64; 0]);
        assert_eq!(finish(&mut requests, 1), [3]);
    }

    #[test]
    fn room_ends_with_bytes_or_requests() {
        let mut requests = none_yet();
        for index in 0..8 {
            assert!(requests.have_room());
            add(&mut requests, &[write(index << 20, 1 << 20)]);
        }
        assert!(!requests.have_room());
        finish(&mut requests, 3);
        assert!(requests.have_room());
        let mut requests = none_yet();
        add(&mut requests, &vec![DiskOperation::Flush; MAX_IN_FLIGHT]);
        assert!(!requests.have_room());
    }

    const MIB: usize = 1 << 20;

    /// Completes so many writes of a mebibyte each, one after the other.
    fn complete_writes(requests: &mut Requests, count: u64) {
        for number in 0..count {
            let sent = add(requests, &[write(number << 20, MIB)]);
            finish(requests, sent[0]);
        }
    }

    #[test]
    fn a_device_that_keeps_much_asks_for_a_flush_that_holds_nothing_up() {
        let mut requests = none_yet();
        requests.keep_completed();
        complete_writes(&mut requests, 15);
        assert_eq!(requests.add_own_flush(), None);
        complete_writes(&mut requests, 1);
        add(&mut requests, &[write(0, 512)]);
        let flush = requests.add_own_flush().expect("half of what it may keep");
        assert_eq!(requests.add_own_flush(), None, "one at a time");
        assert!(requests.have_room());
        assert_eq!(add(&mut requests, &[write(1 << 30, 512)]).len(), 1);
        assert_eq!(finish(&mut requests, flush.0), [0u64; 0]);
        assert_eq!(requests.completed_since(WriteCount(0)).before, WriteCount(16));
    }

    #[test]
    fn a_full_device_takes_nothing_until_its_flush_is_done() {
        let mut requests = none_yet();
        requests.keep_completed();
        complete_writes(&mut requests, 32);
        assert!(requests.have_room(), "a flush is still to be asked for");
        let flush = requests.add_own_flush().expect("due");
        assert!(!requests.have_room());
        finish(&mut requests, flush.0);
        assert!(requests.have_room());
    }

    #[test]
    fn a_flush_of_its_own_that_fails_is_told_by_the_next_one_of_the_guest_and_stops_nothing() {
        let mut requests = none_yet();
        requests.keep_completed();
        complete_writes(&mut requests, 20);
        let flush = requests.add_own_flush().expect("due");
        requests.remove(flush, false).expect("sent out");
        assert_eq!(requests.completed_since(WriteCount(0)).writes.len(), 20, "for another try");
        let flush = requests.add_own_flush().expect("due again");
        complete_writes(&mut requests, 12);
        requests.remove(flush, false).expect("sent out");
        assert_eq!(
            requests.completed_since(WriteCount(0)).writes.len(),
            12,
            "there is no more room"
        );
        assert!(requests.take_doubt());
        assert!(!requests.take_doubt());
    }

    #[test]
    fn a_flush_of_the_guest_covers_what_was_completed_when_it_went_out() {
        let mut requests = none_yet();
        requests.keep_completed();
        assert_eq!(add(&mut requests, &[write(0, 512), DiskOperation::Flush]), [1]);
        assert_eq!(finish(&mut requests, 1), [2]);
        assert_eq!(add(&mut requests, &[write(512, 512)]), [3]);
        finish(&mut requests, 3);
        finish(&mut requests, 2);
        let left = requests.completed_since(WriteCount(0));
        assert_eq!((left.before, left.writes.len()), (WriteCount(1), 1));
        assert_eq!(left.writes[0].offset, 512);
    }

    #[test]
    fn a_write_that_failed_is_not_made_again() {
        let mut requests = none_yet();
        requests.keep_completed();
        add(&mut requests, &[write(0, 512)]);
        requests.remove(RequestId(1), false).expect("sent out");
        assert_eq!(requests.completed(), WriteCount(0));
    }
}
