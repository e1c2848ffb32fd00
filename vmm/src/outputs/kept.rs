//! The gate of a replaying side.

use super::queue::OutputQueue;
use super::{OVERHEAD, Output, OutputGate, OutputKind};
use std::collections::VecDeque;
use vmft_log::entry::OutputSequence;
use vmft_threads::{Mutex, MutexGuard};

/// Bytes of packets kept; beyond it the oldest are forgotten, which are most likely out. More than a
/// primary holds.
const PACKET_BYTES_LIMIT: usize = 48 << 20;

#[derive(Debug, Default)]
struct Kept {
    /// Never forgotten; there are as many as the primary lets wait before it stops its guest.
    console: OutputQueue,
    packets: VecDeque<Output>,
    packet_bytes: usize,
    /// Everything up to here is out.
    out: OutputSequence,
    /// The last that came.
    last: OutputSequence,
}

fn frame_len(output: &Output) -> usize {
    match &output.kind {
        OutputKind::Packet(packet) => packet.frame.len() + OVERHEAD,
        _ => 0,
    }
}

/// Console outputs and packets replayed but not known to be out. Disk requests need no keeping: the
/// board knows which are outstanding, and re-issues them at a go-live.
#[derive(Debug, Default)]
pub struct KeptOutputs {
    kept: Mutex<Kept>,
}

impl KeptOutputs {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock()
    }

    /// Every output up to `output` is out.
    pub fn released(&self, output: OutputSequence) {
        let mut kept = self.lock();
        kept.out = kept.out.max(output);
        let is_out = |first: &Output| first.sequence <= output;
        while kept.console.pop_up_to(output).is_some() {}
        while kept.packets.front().is_some_and(is_out) {
            kept.forget_packet();
        }
    }

    /// Memory that they take, in bytes.
    pub fn bytes(&self) -> usize {
        let kept = self.lock();
        kept.console.cost() + kept.packet_bytes
    }

    /// Takes what is left, in order, to be emitted at a go-live.
    pub fn take(&self) -> Vec<Output> {
        let Kept { mut console, packets, .. } = std::mem::take(&mut *self.lock());
        let console = std::iter::from_fn(|| console.pop());
        let mut left: Vec<Output> = console.chain(packets).collect();
        left.sort_by_key(|output| output.sequence);
        left
    }
}

impl Kept {
    fn forget_packet(&mut self) {
        if let Some(packet) = self.packets.pop_front() {
            self.packet_bytes -= frame_len(&packet);
        }
    }
}

impl OutputGate for KeptOutputs {
    fn emit(&self, output: Output) {
        let mut kept = self.lock();
        if output.sequence <= kept.out || output.sequence <= kept.last {
            // This side has come to it late, from a checkpoint; or it has joined in the middle of an epoch,
            // whose end tells of all that was put out in it.
            return;
        }
        kept.last = output.sequence;
        match output.kind {
            OutputKind::Console { .. } => kept.console.push(output),
            OutputKind::Packet(_) => {
                kept.packet_bytes += frame_len(&output);
                kept.packets.push_back(output);
                while kept.packet_bytes > PACKET_BYTES_LIMIT {
                    kept.forget_packet();
                }
            }
            OutputKind::Disk { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmft_log::entry::Packet;

    fn packet(sequence: u64, len: usize) -> Output {
        let kind = OutputKind::Packet(Packet { frame: vec![0; len], ..Packet::default() });
        Output { sequence: OutputSequence(sequence), kind }
    }

    fn console(sequence: u64) -> Output {
        let kind = OutputKind::Console { offset: sequence, bytes: vec![b'x'] };
        Output { sequence: OutputSequence(sequence), kind }
    }

    fn taken(kept: &KeptOutputs) -> Vec<u64> {
        kept.take().iter().map(|output| output.sequence.0).collect()
    }

    #[test]
    fn what_is_not_known_to_be_out_is_left_in_order() {
        let kept = KeptOutputs::default();
        for output in [packet(1, 60), console(2), packet(3, 60), console(4), packet(5, 60)] {
            kept.emit(output);
        }
        kept.released(OutputSequence(2));
        assert_eq!(taken(&kept), [3, 4, 5]);
        assert_eq!(taken(&kept), [0u64; 0]);
    }

    #[test]
    fn an_output_that_comes_after_word_that_it_is_out_is_not_kept() {
        let kept = KeptOutputs::default();
        kept.emit(console(1));
        kept.released(OutputSequence(3));
        [packet(2, 60), console(3), packet(4, 60)].into_iter().for_each(|output| kept.emit(output));
        assert_eq!(taken(&kept), [4]);
    }

    #[test]
    fn an_output_that_comes_twice_is_kept_once() {
        let kept = KeptOutputs::default();
        let joined_with = [console(4), packet(5, 60)];
        let of_the_epoch = [console(3), console(4), packet(5, 60), packet(6, 60)];
        joined_with.into_iter().chain(of_the_epoch).for_each(|output| kept.emit(output));
        assert_eq!(taken(&kept), [4, 5, 6]);
    }

    #[test]
    fn packets_nobody_says_are_out_do_not_pile_up() {
        let kept = KeptOutputs::default();
        kept.emit(console(1));
        (2..=5).for_each(|sequence| kept.emit(packet(sequence, PACKET_BYTES_LIMIT / 2 - OVERHEAD)));
        assert_eq!(taken(&kept), [1, 4, 5]);
    }
}
