//! The network's thread: receives, repeats announcements, sends what a socket did not take, and opens
//! the link again when it is lost.

use super::link::Link;
use super::unconfirmed::{PacketSink, UnconfirmedPackets};
use super::{NetError, Shared, spawn};
use crate::outputs::Assurance;
use crate::world::{Mailbox, Repeats};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use vmft_log::entry::{MAX_PACKETS, Packet, PacketOffload};
use vmm_sys_util::eventfd::EventFd;

/// When announcements are repeated, after the first: a switch or host that misses one has the others.
const REPEATS: [Duration; 5] = [
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(350),
    Duration::from_millis(700),
    Duration::from_millis(1_500),
];
/// How often a link that is lost is tried again.
const RETRY: Duration = Duration::from_millis(100);

/// Announces a guest.
#[derive(Debug)]
pub(super) struct Announcer {
    frames: Vec<Vec<u8>>,
    begun: Instant,
    repeats: usize,
}

impl Announcer {
    #[expect(clippy::disallowed_methods, reason = "the rim repeats announcements in host time")]
    pub(super) fn new(frames: Vec<Vec<u8>>) -> Self {
        Self { frames, begun: Instant::now(), repeats: 0 }
    }

    fn packets(&self) -> impl Iterator<Item = Packet> {
        let packet =
            |frame: &Vec<u8>| Packet { offload: PacketOffload::default(), frame: frame.clone() };
        self.frames.iter().map(packet)
    }

    /// The first announcement, of a side that has just won.
    pub(super) fn announce(&self, shared: &Shared) {
        shared.send(self.packets());
    }

    /// Another one. By now another side may have won: it waits for the fence.
    pub(super) fn repeat(&self, sink: &impl PacketSink, unconfirmed: &UnconfirmedPackets) {
        self.packets().for_each(|packet| unconfirmed.send(packet, Assurance::Stale, sink));
    }

    /// Time to the next announcement, of those that are left.
    fn next_in(&self) -> Option<Duration> {
        REPEATS.get(self.repeats).map(|due| due.saturating_sub(self.begun.elapsed()))
    }

    fn repeat_if_due(&mut self, shared: &Shared, unconfirmed: &UnconfirmedPackets) {
        if self.next_in().is_some_and(|left| left.is_zero()) {
            self.repeats += 1;
            self.repeat(shared, unconfirmed);
        }
    }

    /// The link is a new one: everything is said again.
    #[expect(clippy::disallowed_methods, reason = "the rim repeats announcements in host time")]
    fn begin_again(&mut self, shared: &Shared, unconfirmed: &UnconfirmedPackets) {
        (self.begun, self.repeats) = (Instant::now(), 0);
        self.repeat(shared, unconfirmed);
    }
}

/// Starts the thread; it ends when the port is dropped.
pub(super) fn start(
    shared: Arc<Shared>,
    unconfirmed: Arc<UnconfirmedPackets>,
    announcer: Announcer,
    mailbox: Arc<Mailbox>,
) -> Result<(), NetError> {
    let wake = shared.wake.try_clone().map_err(NetError::Thread)?;
    mailbox.set_packet_bell(shared.wake.try_clone().map_err(NetError::Thread)?);
    let shared = Arc::downgrade(&shared);
    let receiver =
        Receiver { shared, unconfirmed, announcer, mailbox, wake, told: false, tried: None };
    spawn("net", move || receiver.run())
}

struct Receiver {
    shared: Weak<Shared>,
    unconfirmed: Arc<UnconfirmedPackets>,
    announcer: Announcer,
    mailbox: Arc<Mailbox>,
    wake: EventFd,
    /// The operator knows that the link is lost.
    told: bool,
    /// When it was lost or tried last: a peer that accepts and closes must not be asked all the time.
    tried: Option<Instant>,
}

/// A peer may take the link away as often as it likes.
static LOST: Repeats = Repeats::new();

impl Receiver {
    fn run(mut self) {
        let mut link: Option<OwnedFd> = None;
        loop {
            // Between two looks nothing here keeps the port alive.
            let Some(shared) = self.shared.upgrade() else { return };
            self.announcer.repeat_if_due(&shared, &self.unconfirmed);
            if link.is_none() && self.tried.is_none_or(|tried| tried.elapsed() >= RETRY) {
                link = self.open(&shared);
            }
            let wants_to_send = shared.lock().as_ref().is_some_and(Link::has_unsent);
            drop(shared);
            let ready = self.wait(link.as_ref(), wants_to_send);
            if ready.is_empty() {
                continue;
            }
            let Some(shared) = self.shared.upgrade() else { return };
            if let Err(error) = self.serve(&shared) {
                if let Some(times) = LOST.note(&error.to_string()) {
                    tracing::error!("the guest's network is lost: {error}; trying again{times}");
                }
                *shared.lock() = None;
                (link, self.told) = (None, true);
                self.note_try();
            }
        }
    }

    #[expect(clippy::disallowed_methods, reason = "the rim waits in host time")]
    fn note_try(&mut self) {
        self.tried = Some(Instant::now());
    }

    /// Something to wait on for the open link.
    fn open(&mut self, shared: &Shared) -> Option<OwnedFd> {
        self.note_try();
        let is_new = shared.lock().is_none();
        if let Err(error) = shared.open() {
            tracing::debug!(%error, "opening the network");
            self.told = true;
            return None;
        }
        if is_new {
            self.announcer.begin_again(shared, &self.unconfirmed);
        }
        if std::mem::take(&mut self.told) {
            tracing::info!("the guest's network is back");
        }
        shared.lock().as_ref().and_then(|link| link.try_clone_fd().ok())
    }

    /// Waits until the link, or whoever sends, wants something; what the link is ready for.
    fn wait(&self, link: Option<&OwnedFd>, wants_to_send: bool) -> PollFlags {
        let mut limit = self.announcer.next_in();
        if link.is_none() {
            limit = Some(limit.map_or(RETRY, |limit| limit.min(RETRY)));
        }
        // A moment more than due, so that it is due then.
        let timeout = limit.map_or(PollTimeout::NONE, |limit| {
            PollTimeout::try_from(limit + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::POLLIN, self.mailbox.has_packet_room());
        wanted.set(PollFlags::POLLOUT, wants_to_send);
        // SAFETY: the event's descriptor is open for as long as `self.wake` is.
        let wake = unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(&self.wake)) };
        let mut fds = vec![PollFd::new(wake, PollFlags::POLLIN)];
        // A link nothing is wanted of is left out: its end would be reported again and again.
        if let Some(link) = link.filter(|_| !wanted.is_empty()) {
            fds.push(PollFd::new(link.as_fd(), wanted));
        }
        // An interrupted wait is one that ends early.
        let _ = poll(&mut fds, timeout);
        if fds[0].any() == Some(true) {
            let _ = self.wake.read();
        }
        fds.get(1).and_then(PollFd::revents).unwrap_or(PollFlags::empty())
    }

    fn serve(&self, shared: &Shared) -> std::io::Result<()> {
        let mut packets = Vec::new();
        let received = {
            let mut link = shared.lock();
            let Some(link) = link.as_mut() else { return Ok(()) };
            link.send_rest()?;
            if self.mailbox.has_packet_room() {
                link.receive(MAX_PACKETS, &mut packets)
            } else {
                Ok(())
            }
        };
        shared.counters.received.fetch_add(packets.len() as u64, Ordering::Relaxed);
        if !packets.is_empty() {
            self.mailbox.push_packets(packets);
        }
        received
    }
}
