//! The virtio entropy device (specification §5.4): the guest offers buffers, the outside world
//! fills them.

use super::queue::{MAX_CHAIN_DESCRIPTORS, QueueAccess, QueueFault, Segment, total_len};
use super::{DeviceKind, DeviceName, VirtioDevice};
use crate::board::Effect;
use crate::devices::{InvalidState, require};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vmft_cpu::memory::GuestMemoryMmap;
use vmft_log::entry::RequestId;
use vmft_log::wire::MAX_COUNT;

/// Most bytes given for one buffer.
pub const MAX_REQUEST_BYTES: u32 = 4096;
const QUEUE_SIZE: u16 = 16;
const QUEUE: usize = 0;
/// Most requests on their way, those abandoned included.
const MAX_IN_FLIGHT: usize = QUEUE_SIZE as usize;

/// One buffer to be filled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Its name to the outside world.
    pub id: RequestId,
    /// Its chain's name to the driver.
    pub head: u16,
    /// Where the bytes go.
    pub buffers: Vec<Segment>,
    /// Bytes asked for.
    pub len: u32,
    /// The driver has reset the device since: nobody waits for the answer.
    pub abandoned: bool,
}

/// Everything a restored device needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntropyState {
    /// The name of the last request.
    pub last: RequestId,
    /// The requests on their way, oldest first.
    pub requests: VecDeque<Request>,
}

/// The device.
#[derive(Debug, Clone)]
pub struct Entropy {
    state: EntropyState,
}

impl Default for Entropy {
    fn default() -> Self {
        Self::new()
    }
}

impl Entropy {
    /// A device nobody has asked for anything.
    pub fn new() -> Self {
        Self { state: EntropyState { last: RequestId(0), requests: VecDeque::new() } }
    }

    /// The requests on their way, oldest first.
    pub fn requests(&self) -> impl Iterator<Item = &Request> {
        self.state.requests.iter()
    }

    /// The request of that name.
    pub fn find(&self, id: RequestId) -> Option<&Request> {
        self.state.requests.iter().find(|request| request.id == id)
    }

    /// Random bytes have come; the caller has checked with [`Self::find`] that there is such a
    /// request and that they are as many as it asked for.
    ///
    /// # Errors
    /// What is wrong with the queue.
    pub fn complete(
        &mut self,
        id: RequestId,
        data: &[u8],
        access: &mut QueueAccess<'_>,
    ) -> Result<(), QueueFault> {
        let index = self.state.requests.iter().position(|request| request.id == id);
        let ended = index.and_then(|index| self.state.requests.remove(index));
        if let Some(Request { head, buffers, abandoned: false, .. }) = ended {
            access.write(&buffers, 0, data);
            access.put_used(QUEUE, head, data.len() as u32)?;
        }
        self.take_requests(access)
    }

    fn take_requests(&mut self, access: &mut QueueAccess<'_>) -> Result<(), QueueFault> {
        loop {
            while self.has_room() {
                let Some(chain) = access.next_chain(QUEUE)? else { break };
                let len = total_len(&chain.writable).min(MAX_REQUEST_BYTES.into()) as u32;
                if len == 0 {
                    return Err(QueueFault::ShortChain { queue: QUEUE, head: chain.head });
                }
                self.state.last.0 += 1;
                let id = self.state.last;
                let (head, buffers, abandoned) = (chain.head, chain.writable, false);
                self.state.requests.push_back(Request { id, head, buffers, len, abandoned });
                access.effects().push(Effect::Entropy { request: id, len });
            }
            // Without room, a completion comes here again; no notification is needed.
            if !self.has_room() || !access.ask_for_notification(QUEUE)? {
                return Ok(());
            }
        }
    }

    fn has_room(&self) -> bool {
        self.state.requests.len() < MAX_IN_FLIGHT
    }
}

impl VirtioDevice for Entropy {
    type State = EntropyState;

    fn kind(&self) -> DeviceKind {
        // Unclassified device.
        DeviceKind { virtio_type: VIRTIO_ID_RNG as u16, pci_class: 0x00_FF00 }
    }

    fn name(&self) -> DeviceName {
        DeviceName::Entropy
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn config_space(&self) -> &[u8] {
        &[]
    }

    fn notify(&mut self, _: usize, access: &mut QueueAccess<'_>) -> Result<(), QueueFault> {
        self.take_requests(access)
    }

    fn abandon(&mut self) {
        for request in &mut self.state.requests {
            request.abandoned = true;
            request.buffers = Vec::new();
            request.head = 0;
        }
    }

    fn save(&self) -> EntropyState {
        let Self { state } = self;
        state.clone()
    }

    fn restore(
        &mut self,
        state: &EntropyState,
        queue_sizes: &[u16],
        stopped: bool,
        memory: &GuestMemoryMmap,
    ) -> Result<(), InvalidState> {
        let check = |holds, reason| require("entropy requests", holds, reason);
        let heads = if stopped { 0 } else { queue_sizes[QUEUE] };
        let EntropyState { last, requests } = state;
        check(requests.len() <= MAX_IN_FLIGHT, "too many")?;
        check(last.0 <= MAX_COUNT, "numbered beyond all requests")?;
        let mut previous = RequestId(0);
        for Request { id, head, buffers, len, abandoned } in requests {
            check(previous < *id && *id <= *last, "not numbered in order")?;
            previous = *id;
            check((1..=MAX_REQUEST_BYTES).contains(len), "length out of range")?;
            if *abandoned {
                check(buffers.is_empty() && *head == 0, "abandoned, but somebody waits for it")?;
                continue;
            }
            check(*head < heads, "no such descriptor")?;
            check(buffers.len() <= MAX_CHAIN_DESCRIPTORS, "too many buffers")?;
            let within = |segment: &Segment| segment.len > 0 && segment.is_memory(memory);
            check(buffers.iter().all(within), "a buffer outside memory")?;
            check(total_len(buffers) >= u64::from(*len), "buffers shorter than the length")?;
        }
        self.state = state.clone();
        Ok(())
    }
}
