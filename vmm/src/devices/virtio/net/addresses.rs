//! The addresses a guest uses, learned from what it sends.
//!
//! A side that goes live tells the network where the guest's addresses are now. What they are, the
//! guest says itself, in ARP and in IPv6 neighbour discovery. Learned by the device, so that they
//! are part of the machine: both sides know the same, also of what was sent long before a backup
//! joined.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::net::{Ipv4Addr, Ipv6Addr};

/// Most addresses remembered of each kind; the ones used longest ago are forgotten.
pub const MAX_ADDRESSES: usize = 8;

const ETHERNET_HEADER: usize = 14;
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xDD];
/// Hardware type Ethernet, protocol IPv4, lengths 6 and 4 (RFC 826).
const ARP_ETHERNET_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
const IPV6_HEADER: usize = 40;
const PROTOCOL_ICMPV6: u8 = 58;
const ROUTER_SOLICITATION: u8 = 133;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// True for the address of one station: not a group's, not zero.
    pub fn is_station(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl std::fmt::Display for MacAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Text that is no Ethernet address of a station.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no Ethernet address of one station, such as 52:54:00:12:34:56")]
pub struct NoMacAddress(pub String);

impl std::str::FromStr for MacAddress {
    type Err = NoMacAddress;

    fn from_str(text: &str) -> Result<Self, NoMacAddress> {
        let error = || NoMacAddress(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(error)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        let mac = Self(bytes);
        if parts.next().is_some() || !mac.is_station() {
            return Err(error());
        }
        Ok(mac)
    }
}

/// The addresses of one guest, the one used last at the end.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Addresses {
    /// IPv4.
    pub ipv4: VecDeque<Ipv4Addr>,
    /// IPv6.
    pub ipv6: VecDeque<Ipv6Addr>,
}

fn remember<T: PartialEq>(known: &mut VecDeque<T>, address: T) {
    if known.back() == Some(&address) {
        return;
    }
    known.retain(|other| *other != address);
    if known.len() == MAX_ADDRESSES {
        known.pop_front();
    }
    known.push_back(address);
}

fn bytes<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..at + N)?.try_into().ok()
}

impl Addresses {
    /// Learns from a frame that the station `mac` has sent.
    pub fn learn(&mut self, mac: MacAddress, frame: &[u8]) {
        match bytes::<2>(frame, ETHERNET_HEADER - 2) {
            Some(ETHERTYPE_ARP) => {
                if let Some(address) = arp_sender(mac, &frame[ETHERNET_HEADER..]) {
                    remember(&mut self.ipv4, address);
                }
            }
            Some(ETHERTYPE_IPV6) => {
                if let Some(address) = neighbour(&frame[ETHERNET_HEADER..]) {
                    remember(&mut self.ipv6, address);
                }
            }
            _ => {}
        }
    }

    /// True if they can have been learned: few, each once, and such as a station may have.
    pub fn is_valid(&self) -> bool {
        are_distinct(&self.ipv4)
            && are_distinct(&self.ipv6)
            && self.ipv4.iter().copied().all(is_usable_ipv4)
            && self.ipv6.iter().copied().all(is_usable_ipv6)
    }
}

fn are_distinct<T: PartialEq>(known: &VecDeque<T>) -> bool {
    let first = |(index, address)| known.iter().position(|other| other == address) == Some(index);
    known.len() <= MAX_ADDRESSES && known.iter().enumerate().all(first)
}

fn is_usable_ipv4(address: Ipv4Addr) -> bool {
    !address.is_unspecified() && !address.is_multicast() && !address.is_broadcast()
}

fn is_usable_ipv6(address: Ipv6Addr) -> bool {
    !address.is_unspecified() && !address.is_multicast()
}

/// The address that an ARP packet's sender says is its own.
fn arp_sender(mac: MacAddress, packet: &[u8]) -> Option<Ipv4Addr> {
    let ours = bytes(packet, 0) == Some(ARP_ETHERNET_IPV4) && bytes(packet, 8) == Some(mac.0);
    let address = Ipv4Addr::from(bytes::<4>(packet, 14)?);
    // A probe (RFC 5227) asks whether an address is free, and has none yet.
    (ours && is_usable_ipv4(address)).then_some(address)
}

/// The address that a neighbour discovery packet's sender uses.
fn neighbour(packet: &[u8]) -> Option<Ipv6Addr> {
    if *packet.get(6)? != PROTOCOL_ICMPV6 {
        return None;
    }
    let address = match *packet.get(IPV6_HEADER)? {
        ROUTER_SOLICITATION | NEIGHBOUR_SOLICITATION => bytes::<16>(packet, 8)?,
        NEIGHBOUR_ADVERTISEMENT => bytes::<16>(packet, IPV6_HEADER + 8)?,
        _ => return None,
    };
    let address = Ipv6Addr::from(address);
    is_usable_ipv6(address).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 7]);

    fn arp(sender: [u8; 6], address: [u8; 4]) -> Vec<u8> {
        let mut frame = [[0xFF; 6], sender].concat();
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(sender);
        frame.extend(address);
        frame.extend([0; 10]);
        frame
    }

    fn neighbour(kind: u8, source: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
        let mut frame = [[0x33; 6], MAC.0].concat();
        frame.extend([0x86, 0xDD, 0x60, 0, 0, 0, 0, 24, 58, 255]);
        frame.extend(source.octets());
        frame.extend([0xFF; 16]);
        frame.extend([kind, 0, 0, 0, 0, 0, 0, 0]);
        frame.extend(target.octets());
        frame
    }

    #[test]
    fn a_guest_says_its_addresses_itself() {
        let mut addresses = Addresses::default();
        addresses.learn(MAC, &arp(MAC.0, [10, 0, 0, 2]));
        addresses.learn(MAC, &arp(MAC.0, [0, 0, 0, 0]));
        addresses.learn(MAC, &arp([2, 0, 0, 0, 0, 8], [10, 0, 0, 3]));
        assert_eq!(addresses.ipv4, [Ipv4Addr::new(10, 0, 0, 2)]);
        let [one, two, none] = ["fd00::1", "fd00::2", "::"].map(|text| text.parse().unwrap());
        addresses.learn(MAC, &neighbour(135, one, two));
        assert_eq!(addresses.ipv6, [one]);
        addresses.learn(MAC, &neighbour(136, one, two));
        addresses.learn(MAC, &neighbour(135, none, two));
        addresses.learn(MAC, &neighbour(133, none, two));
        assert_eq!(addresses.ipv6, [one, two]);
        for end in 0..60 {
            addresses.learn(MAC, &arp(MAC.0, [10, 0, 0, 9])[..end.min(32)]);
            addresses.learn(MAC, &neighbour(136, one, two)[..end]);
        }
    }

    #[test]
    fn the_address_used_longest_ago_is_forgotten() {
        let mut addresses = Addresses::default();
        for last in (1..=8).chain([1, 9]) {
            addresses.learn(MAC, &arp(MAC.0, [10, 0, 0, last]));
        }
        let last: Vec<u8> = addresses.ipv4.iter().map(|address| address.octets()[3]).collect();
        assert_eq!(last, [3, 4, 5, 6, 7, 8, 1, 9]);
        assert!(addresses.is_valid());
    }

    #[test]
    fn only_addresses_of_stations_are_read() {
        assert_eq!("02:00:00:00:00:07".parse(), Ok(MAC));
        assert_eq!(MAC.to_string(), "02:00:00:00:00:07");
        for text in ["", "02:00:00:00:00", "01:00:00:00:00:07", "00:00:00:00:00:00", "2:0:0:0:0:7"]
        {
            assert_eq!(text.parse::<MacAddress>(), Err(NoMacAddress(text.to_owned())));
        }
        assert!("02:00:00:00:00:07:08".parse::<MacAddress>().is_err());
    }
}
