//! What a packet's sender has left to be done, checked and done: the last checksum, and cutting a
//! packet of up to 64 KiB of TCP into segments.
//!
//! Pure functions of bytes that a hostile guest or network may have written. They serve the
//! device, for a driver that takes no unfinished packets, and the rim, for a network that takes
//! none. The rules are those of the kernel's `virtio_net_hdr_to_skb` and of virtio 1.2, §5.1.6.2.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6,
};
use vmft_log::entry::{Packet, PacketOffload};

/// Length of an Ethernet header without a VLAN tag.
pub const ETHERNET_HEADER: usize = 14;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86DD;
const ETHERTYPE_VLAN: u16 = 0x8100;
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const TCP_HEADER: usize = 20;
const PROTOCOL_TCP: u8 = 6;
/// Offset of the checksum in a TCP header.
const TCP_CHECKSUM: usize = 16;
/// Offset of the checksum in a UDP header.
const UDP_CHECKSUM: usize = 6;
/// Offset of the flags in a TCP header.
const TCP_FLAGS: usize = 13;
/// Set in the first segment only.
const TCP_CWR: u8 = 0x80;
/// Set in the last segment only.
const TCP_FIN_PSH: u8 = 0x09;

/// Fewest payload bytes of a segment that Linux makes (`TCP_MIN_GSO_SIZE`): bounds how many a packet
/// can become.
pub const MIN_SEGMENT: u16 = 8;

const NEEDS_CHECKSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const GSO_NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
const GSO_TCPV4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const GSO_TCPV6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;

/// What is said to be left to do cannot be done to this packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(&'static str);

/// What is left to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Nothing: the packet is ready for the wire.
    None,
    /// The checksum of everything from `start` on goes to `place`.
    Checksum {
        /// Offset of the first byte it covers.
        start: usize,
        /// Offset of its first byte.
        place: usize,
    },
    /// The payload is cut into segments, each with headers and checksums of its own.
    Segment(Tcp),
}

/// A packet of TCP, larger than the wire takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tcp {
    /// It is IPv6.
    pub is_ipv6: bool,
    /// Offset of the IP header.
    network: usize,
    /// Offset of the TCP header.
    transport: usize,
    /// Offset of the payload.
    payload: usize,
    /// Payload bytes of each segment but the last, not zero.
    size: usize,
    /// What the length field of the IP header counts beside a segment's payload: checked together with
    /// the largest payload, so that no segment's length wraps.
    counted: IpLength,
}

/// A length for an IP header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct IpLength(u16);

impl IpLength {
    fn new(bytes: usize) -> Result<Self, Malformed> {
        let length = u16::try_from(bytes);
        length.map(Self).map_err(|_| Malformed("more than an IP header can count"))
    }

    fn plus(self, bytes: usize) -> Result<Self, Malformed> {
        Self::new(usize::from(self.0).saturating_add(bytes))
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

fn put_word(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Reads and checks what is left to do to a packet.
///
/// # Errors
/// [`Malformed`] if it cannot be done.
pub fn work(packet: &Packet) -> Result<Work, Malformed> {
    let PacketOffload { flags, gso_type, header_len: _, segment_size, .. } = packet.offload;
    if packet.frame.len() < ETHERNET_HEADER {
        return Err(Malformed("shorter than an Ethernet header"));
    }
    let checksum = flags & NEEDS_CHECKSUM != 0;
    let start = usize::from(packet.offload.checksum_start);
    let place = start + usize::from(packet.offload.checksum_offset);
    if checksum && (start < ETHERNET_HEADER || place + 2 > packet.frame.len()) {
        return Err(Malformed("the checksum is not in the packet"));
    }
    let is_ipv6 = match gso_type {
        GSO_NONE if checksum => return Ok(Work::Checksum { start, place }),
        GSO_NONE => return Ok(Work::None),
        GSO_TCPV4 => false,
        GSO_TCPV6 => true,
        _ => return Err(Malformed("segmentation of an unknown kind")),
    };
    if !checksum || place - start != TCP_CHECKSUM || segment_size < MIN_SEGMENT {
        return Err(Malformed("segmentation without a TCP checksum or a size"));
    }
    tcp(&packet.frame, is_ipv6, start, usize::from(segment_size)).map(Work::Segment)
}

fn tcp(frame: &[u8], is_ipv6: bool, transport: usize, size: usize) -> Result<Tcp, Malformed> {
    let (ethertype, network) = match word(frame, ETHERNET_HEADER - 2) {
        Some(ETHERTYPE_VLAN) => (word(frame, ETHERNET_HEADER + 2), ETHERNET_HEADER + 4),
        ethertype => (ethertype, ETHERNET_HEADER),
    };
    let wanted = if is_ipv6 { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 };
    let header = if is_ipv6 { IPV6_HEADER } else { IPV4_HEADER };
    if ethertype != Some(wanted) || transport < network + header {
        return Err(Malformed("segmentation of something else than its kind"));
    }
    let data_offset = *frame.get(transport + 12).ok_or(Malformed("no TCP header"))?;
    let payload = transport + usize::from(data_offset >> 4) * 4;
    if payload < transport + TCP_HEADER || payload > frame.len() {
        return Err(Malformed("the TCP header is not in the packet"));
    }
    let first = frame[network];
    let fits = if is_ipv6 {
        first >> 4 == 6
    } else {
        let length = usize::from(first & 0xF) * 4;
        first >> 4 == 4 && network + length == transport && frame[network + 9] == PROTOCOL_TCP
    };
    if !fits {
        return Err(Malformed("the IP header does not lead to the TCP header"));
    }
    let counted = payload - network - if is_ipv6 { IPV6_HEADER } else { 0 };
    let counted = IpLength::new(counted)?;
    counted.plus(size.min(frame.len() - payload))?;
    Ok(Tcp { is_ipv6, network, transport, payload, size, counted })
}

/// The sum of 16-bit words that checksums are made of, not folded.
fn sum(bytes: &[u8]) -> u64 {
    let (words, last) = bytes.as_chunks::<2>();
    let words: u64 = words.iter().map(|word| u64::from(u16::from_be_bytes(*word))).sum();
    words + last.first().map_or(0, |byte| u64::from(*byte) << 8)
}

/// The checksum of a sum.
fn checksum(mut sum: u64) -> u16 {
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    !(sum as u16)
}

/// Puts in the checksum of everything from `start` on. Its place holds the sum of the pseudo header.
fn complete(frame: &mut [u8], start: usize, place: usize) {
    let found = checksum(sum(&frame[start..]));
    // UDP has zero for a packet without a checksum.
    let value = if found == 0 && place - start == UDP_CHECKSUM { 0xFFFF } else { found };
    put_word(frame, place, value);
}

impl Tcp {
    /// The segment with the payload bytes from `from` on.
    fn segment(&self, frame: &[u8], from: usize, number: u16) -> Vec<u8> {
        let end = (from + self.size).min(frame.len());
        let mut segment = frame[..self.payload].to_vec();
        segment.extend_from_slice(&frame[from..end]);
        let (network, transport) = (self.network, self.transport);
        let length = self.counted.plus(end - from).expect("checked for the largest segment").0;
        if self.is_ipv6 {
            put_word(&mut segment, network + 4, length);
        } else {
            put_word(&mut segment, network + 2, length);
            let id = word(&segment, network + 4).expect("checked").wrapping_add(number);
            put_word(&mut segment, network + 4, id);
            put_word(&mut segment, network + 10, 0);
            let header = checksum(sum(&segment[network..transport]));
            put_word(&mut segment, network + 10, header);
        }
        let advance = (from - self.payload) as u32;
        let sequence = &mut segment[transport + 4..transport + 8];
        let first = u32::from_be_bytes(sequence.try_into().expect("four bytes"));
        sequence.copy_from_slice(&first.wrapping_add(advance).to_be_bytes());
        if number > 0 {
            segment[transport + TCP_FLAGS] &= !TCP_CWR;
        }
        if end < frame.len() {
            segment[transport + TCP_FLAGS] &= !TCP_FIN_PSH;
        }
        put_word(&mut segment, transport + TCP_CHECKSUM, 0);
        let addresses =
            if self.is_ipv6 { network + 8..network + 40 } else { network + 12..network + 20 };
        let length = (segment.len() - transport) as u64;
        let pseudo = sum(&segment[addresses]) + length + u64::from(PROTOCOL_TCP);
        let value = checksum(pseudo + sum(&segment[transport..]));
        put_word(&mut segment, transport + TCP_CHECKSUM, value);
        segment
    }

    fn segments(&self, frame: &[u8]) -> Vec<Vec<u8>> {
        // A packet without payload is one segment.
        let last = frame.len().max(self.payload + 1);
        (0u16..)
            .zip((self.payload..last).step_by(self.size))
            .map(|(number, from)| self.segment(frame, from, number))
            .collect()
    }
}

/// Does what is left to do: the frames, ready for the wire.
///
/// # Errors
/// [`Malformed`] if it cannot be done.
pub fn finish(packet: Packet) -> Result<Vec<Vec<u8>>, Malformed> {
    let work = work(&packet)?;
    let mut frame = packet.frame;
    Ok(match work {
        Work::None => vec![frame],
        Work::Checksum { start, place } => {
            complete(&mut frame, start, place);
            vec![frame]
        }
        Work::Segment(tcp) => tcp.segments(&frame),
    })
}

#[cfg(test)]
#[path = "offload_tests.rs"]
mod tests;
