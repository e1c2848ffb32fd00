//! Joins that take long, over streams in memory, by a clock that moves only when everybody waits.

#![expect(clippy::disallowed_methods, reason = "the clock of these tests is theirs")]

use super::super::backup::take_checkpoint;
use super::super::primary::Shared;
use super::super::primary_session::serve_backup;
use super::super::{JoinTicket, Origin, PrimaryConfig, PrimaryHandler, SessionEnd};
use super::*;
use crate::backups::{BackupKey, Protects};
use crate::fingerprint::{Fingerprint, Identity};
use crate::handshake::{Admission, Answered, Nonce, Offered};
use crate::session::Acknowledge;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use tokio::io::duplex;
use tokio::task::{JoinHandle, LocalSet, spawn_blocking, spawn_local};
use tokio::time::Instant;
use vmft_log::checkpoint::{
    CheckpointHeader, CheckpointSink, CheckpointSource, CompleteCheckpoint, JoinPiece, JoinSink,
    Page, PageNumber, PageSource, SinkRefusal, WholeCheckpoint,
};
use vmft_log::disk_copy::{DiskPiece, DisksProgress};
use vmft_log::entry::{EntrySequence, LogPosition};
use vmft_log::point::ExecutionPoint;

const LIMIT: Duration = super::super::DEFAULT_SETUP_TIMEOUT;
const AN_HOUR: Duration = Duration::from_secs(3600);

struct Machine;

impl CheckpointSource for Machine {
    fn position(&self) -> LogPosition {
        LogPosition::start_of_log(ExecutionPoint::new(50))
    }
    fn fixed(&self) -> &[u8] {
        b"kernel"
    }
    fn state(&self) -> &[u8] {
        b"registers"
    }
    fn page_limit(&self) -> PageNumber {
        PageNumber(1)
    }
}

impl PageSource for Machine {
    fn next_page(&mut self, _: &mut Page) -> Option<PageNumber> {
        None
    }
}

struct NoMemory;

impl CheckpointSink for NoMemory {
    fn begin(&mut self, _: &CheckpointHeader) -> Result<(), SinkRefusal> {
        Ok(())
    }
    fn page(&mut self, _: PageNumber, _: &Page) -> Result<(), SinkRefusal> {
        Ok(())
    }
    fn read(&self, _: PageNumber, _: &mut Page) -> Result<(), SinkRefusal> {
        Ok(())
    }
}

impl JoinSink for NoMemory {
    fn ready(&mut self, _: &CompleteCheckpoint) -> Result<(), SinkRefusal> {
        Ok(())
    }

    fn disk(&mut self, _: DiskPiece) -> Result<(), SinkRefusal> {
        Err(SinkRefusal("it has no disks of its own".to_owned()))
    }

    fn poll_disks(&mut self) -> Result<DisksProgress, SinkRefusal> {
        Ok(DisksProgress::none())
    }
}

/// Begins when it is told to; gone once all its pieces have been given.
struct Stream {
    ticket: Option<JoinTicket>,
    told: Told,
    pieces: Option<WholeCheckpoint<Machine>>,
}

/// The stream's end of [`Start`].
struct Told {
    go: Receiver<()>,
    _gone: Sender<()>,
}

/// Lets the stream begin.
struct Start {
    go: Sender<()>,
    gone: Receiver<()>,
}

impl Start {
    fn new() -> (Self, Told) {
        let ((go, told), (on_drop, gone)) = (channel(), channel());
        (Self { go, gone }, Told { go: told, _gone: on_drop })
    }

    /// The clock stands still until the stream's thread has given all pieces. It would not
    /// otherwise: between the moment at which that thread marks a task as woken and the one at
    /// which it wakes the runtime, the runtime sees nothing to do but to let time pass, and the
    /// task cannot be woken a second time, by no timer either.
    fn go(self) {
        self.go.send(()).expect("it waits");
        // It ends with an error, since nothing is ever sent.
        spawn_blocking(move || self.gone.recv().expect_err("nothing is sent"));
    }
}

impl CheckpointStream for Stream {
    fn next_piece(&mut self) -> Result<Option<JoinPiece>, String> {
        if let Some(ticket) = self.ticket.take() {
            self.told.go.recv().map_err(|error| error.to_string())?;
            ticket.begin(Machine.position().point).map_err(|error| error.to_string())?;
            self.pieces = Some(WholeCheckpoint::new(Machine).expect("small"));
        }
        Ok(self.pieces.as_mut().expect("begun").next().map(JoinPiece::from))
    }

    fn digests(&self) -> Option<Arc<dyn TakesDigests>> {
        None
    }
}

struct Handler(Option<Told>);

impl PrimaryHandler for Handler {
    fn checkpoint(
        &mut self,
        _: &SessionTerms,
        ticket: JoinTicket,
    ) -> Result<Box<dyn CheckpointStream>, String> {
        let told = self.0.take().expect("one backup");
        Ok(Box::new(Stream { ticket: Some(ticket), told, pieces: None }))
    }
    fn protected(&mut self, _: BackupKey, _: Protects) {}
    fn acknowledged(&mut self, _: EntrySequence) {}
    fn session_ended(&mut self, _: &SessionEnd) {}
    fn peer_refused(&mut self, _: Origin, _: &TransportError, _: u64) {}
}

fn terms() -> SessionTerms {
    let identity = Identity {
        pair: "ours".parse().expect("a good name"),
        generation: Generation(1),
        fingerprint: Fingerprint::new(),
    };
    let (offered, hello) = Offered::new(identity.clone(), Nonce([1; 16]));
    let (answered, reply) =
        Answered::new(&hello, identity, Nonce([2; 16]), &Admission::Open).expect("alike");
    let (terms, confirm) = offered.handle_frame(&reply).expect("alike");
    assert_eq!(answered.handle_frame(&confirm).expect("confirmed").session, terms.session);
    terms
}

/// A primary that serves one backup, whose checkpoint begins when it is told to; and that backup's end.
fn primary(terms: &SessionTerms) -> (Connection, Start, JoinHandle<Result<(), TransportError>>) {
    let (ours, theirs) = duplex(1 << 16);
    let (start, told) = Start::new();
    let listen = "tcp:127.0.0.1:0".parse().expect("an address");
    let config = PrimaryConfig::new(listen, terms.peer.clone());
    assert_eq!(config.setup_timeout, LIMIT);
    let shared = Arc::new(Shared::new(&config));
    let context = Context::new(config, shared, Box::new(Handler(Some(told))));
    let of_session = |stream| {
        let mut connection = Connection::new(Box::new(stream));
        connection.reader.set_session(terms.session);
        connection
    };
    let (connection, terms) = (of_session(ours), terms.clone());
    let serving = spawn_local(async move { serve_backup(&context, connection, &terms).await });
    (of_session(theirs), start, serving)
}

async fn say(connection: &mut Connection, session: SessionId, frame: Frame) {
    let frame = frame.encode(session).expect("small");
    connection.writer.send(frame, LIMIT, "a word").await.expect("it listens");
}

/// Reads a whole checkpoint, and says as often as the primary that somebody is there.
async fn take_all(connection: &mut Connection, session: SessionId) {
    loop {
        match connection.reader.next_frame(LIMIT, "a piece").await.expect("it is sent") {
            Frame::Progress(progress) => say(connection, session, Frame::Progress(progress)).await,
            Frame::Checkpoint(vmft_log::checkpoint::CheckpointPiece::End(_)) => return,
            Frame::Checkpoint(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

fn by_a_clock_of_its_own<F: Future<Output = ()>>(test: F) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, test);
}

#[test]
fn a_checkpoint_that_takes_an_hour_is_waited_for_on_both_sides() {
    by_a_clock_of_its_own(async {
        let (terms, begun) = (terms(), Instant::now());
        let (mut connection, start, serving) = primary(&terms);
        spawn_local(async move {
            tokio::time::sleep(AN_HOUR).await;
            start.go();
        });
        let taken = take_checkpoint(&mut connection, terms.session, &mut NoMemory, LIMIT).await;
        assert!(begun.elapsed() >= AN_HOUR);
        assert_eq!(taken.expect("a good primary").state, Machine.state());
        serving.abort();
    });
}

#[test]
fn a_backup_that_needs_an_hour_to_take_its_checkpoint_is_waited_for() {
    by_a_clock_of_its_own(async {
        let terms = terms();
        let (mut connection, start, serving) = primary(&terms);
        start.go();
        take_all(&mut connection, terms.session).await;
        for pieces in 0..AN_HOUR.as_secs() {
            tokio::time::sleep(Duration::from_secs(1)).await;
            say(&mut connection, terms.session, Frame::Progress(Progress { pieces })).await;
        }
        let LogPosition { entry, point } = Machine.position();
        let all = Acknowledge { received: entry, applied: entry, applied_point: point, window: 9 };
        say(&mut connection, terms.session, Frame::Acknowledge(all)).await;
        let first = connection.reader.next_frame(LIMIT, "the session").await;
        assert!(matches!(first, Ok(Frame::Heartbeat(_))), "{first:?}");
        serving.abort();
    });
}

#[test]
fn a_backup_that_is_silent_while_its_checkpoint_is_made_goes_after_five_seconds() {
    by_a_clock_of_its_own(async {
        let begun = Instant::now();
        let (_connection, _start, serving) = primary(&terms());
        let ended = serving.await.expect("no panic");
        assert!(matches!(ended, Err(TransportError::TimedOut { .. })), "{ended:?}");
        assert_eq!(begun.elapsed().as_secs(), LIMIT.as_secs());
    });
}

#[test]
fn a_backup_that_is_silent_with_a_whole_checkpoint_is_told_that_it_was_turned_away() {
    by_a_clock_of_its_own(async {
        let terms = terms();
        let (mut connection, start, serving) = primary(&terms);
        start.go();
        take_all(&mut connection, terms.session).await;
        let word = connection.reader.next_frame(LIMIT * 2, "a last word").await;
        assert!(matches!(word, Ok(Frame::Goodbye(GoodbyeReason::Fault(_)))), "{word:?}");
        drop(connection);
        let ended = serving.await.expect("no panic");
        assert!(matches!(ended, Err(TransportError::TimedOut { .. })), "{ended:?}");
    });
}

#[test]
fn a_primary_that_is_silent_while_it_makes_a_checkpoint_is_left_after_five_seconds() {
    by_a_clock_of_its_own(async {
        let (ours, _theirs) = duplex(1 << 16);
        let mut connection = Connection::new(Box::new(ours));
        let (session, begun) = (SessionId::derive(b"a session"), Instant::now());
        let taken = take_checkpoint(&mut connection, session, &mut NoMemory, LIMIT).await;
        assert!(matches!(taken, Err(TransportError::TimedOut { .. })), "{taken:?}");
        assert_eq!(begun.elapsed().as_secs(), LIMIT.as_secs());
    });
}
