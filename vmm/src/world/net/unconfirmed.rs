//! Packets that must not leave before it is known that this side may still speak.

use super::{NetError, Shared, spawn};
use crate::outputs::Assurance;
use crate::world::Fence;
use std::collections::VecDeque;
use std::sync::Arc;
use vmft_log::entry::Packet;
use vmft_threads::{Condvar, Mutex, MutexGuard};

/// Where packets go once they may leave.
pub(super) trait PacketSink {
    fn send_all(&self, packets: &mut VecDeque<Packet>);
}

impl PacketSink for Shared {
    fn send_all(&self, packets: &mut VecDeque<Packet>) {
        self.send(packets.drain(..));
    }
}

#[derive(Debug, Default)]
struct Waiting {
    packets: VecDeque<Packet>,
    /// Packets that have waited and left, ever.
    left: u64,
    /// This side's time is over, or the port's.
    closed: bool,
}

/// The packets that wait, oldest first.
#[derive(Debug, Default)]
pub(super) struct UnconfirmedPackets {
    waiting: Mutex<Waiting>,
    came: Condvar,
}

impl Waiting {
    /// Sends the oldest `count`.
    fn send(&mut self, count: usize, sink: &impl PacketSink) {
        let later = self.packets.split_off(count);
        self.left += count as u64;
        sink.send_all(&mut self.packets);
        self.packets = later;
    }
}

impl UnconfirmedPackets {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock()
    }

    /// Sends a packet, or keeps it. Fresh evidence is evidence for all that wait: it shows that
    /// nobody had taken this side's place until now.
    pub(super) fn send(&self, packet: Packet, assurance: Assurance, sink: &impl PacketSink) {
        let mut waiting = self.lock();
        if waiting.closed {
            return;
        }
        waiting.packets.push_back(packet);
        match assurance {
            Assurance::Fresh => {
                let all = waiting.packets.len();
                waiting.send(all, sink);
            }
            Assurance::Stale => self.came.notify_one(),
        }
    }

    /// Nothing leaves any more.
    pub(super) fn close(&self) {
        let mut waiting = self.lock();
        waiting.closed = true;
        waiting.packets.clear();
        self.came.notify_one();
    }

    /// Asks the fence whenever packets wait, until closed or fenced.
    fn run(&self, fence: &dyn Fence, sink: &impl PacketSink) {
        loop {
            let mut waiting = self.lock();
            while waiting.packets.is_empty() && !waiting.closed {
                waiting = self.came.wait(waiting);
            }
            let closed = waiting.closed;
            let asked_for = waiting.left + waiting.packets.len() as u64;
            drop(waiting);
            if closed {
                return;
            }
            if fence.check().is_err() {
                return self.close();
            }
            // What came while the fence was asked was not asked for, and waits for another answer;
            // what was asked for may have left meanwhile.
            let mut waiting = self.lock();
            let sure = asked_for.saturating_sub(waiting.left);
            let sure = usize::try_from(sure)
                .map_or(waiting.packets.len(), |sure| sure.min(waiting.packets.len()));
            waiting.send(sure, sink);
        }
    }
}

/// Starts the thread that asks; it ends when the side is fenced or the port dropped.
pub(super) fn start(
    unconfirmed: &Arc<UnconfirmedPackets>,
    shared: Arc<Shared>,
    fence: Arc<dyn Fence>,
) -> Result<(), NetError> {
    let unconfirmed = Arc::clone(unconfirmed);
    spawn("net-fence", move || unconfirmed.run(&*fence, &*shared))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::net::thread::Announcer;
    use crate::world::{FenceError, Permit};
    use std::sync::mpsc::{Receiver, Sender, channel};

    #[derive(Debug)]
    struct Wire(Mutex<Sender<u8>>);

    impl PacketSink for Wire {
        fn send_all(&self, packets: &mut VecDeque<Packet>) {
            for packet in packets.drain(..) {
                self.0.lock().send(packet.frame[0]).unwrap();
            }
        }
    }

    /// A fence whose answers the test gives; it tells when it is asked.
    #[derive(Debug)]
    struct Asked {
        asked: Mutex<Sender<()>>,
        answers: Mutex<Receiver<Result<Permit, FenceError>>>,
    }

    impl Fence for Asked {
        fn check(&self) -> Result<Permit, FenceError> {
            self.asked.lock().send(()).unwrap();
            self.answers.lock().recv().unwrap()
        }

        fn refused(&self) {}
    }

    fn packet(byte: u8) -> Packet {
        Packet { frame: vec![byte], ..Packet::default() }
    }

    /// Runs `body` with the packets that wait, their wire's far end, the fence's questions and its answers.
    fn with_fence(
        body: impl FnOnce(
            &UnconfirmedPackets,
            &Wire,
            &Receiver<u8>,
            &Receiver<()>,
            &Sender<Result<Permit, FenceError>>,
        ),
    ) {
        let (wire, seen) = channel();
        let (asked, questions) = channel();
        let (answer, answers) = channel();
        let fence = Asked { asked: Mutex::new(asked), answers: Mutex::new(answers) };
        let (unconfirmed, wire) = (UnconfirmedPackets::default(), Wire(Mutex::new(wire)));
        std::thread::scope(|scope| {
            scope.spawn(|| unconfirmed.run(&fence, &wire));
            body(&unconfirmed, &wire, &seen, &questions, &answer);
            unconfirmed.close();
            // Should it be asking.
            let _ = answer.send(Err(FenceError));
        });
    }

    #[test]
    fn stale_packets_wait_for_the_fence_and_leave_in_order() {
        with_fence(|unconfirmed, wire, seen, questions, answer| {
            unconfirmed.send(packet(1), Assurance::Fresh, wire);
            assert_eq!(seen.recv(), Ok(1));
            unconfirmed.send(packet(2), Assurance::Stale, wire);
            questions.recv().unwrap();
            unconfirmed.send(packet(3), Assurance::Stale, wire);
            assert!(seen.try_recv().is_err());
            answer.send(Ok(Permit(None))).unwrap();
            assert_eq!(seen.recv(), Ok(2));
            questions.recv().unwrap();
            assert!(seen.try_recv().is_err(), "3 came after the first question");
            answer.send(Ok(Permit(None))).unwrap();
            assert_eq!(seen.recv(), Ok(3));
        });
    }

    #[test]
    fn fresh_evidence_frees_what_waits_while_the_arbiter_is_away() {
        with_fence(|unconfirmed, wire, seen, questions, answer| {
            unconfirmed.send(packet(1), Assurance::Stale, wire);
            questions.recv().unwrap();
            unconfirmed.send(packet(2), Assurance::Fresh, wire);
            assert_eq!([seen.recv(), seen.recv()], [Ok(1), Ok(2)]);
            unconfirmed.send(packet(3), Assurance::Stale, wire);
            answer.send(Ok(Permit(None))).unwrap();
            questions.recv().unwrap();
            assert!(seen.try_recv().is_err(), "the first question was not asked for 3");
        });
    }

    #[test]
    fn a_side_that_is_fenced_sends_nothing_more() {
        with_fence(|unconfirmed, wire, seen, questions, answer| {
            unconfirmed.send(packet(1), Assurance::Stale, wire);
            questions.recv().unwrap();
            answer.send(Err(FenceError)).unwrap();
            while !unconfirmed.lock().closed {
                std::thread::yield_now();
            }
            unconfirmed.send(packet(2), Assurance::Fresh, wire);
            assert!(seen.try_recv().is_err());
        });
    }

    #[test]
    fn a_side_that_has_lost_its_generation_repeats_no_announcement() {
        with_fence(|unconfirmed, wire, seen, questions, answer| {
            let announcer = Announcer::new(vec![vec![7]]);
            announcer.repeat(wire, unconfirmed);
            questions.recv().unwrap();
            answer.send(Ok(Permit(None))).unwrap();
            assert_eq!(seen.recv(), Ok(7));
            announcer.repeat(wire, unconfirmed);
            questions.recv().unwrap();
            answer.send(Err(FenceError)).unwrap();
            while !unconfirmed.lock().closed {
                std::thread::yield_now();
            }
            assert!(seen.try_recv().is_err());
        });
    }
}
