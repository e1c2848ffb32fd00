use super::*;
use crate::fingerprint::{Fingerprint, Identity};
use crate::handshake::{Nonce, Role};
use crate::session::{DivergenceNotice, HeartbeatEcho};
use crate::time::MonotonicTime;
use proptest::prelude::*;
use vmft_log::checkpoint::{CheckpointEnd, CheckpointHeader, MemoryBase, PageNumber};
use vmft_log::codec::{BATCH_COST, BatchEncoder, CostedEntry};
use vmft_log::disk_copy::{CopyId, DiskCopyHeader, DiskDigest};
use vmft_log::entry::{
    Arrival, Entry, EntrySequence, Generation, LogPosition, MAX_DISK_DATA, OutputSequence,
    RequestId,
};
use vmft_log::point::ExecutionPoint;
use vmft_log::wire::MAX_COUNT;

const SESSION: SessionId = SessionId(0x0403_0201);

fn identity() -> Identity {
    Identity {
        pair: "demo".parse().expect("a good name"),
        generation: Generation(3),
        fingerprint: Fingerprint::new().with("engine", "soft"),
    }
}

fn every_frame() -> Vec<Frame> {
    let (nonce, echo) = (Nonce([1; 16]), Nonce([2; 16]));
    let mark = Entry::OutputMark { point: ExecutionPoint::new(9), output: OutputSequence(1) };
    vec![
        Frame::Hello(Hello { role: Role::Backup, identity: identity(), nonce }),
        Frame::HelloReply(HelloReply { role: Role::Primary, identity: identity(), nonce, echo }),
        Frame::HelloConfirm(HelloConfirm { echo }),
        Frame::Refusal(Refusal::HasBackup),
        Frame::Goodbye(GoodbyeReason::Stopped),
        Frame::Goodbye(GoodbyeReason::Failed("at point 7".into())),
        Frame::Goodbye(GoodbyeReason::HandedOver),
        Frame::Goodbye(GoodbyeReason::StorageFailed("disk a.img".into())),
        Frame::Goodbye(GoodbyeReason::Diverged(DivergenceNotice {
            window: Some((ExecutionPoint::new(300), ExecutionPoint::new(301))),
            page: Some(0x5000),
            text: "differs".into(),
        })),
        Frame::Heartbeat(Heartbeat {
            number: 7,
            sent_at: MonotonicTime::from_ns(300),
            echo: Some(HeartbeatEcho { sent_at: MonotonicTime::from_ns(200), held_ns: 5 }),
            last: EntrySequence(4),
        }),
        Frame::Acknowledge(Acknowledge {
            received: EntrySequence(300),
            applied: EntrySequence(299),
            applied_point: ExecutionPoint::new(1 << 20),
            window: 1 << 25,
        }),
        Frame::Entries(EntryBatch {
            first: EntrySequence(300),
            base: ExecutionPoint::new(5),
            entries: vec![CostedEntry { entry: mark, cost: 259 }],
        }),
        Frame::Checkpoint(CheckpointPiece::Header(CheckpointHeader {
            base: MemoryBase::Zeroes,
            fixed_len: 5,
            page_limit: PageNumber(1 << 14),
        })),
        Frame::Checkpoint(CheckpointPiece::State(b"state".to_vec())),
        Frame::Checkpoint(
            CheckpointPiece::decode(
                PieceKind::Pages,
                &[&[2u8, 7, 1, 0, 0][..], &[5; 4096]].concat(),
            )
            .expect("one page as it is, and one of zeroes"),
        ),
        Frame::Checkpoint(CheckpointPiece::End(CheckpointEnd {
            position: LogPosition { entry: EntrySequence(6), point: ExecutionPoint::new(300) },
            state_len: 5,
            pages: 2,
            digest: 0x1234,
        })),
        Frame::LogHeader(LogHeader {
            identity: identity(),
            metadata: [("guest".into(), "debian".into())].into(),
            nonce,
        }),
        Frame::Reign(Reign { generation: Generation(4) }),
        Frame::Progress(Progress { pieces: 300 }),
        Frame::Disk(DiskPiece::Begin(DiskCopyHeader {
            disk: 1,
            size: 1 << 30,
            chunk: 1 << 16,
            generation: Generation(4),
            copy: CopyId([3; 16]),
        })),
        Frame::Disk(DiskPiece::Data { disk: 1, offset: 512, data: [[7, 8]; 256].concat() }),
        Frame::Disk(DiskPiece::Zeroes { disk: 1, offset: 1024, len: 1 << 20 }),
        Frame::Disk(DiskPiece::Reached { disk: 1, offset: 1 << 21 }),
        Frame::DiskDigests(DiskDigests {
            disk: 1,
            seed: 5,
            first: 300,
            digests: vec![DiskDigest::ZEROES, DiskDigest([6; 16])],
        }),
    ]
}

fn session_for(kind: FrameKind) -> SessionId {
    if kind.opens_a_stream() { SessionId::HANDSHAKE } else { SESSION }
}

fn seal(frame: &Frame) -> Vec<u8> {
    frame.encode(session_for(frame.kind())).expect("within the limits").seal()
}

fn decode(session: SessionId, bytes: &[u8]) -> Result<Option<Frame>, FrameError> {
    let mut decoder = FrameDecoder::new(session);
    decoder.feed(bytes);
    decoder.next_frame()
}

#[test]
fn the_largest_batch_and_the_largest_piece_of_a_checkpoint_fit_their_frames() {
    let data = vec![1; MAX_DISK_DATA];
    let (request, point) = (RequestId(u64::MAX), ExecutionPoint::NEVER);
    let arrival = Arrival::DiskCompletion { disk: 255, request, status: 255, data };
    let room = vec![0; HEADER_LEN];
    let mut batch =
        BatchEncoder::new(room, EntrySequence(MAX_COUNT - 70_000), ExecutionPoint::START);
    while batch.cost() < BATCH_COST {
        batch.push(&Entry::Progress { point: ExecutionPoint::START }).expect("fits");
    }
    batch.push(&Entry::Arrival { point, arrival }).expect("fits");
    UnsealedFrame::new(FrameKind::Entries, SESSION, batch.finish())
        .expect("within the limit of its kind");
    let state = CheckpointPiece::State(vec![1; MAX_STATE_CHUNK]);
    let mut pages = vec![64];
    // Each the page after the one before it, and as it is.
    pages.extend([0, 1].repeat(64));
    pages.extend([5; 4096].repeat(64));
    let pages =
        CheckpointPiece::decode(PieceKind::Pages, &pages).expect("as many pages as there may be");
    for piece in [state, pages] {
        let frame = Frame::Checkpoint(piece);
        assert_eq!(decode(SESSION, &seal(&frame)), Ok(Some(frame)));
    }
}

#[test]
fn every_kind_of_frame_has_its_golden_bytes() {
    let golden = include_str!("../tests/golden/frames.txt");
    let lines: Vec<&str> = golden.lines().filter(|line| !line.starts_with('#')).collect();
    let found: Vec<String> = every_frame()
        .iter()
        .map(|frame| {
            let hex: String = seal(frame).iter().map(|byte| format!("{byte:02x}")).collect();
            // One page of the same byte is no news.
            format!("{} {}", frame.kind(), hex.replace(&"05".repeat(4096), "05*4096"))
        })
        .collect();
    assert_eq!(found, lines);
}

#[test]
fn every_frame_comes_back_from_any_division_of_its_bytes() {
    for frame in every_frame() {
        let bytes = seal(&frame);
        let mut decoder = FrameDecoder::new(session_for(frame.kind()));
        for (at, byte) in bytes.iter().enumerate() {
            assert_eq!(decoder.next_frame(), Ok(None), "{} at {at}", frame.kind());
            decoder.feed(&[*byte]);
        }
        assert_eq!(decoder.next_frame(), Ok(Some(frame)));
        assert_eq!((decoder.offset(), decoder.pending()), (bytes.len() as u64, 0));
    }
}

#[test]
fn every_damaged_byte_of_every_frame_is_found() {
    for frame in every_frame() {
        let bytes = seal(&frame);
        for at in (0..bytes.len()).filter(|at| *at < 120 || at % 97 == 0) {
            for flip in [0x01, 0x80, 0xFF] {
                let mut damaged = bytes.clone();
                damaged[at] ^= flip;
                let result = decode(session_for(frame.kind()), &damaged);
                assert!(result.is_err(), "{} byte {at}: {result:?}", frame.kind());
            }
        }
    }
}

#[test]
fn a_frame_of_another_version_is_refused_before_anything_else_is_read() {
    let expected = Err(FrameError::Version { found: 4 });
    assert_eq!(decode(SESSION, b"vmf\x04"), expected);
    assert_eq!(decode(SESSION, b"vmf\x04 whatever version four may put here"), expected);
}

#[test]
fn a_stream_that_is_no_channel_is_refused_at_its_first_wrong_byte() {
    assert_eq!(decode(SESSION, b"GET /"), Err(FrameError::Magic { found: *b"GET" }));
    assert_eq!(decode(SESSION, b"vx"), Err(FrameError::Magic { found: *b"vx\0" }));
    assert_eq!(decode(SESSION, b"vm"), Ok(None));
}

#[test]
fn a_frame_of_another_session_is_refused() {
    let frame = Frame::Goodbye(GoodbyeReason::Stopped);
    let bytes = frame.encode(SessionId(5)).expect("small").seal();
    let (kind, found, expected) = (FrameKind::Goodbye, SessionId(5), SESSION);
    assert_eq!(decode(SESSION, &bytes), Err(FrameError::Session { kind, found, expected }));
}

#[test]
fn a_refusal_belongs_to_no_session() {
    let frame = Frame::Refusal(Refusal::Replayed);
    let bytes = frame.encode(SessionId::HANDSHAKE).expect("small").seal();
    assert_eq!(decode(SESSION, &bytes), Ok(Some(frame.clone())));
    let bytes = frame.encode(SESSION).expect("small").seal();
    let (kind, found, expected) = (FrameKind::Refusal, SESSION, SessionId::HANDSHAKE);
    assert_eq!(decode(SESSION, &bytes), Err(FrameError::Session { kind, found, expected }));
}

#[test]
fn a_stranger_can_only_send_what_opens_a_stream() {
    for frame in every_frame() {
        let kind = frame.kind();
        let bytes = frame.encode(SessionId::HANDSHAKE).expect("within the limits").seal();
        let result = decode(SessionId::HANDSHAKE, &bytes);
        if kind.opens_a_stream() {
            assert_eq!(result, Ok(Some(frame)));
            assert!(kind.max_payload() <= MAX_CONTROL_PAYLOAD);
        } else {
            assert_eq!(result, Err(FrameError::Early { kind }));
        }
    }
}

fn raw_header(kind: u8, len: u32) -> Vec<u8> {
    let mut header = Vec::from(*b"vmf\x03");
    header.push(kind);
    header.extend_from_slice(&len.to_le_bytes()[..3]);
    header.extend_from_slice(&SESSION.0.to_le_bytes());
    header.extend_from_slice(&crc32c::crc32c(&header).to_le_bytes());
    header.extend_from_slice(&[0; 4]);
    header
}

#[test]
fn unknown_kinds_and_excessive_lengths_are_refused_from_the_header_alone() {
    assert_eq!(decode(SESSION, &raw_header(18, 0)), Err(FrameError::Kind { found: 18 }));
    let (kind, len, limit) = (FrameKind::Heartbeat, 65, 64);
    assert_eq!(decode(SESSION, &raw_header(6, 65)), Err(FrameError::Length { kind, len, limit }));
}

#[test]
fn a_decoder_that_has_failed_stays_failed() {
    let mut decoder = FrameDecoder::new(SESSION);
    decoder.feed(b"garbage");
    let error = decoder.next_frame().expect_err("no frame");
    decoder.feed(&seal(&Frame::Goodbye(GoodbyeReason::Stopped)));
    assert_eq!(decoder.next_frame(), Err(error));
    assert_eq!(decoder.pending(), 0);
}

#[test]
fn bytes_after_the_content_are_refused() {
    let mut payload = vec![0; HEADER_LEN];
    payload.extend_from_slice(&[0, 0]);
    let frame = UnsealedFrame::new(FrameKind::Goodbye, SESSION, payload).expect("small").seal();
    let (kind, source) = (FrameKind::Goodbye, DecodeError::Trailing { count: 1 });
    assert_eq!(decode(SESSION, &frame), Err(FrameError::Payload { kind, source }));
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1000,
        failure_persistence: None,
        rng_seed: proptest::test_runner::RngSeed::Fixed(2010),
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_bytes_are_refused_and_never_panic(bytes in proptest::collection::vec(any::<u8>(), 24..200)) {
        prop_assert!(decode(SESSION, &bytes).is_err());
    }

    #[test]
    fn random_payloads_with_good_checksums_never_panic(
        kind in 1u8..=13,
        payload in proptest::collection::vec(any::<u8>(), 0..400),
    ) {
        let kind = FrameKind::from_byte(kind).expect("in range");
        let bytes = [&[0; HEADER_LEN][..], &payload].concat();
        let session = if kind == FrameKind::Refusal { SessionId::HANDSHAKE } else { SESSION };
        if let Ok(frame) = UnsealedFrame::new(kind, session, bytes) {
            match decode(session, &frame.seal()) {
                Ok(found) => prop_assert_eq!(found.map(|frame| frame.kind()), Some(kind)),
                Err(error) => prop_assert!(
                    matches!(error, FrameError::Payload { .. }), "{error:?}"
                ),
            }
        }
    }
}
