//! What tells the network that the guest's addresses are here now.
//!
//! | frame | who learns |
//! |---|---|
//! | RARP request for our own address, to everybody | switches: behind which port the MAC address is |
//! | gratuitous ARP request and reply (RFC 5227 §3) | hosts: which MAC address has the IPv4 address |
//! | unsolicited neighbour advertisement (RFC 4861 §7.2.6) | hosts: the same for IPv6 |

use crate::devices::virtio::net::addresses::{Addresses, MacAddress};
use std::net::{Ipv4Addr, Ipv6Addr};

const EVERYBODY: [u8; 6] = [0xFF; 6];
/// Shortest frame without its check sequence.
const SHORTEST: usize = 60;
const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;
const RARP_REQUEST: u16 = 3;
const PROTOCOL_ICMPV6: u8 = 58;
/// `ff02::1` and the Ethernet address that stands for it (RFC 2464 §7).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xFF02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

/// The frames that announce a guest, in the order to be sent.
pub fn announcements(mac: MacAddress, addresses: &Addresses) -> Vec<Vec<u8>> {
    let mut frames = vec![arp(0x8035, RARP_REQUEST, mac, Ipv4Addr::UNSPECIFIED)];
    for address in &addresses.ipv4 {
        frames.extend([ARP_REQUEST, ARP_REPLY].map(|kind| arp(0x0806, kind, mac, *address)));
    }
    frames.extend(addresses.ipv6.iter().map(|address| advertisement(mac, *address)));
    frames
}

fn ethernet(to: [u8; 6], mac: MacAddress, ethertype: u16) -> Vec<u8> {
    [&to[..], &mac.0, &ethertype.to_be_bytes()].concat()
}

/// An ARP or RARP packet from and about ourselves.
fn arp(ethertype: u16, kind: u16, mac: MacAddress, address: Ipv4Addr) -> Vec<u8> {
    let mut frame = ethernet(EVERYBODY, mac, ethertype);
    frame.extend([0, 1, 8, 0, 6, 4]);
    frame.extend(kind.to_be_bytes());
    frame.extend(mac.0);
    frame.extend(address.octets());
    // RARP asks for the target's address; a gratuitous reply is addressed to everybody.
    frame.extend(match kind {
        ARP_REQUEST => [0; 6],
        ARP_REPLY => EVERYBODY,
        _ => mac.0,
    });
    frame.extend(address.octets());
    frame.resize(SHORTEST, 0);
    frame
}

fn advertisement(mac: MacAddress, address: Ipv6Addr) -> Vec<u8> {
    let mut body = vec![136, 0, 0, 0];
    // Override: replaces what is known.
    body.extend([0x20, 0, 0, 0]);
    body.extend(address.octets());
    // Target link-layer address.
    body.extend([2, 1]);
    body.extend(mac.0);
    let length = body.len() as u16;
    let pseudo = [
        &address.octets()[..],
        &ALL_NODES.octets(),
        &u32::from(length).to_be_bytes(),
        &[0, 0, 0, PROTOCOL_ICMPV6],
    ]
    .concat();
    let checksum = checksum(&pseudo, &body);
    body[2..4].copy_from_slice(&checksum.to_be_bytes());
    let mut frame = ethernet(ALL_NODES_MAC, mac, 0x86DD);
    frame.extend([0x60, 0, 0, 0]);
    frame.extend(length.to_be_bytes());
    // A hop limit of 255 shows that it comes from this link.
    frame.extend([PROTOCOL_ICMPV6, 255]);
    frame.extend(address.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(body);
    frame
}

fn checksum(pseudo: &[u8], body: &[u8]) -> u16 {
    let words = pseudo.chunks_exact(2).chain(body.chunks_exact(2));
    let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let folded = (sum & 0xFFFF) + (sum >> 16);
    !((folded & 0xFFFF) as u16 + (folded >> 16) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_announced_to_switches_and_to_hosts() {
        let mac = MacAddress([2, 0, 0, 0, 0, 7]);
        let addresses = Addresses {
            ipv4: [Ipv4Addr::new(10, 0, 0, 2)].into(),
            ipv6: ["fd00::2".parse().unwrap()].into(),
        };
        let frames = announcements(mac, &addresses);
        let kinds: Vec<[u8; 2]> = frames.iter().map(|frame| [frame[12], frame[13]]).collect();
        assert_eq!(kinds, [[0x80, 0x35], [8, 6], [8, 6], [0x86, 0xDD]]);
        assert!(frames.iter().all(|frame| frame[6..12] == mac.0 && frame.len() >= SHORTEST));
        assert_eq!(frames[0][..6], EVERYBODY);
        for (frame, kind) in frames[1..3].iter().zip([1, 2]) {
            assert_eq!(frame[20..22], [0, kind]);
            assert_eq!(frame[28..32], [10, 0, 0, 2]);
            assert_eq!(frame[38..42], [10, 0, 0, 2]);
        }
        // What receivers learn themselves from it is what the guest says it has.
        let mut learned = Addresses::default();
        frames.iter().for_each(|frame| learned.learn(mac, frame));
        assert_eq!(learned, addresses);
        let (pseudo, body) = (&frames[3][22..54], &frames[3][54..]);
        let pseudo = [pseudo, &[0, 0, 0, body.len() as u8, 0, 0, 0, 58]].concat();
        assert_eq!(checksum(&pseudo, body), 0, "a receiver checks the sum");
    }

    #[test]
    fn a_guest_without_addresses_is_announced_to_switches() {
        let frames = announcements(MacAddress([2, 0, 0, 0, 0, 7]), &Addresses::default());
        assert_eq!(frames.len(), 1);
    }
}
