//! Good frames of every kind, made by the real encoders.

use super::{ToyMachine, disk_read, identity, mark};
use std::collections::BTreeMap;
use vmft_log::checkpoint::{CheckpointPiece, PieceKind, WholeCheckpoint};
use vmft_log::entry::{
    Arrival, Entry, EntrySequence, Generation, OutputSequence, Packet, RequestId, StateDigest,
    StopReason,
};
use vmft_log::point::ExecutionPoint;
use vmft_logging_channel::fingerprint::Fingerprint;
use vmft_logging_channel::frame::{Frame, HEADER_LEN};
use vmft_logging_channel::handshake::{Hello, HelloConfirm, HelloReply, Nonce, Refusal, Role};
use vmft_logging_channel::log_file::{LogHeader, LogWriter};
use vmft_logging_channel::session::{
    Acknowledge, DivergenceNotice, GoodbyeReason, Heartbeat, Progress, Reign, SessionId,
};
use vmft_logging_channel::time::MonotonicTime;

pub fn nonce(byte: u8) -> Nonce {
    Nonce([byte; 16])
}

pub fn entries() -> Vec<Entry> {
    let point = ExecutionPoint::new(700);
    let digest = StateDigest {
        registers: [u64::MAX; 18],
        cpu: 1,
        devices: 2,
        memory: 3,
        places: 4,
        pages: 5,
    };
    let packets = vec![Packet { frame: vec![7; 60], ..Packet::default() }; 3];
    let entropy = Arrival::Entropy { request: RequestId(3), data: vec![9; 16] };
    vec![
        mark(60, 1),
        disk_read(61, 300),
        Entry::Arrival { point, arrival: entropy },
        Entry::Arrival { point, arrival: Arrival::ConsoleInput(b"ls\n".to_vec()) },
        Entry::Arrival { point, arrival: Arrival::Packets(packets) },
        Entry::Released { output: OutputSequence(1) },
        Entry::Progress { point },
        Entry::Digest { point, digest },
        Entry::Exits { point, exits: vec![1; 40] },
        Entry::Flush { point },
        Entry::CheckpointPart { piece: PieceKind::State, bytes: vec![3; 90] },
        Entry::Stop { point, reason: StopReason::Operator },
    ]
}

pub fn pieces() -> Vec<CheckpointPiece> {
    WholeCheckpoint::new(ToyMachine { next: 0 }).expect("small").collect()
}

/// A log file, whole.
pub fn log_file() -> Vec<u8> {
    let header = LogHeader { identity: identity(), metadata: BTreeMap::new(), nonce: nonce(5) };
    let mut writer =
        LogWriter::create(Vec::new(), header, ToyMachine { next: 0 }).expect("to memory");
    for entry in entries() {
        writer.push(&entry).expect("to memory");
    }
    writer.finish(GoodbyeReason::Stopped).expect("to memory")
}

/// Good frames of every kind, with the session a reader must expect.
pub fn golden() -> Vec<(SessionId, Vec<u8>)> {
    let point = ExecutionPoint::new(50);
    let (role, echo) = (Role::Primary, nonce(1));
    let hello = Hello { role: Role::Backup, identity: identity(), nonce: nonce(1) };
    let reply = HelloReply { role, identity: identity(), nonce: nonce(2), echo };
    let mismatch = identity().fingerprint.mismatch(&Fingerprint::new()).expect("a field less");
    let notice = DivergenceNotice {
        window: Some((point, ExecutionPoint::new(60))),
        page: Some(4096),
        text: "divergence".into(),
    };
    let entry = EntrySequence(3);
    let opening = [
        Frame::Hello(hello),
        Frame::HelloReply(reply),
        Frame::Refusal(Refusal::Fingerprint(mismatch)),
        Frame::Refusal(Refusal::NotAccepting("stopped".into())),
    ];
    let session = SessionId::derive(b"a session");
    let heartbeat =
        Heartbeat { number: 1, sent_at: MonotonicTime::from_ns(7), echo: None, last: entry };
    let acknowledge =
        Acknowledge { received: entry, applied: entry, applied_point: point, window: 1 << 20 };
    let later = [
        Frame::HelloConfirm(HelloConfirm { echo: nonce(2) }),
        Frame::Goodbye(GoodbyeReason::Fault("why".into())),
        Frame::Goodbye(GoodbyeReason::Diverged(notice)),
        Frame::Heartbeat(heartbeat),
        Frame::Acknowledge(acknowledge),
        Frame::Reign(Reign { generation: Generation(2) }),
        Frame::Progress(Progress { pieces: 9 }),
    ];
    let seal = |session: SessionId| {
        move |frame: Frame| (session, frame.encode(session).expect("small").seal())
    };
    let opening = opening.into_iter().map(seal(SessionId::HANDSHAKE));
    let later = later.into_iter().chain(pieces().into_iter().map(Frame::Checkpoint));
    opening.chain(later.map(seal(session))).collect()
}

/// The frames of a stream.
pub fn split(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    while let Some(header) = bytes.first_chunk::<HEADER_LEN>() {
        let len = u32::from_le_bytes([header[5], header[6], header[7], 0]) as usize;
        let (frame, rest) = bytes.split_at(HEADER_LEN + len);
        frames.push(frame.to_vec());
        bytes = rest;
    }
    frames
}

/// A frame with this header's kind and session, or another kind, and good checksums.
pub fn reseal(header: &[u8], kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = header[..HEADER_LEN].to_vec();
    frame[4] = kind;
    frame[5..8].copy_from_slice(&(payload.len() as u32).to_le_bytes()[..3]);
    let check = crc32c::crc32c(&frame[..12]).to_le_bytes();
    frame[12..16].copy_from_slice(&check);
    frame[16..20].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
    [&frame, payload].concat()
}
