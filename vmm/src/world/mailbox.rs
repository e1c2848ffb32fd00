//! Where the world leaves what it has for the guest.

use crate::inputs::{Asked, Room};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vmft_cpu::Kicker;
use vmft_log::entry::{Arrival, MAX_PACKET_BYTES, MAX_PACKETS, Packet};
use vmft_threads::{Condvar, Mutex, MutexGuard};
use vmm_sys_util::eventfd::EventFd;

/// Console input kept for a guest that does not read it, in bytes. More waits where it comes from.
const CONSOLE_INPUT_LIMIT: usize = 64 << 10;

/// Packets kept for a guest that does not take them, in packets and in bytes: two groups. More stay
/// in the network, which knows what to do about a slow receiver.
const PACKET_LIMIT: usize = 2 * MAX_PACKETS;
const PACKET_BYTES_LIMIT: usize = 2 * MAX_PACKET_BYTES;

#[derive(Debug, Default)]
struct Mail {
    arrivals: VecDeque<Arrival>,
    console_input: VecDeque<u8>,
    packets: VecDeque<Packet>,
    packet_bytes: usize,
    /// Rung when there is room for packets again.
    packet_bell: Option<EventFd>,
    asked: Option<Asked>,
    /// A stop was asked for, whether or not it was taken.
    stop_asked: bool,
    /// Makes the running machine look here.
    wake_up: Option<WakeUp>,
}

/// How the running machine is made to look.
#[derive(Debug)]
struct WakeUp {
    kicker: Kicker,
    /// Also for arrivals.
    for_arrivals: bool,
}

impl Mail {
    fn something_to_take(&self, room: Room) -> bool {
        !self.arrivals.is_empty()
            || self.asked.is_some()
            || (room.console > 0 && !self.console_input.is_empty())
            || (room.packets && !self.packets.is_empty())
    }

    fn has_packet_room(&self) -> bool {
        self.packets.len() < PACKET_LIMIT && self.packet_bytes < PACKET_BYTES_LIMIT
    }

    /// Takes packets for one interrupt.
    fn take_packets(&mut self) -> Vec<Packet> {
        let was_full = !self.has_packet_room();
        let mut bytes = 0;
        let count = self.packets.iter().take(MAX_PACKETS).take_while(|packet| {
            bytes += packet.frame.len();
            bytes <= MAX_PACKET_BYTES
        });
        let count = count.count();
        let group: Vec<Packet> = self.packets.drain(..count).collect();
        self.packet_bytes -= group.iter().map(|packet| packet.frame.len()).sum::<usize>();
        if let Some(bell) = self.packet_bell.as_ref().filter(|_| was_full) {
            // A bell that rings already is as good.
            let _ = bell.write(1);
        }
        group
    }
}

/// Arrivals and requests of the operator, on their way to the run loop.
#[derive(Debug, Default)]
pub struct Mailbox {
    mail: Mutex<Mail>,
    wake: Condvar,
    /// There is room for console input again.
    console_room: Condvar,
    /// Set while there may be something to take: spares the run loop the lock.
    any: AtomicBool,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock()
    }

    fn rouse(&self, mail: MutexGuard<'_, Mail>) {
        let wanted = |wake_up: &&WakeUp| wake_up.for_arrivals || mail.asked.is_some();
        let kicker = mail.wake_up.as_ref().filter(wanted).map(|wake_up| wake_up.kicker.clone());
        self.any.store(true, Ordering::Release);
        drop(mail);
        self.wake.notify_all();
        if let Some(kicker) = kicker {
            kicker.kick();
        }
    }

    /// From now on, the running machine is made to look here when something is asked of it, and
    /// `for_arrivals` also when something arrives. `None` for one that looks by itself.
    pub fn set_kicker(&self, kicker: Option<Kicker>, for_arrivals: bool) {
        self.lock().wake_up = kicker.map(|kicker| WakeUp { kicker, for_arrivals });
    }

    /// Leaves an arrival.
    pub fn push(&self, arrival: Arrival) {
        let mut mail = self.lock();
        mail.arrivals.push_back(arrival);
        self.rouse(mail);
    }

    /// Leaves packets from the network; to be called when there is room ([`Self::has_packet_room`]).
    pub fn push_packets(&self, packets: Vec<Packet>) {
        let mut mail = self.lock();
        mail.packet_bytes += packets.iter().map(|packet| packet.frame.len()).sum::<usize>();
        mail.packets.extend(packets);
        self.rouse(mail);
    }

    /// True if packets may be left here.
    pub fn has_packet_room(&self) -> bool {
        self.lock().has_packet_room()
    }

    /// From now on `bell` is rung when there is room for packets again.
    pub fn set_packet_bell(&self, bell: EventFd) {
        self.lock().packet_bell = Some(bell);
    }

    /// Leaves console input; returns how many of the bytes there was room for.
    pub fn push_console_input(&self, bytes: &[u8]) -> usize {
        let mut mail = self.lock();
        let room = CONSOLE_INPUT_LIMIT.saturating_sub(mail.console_input.len());
        let taken = bytes.len().min(room);
        mail.console_input.extend(&bytes[..taken]);
        self.rouse(mail);
        taken
    }

    /// Waits until there is room for console input, for at most `limit`.
    pub fn wait_console_room(&self, limit: Duration) {
        let full = |mail: &mut Mail| mail.console_input.len() >= CONSOLE_INPUT_LIMIT;
        drop(self.console_room.wait_timeout_while(self.lock(), limit, full));
    }

    /// Asks the machine to pause, stop or halt. What is asked replaces only what is weaker.
    pub fn ask(&self, asked: Asked) {
        let strength = |asked| match asked {
            Asked::Pause => 1,
            Asked::Stop(_) => 2,
            Asked::Halt => 3,
        };
        let mut mail = self.lock();
        mail.stop_asked |= matches!(asked, Asked::Stop(_));
        if mail.asked.is_none_or(|before| strength(before) < strength(asked)) {
            mail.asked = Some(asked);
        }
        self.rouse(mail);
    }

    /// True if anybody has ever asked the machine to stop.
    pub fn was_asked_to_stop(&self) -> bool {
        self.lock().stop_asked
    }

    /// True if the machine was asked to stop or halt, and has not taken notice yet.
    pub fn is_asked_to_end(&self) -> bool {
        matches!(self.lock().asked, Some(Asked::Stop(_) | Asked::Halt))
    }

    /// Takes what the operator asks, if anything.
    pub fn take_asked(&self) -> Option<Asked> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        self.lock().asked.take()
    }

    /// Waits until the operator asks something of a machine that does not run yet.
    pub fn wait_asked(&self) -> Asked {
        let mut mail = self.lock();
        loop {
            if let Some(asked) = mail.asked.take() {
                return asked;
            }
            mail = self.wake.wait(mail);
        }
    }

    pub(super) fn take_arrival(&self, room: Room) -> Option<Arrival> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        let mut mail = self.lock();
        if let Some(arrival) = mail.arrivals.pop_front() {
            return Some(arrival);
        }
        let typed = mail.console_input.len().min(room.console);
        if typed > 0 {
            let bytes = mail.console_input.drain(..typed).collect();
            self.console_room.notify_all();
            return Some(Arrival::ConsoleInput(bytes));
        }
        if room.packets && !mail.packets.is_empty() {
            return Some(Arrival::Packets(mail.take_packets()));
        }
        if mail.asked.is_none() && mail.console_input.is_empty() && mail.packets.is_empty() {
            self.any.store(false, Ordering::Release);
        }
        None
    }

    /// Waits until there is something to take, or until `deadline`; true if there is.
    #[expect(clippy::disallowed_methods, reason = "the rim waits in host time")]
    pub(super) fn wait(&self, deadline: Option<Instant>, room: Room) -> bool {
        let mut mail = self.lock();
        while !mail.something_to_take(room) {
            let Some(deadline) = deadline else {
                mail = self.wake.wait(mail);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            mail = self.wake.wait_timeout(mail, left);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmft_log::entry::{RequestId, StopReason};

    #[test]
    fn arrivals_come_in_order_and_console_input_only_as_there_is_room() {
        let mailbox = Mailbox::default();
        assert_eq!(mailbox.push_console_input(b"hello"), 5);
        for request in [1, 2] {
            mailbox.push(Arrival::Entropy { request: RequestId(request), data: vec![] });
        }
        let room = |console| Room { console, packets: false };
        let next = || mailbox.take_arrival(room(2));
        assert_eq!(next(), Some(Arrival::Entropy { request: RequestId(1), data: vec![] }));
        assert_eq!(next(), Some(Arrival::Entropy { request: RequestId(2), data: vec![] }));
        assert_eq!(next(), Some(Arrival::ConsoleInput(b"he".to_vec())));
        assert_eq!(mailbox.take_arrival(room(0)), None);
        assert_eq!(mailbox.take_arrival(room(9)), Some(Arrival::ConsoleInput(b"llo".to_vec())));
        assert_eq!(next(), None);
    }

    #[test]
    fn packets_come_in_groups_within_the_limits_and_a_full_box_rings_when_it_has_room() {
        let mailbox = Mailbox::default();
        let bell = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).expect("an event");
        mailbox.set_packet_bell(bell.try_clone().expect("an event"));
        let packets = |count, len| vec![Packet { frame: vec![0; len], ..Packet::default() }; count];
        let room = Room { console: 0, packets: true };
        let group = || match mailbox.take_arrival(room) {
            Some(Arrival::Packets(packets)) => packets.len(),
            other => panic!("{other:?}"),
        };
        mailbox.push_packets(packets(100, 60));
        assert!(mailbox.has_packet_room());
        assert_eq!(mailbox.take_arrival(Room { packets: false, ..room }), None);
        mailbox.push_packets(packets(28, 60_000));
        assert!(!mailbox.has_packet_room());
        assert!(bell.read().is_err());
        assert_eq!(group(), MAX_PACKETS);
        assert_eq!(bell.read().ok(), Some(1));
        assert_eq!(group(), 36 + 4, "all small ones, and 60,000 bytes four times");
        while mailbox.take_arrival(room).is_some() {}
        assert!(mailbox.has_packet_room());
    }

    #[test]
    fn a_stop_is_not_replaced_by_a_pause() {
        let mailbox = Mailbox::default();
        mailbox.ask(Asked::Stop(StopReason::Operator));
        mailbox.ask(Asked::Pause);
        assert!(mailbox.is_asked_to_end());
        assert_eq!(mailbox.take_asked(), Some(Asked::Stop(StopReason::Operator)));
        assert!(!mailbox.is_asked_to_end());
        assert_eq!(mailbox.take_asked(), None);
        assert!(mailbox.was_asked_to_stop(), "also after it was taken");
    }

    #[test]
    fn console_input_beyond_the_limit_is_refused() {
        let mailbox = Mailbox::default();
        assert_eq!(mailbox.push_console_input(&[0; CONSOLE_INPUT_LIMIT + 5]), CONSOLE_INPUT_LIMIT);
        assert_eq!(mailbox.push_console_input(b"x"), 0);
        let room = Room { console: 1, packets: false };
        std::thread::scope(|scope| {
            scope.spawn(|| mailbox.wait_console_room(Duration::MAX));
            assert!(mailbox.take_arrival(room).is_some());
        });
        assert_eq!(mailbox.push_console_input(b"xy"), 1);
    }
}
