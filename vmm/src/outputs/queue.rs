//! Outputs that wait, in order.

use super::{OVERHEAD, Output, OutputKind};
use crate::board::DiskOperation;
use std::collections::VecDeque;
use vmft_log::entry::OutputSequence;

/// Bytes of a run: a guest writes its console one byte at a time, and an output for each byte would take
/// a hundred times their memory.
const RUN: usize = 256;

/// An output, or a run of several.
#[derive(Debug)]
struct Waiting {
    /// The last of them, with the bytes of all.
    output: Output,
    /// More than one: console outputs of one byte each, which follow each other.
    count: usize,
}

impl Waiting {
    fn is_up_to(&self, sequence: OutputSequence) -> bool {
        self.output.sequence <= sequence
    }

    /// How many of a run come up to `sequence`.
    fn count_up_to(&self, sequence: OutputSequence) -> usize {
        let beyond = self.output.sequence.0.saturating_sub(sequence.0);
        self.count.saturating_sub(usize::try_from(beyond).unwrap_or(usize::MAX))
    }

    /// Cuts a run after its first `count`, and returns those.
    fn split(&mut self, count: usize) -> Output {
        let Output { sequence, kind: OutputKind::Console { offset, bytes } } = &mut self.output
        else {
            unreachable!("only console outputs make a run");
        };
        let later = bytes.split_off(count);
        let first = std::mem::replace(bytes, later);
        let from = std::mem::replace(offset, *offset + count as u64);
        self.count -= count;
        let sequence = OutputSequence(sequence.0 - self.count as u64);
        Output { sequence, kind: OutputKind::Console { offset: from, bytes: first } }
    }

    /// Memory it takes, but for packets: those are counted apart.
    fn cost(&self) -> usize {
        let payload = match &self.output.kind {
            OutputKind::Console { bytes, .. } => bytes.capacity(),
            OutputKind::Disk { operation: DiskOperation::Write { data, .. }, .. } => {
                data.capacity()
            }
            OutputKind::Disk { .. } => 0,
            OutputKind::Packet(_) => return 0,
        };
        OVERHEAD + payload
    }
}

/// A queue of outputs whose memory is counted, but for packets.
#[derive(Debug, Default)]
pub(super) struct OutputQueue {
    queue: VecDeque<Waiting>,
    outputs: usize,
    cost: usize,
}

impl OutputQueue {
    /// Adds an output that comes after all that are here.
    pub(super) fn push(&mut self, output: Output) {
        self.outputs += 1;
        if let Some(last) = self.queue.back_mut() {
            let before = last.cost();
            if let Output { sequence, kind: OutputKind::Console { offset, bytes } } =
                &mut last.output
                && let OutputKind::Console { offset: next, bytes: byte } = &output.kind
                && bytes.len() == last.count
                && (1..RUN).contains(&last.count)
                && byte.len() == 1
                && output.sequence.0 == sequence.0 + 1
                && *next == *offset + bytes.len() as u64
            {
                bytes.extend(byte);
                *sequence = output.sequence;
                last.count += 1;
                self.cost += last.cost() - before;
                return;
            }
        }
        let waiting = Waiting { output, count: 1 };
        self.cost += waiting.cost();
        self.queue.push_back(waiting);
    }

    /// Takes the first, if it is no later than `sequence`: of a run, as much as is.
    pub(super) fn pop_up_to(&mut self, sequence: OutputSequence) -> Option<Output> {
        let first = self.queue.front_mut()?;
        if !first.is_up_to(sequence) {
            let count = first.count_up_to(sequence);
            if count == 0 {
                return None;
            }
            let before = first.cost();
            let output = first.split(count);
            self.cost = self.cost - before + first.cost();
            self.outputs -= count;
            return Some(output);
        }
        self.pop()
    }

    /// Takes the first.
    pub(super) fn pop(&mut self) -> Option<Output> {
        let Waiting { output, count } = self.queue.pop_front().inspect(|first| {
            self.cost -= first.cost();
        })?;
        self.outputs -= count;
        Some(output)
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Outputs, each byte of a run for one.
    pub(super) fn len(&self) -> usize {
        self.outputs
    }

    /// Memory that they take, in bytes; packets are not counted.
    pub(super) fn cost(&self) -> usize {
        self.cost
    }

    /// The last output.
    pub(super) fn last(&self) -> Option<OutputSequence> {
        self.queue.back().map(|last| last.output.sequence)
    }

    /// Copies of those after `sequence`.
    pub(super) fn after(&self, sequence: OutputSequence) -> Vec<Output> {
        let later = self.queue.iter().filter(|waiting| !waiting.is_up_to(sequence));
        let copy = |waiting: &Waiting| {
            let (output, count) = (waiting.output.clone(), waiting.count);
            let mut waiting = Waiting { output, count };
            match waiting.count_up_to(sequence) {
                0 => {}
                known => drop(waiting.split(known)),
            }
            waiting.output
        };
        later.map(copy).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmft_log::entry::Packet;

    fn console(sequence: u64, offset: u64, bytes: &[u8]) -> Output {
        let kind = OutputKind::Console { offset, bytes: bytes.to_vec() };
        Output { sequence: OutputSequence(sequence), kind }
    }

    fn packet(sequence: u64) -> Output {
        let kind = OutputKind::Packet(Packet { frame: vec![0; 60], ..Packet::default() });
        Output { sequence: OutputSequence(sequence), kind }
    }

    fn seen(outputs: impl IntoIterator<Item = Output>) -> Vec<(u64, Vec<u8>)> {
        let one = |output: Output| match output.kind {
            OutputKind::Console { bytes, .. } => (output.sequence.0, bytes),
            _ => (output.sequence.0, Vec::new()),
        };
        outputs.into_iter().map(one).collect()
    }

    #[test]
    fn bytes_written_one_by_one_take_little_more_than_themselves() {
        let mut queue = OutputQueue::default();
        let bytes = 100_000;
        for number in 0..bytes {
            queue.push(console(number + 1, number, b"x"));
        }
        assert_eq!(queue.len() as u64, bytes);
        assert!((bytes as usize..2 * bytes as usize).contains(&queue.cost()), "{}", queue.cost());
        while queue.pop().is_some() {}
        assert_eq!((queue.len(), queue.cost()), (0, 0));
    }

    #[test]
    fn a_run_is_taken_as_far_as_was_asked_for_and_no_further() {
        let mut queue = OutputQueue::default();
        for (number, byte) in (0..5).zip(b"hello") {
            queue.push(console(number + 1, number, &[*byte]));
        }
        queue.push(packet(6));
        queue.push(console(7, 5, b"!"));
        assert_eq!(
            seen(queue.after(OutputSequence(3))),
            [(5, b"lo".to_vec()), (6, vec![]), (7, b"!".to_vec())]
        );
        assert_eq!(queue.pop_up_to(OutputSequence(0)), None);
        assert_eq!(seen(queue.pop_up_to(OutputSequence(2))), [(2, b"he".to_vec())]);
        assert_eq!(queue.pop_up_to(OutputSequence(2)), None);
        let rest = queue.pop_up_to(OutputSequence(9)).expect("it is left");
        assert_eq!(rest, console(5, 2, b"llo"));
        assert_eq!((queue.len(), queue.last()), (2, Some(OutputSequence(7))));
        assert_eq!(seen(std::iter::from_fn(|| queue.pop())), [(6, vec![]), (7, b"!".to_vec())]);
        assert_eq!(queue.cost(), 0);
    }

    #[test]
    fn outputs_of_several_bytes_stay_whole() {
        let mut queue = OutputQueue::default();
        queue.push(console(1, 0, b"ab"));
        queue.push(console(2, 2, b"c"));
        queue.push(console(3, 3, b"de"));
        assert_eq!(seen(queue.pop_up_to(OutputSequence(1))), [(1, b"ab".to_vec())]);
        assert_eq!(queue.len(), 2);
    }
}
