//! What a primary has put out since the last checkpoint in its log.
//!
//! A backup that goes on from a checkpoint instead of replaying up to it has not produced these outputs. It
//! needs them all the same: those not known to be out, because a failover lets them out again, and console
//! bytes in any case, for readers that attach later.

use super::{OVERHEAD, Output, OutputKind};
use std::collections::VecDeque;
use vmft_log::entry::OutputSequence;
use vmft_threads::{Mutex, MutexGuard};

/// Console bytes that one output may hold: a guest writes them one by one.
const RUN: usize = 256;
/// Console bytes remembered that are out: as many as a console remembers for its readers.
const CONSOLE_LIMIT: usize = 1 << 20;
/// Bytes of packets remembered; beyond it the oldest are forgotten, and lost at a failover as in a network
/// that is too slow. As many as a gate holds.
const PACKET_LIMIT: usize = 32 << 20;

#[derive(Debug, Default)]
struct Recent {
    /// Off, nothing is remembered.
    on: bool,
    outputs: VecDeque<Output>,
    /// Bytes of the packets among them.
    packet_bytes: usize,
    console_bytes: usize,
    /// Everything up to here is out.
    out: OutputSequence,
}

/// Console outputs and packets since the last checkpoint in the log. Disk requests are not among them: the
/// board knows which are outstanding.
#[derive(Debug, Default)]
pub struct RecentOutputs {
    recent: Mutex<Recent>,
}

impl RecentOutputs {
    fn lock(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock()
    }

    /// From now on outputs are remembered.
    pub fn begin(&self) {
        *self.lock() = Recent { on: true, ..Recent::default() };
    }

    /// Nobody needs them any more.
    pub fn end(&self) {
        *self.lock() = Recent::default();
    }

    /// A checkpoint begins here, or both sides agree: what was put out before is known to the backup.
    pub fn forget(&self) {
        let mut recent = self.lock();
        recent.outputs.clear();
        (recent.packet_bytes, recent.console_bytes) = (0, 0);
    }

    /// An output is made.
    pub(super) fn add(&self, output: &Output) {
        let mut recent = self.lock();
        if recent.on {
            recent.add(output);
        }
    }

    /// Everything up to `output` is out.
    pub fn released(&self, output: OutputSequence) {
        let mut recent = self.lock();
        if !recent.on {
            return;
        }
        recent.out = recent.out.max(output);
        if recent.packet_bytes > 0 {
            recent.outputs.retain(|kept| kept.sequence > output || packet_bytes(kept).is_none());
            recent.packet_bytes = recent.outputs.iter().filter_map(packet_bytes).sum();
        }
        recent.limit_console();
    }

    /// All that is remembered, in order.
    pub fn all(&self) -> Vec<Output> {
        self.lock().outputs.iter().cloned().collect()
    }
}

/// Bytes of a packet; `None` for what is none.
fn packet_bytes(output: &Output) -> Option<usize> {
    match &output.kind {
        OutputKind::Packet(packet) => Some(packet.frame.len() + OVERHEAD),
        OutputKind::Console { .. } | OutputKind::Disk { .. } => None,
    }
}

impl Recent {
    fn add(&mut self, output: &Output) {
        match &output.kind {
            OutputKind::Disk { .. } => return,
            OutputKind::Packet(packet) => {
                self.packet_bytes += packet.frame.len() + OVERHEAD;
                self.limit_packets();
            }
            OutputKind::Console { offset, bytes } => {
                self.console_bytes += bytes.len();
                if let Some(Output {
                    sequence,
                    kind: OutputKind::Console { offset: from, bytes: run },
                }) = self.outputs.back_mut()
                    && *from + run.len() as u64 == *offset
                    && run.len() + bytes.len() <= RUN
                {
                    // By its last byte's number: a run of which a part is out is let out whole again,
                    // and every byte has its offset.
                    *sequence = output.sequence;
                    run.extend(bytes);
                    return;
                }
            }
        }
        self.outputs.push_back(output.clone());
        self.limit_console();
    }

    /// Forgets the oldest packets, if there are too many.
    fn limit_packets(&mut self) {
        while self.packet_bytes > PACKET_LIMIT
            && let Some(oldest) = self.outputs.iter().position(|kept| packet_bytes(kept).is_some())
        {
            let forgotten = self.outputs.remove(oldest);
            self.packet_bytes -= forgotten.as_ref().and_then(packet_bytes).unwrap_or(0);
        }
    }

    /// Forgets the oldest console bytes that are out, if there are too many.
    fn limit_console(&mut self) {
        while self.console_bytes > CONSOLE_LIMIT
            && let Some(Output { sequence, kind: OutputKind::Console { bytes, .. } }) =
                self.outputs.front()
            && *sequence <= self.out
        {
            self.console_bytes -= bytes.len();
            self.outputs.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmft_log::entry::{Packet, RequestId};

    fn console(sequence: u64, offset: u64, len: usize) -> Output {
        let kind = OutputKind::Console { offset, bytes: vec![b'x'; len] };
        Output { sequence: OutputSequence(sequence), kind }
    }

    fn packet(sequence: u64) -> Output {
        let kind = OutputKind::Packet(Packet { frame: vec![1; 60], ..Packet::default() });
        Output { sequence: OutputSequence(sequence), kind }
    }

    fn sequences(recent: &RecentOutputs) -> Vec<u64> {
        recent.all().iter().map(|output| output.sequence.0).collect()
    }

    #[test]
    fn console_bytes_are_remembered_although_they_are_out_and_packets_only_until_then() {
        let recent = RecentOutputs::default();
        recent.add(&console(1, 0, 1));
        assert!(recent.all().is_empty(), "nobody needs them yet");
        recent.begin();
        for output in [console(1, 0, 1), packet(2), console(3, 1, 1), packet(4)] {
            recent.add(&output);
        }
        recent.released(OutputSequence(3));
        assert_eq!(sequences(&recent), [1, 3, 4]);
        recent.forget();
        assert!(recent.all().is_empty());
    }

    #[test]
    fn bytes_written_one_by_one_are_one_output_and_disk_requests_are_none() {
        let recent = RecentOutputs::default();
        recent.begin();
        for number in 0..300 {
            recent.add(&console(number + 1, 40 + number, 1));
        }
        let operation = crate::board::DiskOperation::Flush;
        let kind = OutputKind::Disk { disk: 0, request: RequestId(1), operation };
        recent.add(&Output { sequence: OutputSequence(301), kind });
        let all = recent.all();
        assert_eq!(sequences(&recent), [RUN as u64, 300]);
        let OutputKind::Console { offset, bytes } = &all[1].kind else { panic!("{all:?}") };
        assert_eq!((*offset, bytes.len()), (40 + RUN as u64, 300 - RUN));
    }

    #[test]
    fn packets_that_nobody_takes_do_not_pile_up() {
        let recent = RecentOutputs::default();
        recent.begin();
        recent.add(&console(1, 0, 1));
        for sequence in 2..=5 {
            let frame = vec![0; PACKET_LIMIT / 2 - OVERHEAD];
            let kind = OutputKind::Packet(Packet { frame, ..Packet::default() });
            recent.add(&Output { sequence: OutputSequence(sequence), kind });
        }
        assert_eq!(sequences(&recent), [1, 4, 5]);
    }

    #[test]
    fn what_is_out_does_not_pile_up_and_what_is_not_is_never_forgotten() {
        let recent = RecentOutputs::default();
        recent.begin();
        let half = CONSOLE_LIMIT / 2;
        for number in 0..6 {
            recent.add(&console(number + 1, number * half as u64, half));
        }
        assert_eq!(sequences(&recent), [1, 2, 3, 4, 5, 6]);
        recent.released(OutputSequence(3));
        assert_eq!(sequences(&recent), [4, 5, 6]);
        recent.released(OutputSequence(6));
        assert_eq!(sequences(&recent), [5, 6]);
    }
}
