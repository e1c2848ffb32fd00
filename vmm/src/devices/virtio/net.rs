//! The virtio network device (specification §5.1): one pair of queues, no control queue.
//!
//! Packets from the network come in groups, at a point both sides of a pair agree on, and make one
//! interrupt. What finds no buffer waits here, and no further group is taken before the driver has
//! made room. Packets of the guest are copied out at the exit that announces them, so their buffers
//! are used at once and the driver never waits for the network.
//!
//! With offloads the driver leaves checksums undone and TCP packets uncut ([`offload`]); what a
//! packet has left to be done travels with it. A driver that does not take such packets gets
//! finished ones. Which offloads are offered is the machine's configuration, never a host's
//! ability.
//!
//! The device also learns the guest's [`addresses`], for announcements at a go-live.

pub mod addresses;
pub mod offload;

use super::queue::{Chain, QueueAccess, QueueFault, total_len};
use super::{DeviceKind, DeviceName, VirtioDevice};
use crate::board::Effect;
use crate::devices::{InvalidState, require};
use addresses::{Addresses, MacAddress};
use offload::Work;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::VecDeque;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use vmft_cpu::memory::GuestMemoryMmap;
use vmft_log::entry::{MAX_PACKET, MAX_PACKET_BYTES, MAX_PACKETS, Packet, PacketOffload};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Room for 256 buffers: a megabyte of pages to receive into.
const QUEUE_SIZE: u16 = 256;
/// `struct virtio_net_hdr_v1`.
const HEADER_LEN: usize = PacketOffload::LEN + 2;
/// `struct virtio_net_config` up to and including the link status.
const CONFIG_LEN: usize = 8;
/// Most packets that wait for buffers: a group, cut into the smallest segments.
const MAX_WAITING: usize = MAX_PACKETS + MAX_PACKET_BYTES / offload::MIN_SEGMENT as usize;

/// What a driver may leave to be done, and may be left with.
const OFFLOADS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6;

/// Everything a restored device needs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NetState {
    /// Packets that have come and wait for buffers, oldest first.
    pub waiting: VecDeque<Packet>,
    /// The guest's addresses.
    pub addresses: Addresses,
}

/// The device.
#[derive(Debug, Clone)]
pub struct Net {
    mac: MacAddress,
    offloads: bool,
    config_space: [u8; CONFIG_LEN],
    state: NetState,
}

impl Net {
    /// A device with the address `mac`; its link is always up.
    pub fn new(mac: MacAddress, offloads: bool) -> Self {
        let mut config_space = [0; CONFIG_LEN];
        config_space[..6].copy_from_slice(&mac.0);
        config_space[6..].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        Self { mac, offloads, config_space, state: NetState::default() }
    }

    /// The addresses the guest was seen to use.
    pub fn addresses(&self) -> &Addresses {
        &self.state.addresses
    }

    /// True if another group of packets may come.
    pub fn has_room(&self) -> bool {
        self.state.waiting.is_empty()
    }

    /// Packets have come. The caller has checked with [`Self::has_room`].
    ///
    /// # Errors
    /// What is wrong with the queue.
    pub fn receive(
        &mut self,
        packets: &[Packet],
        access: &mut QueueAccess<'_>,
    ) -> Result<(), QueueFault> {
        if !access.is_ready(RECEIVE) {
            // A cable nobody listens to.
            return Ok(());
        }
        for packet in packets {
            match offload::work(packet) {
                Ok(work) if is_taken(work, access.features()) => {
                    self.place_or_keep(Cow::Borrowed(packet), access)?;
                }
                Ok(_) => {
                    for frame in offload::finish(packet.clone()).expect("checked") {
                        let finished = Packet { offload: PacketOffload::default(), frame };
                        self.place_or_keep(Cow::Owned(finished), access)?;
                    }
                }
                // A damaged packet is lost, as on a wire.
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// Moves a packet that the driver takes into its buffers; behind those that wait, if any do.
    fn place_or_keep(
        &mut self,
        packet: Cow<'_, Packet>,
        access: &mut QueueAccess<'_>,
    ) -> Result<(), QueueFault> {
        if !self.state.waiting.is_empty() || !place_packet(&packet, access)? {
            self.state.waiting.push_back(packet.into_owned());
        }
        Ok(())
    }

    /// Moves what waits into the driver's buffers, as far as there are any.
    fn place(&mut self, access: &mut QueueAccess<'_>) -> Result<(), QueueFault> {
        while let Some(packet) = self.state.waiting.front() {
            if !place_packet(packet, access)? {
                break;
            }
            self.state.waiting.pop_front();
        }
        Ok(())
    }

    fn transmit_all(&mut self, access: &mut QueueAccess<'_>) -> Result<(), QueueFault> {
        loop {
            while let Some(chain) = access.next_chain(TRANSMIT)? {
                self.transmit(&chain, access)?;
            }
            if !access.ask_for_notification(TRANSMIT)? {
                return Ok(());
            }
        }
    }

    fn transmit(&mut self, chain: &Chain, access: &mut QueueAccess<'_>) -> Result<(), QueueFault> {
        let len = total_len(&chain.readable);
        if len < HEADER_LEN as u64 || !chain.writable.is_empty() {
            return Err(QueueFault::ShortChain { queue: TRANSMIT, head: chain.head });
        }
        if len > (HEADER_LEN + MAX_PACKET) as u64 {
            return Err(QueueFault::LongChain { queue: TRANSMIT, head: chain.head });
        }
        let header = access.read(&chain.readable, 0, PacketOffload::LEN);
        let header = header.try_into().expect("the chain is long enough");
        let frame = access.read(&chain.readable, HEADER_LEN as u64, len as usize - HEADER_LEN);
        let packet = Packet { offload: PacketOffload::from_bytes(header), frame };
        // What no network could carry is lost, as on a wire.
        if offload::work(&packet).is_ok_and(|work| is_offered(work, self.features())) {
            self.state.addresses.learn(self.mac, &packet.frame);
            access.effects().push(Effect::Packet(packet));
        }
        access.put_used(TRANSMIT, chain.head, 0)
    }
}

/// `struct virtio_net_hdr_v1`.
fn header_bytes(offload: PacketOffload, buffers: u16) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    bytes[..PacketOffload::LEN].copy_from_slice(&offload.to_bytes());
    bytes[PacketOffload::LEN..].copy_from_slice(&buffers.to_le_bytes());
    bytes
}

/// True for a packet that a device takes, from whichever side.
pub fn is_good(packet: &Packet) -> bool {
    packet.frame.len() <= MAX_PACKET && offload::work(packet).is_ok()
}

fn has(features: u64, bit: u32) -> bool {
    features & 1 << bit != 0
}

/// True if a driver may leave this work to the device.
fn is_offered(work: Work, features: u64) -> bool {
    match work {
        Work::None => true,
        Work::Checksum { .. } => has(features, VIRTIO_NET_F_CSUM),
        Work::Segment(tcp) if tcp.is_ipv6 => has(features, VIRTIO_NET_F_HOST_TSO6),
        Work::Segment(_) => has(features, VIRTIO_NET_F_HOST_TSO4),
    }
}

/// True if the driver takes a packet with this work left.
fn is_taken(work: Work, features: u64) -> bool {
    match work {
        Work::None => true,
        Work::Checksum { .. } => has(features, VIRTIO_NET_F_GUEST_CSUM),
        Work::Segment(tcp) if tcp.is_ipv6 => has(features, VIRTIO_NET_F_GUEST_TSO6),
        Work::Segment(_) => has(features, VIRTIO_NET_F_GUEST_TSO4),
    }
}

/// Puts a packet into buffers; false if there are too few, of which then none is used, and the driver
/// announces the next.
fn place_packet(packet: &Packet, access: &mut QueueAccess<'_>) -> Result<bool, QueueFault> {
    let wanted = HEADER_LEN + packet.frame.len();
    let mergeable = has(access.features(), VIRTIO_NET_F_MRG_RXBUF);
    let start = access.position(RECEIVE);
    let mut chains = Vec::new();
    let mut room = 0;
    while room < wanted {
        let Some(chain) = access.next_chain(RECEIVE)? else {
            // Asked behind the last buffer there is: those before it the driver has announced.
            if access.ask_for_notification(RECEIVE)? {
                continue;
            }
            access.rewind(RECEIVE, start, chains.len());
            return Ok(false);
        };
        let here = total_len(&chain.writable) as usize;
        if here < HEADER_LEN || !chain.readable.is_empty() {
            return Err(QueueFault::ShortChain { queue: RECEIVE, head: chain.head });
        }
        room += here;
        chains.push(chain);
        if !mergeable && room < wanted {
            // The driver gives smaller buffers than its features call for: the packet is lost.
            access.rewind(RECEIVE, start, chains.len());
            return Ok(true);
        }
    }
    // The header is in the first chain, which has room for it.
    access.write(&chains[0].writable, 0, &header_bytes(packet.offload, chains.len() as u16));
    let (mut skip, mut rest) = (HEADER_LEN, packet.frame.as_slice());
    for chain in &chains {
        let here = rest.len().min(total_len(&chain.writable) as usize - skip);
        let (now, later) = rest.split_at(here);
        access.write(&chain.writable, skip as u64, now);
        access.put_used(RECEIVE, chain.head, (skip + here) as u32)?;
        (skip, rest) = (0, later);
    }
    Ok(true)
}

impl VirtioDevice for Net {
    type State = NetState;

    fn kind(&self) -> DeviceKind {
        // Network controller, Ethernet.
        DeviceKind { virtio_type: VIRTIO_ID_NET as u16, pci_class: 0x02_0000 }
    }

    fn name(&self) -> DeviceName {
        DeviceName::Network
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS | 1 << VIRTIO_NET_F_MRG_RXBUF;
        always | if self.offloads { OFFLOADS } else { 0 }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn config_space(&self) -> &[u8] {
        &self.config_space
    }

    fn notify(&mut self, queue: usize, access: &mut QueueAccess<'_>) -> Result<(), QueueFault> {
        match queue {
            RECEIVE => self.place(access),
            _ => self.transmit_all(access),
        }
    }

    /// What waited for buffers is lost. The guest's addresses are still its own.
    fn abandon(&mut self) {
        self.state.waiting.clear();
    }

    fn save(&self) -> NetState {
        let Self { mac: _, offloads: _, config_space: _, state } = self;
        state.clone()
    }

    fn restore(
        &mut self,
        state: &NetState,
        queue_sizes: &[u16],
        stopped: bool,
        _: &GuestMemoryMmap,
    ) -> Result<(), InvalidState> {
        let check = |holds, reason| require("network device", holds, reason);
        let NetState { waiting, addresses } = state;
        let nobody = stopped || queue_sizes[RECEIVE] == 0;
        check(waiting.is_empty() || !nobody, "packets for a driver that is not there")?;
        check(waiting.len() <= MAX_WAITING, "too many packets")?;
        check(waiting.iter().all(is_good), "a packet that cannot have come")?;
        check(addresses.is_valid(), "addresses that cannot have been learned")?;
        self.state = state.clone();
        Ok(())
    }
}
