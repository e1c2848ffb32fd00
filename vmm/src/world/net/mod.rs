//! The network outside: a TAP device, or a Unix socket to `passt`, QEMU or a switch.
//!
//! ```text
//!   HeldOutputs ──let_out──▶ NetPort::send ─────────────▶ Link ◀──▶ TAP, socket
//!                               │ doubtful                 ▲ │
//!                               └──▶ fence's thread ───────┘ └──▶ net thread ──▶ Mailbox
//! ```
//! Only a live side is attached. A packet is sent by the thread that lets it out, which at a
//! protected side is the one that has read the acknowledgement. A thread of its own receives,
//! repeats announcements, sends what a full socket did not take, and opens the link again when it is lost.
//!
//! **Fencing.** A side that was stopped for a while and goes on may hold acknowledgements of a backup
//! that has gone live since. What is let out on evidence that old ([`Assurance::Stale`]) waits for
//! the fence, on a thread that may wait for the arbiter, or for fresh evidence, whichever comes
//! first; everything behind it waits as well.

mod announce;
mod link;
mod stream;
mod tap;
mod thread;
mod unconfirmed;

pub use announce::announcements;

use super::{Fence, Mailbox};
use crate::board::NetConfig;
use crate::devices::virtio::net::addresses::Addresses;
use crate::outputs::Assurance;
use link::Link;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use thread::Announcer;
use unconfirmed::UnconfirmedPackets;
use vmft_log::entry::Packet;
use vmft_sandbox::Task;
use vmft_threads::{Mutex, MutexGuard};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Where the guest's network device is connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetTarget {
    /// A TAP device of the host, by name.
    Tap(String),
    /// An open TAP device, inherited as this file descriptor.
    TapFd(i32),
    /// A Unix socket where somebody listens who speaks the stream protocol of `passt` and QEMU.
    Socket(PathBuf),
}

impl std::fmt::Display for NetTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tap(name) => write!(f, "TAP device {name}"),
            Self::TapFd(number) => write!(f, "TAP file descriptor {number}"),
            Self::Socket(path) => write!(f, "socket {}", path.display()),
        }
    }
}

/// Why the network cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// There is no such TAP device.
    #[error("there is no network device {0}")]
    NoDevice(String),
    /// Another process has the TAP device open.
    #[error("TAP device {0} is in use")]
    InUse(String),
    /// The name is too long or too short for a network device.
    #[error("`{0}` is no name of a network device")]
    Name(String),
    /// Opening it failed.
    #[error("opening {target}")]
    Open {
        /// What.
        target: NetTarget,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// It is no TAP device that carries Ethernet frames without more in front.
    #[error("{0} is no TAP device without packet information")]
    NotTap(NetTarget),
    /// The host has no threads or events left.
    #[error("starting the network's thread")]
    Thread(#[source] io::Error),
}

/// Counts of packets, for status.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NetCounts {
    /// Sent to the network.
    pub sent: u64,
    /// Received from it.
    pub received: u64,
    /// Not sent: no link, or one that did not take them.
    pub lost: u64,
}

#[derive(Debug, Default)]
struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
    lost: AtomicU64,
}

/// Shared by whoever sends and the network's threads.
#[derive(Debug)]
struct Shared {
    target: NetTarget,
    /// What the guest leaves to be done may be left to the link, if that can do it.
    offloads: AtomicBool,
    link: Mutex<Option<Link>>,
    /// Makes the network's thread look around.
    wake: EventFd,
    counters: Counters,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<Link>> {
        self.link.lock()
    }

    /// Opens the link if it is not open.
    fn open(&self) -> Result<(), NetError> {
        let mut link = self.lock();
        if link.is_none() {
            let (target, offloads) = (self.target.clone(), self.offloads.load(Ordering::Relaxed));
            let open = move || Link::open(&target, offloads);
            *link = Some(vmft_sandbox::run(Task::Link, "link", open).map_err(NetError::Thread)??);
        }
        Ok(())
    }

    /// Sends packets; those the network does not take are lost, as on a wire.
    fn send(&self, packets: impl IntoIterator<Item = Packet>) {
        let mut link = self.lock();
        let (mut sent, mut lost) = (0, 0);
        let mut was_idle = true;
        for packet in packets {
            let Some(link) = link.as_mut() else {
                lost += 1;
                continue;
            };
            was_idle &= !link.has_unsent();
            match link.send(packet) {
                Ok(()) => sent += 1,
                // A link that is gone is noticed, and opened again, by the thread that reads it.
                Err(_) => lost += 1,
            }
        }
        let waits = link.as_ref().is_some_and(Link::has_unsent);
        drop(link);
        self.counters.sent.fetch_add(sent, Ordering::Relaxed);
        self.counters.lost.fetch_add(lost, Ordering::Relaxed);
        if waits && was_idle {
            self.wake();
        }
    }

    fn wake(&self) {
        // A counter that is full wakes just as well.
        let _ = self.wake.write(1);
    }
}

/// A machine's connection to the network, of one side.
#[derive(Debug)]
pub struct NetPort {
    shared: Arc<Shared>,
    /// Packets that wait, of a port that is attached.
    unconfirmed: OnceLock<Arc<UnconfirmedPackets>>,
}

impl NetPort {
    /// A port to `target`, not open yet.
    ///
    /// # Errors
    /// [`NetError::Thread`] if the host has no events left.
    pub fn new(target: NetTarget) -> Result<Self, NetError> {
        let shared = Shared {
            target,
            offloads: AtomicBool::new(false),
            link: Mutex::new(None),
            wake: EventFd::new(EFD_NONBLOCK).map_err(NetError::Thread)?,
            counters: Counters::default(),
        };
        Ok(Self { shared: Arc::new(shared), unconfirmed: OnceLock::new() })
    }

    /// Opens the link, of a side that is about to be live, for a machine whose device has `offloads`
    /// or not.
    ///
    /// # Errors
    /// See [`NetError`].
    pub fn open(&self, offloads: bool) -> Result<(), NetError> {
        self.shared.offloads.store(offloads, Ordering::Relaxed);
        self.shared.open()
    }

    /// Looks whether the link could be opened, without opening it: a side that only follows must not
    /// be seen by the network.
    ///
    /// # Errors
    /// See [`NetError`].
    pub fn check(&self) -> Result<(), NetError> {
        link::check(&self.shared.target)
    }

    /// Connects the machine: announces the guest's addresses, then lets packets through. A link that
    /// cannot be opened now is tried again and again: the guest's cable is unplugged meanwhile.
    ///
    /// # Errors
    /// [`NetError::Thread`].
    pub fn attach(
        &self,
        device: &NetConfig,
        addresses: &Addresses,
        fence: &Arc<dyn Fence>,
        mailbox: &Arc<Mailbox>,
    ) -> Result<(), NetError> {
        let announcer = Announcer::new(announcements(device.mac, addresses));
        if let Err(error) = self.open(device.offloads) {
            let error = super::error_text(&error);
            tracing::error!("the guest has no network yet: {error}; trying again");
        }
        announcer.announce(&self.shared);
        let unconfirmed = Arc::new(UnconfirmedPackets::default());
        unconfirmed::start(&unconfirmed, Arc::clone(&self.shared), Arc::clone(fence))?;
        thread::start(
            Arc::clone(&self.shared),
            Arc::clone(&unconfirmed),
            announcer,
            Arc::clone(mailbox),
        )?;
        assert!(self.unconfirmed.set(unconfirmed).is_ok(), "a port is attached once");
        Ok(())
    }

    /// Sends a packet of the guest. One that is let out on stale evidence, and every later one, waits
    /// until the fence was asked or fresh evidence has come.
    pub fn send(&self, packet: Packet, assurance: Assurance) {
        if let Some(unconfirmed) = self.unconfirmed.get() {
            unconfirmed.send(packet, assurance, &*self.shared);
        }
    }

    /// What was sent, received and lost.
    pub fn counts(&self) -> NetCounts {
        let counters = &self.shared.counters;
        NetCounts {
            sent: counters.sent.load(Ordering::Relaxed),
            received: counters.received.load(Ordering::Relaxed),
            lost: counters.lost.load(Ordering::Relaxed),
        }
    }
}

impl Drop for NetPort {
    fn drop(&mut self) {
        *self.shared.lock() = None;
        self.shared.wake();
        if let Some(unconfirmed) = self.unconfirmed.get() {
            unconfirmed.close();
        }
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), NetError> {
    vmft_sandbox::spawn(Task::Network, name, body).map(drop).map_err(NetError::Thread)
}
