//! Where the world leaves what it has for the guest.

use crate::engine::Kicker;
use crate::inputs::Asked;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Instant;
use vmft_logging_channel::entry::Arrival;

/// Console input kept for a guest that does not read it, in bytes. More is refused.
const CONSOLE_INPUT_LIMIT: usize = 64 << 10;

#[derive(Debug, Default)]
struct Mail {
    arrivals: VecDeque<Arrival>,
    console_input: VecDeque<u8>,
    asked: Option<Asked>,
    /// Makes the running machine look here.
    bell: Option<Bell>,
}

/// How the running machine is made to look.
#[derive(Debug)]
struct Bell {
    kicker: Kicker,
    /// Also for arrivals.
    for_arrivals: bool,
}

impl Mail {
    fn something_to_take(&self, console_room: usize) -> bool {
        !self.arrivals.is_empty()
            || self.asked.is_some()
            || (console_room > 0 && !self.console_input.is_empty())
    }
}

/// Arrivals and requests of the operator, on their way to the run loop.
#[derive(Debug, Default)]
pub struct Mailbox {
    mail: Mutex<Mail>,
    wake: Condvar,
    /// Set while there may be something to take: spares the run loop the lock.
    any: AtomicBool,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock().expect("no holder of the mailbox's lock panics")
    }

    fn rouse(&self, mail: MutexGuard<'_, Mail>) {
        let wanted = |bell: &&Bell| bell.for_arrivals || mail.asked.is_some();
        let kicker = mail.bell.as_ref().filter(wanted).map(|bell| bell.kicker.clone());
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
        self.lock().bell = kicker.map(|kicker| Bell { kicker, for_arrivals });
    }

    /// Leaves an arrival.
    pub fn push(&self, arrival: Arrival) {
        let mut mail = self.lock();
        mail.arrivals.push_back(arrival);
        self.rouse(mail);
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

    /// Asks the machine to pause, stop or halt. What is asked replaces only what is weaker.
    pub fn ask(&self, asked: Asked) {
        let strength = |asked| match asked {
            Asked::Pause => 1,
            Asked::Stop(_) => 2,
            Asked::Halt => 3,
        };
        let mut mail = self.lock();
        if mail.asked.is_none_or(|before| strength(before) < strength(asked)) {
            mail.asked = Some(asked);
        }
        self.rouse(mail);
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
            mail = self.wake.wait(mail).expect("no holder of the mailbox's lock panics");
        }
    }

    pub(super) fn take_arrival(&self, console_room: usize) -> Option<Arrival> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        let mut mail = self.lock();
        if let Some(arrival) = mail.arrivals.pop_front() {
            return Some(arrival);
        }
        let typed = mail.console_input.len().min(console_room);
        if typed > 0 {
            return Some(Arrival::ConsoleInput(mail.console_input.drain(..typed).collect()));
        }
        if mail.asked.is_none() && mail.console_input.is_empty() {
            self.any.store(false, Ordering::Release);
        }
        None
    }

    /// Waits until there is something to take, or until `deadline`; true if there is.
    #[expect(clippy::disallowed_methods, reason = "the rim waits in host time")]
    pub(super) fn wait(&self, deadline: Option<Instant>, console_room: usize) -> bool {
        let mut mail = self.lock();
        while !mail.something_to_take(console_room) {
            let Some(deadline) = deadline else {
                mail = self.wake.wait(mail).expect("no holder of the mailbox's lock panics");
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.wake.wait_timeout(mail, left);
            mail = waited.expect("no holder of the mailbox's lock panics").0;
        }
        true
    }

    /// Forgets everything that came, and whom to tell: the machine it was for is no more.
    pub fn clear(&self) {
        *self.lock() = Mail::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmft_logging_channel::entry::{RequestId, StopReason};

    #[test]
    fn arrivals_come_in_order_and_console_input_only_as_there_is_room() {
        let mailbox = Mailbox::default();
        assert_eq!(mailbox.push_console_input(b"hello"), 5);
        for request in [1, 2] {
            mailbox.push(Arrival::Entropy { request: RequestId(request), data: vec![] });
        }
        let next = || mailbox.take_arrival(2);
        assert_eq!(next(), Some(Arrival::Entropy { request: RequestId(1), data: vec![] }));
        assert_eq!(next(), Some(Arrival::Entropy { request: RequestId(2), data: vec![] }));
        assert_eq!(next(), Some(Arrival::ConsoleInput(b"he".to_vec())));
        assert_eq!(mailbox.take_arrival(0), None);
        assert_eq!(mailbox.take_arrival(9), Some(Arrival::ConsoleInput(b"llo".to_vec())));
        assert_eq!(next(), None);
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
    }

    #[test]
    fn console_input_beyond_the_limit_is_refused() {
        let mailbox = Mailbox::default();
        assert_eq!(mailbox.push_console_input(&[0; CONSOLE_INPUT_LIMIT + 5]), CONSOLE_INPUT_LIMIT);
        assert_eq!(mailbox.push_console_input(b"x"), 0);
    }
}
