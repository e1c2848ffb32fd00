//! What the tests of the transport share: a toy machine, and a handler that writes down what it
//! is told.

#![allow(dead_code, reason = "every test file uses a part of it")]

pub mod golden;

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;
use vmft_log::checkpoint::{
    CheckpointHeader, CheckpointSink, CheckpointSource, CompleteCheckpoint, JoinPiece, JoinSink,
    Page, PageNumber, PageSource, SinkRefusal, WholeCheckpoint,
};
use vmft_log::disk_copy::{DiskPiece, DisksProgress};
use vmft_log::entry::{
    Arrival, Entry, EntrySequence, Generation, LogPosition, OutputSequence, RequestId,
};
use vmft_log::point::ExecutionPoint;
use vmft_logging_channel::backups::{BackupKey, Protects};
use vmft_logging_channel::fingerprint::{Fingerprint, Identity};
use vmft_logging_channel::handshake::SessionTerms;
use vmft_logging_channel::transport::{
    BackupConfig, CheckpointStream, JoinTicket, Origin, PeerAddress, PrimaryChannel, PrimaryConfig,
    PrimaryHandler, SessionEnd, TakesDigests, TransportError,
};

/// Longer than anything takes that is going to happen at all.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// When a peer is suspected where a test is not about that: a busy machine may well hold a thread
/// up for longer than pairs are configured to put up with.
pub const CALM: Duration = Duration::from_secs(5);

/// What a handler was told.
#[derive(Debug)]
pub enum Told {
    Protected,
    Acknowledged(EntrySequence),
    Ended(SessionEnd),
    Refused(String),
}

/// A machine of 200 pages, every third of them written.
#[derive(Debug, Clone)]
pub struct ToyMachine {
    pub next: u64,
}

impl CheckpointSource for ToyMachine {
    fn position(&self) -> LogPosition {
        LogPosition::start_of_log(ExecutionPoint::new(50))
    }

    fn fixed(&self) -> &[u8] {
        b"kernel"
    }

    fn state(&self) -> &[u8] {
        b"registers and devices"
    }

    fn page_limit(&self) -> PageNumber {
        PageNumber(200)
    }
}

impl PageSource for ToyMachine {
    fn next_page(&mut self, page: &mut Page) -> Option<PageNumber> {
        let number = self.next;
        self.next += 1;
        page.fill(if number.is_multiple_of(3) { number as u8 } else { 0 });
        (number < 200).then_some(PageNumber(number))
    }
}

/// The stream of a toy machine, which does not run: its log begins before anything is sent.
pub fn toy_stream(ticket: JoinTicket) -> Box<dyn CheckpointStream> {
    let source = ToyMachine { next: 0 };
    let begun = ticket.begin(source.position().point).expect("just joining");
    assert!(begun.position.point == source.position().point);
    Box::new(ToyStream(WholeCheckpoint::new(source).expect("small")))
}

struct ToyStream(WholeCheckpoint<ToyMachine>);

impl CheckpointStream for ToyStream {
    fn next_piece(&mut self) -> Result<Option<JoinPiece>, String> {
        Ok(self.0.next().map(JoinPiece::from))
    }

    fn digests(&self) -> Option<Arc<dyn TakesDigests>> {
        None
    }
}

/// The stream of a toy machine whose log begins when `go` says so, and not before.
pub struct LateStream {
    ticket: Option<JoinTicket>,
    go: Receiver<()>,
    stream: Option<Box<dyn CheckpointStream>>,
}

impl LateStream {
    pub fn new(ticket: JoinTicket, go: Receiver<()>) -> Self {
        Self { ticket: Some(ticket), go, stream: None }
    }
}

impl CheckpointStream for LateStream {
    fn next_piece(&mut self) -> Result<Option<JoinPiece>, String> {
        if let Some(ticket) = self.ticket.take() {
            self.go.recv_timeout(PATIENCE).expect("it should have been told by now");
            self.stream = Some(toy_stream(ticket));
        }
        self.stream.as_mut().expect("begun").next_piece()
    }

    fn digests(&self) -> Option<Arc<dyn TakesDigests>> {
        None
    }
}

/// Keeps the bytes of the pages it was given.
#[derive(Debug, Default)]
pub struct ToyMemory(pub Vec<(u64, u8)>);

impl CheckpointSink for ToyMemory {
    fn begin(&mut self, _header: &CheckpointHeader) -> Result<(), SinkRefusal> {
        Ok(())
    }

    fn page(&mut self, number: PageNumber, data: &Page) -> Result<(), SinkRefusal> {
        self.0.push((number.0, data[17]));
        Ok(())
    }

    fn read(&self, _: PageNumber, _: &mut Page) -> Result<(), SinkRefusal> {
        Err(SinkRefusal("every page is sent once".to_owned()))
    }
}

impl JoinSink for ToyMemory {
    fn ready(&mut self, _checkpoint: &CompleteCheckpoint) -> Result<(), SinkRefusal> {
        Ok(())
    }

    fn disk(&mut self, _: DiskPiece) -> Result<(), SinkRefusal> {
        Err(SinkRefusal("it has no disks of its own".to_owned()))
    }

    fn poll_disks(&mut self) -> Result<DisksProgress, SinkRefusal> {
        Ok(DisksProgress::none())
    }
}

/// Passes on everything it is told.
#[derive(Debug)]
pub struct Scribe(Sender<Told>);

impl PrimaryHandler for Scribe {
    fn checkpoint(
        &mut self,
        _terms: &SessionTerms,
        ticket: JoinTicket,
    ) -> Result<Box<dyn CheckpointStream>, String> {
        Ok(toy_stream(ticket))
    }

    fn protected(&mut self, _: BackupKey, _: Protects) {
        self.tell(Told::Protected);
    }

    fn acknowledged(&mut self, received: EntrySequence) {
        self.tell(Told::Acknowledged(received));
    }

    fn session_ended(&mut self, end: &SessionEnd) {
        self.tell(Told::Ended(end.clone()));
    }

    fn peer_refused(&mut self, _peer: Origin, error: &TransportError, _untold: u64) {
        self.tell(Told::Refused(chain(error)));
    }
}

impl Scribe {
    pub fn new(tell: Sender<Told>) -> Self {
        Self(tell)
    }

    fn tell(&self, told: Told) {
        // The test may have ended.
        let _ = self.0.send(told);
    }
}

/// An error and its causes, as the command line prints them.
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

pub fn identity() -> Identity {
    Identity {
        pair: "test".parse().expect("a good name"),
        generation: Generation(1),
        fingerprint: Fingerprint::new().with("engine", "toy"),
    }
}

pub fn primary_config() -> PrimaryConfig {
    let listen = "tcp:127.0.0.1:0".parse().expect("an address");
    let mut config = PrimaryConfig::new(listen, identity());
    config.detector.suspect_after = CALM;
    config
}

/// A listening primary, and what its handler is told.
pub fn primary(config: PrimaryConfig) -> (PrimaryChannel, Receiver<Told>) {
    let (tell, told) = mpsc::channel();
    (PrimaryChannel::listen(config, Scribe(tell)).expect("a free port"), told)
}

pub fn backup_config(primary: &PrimaryChannel) -> BackupConfig {
    let port = primary.local_address().socket_address().port();
    let address = PeerAddress::tcp("127.0.0.1", port);
    let mut config = BackupConfig::new(address, identity());
    config.detector.suspect_after = CALM;
    config
}

/// The next thing told that is wanted.
pub fn wait_for<T>(told: &Receiver<Told>, mut wanted: impl FnMut(Told) -> Option<T>) -> T {
    loop {
        let told = told.recv_timeout(PATIENCE).expect("it should have been told by now");
        if let Some(found) = wanted(told) {
            return found;
        }
    }
}

pub fn wait_for_end(told: &Receiver<Told>) -> SessionEnd {
    wait_for(told, |told| match told {
        Told::Ended(end) => Some(end),
        _ => None,
    })
}

pub fn wait_for_refusal(told: &Receiver<Told>) -> String {
    wait_for(told, |told| match told {
        Told::Refused(text) => Some(text),
        _ => None,
    })
}

pub fn mark(point: u64, output: u64) -> Entry {
    Entry::OutputMark { point: ExecutionPoint::new(point), output: OutputSequence(output) }
}

pub fn disk_read(point: u64, len: usize) -> Entry {
    let arrival = Arrival::DiskCompletion {
        disk: 0,
        request: RequestId(point),
        status: 0,
        data: vec![point as u8; len],
    };
    Entry::Arrival { point: ExecutionPoint::new(point), arrival }
}
