use super::*;
use proptest::prelude::*;

/// A TCP packet with `payload` bytes of payload, and the checksum a stock driver leaves: the sum of
/// the pseudo header.
fn packet(is_ipv6: bool, payload: usize, segment_size: u16) -> Packet {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    if is_ipv6 {
        frame.extend([0x86, 0xDD, 0x60, 0, 0, 0]);
        frame.extend(((TCP_HEADER + payload) as u16).to_be_bytes());
        frame.extend([PROTOCOL_TCP, 64]);
        frame.extend([0xFD; 16]);
        frame.extend([0xFE; 16]);
    } else {
        frame.extend([0x08, 0x00, 0x45, 0]);
        frame.extend(((IPV4_HEADER + TCP_HEADER + payload) as u16).to_be_bytes());
        frame.extend([0xFF, 0xFE, 0x40, 0, 64, PROTOCOL_TCP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    }
    let transport = frame.len();
    frame
        .extend([0x30, 0x39, 0, 80, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0, 1, 0x50, 0x99, 1, 0, 0, 0, 0, 0]);
    frame.extend((0..payload).map(|index| (index * 7 % 251) as u8));
    let offload = PacketOffload {
        flags: NEEDS_CHECKSUM,
        gso_type: match (segment_size, is_ipv6) {
            (0, _) => GSO_NONE,
            (_, true) => GSO_TCPV6,
            (_, false) => GSO_TCPV4,
        },
        header_len: 0,
        segment_size,
        checksum_start: transport as u16,
        checksum_offset: TCP_CHECKSUM as u16,
    };
    let pseudo = pseudo_sum(&frame, is_ipv6, transport);
    put_word(&mut frame, transport + TCP_CHECKSUM, !checksum(pseudo));
    Packet { offload, frame }
}

fn pseudo_sum(frame: &[u8], is_ipv6: bool, transport: usize) -> u64 {
    let addresses = if is_ipv6 { &frame[22..54] } else { &frame[26..34] };
    sum(addresses) + (frame.len() - transport) as u64 + u64::from(PROTOCOL_TCP)
}

/// True if a receiver takes the frame: lengths and checksums go together.
fn is_good(frame: &[u8], is_ipv6: bool) -> bool {
    let transport = if is_ipv6 { 54 } else { 34 };
    let length = if is_ipv6 { word(frame, 18) } else { word(frame, 16) };
    let behind = if is_ipv6 { frame.len() - 54 } else { frame.len() - 14 };
    let header = is_ipv6 || checksum(sum(&frame[14..34])) == 0;
    let whole = checksum(pseudo_sum(frame, is_ipv6, transport) + sum(&frame[transport..]));
    length == Some(behind as u16) && header && whole == 0
}

#[test]
fn a_large_packet_becomes_good_segments_with_the_same_bytes() {
    for is_ipv6 in [false, true] {
        for (payload, size, count) in [(5_000, 1_448, 4), (2_896, 1_448, 2), (65_000, 1_000, 65)] {
            let packet = packet(is_ipv6, payload, size);
            let start = packet.frame.len() - payload;
            let whole = packet.frame[start..].to_vec();
            let frames = finish(packet).expect("well formed");
            assert_eq!(frames.len(), count);
            assert!(frames.iter().all(|frame| is_good(frame, is_ipv6)));
            let bytes: Vec<u8> = frames.iter().flat_map(|frame| frame[start..].to_vec()).collect();
            assert_eq!(bytes, whole);
            let flags = |frame: &Vec<u8>| frame[start - TCP_HEADER + TCP_FLAGS];
            assert_eq!(flags(&frames[0]), 0x90, "no FIN or PSH before the last");
            assert_eq!(flags(&frames[count - 1]), 0x19, "no CWR behind the first");
            let sequence = |frame: &Vec<u8>| word(frame, start - TCP_HEADER + 4);
            assert_eq!(sequence(&frames[0]), Some(0xFFFF), "the sequence number wraps");
            assert_eq!(sequence(&frames[count - 1]), Some(0));
        }
    }
}

#[test]
fn a_checksum_is_completed_and_a_finished_packet_is_left_alone() {
    for is_ipv6 in [false, true] {
        let mut packet = packet(is_ipv6, 33, 0);
        if !is_ipv6 {
            let header = checksum(sum(&packet.frame[14..34]));
            put_word(&mut packet.frame, 24, header);
        }
        let frames = finish(packet).expect("well formed");
        assert!(is_good(&frames[0], is_ipv6));
        let plain = Packet { offload: PacketOffload::default(), frame: frames[0].clone() };
        assert_eq!(finish(plain), Ok(frames));
    }
}

#[test]
fn work_that_cannot_be_done_is_malformed() {
    let changed = |change: fn(&mut Packet)| {
        let mut packet = packet(false, 3_000, 1_448);
        change(&mut packet);
        work(&packet).is_err()
    };
    assert!(changed(|packet| packet.frame.truncate(13)));
    assert!(changed(|packet| packet.offload.flags = 0));
    assert!(changed(|packet| packet.offload.segment_size = MIN_SEGMENT - 1));
    assert!(changed(|packet| packet.offload.gso_type = 3));
    assert!(changed(|packet| packet.offload.gso_type = GSO_TCPV6));
    assert!(changed(|packet| packet.offload.checksum_start = 60_000));
    assert!(changed(|packet| packet.offload.checksum_start = 2));
    assert!(changed(|packet| packet.offload.checksum_offset = 6));
    assert!(changed(|packet| packet.frame[14] = 0x46));
    assert!(changed(|packet| packet.frame[46] = 0x40));
    assert!(changed(|packet| packet.frame.truncate(45)));
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 512,
        failure_persistence: None,
        rng_seed: proptest::test_runner::RngSeed::Fixed(0x0FF1_0AD5),
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_header_breaks_the_segmenter(
        is_ipv6 in any::<bool>(),
        payload in 0usize..4_000,
        size in 0u16..3_000,
        cut in 0usize..4_100,
        changes in prop::collection::vec((0usize..80, any::<u8>()), 0..4),
        words in prop::option::of(any::<[u16; 2]>()),
        kind in prop::option::of(any::<u8>()),
    ) {
        let mut packet = packet(is_ipv6, payload, size);
        packet.frame.truncate(cut);
        for (at, byte) in changes {
            if let Some(place) = packet.frame.get_mut(at) {
                *place = byte;
            }
        }
        if let Some([start, offset]) = words {
            packet.offload.checksum_start = start;
            packet.offload.checksum_offset = offset;
        }
        packet.offload.gso_type = kind.unwrap_or(packet.offload.gso_type);
        let length = packet.frame.len();
        if let Ok(frames) = finish(packet) {
            prop_assert!(!frames.is_empty());
            prop_assert!(frames.iter().all(|frame| frame.len() <= length));
        }
    }
}

#[test]
fn no_segment_is_longer_than_its_header_can_count() {
    // The length field counts all behind Ethernet with IPv4, and all behind the IP header with IPv6.
    for (is_ipv6, fits) in [(false, 65_535 - 20 - 20), (true, 65_535 - 20)] {
        for (payload, size, good) in [
            (fits, u16::MAX, true),
            (fits + 1, u16::MAX, false),
            // A smaller size makes good segments of the same packet.
            (fits + 1, 1_448, true),
            (fits - 1, fits as u16, true),
        ] {
            let packet = packet(is_ipv6, payload, size);
            let frames = finish(packet);
            assert_eq!(frames.is_ok(), good, "IPv6 {is_ipv6}, {payload} bytes by {size}");
            for frame in frames.unwrap_or_default() {
                assert!(is_good(&frame, is_ipv6), "IPv6 {is_ipv6}, {payload} bytes by {size}");
            }
        }
    }
    // With extension headers of IPv6 between, they count, too.
    let mut long = packet(true, 65_400, u16::MAX);
    let extension = vec![0; 200];
    long.frame.splice(54..54, extension);
    long.offload.checksum_start += 200;
    assert_eq!(finish(long), Err(Malformed("more than an IP header can count")));
}
