//! Frames of a guest and of a network: what addresses are learned from them, and what is left to be
//! done to them.

use std::net::{Ipv4Addr, Ipv6Addr};
use vmft_fuzzing::{Random, cases, damage};
use vmft_log::entry::{Packet, PacketOffload};
use vmft_vmm::devices::virtio::net::addresses::{Addresses, MacAddress};
use vmft_vmm::devices::virtio::net::offload::{MIN_SEGMENT, finish, work};

/// Cases of a quick run.
const CASES: u64 = 200;
/// Frames in a case.
const EACH: usize = 300;
const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 7]);

/// Headers and `payload` bytes of TCP, over IPv4 or IPv6, perhaps in a VLAN.
fn tcp(is_ipv6: bool, vlan: bool, payload: usize) -> Packet {
    let mut frame = vec![0; 12];
    if vlan {
        frame.extend([0x81, 0, 0, 5]);
    }
    frame.extend(if is_ipv6 { [0x86, 0xDD] } else { [8, 0] });
    if is_ipv6 {
        frame.extend([0x60, 0, 0, 0, 0, 0, 6, 64]);
        frame.extend([0xFD; 32]);
    } else {
        frame.extend([0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    }
    let start = frame.len() as u16;
    frame.extend([0, 80, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x18, 0, 0, 0, 0, 0, 0]);
    frame.extend(vec![0x5A; payload]);
    let offload = PacketOffload {
        flags: 1,
        gso_type: if is_ipv6 { 4 } else { 1 },
        header_len: start + 20,
        segment_size: 1000,
        checksum_start: start,
        checksum_offset: 16,
    };
    Packet { offload, frame }
}

/// Good frames: what is learned from, and what is cut.
fn good() -> Vec<Packet> {
    let plain = |frame: Vec<u8>| Packet { offload: PacketOffload::default(), frame };
    let mut arp = [[0xFF; 6], MAC.0].concat();
    arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    arp.extend(MAC.0);
    arp.extend([10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 10, 0, 0, 1]);
    let neighbour = |kind: u8| {
        let mut frame = [[0x33; 6], MAC.0].concat();
        frame.extend([0x86, 0xDD, 0x60, 0, 0, 0, 0, 24, 58, 255]);
        frame.extend(Ipv6Addr::new(0xFD00, 0, 0, 0, 0, 0, 0, 1).octets());
        frame.extend([0xFF; 16]);
        frame.extend([kind, 0, 0, 0, 0, 0, 0, 0]);
        frame.extend(Ipv6Addr::new(0xFD00, 0, 0, 0, 0, 0, 0, 2).octets());
        frame
    };
    let mut all = vec![plain(arp)];
    all.extend([133, 135, 136].map(|kind| plain(neighbour(kind))));
    for is_ipv6 in [false, true] {
        all.extend([0, 1, 3000, 65_000].map(|payload| tcp(is_ipv6, false, payload)));
        all.push(tcp(is_ipv6, true, 2500));
    }
    all
}

fn gone_bad(random: &mut Random, good: &[Packet], frames: &[Vec<u8>]) -> Packet {
    let mut packet = random.pick(good).clone();
    if random.chance(70) {
        // Headers, or anything.
        let rest = packet.frame.split_off(packet.frame.len().min(80));
        damage(random, &mut packet.frame, frames);
        packet.frame.extend(rest);
        packet.frame.truncate(70_000);
    }
    let offload = &mut packet.offload;
    for _ in 0..random.below(3) {
        let word = match random.below(4) {
            0 => random.below(80) as u16,
            1 => u16::MAX >> random.below(16),
            2 => packet.frame.len() as u16,
            _ => random.next() as u16,
        };
        match random.below(6) {
            0 => offload.flags = random.below(4) as u8,
            1 => offload.gso_type = random.below(6) as u8,
            2 => offload.segment_size = word,
            3 => offload.checksum_start = word,
            4 => offload.checksum_offset = word,
            _ => offload.header_len = word,
        }
    }
    packet
}

#[test]
fn frames_gone_bad_are_refused_or_cut_into_frames_that_a_network_takes() {
    let good = good();
    let frames: Vec<Vec<u8>> = good.iter().map(|packet| packet.frame.clone()).take(6).collect();
    let (mut cut, mut learned) = (0u64, 0u64);
    cases(CASES, |mut random| {
        let mut addresses = Addresses::default();
        for _ in 0..EACH {
            let packet = gone_bad(&mut random, &good, &frames);
            addresses.learn(MAC, &packet.frame);
            assert!(addresses.is_valid(), "{addresses:?}");
            let (before, offload) = (packet.frame.clone(), packet.offload);
            let can_be_done = work(&packet);
            let done = finish(packet);
            assert_eq!(done.is_ok(), can_be_done.is_ok());
            let Ok(done) = done else { continue };
            // Each segment has at least so much of the payload, and none is larger than what it comes from.
            assert!(done.len() <= before.len() / usize::from(MIN_SEGMENT) + 1);
            assert!(done.iter().all(|frame| frame.len() <= before.len()));
            if done.len() > 1 {
                cut += 1;
                let header = before.len() - payload_of(&done, &before, offload);
                let payload: usize = done.iter().map(|frame| frame.len() - header).sum();
                assert_eq!(payload, before.len() - header, "payload is missing");
            }
        }
        learned += (addresses.ipv4.len() + addresses.ipv6.len()) as u64;
        assert!(addresses.ipv4.iter().all(|address| *address != Ipv4Addr::UNSPECIFIED));
    });
    println!("{cut} cut, {learned} addresses");
}

/// How much of a frame that was cut is payload.
fn payload_of(done: &[Vec<u8>], before: &[u8], offload: PacketOffload) -> usize {
    // The first is whole: headers, and a segment.
    before.len() - (done[0].len() - usize::from(offload.segment_size))
}
