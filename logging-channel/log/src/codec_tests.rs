use super::*;
use proptest::prelude::*;

fn code_address(address: u64) -> CodeAddress {
    CodeAddress::try_from(address).expect("canonical")
}

/// One entry of every kind, and its golden bytes when the point before was 1000.
fn golden() -> Vec<(Entry, Vec<u8>)> {
    let point = ExecutionPoint::new(1_300);
    let arrival = |arrival| Entry::Arrival { point, arrival };
    let mut digest_bytes = vec![8, 0xAC, 0x02];
    for register in 1..=18u64 {
        digest_bytes.extend_from_slice(&register.to_le_bytes());
    }
    digest_bytes.extend_from_slice(&[0xC1, 0, 0, 0, 0, 0, 0, 0]);
    digest_bytes.extend_from_slice(&[0xD2, 0, 0, 0, 0, 0, 0, 0]);
    digest_bytes.extend_from_slice(&[0xE3, 0, 0, 0, 0, 0, 0, 0]);
    digest_bytes.extend_from_slice(&[0xF4, 0, 0, 0, 0, 0, 0, 0]);
    digest_bytes.push(77);
    let mut registers = [0; 18];
    for (register, value) in registers.iter_mut().zip(1..) {
        *register = value;
    }
    let (memory, places) = (0xE3, 0xF4);
    let digest = StateDigest { registers, cpu: 0xC1, devices: 0xD2, memory, places, pages: 77 };
    vec![
        (
            arrival(Arrival::ClockSync {
                time: VirtualTime::from_ns(5_000_000),
                rate: ClockRate::from_raw(1 << 24),
            }),
            vec![1, 0xAC, 0x02, 0xC0, 0x96, 0xB1, 0x02, 0x80, 0x80, 0x80, 0x08],
        ),
        (
            arrival(Arrival::DiskCompletion {
                disk: 1,
                request: RequestId(200),
                status: 2,
                data: vec![0xAA, 0xBB],
            }),
            vec![2, 0xAC, 0x02, 1, 0xC8, 0x01, 2, 2, 0xAA, 0xBB],
        ),
        (
            arrival(Arrival::Entropy { request: RequestId(3), data: vec![9] }),
            vec![3, 0xAC, 0x02, 3, 1, 9],
        ),
        (arrival(Arrival::ConsoleInput(b"ls\n".to_vec())), b"\x04\xAC\x02\x03ls\n".to_vec()),
        (
            arrival(Arrival::WallClock { time: WallTime::from_unix_ns(300) }),
            vec![17, 0xAC, 0x02, 0xAC, 0x02],
        ),
        (
            arrival(Arrival::Packets(vec![
                Packet { offload: PacketOffload::default(), frame: vec![0xAA, 0xBB] },
                Packet {
                    offload: PacketOffload {
                        flags: 1,
                        gso_type: 4,
                        header_len: 0x36,
                        segment_size: 0x5A8,
                        checksum_start: 0x22,
                        checksum_offset: 0x10,
                    },
                    frame: vec![0xCC],
                },
            ])),
            b"\x10\xAC\x02\x02\0\x02\xAA\xBB\x01\x01\x04\x36\0\xA8\x05\x22\0\x10\0\x01\xCC"
                .to_vec(),
        ),
        (Entry::OutputMark { point, output: OutputSequence(42) }, vec![5, 0xAC, 0x02, 42]),
        (Entry::Released { output: OutputSequence(41) }, vec![6, 41]),
        (Entry::Progress { point }, vec![7, 0xAC, 0x02]),
        (Entry::Flush { point }, vec![10, 0xAC, 0x02]),
        (
            Entry::Landing { point, branch: code_address(0xFFFF_FFFF_8110_0FFE) },
            vec![11, 0xAC, 0x02, 0xFE, 0x0F, 0x10, 0x81, 0xFF, 0xFF, 0xFF, 0xFF],
        ),
        (
            Entry::CheckpointPart { piece: PieceKind::Pages, bytes: vec![7, 8] },
            vec![20, 2, 2, 7, 8],
        ),
        (Entry::Digest { point, digest }, digest_bytes),
        (Entry::Exits { point, exits: vec![7, 8] }, vec![24, 0xAC, 0x02, 2, 7, 8]),
        (Entry::Stop { point, reason: StopReason::GuestPowerOff }, vec![9, 0xAC, 0x02, 0]),
        (Entry::Stop { point, reason: StopReason::Operator }, vec![9, 0xAC, 0x02, 1]),
        (Entry::Stop { point, reason: StopReason::CannotBoot }, vec![9, 0xAC, 0x02, 2]),
        (Entry::Stop { point, reason: StopReason::Reboot }, vec![9, 0xAC, 0x02, 3]),
    ]
}

fn decode_one(bytes: &[u8]) -> Result<Entry, DecodeError> {
    let mut cursor = Cursor::new(bytes);
    let entry = decode_entry(&mut cursor, &mut ExecutionPoint::new(1_000))?;
    cursor.finish()?;
    Ok(entry)
}

#[test]
fn every_kind_of_entry_has_its_golden_bytes() {
    for (entry, bytes) in golden() {
        let mut out = Vec::new();
        let mut last = ExecutionPoint::new(1_000);
        encode_entry(&entry, &mut last, &mut out).expect("fit for the log");
        assert_eq!(out, bytes, "{entry:?}");
        assert_eq!(last, entry.point().unwrap_or(ExecutionPoint::new(1_000)));
        assert_eq!(decode_one(&bytes).as_ref(), Ok(&entry));
    }
}

#[test]
fn an_entry_cut_anywhere_is_refused() {
    for (entry, bytes) in golden() {
        for end in 0..bytes.len() {
            let error = decode_one(&bytes[..end]).expect_err("a byte is missing");
            assert!(matches!(error, DecodeError::Truncated { .. }), "{entry:?} at {end}: {error}");
        }
    }
}

#[test]
fn unknown_kinds_and_reasons_are_refused() {
    for kind in [0, 12, 23, 25, 255] {
        assert_eq!(decode_one(&[kind, 0]), Err(DecodeError::Tag { what: "entry kind", tag: kind }));
    }
    assert_eq!(decode_one(&[9, 0, 4]), Err(DecodeError::Tag { what: "stop reason", tag: 4 }));
}

#[test]
fn data_beyond_its_limit_is_neither_written_nor_read() {
    let point = ExecutionPoint::new(5);
    let data = |len| vec![0; len];
    let request = RequestId(1);
    for (arrival, limit, field) in [
        (
            Arrival::DiskCompletion { disk: 0, request, status: 0, data: data(MAX_DISK_DATA + 1) },
            MAX_DISK_DATA,
            "disk data",
        ),
        (Arrival::Entropy { request, data: data(MAX_ENTROPY + 1) }, MAX_ENTROPY, "entropy"),
        (Arrival::ConsoleInput(data(MAX_CONSOLE_INPUT + 1)), MAX_CONSOLE_INPUT, "console input"),
    ] {
        let (mut out, mut last) = (Vec::new(), ExecutionPoint::START);
        let entry = Entry::Arrival { point, arrival };
        let error = encode_entry(&entry, &mut last, &mut out);
        assert_eq!(error, Err(EncodeError::TooLarge { what: field, len: limit + 1, limit }));
        assert!(out.is_empty() && last == ExecutionPoint::START, "nothing has changed");
    }
    let mut bytes = vec![4, 0];
    put_varint(&mut bytes, MAX_CONSOLE_INPUT as u64 + 1);
    bytes.resize(bytes.len() + MAX_CONSOLE_INPUT + 1, 0);
    let error = DecodeError::Limit { what: "console input", found: 4097, limit: 4096 };
    assert_eq!(decode_one(&bytes), Err(error));
}

#[test]
fn a_point_before_the_last_one_is_refused() {
    let mut encoder = BatchEncoder::new(Vec::new(), EntrySequence(1), ExecutionPoint::START);
    let progress = |point| Entry::Progress { point: ExecutionPoint::new(point) };
    encoder.push(&progress(10)).expect("forwards");
    let error = encoder.push(&progress(9)).expect_err("backwards");
    assert!(matches!(error, EncodeError::PointRunsBackwards { .. }));
    encoder.push(&progress(10)).expect("in place");
    let batch = EntryBatch::decode(&encoder.finish()).expect("whole");
    assert_eq!((batch.entries.len(), batch.last_point()), (2, ExecutionPoint::new(10)));
}

#[test]
fn a_branch_where_no_instruction_can_be_is_refused() {
    for address in [1u64 << 47, 1 << 63, 0x7FFF_8110_0000_0000, (u64::MAX << 47) - 1] {
        let mut bytes = vec![11, 0];
        bytes.extend_from_slice(&address.to_le_bytes());
        assert_eq!(decode_one(&bytes), Err(NOT_CANONICAL), "{address:#x}");
    }
}

#[test]
fn the_largest_entry_fits_its_limit_and_its_batch() {
    let entry = Entry::Arrival {
        point: ExecutionPoint::NEVER,
        arrival: Arrival::DiskCompletion {
            disk: 255,
            request: RequestId(u64::MAX),
            status: 255,
            data: vec![1; MAX_DISK_DATA],
        },
    };
    let (mut out, mut last) = (Vec::new(), ExecutionPoint::START);
    encode_entry(&entry, &mut last, &mut out).expect("at the limit");
    assert!(out.len() <= MAX_ENTRY_BYTES);
    let mut encoder = BatchEncoder::new(
        vec![0; 20],
        EntrySequence(crate::wire::MAX_COUNT - 70_000),
        ExecutionPoint::START,
    );
    let filler = Entry::Progress { point: ExecutionPoint::START };
    while encoder.cost() < BATCH_COST {
        encoder.push(&filler).expect("fits");
    }
    encoder.push(&entry).expect("fits");
    assert!(encoder.cost() <= BATCH_COST_LIMIT + entry_cost(3));
}

fn any_packet() -> impl Strategy<Value = Packet> {
    let offload = (any::<[u8; 2]>(), any::<[u16; 4]>());
    (offload, proptest::collection::vec(any::<u8>(), 0..100)).prop_map(|((bytes, words), frame)| {
        let offload = PacketOffload {
            flags: bytes[0],
            gso_type: bytes[1],
            header_len: words[0],
            segment_size: words[1],
            checksum_start: words[2],
            checksum_offset: words[3],
        };
        Packet { offload, frame }
    })
}

#[test]
fn a_group_of_packets_beyond_its_limits_is_neither_written_nor_read() {
    let point = ExecutionPoint::new(5);
    let packet = |len| Packet { offload: PacketOffload::default(), frame: vec![0; len] };
    let encode = |packets| {
        let (mut out, mut last) = (Vec::new(), ExecutionPoint::START);
        let entry = Entry::Arrival { point, arrival: Arrival::Packets(packets) };
        encode_entry(&entry, &mut last, &mut out).map(|()| out)
    };
    let too_large = |what, len, limit| Err(EncodeError::TooLarge { what, len, limit });
    assert_eq!(encode(vec![]), Err(EncodeError::Message(NO_PACKETS)));
    assert_eq!(encode(vec![packet(1); 65]), too_large("packets", 65, 64));
    let len = MAX_PACKET + 1;
    assert_eq!(encode(vec![packet(len)]), too_large("packet", len, MAX_PACKET));
    let (len, limit) = (4 * MAX_PACKET, MAX_PACKET_BYTES);
    assert_eq!(encode(vec![packet(MAX_PACKET); 4]), too_large("packet bytes", len, limit));
    encode(vec![packet(60); 64]).expect("within the limits");
    encode(vec![packet(MAX_PACKET); 3]).expect("within the limits");
    assert_eq!(decode_one(&[16, 0, 0]), Err(NO_PACKETS));
    let found = DecodeError::Limit { what: "packet count", found: 65, limit: 64 };
    assert_eq!(decode_one(&[16, 0, 65]), Err(found));
    let empty_offload = [16, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let error = DecodeError::Rule("packet offload without content");
    assert_eq!(decode_one(&empty_offload), Err(error));
}

pub(crate) fn any_entry() -> impl Strategy<Value = Entry> {
    let point = (0..1u64 << 40).prop_map(ExecutionPoint::new);
    let bytes = |len| proptest::collection::vec(any::<u8>(), 0..len);
    let arrival = prop_oneof![
        (any::<u64>(), any::<u64>()).prop_map(|(time, rate)| Arrival::ClockSync {
            time: VirtualTime::from_ns(time),
            rate: ClockRate::from_raw(rate)
        }),
        (any::<u8>(), any::<u64>(), any::<u8>(), bytes(9_000)).prop_map(
            |(disk, request, status, data)| Arrival::DiskCompletion {
                disk,
                request: RequestId(request),
                status,
                data
            }
        ),
        (any::<u64>(), bytes(MAX_ENTROPY))
            .prop_map(|(request, data)| Arrival::Entropy { request: RequestId(request), data }),
        bytes(MAX_CONSOLE_INPUT).prop_map(Arrival::ConsoleInput),
        any::<u64>().prop_map(|ns| Arrival::WallClock { time: WallTime::from_unix_ns(ns) }),
        proptest::collection::vec(any_packet(), 1..4).prop_map(Arrival::Packets),
    ];
    (point, arrival, any::<u64>(), any::<[u64; 18]>(), any::<u32>(), 0..8).prop_map(
        |(point, arrival, number, registers, pages, kind)| match kind {
            0 => Entry::Arrival { point, arrival },
            1 => Entry::OutputMark { point, output: OutputSequence(number) },
            2 => Entry::Released { output: OutputSequence(number) },
            3 => Entry::Progress { point },
            4 => Entry::Digest {
                point,
                digest: StateDigest {
                    registers,
                    cpu: number,
                    devices: !number,
                    memory: number.rotate_left(7),
                    places: number.rotate_left(9),
                    pages,
                },
            },
            5 => {
                Entry::Exits { point, exits: number.to_le_bytes()[..number as usize % 8].to_vec() }
            }
            6 => Entry::Landing { point, branch: code_address(number >> 17) },
            _ => Entry::Stop { point, reason: StopReason::Operator },
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 256,
        failure_persistence: None,
        rng_seed: proptest::test_runner::RngSeed::Fixed(2010),
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_batch_comes_back(mut entries in proptest::collection::vec(any_entry(), 1..20), first in 1u64..1 << 50) {
        entries.sort_by_key(Entry::point);
        let mut encoder = BatchEncoder::new(Vec::new(), EntrySequence(first), ExecutionPoint::START);
        for entry in &entries {
            encoder.push(entry).expect("in order");
        }
        let cost = encoder.cost();
        let batch = EntryBatch::decode(&encoder.finish()).expect("whole");
        prop_assert_eq!(batch.cost(), cost);
        prop_assert_eq!(batch.first, EntrySequence(first));
        let decoded: Vec<Entry> = batch.entries.into_iter().map(|costed| costed.entry).collect();
        prop_assert_eq!(decoded, entries);
    }

    #[test]
    fn random_bytes_never_panic_the_batch_decoder(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(batch) = EntryBatch::decode(&bytes) {
            // What is accepted is exactly what encoding it again gives.
            let mut encoder = BatchEncoder::new(Vec::new(), batch.first, batch.base);
            for costed in &batch.entries {
                encoder.push(&costed.entry).expect("decoded entries are fit for the log");
            }
            prop_assert_eq!(encoder.finish(), bytes);
        }
    }
}
