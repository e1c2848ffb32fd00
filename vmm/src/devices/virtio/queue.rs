//! Walking virtqueues that a hostile guest may have written.
//!
//! `virtio-queue` does the ring arithmetic. Added here: chains are parsed whole and checked
//! (ends properly, readable buffers first, every buffer in guest memory, bounded length), and
//! the work done for one notification is bounded even if the device's own writes land in the
//! rings. The guest does not run meanwhile, so nothing changes between check and use.

use crate::board::EffectQueue;
use crate::devices::{InvalidState, require};
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, Permissions};
use vmft_cpu::memory::GuestMemoryMmap;

/// Descriptors a chain may have; every queue announces limits below it.
pub const MAX_CHAIN_DESCRIPTORS: usize = 256;

/// A contiguous piece of guest memory, checked to be guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes, not zero.
    pub len: u32,
}

impl Segment {
    /// True if every byte is guest memory.
    pub fn is_memory(self, memory: &GuestMemoryMmap) -> bool {
        memory.check_range(GuestAddress(self.address), self.len as usize, Permissions::ReadWrite)
    }
}

/// The bytes in `segments`.
pub fn total_len(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}

/// A request as the driver laid it out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Its first descriptor, which names it in the used ring.
    pub head: u16,
    /// What the device reads.
    pub readable: Vec<Segment>,
    /// What the device writes.
    pub writable: Vec<Segment>,
}

/// What a driver did to a queue that a device cannot go on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QueueFault {
    /// The rings are not in guest memory.
    #[error("the rings of queue {queue} are not in guest memory")]
    Rings {
        /// Which queue.
        queue: usize,
    },
    /// The available index is farther ahead than the queue is long.
    #[error("the available index of queue {queue} is beyond the queue")]
    AvailableIndex {
        /// Which queue.
        queue: usize,
    },
    /// More chains became available while the guest was not running.
    #[error("queue {queue} does not come to an end")]
    Endless {
        /// Which queue.
        queue: usize,
    },
    /// A chain leaves its table, does not end, or is longer than allowed.
    #[error("the chain at descriptor {head} of queue {queue} is broken")]
    BrokenChain {
        /// Which queue.
        queue: usize,
        /// First descriptor.
        head: u16,
    },
    /// A buffer is not in guest memory.
    #[error(
        "a buffer of the chain at descriptor {head} of queue {queue} is at {address:#x}, outside memory"
    )]
    Buffer {
        /// Which queue.
        queue: usize,
        /// First descriptor.
        head: u16,
        /// Where the buffer starts.
        address: u64,
    },
    /// A chain has more bytes than its device takes.
    #[error("the chain at descriptor {head} of queue {queue} is too long for a request")]
    LongChain {
        /// Which queue.
        queue: usize,
        /// First descriptor.
        head: u16,
    },
    /// A chain lacks the parts its device needs.
    #[error("the chain at descriptor {head} of queue {queue} is too short for a request")]
    ShortChain {
        /// Which queue.
        queue: usize,
        /// First descriptor.
        head: u16,
    },
}

/// One virtqueue's registers, as `virtio_queue::QueueState` has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Next available entry to take.
    pub next_available: u16,
    /// Next used entry to write.
    pub next_used: u16,
    /// Event indexes were negotiated.
    pub event_index: bool,
    /// Size chosen by the driver.
    pub size: u16,
    /// Enabled by the driver.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
}

impl QueueState {
    pub(super) fn of(queue: &Queue) -> Self {
        let virtio_queue::QueueState {
            max_size: _,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        } = queue.state();
        Self {
            next_available: next_avail,
            next_used,
            event_index: event_idx_enabled,
            size,
            ready,
            descriptors: desc_table,
            available: avail_ring,
            used: used_ring,
        }
    }

    pub(super) fn restore(
        &self,
        max_size: u16,
        memory: &GuestMemoryMmap,
    ) -> Result<Queue, InvalidState> {
        let state = virtio_queue::QueueState {
            max_size,
            next_avail: self.next_available,
            next_used: self.next_used,
            event_idx_enabled: self.event_index,
            size: self.size,
            ready: self.ready,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        };
        let reason = "size or alignment out of range";
        let queue =
            Queue::try_from(state).map_err(|_| InvalidState { device: "virtqueue", reason })?;
        let usable = !self.ready || queue_is_usable(&queue, memory);
        require("virtqueue", usable, "rings outside guest memory")?;
        Ok(queue)
    }
}

/// True if the rings of a ready queue lie in guest memory. Address 0 is refused too: it is where
/// a queue's rings are before the driver says otherwise.
pub(super) fn queue_is_usable(queue: &Queue, memory: &GuestMemoryMmap) -> bool {
    queue.is_valid(memory) && queue.avail_ring() != 0
}

/// A device's view of its queues and of guest memory, for the length of one exit or arrival.
#[derive(Debug)]
pub struct QueueAccess<'a> {
    memory: &'a GuestMemoryMmap,
    queues: &'a mut [Queue],
    effects: &'a mut EffectQueue,
    /// The driver has finished setting the device up.
    live: bool,
    /// What it has accepted.
    features: u64,
    /// Chains taken since the access began: a bound on the work of one exit.
    taken: u32,
    interrupt: bool,
}

impl<'a> QueueAccess<'a> {
    pub(super) fn new(
        memory: &'a GuestMemoryMmap,
        queues: &'a mut [Queue],
        effects: &'a mut EffectQueue,
        live: bool,
        features: u64,
    ) -> Self {
        Self { memory, queues, effects, live, features, taken: 0, interrupt: false }
    }

    /// The features that device and driver have agreed on.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// True if chains can be taken from the queue, when there are any.
    pub fn is_ready(&self, queue: usize) -> bool {
        self.live && self.queues[queue].ready()
    }

    /// Where in the queue the next chain is taken from.
    pub fn position(&self, queue: usize) -> u16 {
        self.queues[queue].next_avail()
    }

    /// Gives the last `chains` chains, taken since `position` and not used, back to be taken again.
    pub fn rewind(&mut self, queue: usize, position: u16, chains: usize) {
        self.queues[queue].set_next_avail(position);
        self.taken -= chains as u32;
    }

    /// True if the driver wants to hear of what was used.
    pub(super) fn wants_interrupt(&self) -> bool {
        self.interrupt
    }

    /// Where requests to the outside world go.
    pub fn effects(&mut self) -> &mut EffectQueue {
        self.effects
    }

    /// Takes the next chain the driver made available; none while the device is not set up.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn next_chain(&mut self, queue: usize) -> Result<Option<Chain>, QueueFault> {
        let ring = &mut self.queues[queue];
        if !self.live || !ring.ready() {
            return Ok(None);
        }
        let limit = u32::from(ring.size());
        let mut available =
            ring.iter(self.memory).map_err(|_| QueueFault::AvailableIndex { queue })?;
        let Some(descriptors) = available.next() else { return Ok(None) };
        self.taken += 1;
        if self.taken > limit {
            return Err(QueueFault::Endless { queue });
        }
        let head = descriptors.head_index();
        let broken = QueueFault::BrokenChain { queue, head };
        let mut chain = Chain { head, readable: Vec::new(), writable: Vec::new() };
        let mut ended = false;
        for (index, descriptor) in descriptors.enumerate() {
            if index == MAX_CHAIN_DESCRIPTORS {
                return Err(broken);
            }
            ended = !descriptor.has_next();
            let segment = Segment { address: descriptor.addr().raw_value(), len: descriptor.len() };
            if segment.len == 0 {
                continue;
            }
            if !segment.is_memory(self.memory) {
                return Err(QueueFault::Buffer { queue, head, address: segment.address });
            }
            if descriptor.is_write_only() {
                chain.writable.push(segment);
            } else if chain.writable.is_empty() {
                chain.readable.push(segment);
            } else {
                return Err(broken);
            }
        }
        if ended { Ok(Some(chain)) } else { Err(broken) }
    }

    /// Asks the driver to announce what it makes available from now on. True if something
    /// has become available already, which [`Self::next_chain`] will then find.
    ///
    /// # Errors
    /// [`QueueFault::Rings`] if the rings cannot be reached.
    pub fn ask_for_notification(&mut self, queue: usize) -> Result<bool, QueueFault> {
        let ring = &mut self.queues[queue];
        if !self.live || !ring.ready() {
            return Ok(false);
        }
        ring.enable_notification(self.memory).map_err(|_| QueueFault::Rings { queue })
    }

    /// Gives a chain back, `len` bytes of it written, and notes whether the driver wants an
    /// interrupt for it.
    ///
    /// # Errors
    /// What is wrong with the ring.
    pub fn put_used(&mut self, queue: usize, head: u16, len: u32) -> Result<(), QueueFault> {
        let rings = QueueFault::Rings { queue };
        let memory = self.memory;
        let ring = &mut self.queues[queue];
        ring.add_used(memory, head, len).map_err(|_| rings)?;
        let wanted = ring.needs_notification(memory).map_err(|_| rings)?;
        // `needs_notification` knows event indexes only; without them the driver has a flag.
        let silenced = !ring.event_idx_enabled() && {
            let flags: u16 = memory
                .load(GuestAddress(ring.avail_ring()), Ordering::Relaxed)
                .map_err(|_| rings)?;
            u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT != 0
        };
        self.interrupt |= wanted && !silenced;
        Ok(())
    }

    /// Copies `len` bytes out of the concatenation of `segments`, from byte `skip` on.
    /// Bytes that are not there are not copied.
    pub fn read(&self, segments: &[Segment], skip: u64, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len);
        let mut skip = skip;
        for segment in segments {
            let here = u64::from(segment.len);
            let start = skip.min(here);
            skip -= start;
            let count = ((here - start) as usize).min(len - bytes.len());
            self.memory
                .write_all_volatile_to(GuestAddress(segment.address + start), &mut bytes, count)
                .expect("segments are checked to be guest memory");
        }
        bytes
    }

    /// Copies bytes into the concatenation of `segments`, from byte `skip` on. Bytes that do not fit
    /// are dropped.
    pub fn write(&mut self, segments: &[Segment], skip: u64, bytes: &[u8]) {
        let (mut skip, mut rest) = (skip, bytes);
        for segment in segments {
            let start = skip.min(u64::from(segment.len));
            skip -= start;
            let room = (u64::from(segment.len) - start) as usize;
            let (here, later) = rest.split_at(rest.len().min(room));
            self.memory
                .write_slice(here, GuestAddress(segment.address + start))
                .expect("segments are checked to be guest memory");
            rest = later;
        }
    }
}
