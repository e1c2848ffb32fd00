//! Strangers over streams in memory, by a clock that moves only when everybody waits.

#![expect(clippy::disallowed_methods, reason = "the clock of these tests is theirs")]

use super::super::lobby::{MAX_PER_ADDRESS, MAX_STRANGERS};
use super::super::{
    CheckpointStream, JoinTicket, KeyStore, PrimaryConfig, PrimaryHandler, SessionEnd, tls,
};
use super::*;
use crate::backups::{BackupKey, Protects};
use crate::fingerprint::{Fingerprint, Identity};
use crate::handshake::{Nonce, Offered};
use std::path::Path;
use std::rc::Rc;
use tokio::io::{AsyncWriteExt, DuplexStream, duplex};
use tokio::task::{JoinHandle, LocalSet, spawn_local};
use tokio::time::{Instant, sleep};
use tokio_rustls::TlsConnector;
use vmft_log::entry::{EntrySequence, Generation};

struct Nobody;

impl PrimaryHandler for Nobody {
    fn checkpoint(
        &mut self,
        _: &SessionTerms,
        _: JoinTicket,
    ) -> Result<Box<dyn CheckpointStream>, String> {
        Err("greetings only".to_owned())
    }
    fn protected(&mut self, _: BackupKey, _: Protects) {}
    fn acknowledged(&mut self, _: EntrySequence) {}
    fn session_ended(&mut self, _: &SessionEnd) {}
    fn peer_refused(&mut self, _: Origin, _: &TransportError, _: u64) {}
}

fn identity(pair: &str, engine: &str) -> Identity {
    Identity {
        pair: pair.parse().expect("a good name"),
        generation: Generation(1),
        fingerprint: Fingerprint::new().with("engine", engine),
    }
}

/// A primary without sockets.
struct Primary {
    context: Rc<Context>,
    tls: Option<Arc<ServerIdentity>>,
}

impl Primary {
    fn new(keys: Option<&Path>) -> Self {
        let listen = "tcp:127.0.0.1:0".parse().expect("an address");
        let config = PrimaryConfig::new(listen, identity("ours", "toy"));
        let shared = Arc::new(Shared::new(&config));
        let context = Rc::new(Context::new(config, shared, Box::new(Nobody)));
        let tls = keys.map(|keys| ServerIdentity::load(&keys.join("primary")).expect("keys"));
        Self { context, tls }
    }

    /// Somebody connects.
    fn meet(&self, origin: Origin) -> (DuplexStream, JoinHandle<Greeted>) {
        let (ours, theirs) = duplex(1 << 16);
        let (context, tls) = (Rc::clone(&self.context), self.tls.clone());
        let visit = context.lobby.enter(origin);
        let greeting = spawn_local(async move {
            hear(&context, Stranger { stream: Box::new(ours), origin, tls }, visit).await
        });
        (theirs, greeting)
    }
}

fn from(n: usize) -> Origin {
    Origin::Tcp(format!("192.0.2.{n}:1").parse().expect("an address"))
}

fn keys() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut store = KeyStore::open_or_create(dir.path()).expect("a new authority");
    for side in ["primary", "backup"] {
        store.add(&side.parse().expect("a name"), 1).expect("a new side");
    }
    dir
}

/// Greets as a backup; what the primary answers, as the backup sees it.
async fn greet_as(
    stream: DuplexStream,
    keys: Option<&Path>,
    identity: Identity,
) -> Result<SessionTerms, HandshakeError> {
    let limit = Duration::from_secs(60);
    let stream: Stream = match keys {
        None => Box::new(stream),
        Some(keys) => {
            let config = tls::client_config(&keys.join("backup")).expect("keys");
            let connected = TlsConnector::from(config).connect(tls::side_name(), stream).await;
            Box::new(connected.expect("trusted"))
        }
    };
    let mut connection = Connection::new(stream);
    let (offered, hello) = Offered::new(identity, Nonce([1; 16]));
    let hello = hello.encode(SessionId::HANDSHAKE).expect("small");
    connection.writer.send(hello, limit, "hello").await.expect("it listens");
    let reply = connection.reader.next_frame(limit, "reply").await.expect("it answers");
    let (terms, confirm) = offered.handle_frame(&reply)?;
    let confirm = confirm.encode(terms.session).expect("small");
    connection.writer.send(confirm, limit, "confirm").await.expect("it listens");
    Ok(terms)
}

/// Runs a test; by its clock no time passes while there is something to do.
fn by_a_clock_of_its_own<F: Future<Output = ()>>(test: F) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, test);
}

fn waited_for(greeted: Greeted) -> &'static str {
    match greeted {
        Err(TransportError::TimedOut { what, .. }) => what,
        Err(other) => panic!("a deadline was due: {other}"),
        Ok(_) => panic!("nobody was greeted"),
    }
}

#[test]
fn who_says_nothing_goes_after_two_seconds() {
    let keys = keys();
    for keys in [None, Some(keys.path())] {
        by_a_clock_of_its_own(async {
            let begun = Instant::now();
            let (_silent, greeting) = Primary::new(keys).meet(from(1));
            assert_eq!(waited_for(greeting.await.expect("no panic")), "its first byte");
            assert_eq!(begun.elapsed().as_millis(), FIRST_BYTE.as_millis());
        });
    }
}

#[test]
fn a_byte_now_and_then_keeps_a_place_for_one_deadline_only() {
    let keys = keys();
    let (_, hello) = Offered::new(identity("ours", "toy"), Nonce([1; 16]));
    let hello = hello.encode(SessionId::HANDSHAKE).expect("small").seal();
    // A TLS record of 512 bytes of a ClientHello that never ends, and a plain hello.
    let tls_hello = [&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3][..], &[7; 500]].concat();
    for (keys, bytes) in [(None, &hello), (Some(keys.path()), &tls_hello)] {
        by_a_clock_of_its_own(async move {
            let primary = Primary::new(keys);
            let begun = Instant::now();
            let (mut slow, greeting) = primary.meet(from(1));
            let bytes = bytes.clone();
            spawn_local(async move {
                for byte in bytes {
                    if slow.write_all(&[byte]).await.is_err() {
                        return;
                    }
                    sleep(Duration::from_millis(900)).await;
                }
            });
            assert_eq!(waited_for(greeting.await.expect("no panic")), "its greeting");
            let limit = primary.context.config.setup_timeout;
            assert_eq!(begun.elapsed().as_millis(), limit.as_millis());
        });
    }
}

#[test]
fn four_hundred_strangers_keep_no_backup_out_for_a_moment() {
    let keys = keys();
    for (keys, addresses) in [(None, 1), (Some(keys.path()), 1), (Some(keys.path()), 200)] {
        by_a_clock_of_its_own(async move {
            let primary = Primary::new(keys);
            let strangers: Vec<_> =
                (0..400).map(|n| primary.meet(from(n % addresses + 1))).collect();
            let begun = Instant::now();
            let (backup, greeting) = primary.meet(from(1));
            let terms = greet_as(backup, keys, identity("ours", "toy")).await.expect("a backup");
            let (_, greeted, _place) = greeting.await.expect("no panic").expect("a good backup");
            assert_eq!((terms.session, begun.elapsed()), (greeted.session, Duration::ZERO));
            let left = strangers.iter().filter(|(_, greeting)| !greeting.is_finished()).count();
            let most = if addresses == 1 { MAX_PER_ADDRESS } else { MAX_STRANGERS };
            assert!(left < most, "{left} are still heard");
        });
    }
}

#[test]
fn a_refusal_tells_a_stranger_nothing_and_a_side_with_a_certificate_what_differs() {
    let keys = keys();
    for (keys, origin) in [(None, from(1)), (None, Origin::Unix), (Some(keys.path()), from(1))] {
        by_a_clock_of_its_own(async move {
            let trusted = keys.is_some() || origin == Origin::Unix;
            for asks in [identity("guess", "toy"), identity("ours", "guess")] {
                let primary = Primary::new(keys);
                let (stream, greeting) = primary.meet(origin);
                let refused = greet_as(stream, keys, asks).await.expect_err("another machine");
                let HandshakeError::RefusedByPeer(refusal) = refused else { panic!("{refused}") };
                let text = refusal.to_string();
                assert_eq!(refusal != Refusal::Undisclosed, trusted, "{text}");
                let told = ["ours", "engine", "toy"].iter().any(|word| text.contains(word));
                assert_eq!(told, trusted, "{text}");
                // The primary's own log has it all.
                let error = greeting.await.expect("no panic").err().expect("refused").to_string();
                assert!(error.contains("ours") || error.contains("toy"), "{error}");
            }
        });
    }
}
