//! Sockets, clocks and threads: the rim around the pure sessions.
//!
//! Each side has one thread of its own, on which everything about the channel happens; the
//! thread that runs the guest only pushes or takes entries under a lock. When an acknowledgement
//! comes, the primary's handler is called right there, so that releasing outputs needs no further
//! switch of threads. Nothing here decides anything about the protocol or about failover.

mod address;
mod admission;
mod backup;
mod clock;
mod connection;
mod greeting;
mod keys;
mod listener;
mod lobby;
mod pieces;
mod primary;
mod primary_session;
mod refusals;
mod session_loop;
mod set_up;
pub mod streams;
mod tls;
mod waker;

pub use address::{DEFAULT_TLS_DIR, InvalidAddress, PeerAddress, Place};
pub use admission::AdmissionCheck;
pub use backup::{BackupChannel, BackupConfig, Delivery, Joined};
pub use clock::now;
pub use keys::{
    DEFAULT_DAYS, InvalidSideName, Issued, KeyStore, KeysError, MAX_DAYS, SideName, TLS_SIDES,
    create_tls_directories,
};
pub use listener::{Listener, LocalAddress, Origin};
pub use primary::{
    CheckpointStream, Followers, JoinTicket, PrimaryChannel, PrimaryConfig, PrimaryHandler, Room,
    TakesDigests,
};
pub use tls::{CertificateRefusal, Date, TlsError};

use crate::backups::BackupKey;
pub use crate::backups::{Begun, PrimaryPushError};
use crate::detector::Suspicion;
use crate::frame::FrameError;
use crate::handshake::{HandshakeError, Nonce, Refusal};
use crate::receiver::ReceiveError;
use crate::sender::SendError;
use crate::session::GoodbyeReason;
use crate::time::MonotonicTime;
use std::io;
use std::net::IpAddr;
use std::time::Duration;
use vmft_log::checkpoint::CheckpointError;
use vmft_log::codec::EncodeError;
use vmft_log::foreign::ForeignText;
use vmft_sandbox::Task;

/// How long the whole greeting may take (TLS and the handshake, from connecting to the confirmation),
/// and every silence of a side that works on the checkpoint.
pub const DEFAULT_SETUP_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a side that works on a join says so, at least: many times in the shortest silence that ends it.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// How long to wait for the peer to close its end after a goodbye.
const LINGER: Duration = Duration::from_secs(1);

/// Why there is no session with a peer.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The address cannot be listened at.
    #[error("listening at {address}")]
    Listen {
        /// The address.
        address: PeerAddress,
        /// The host's reason, for instance that it is in use.
        #[source]
        source: io::Error,
    },
    /// Without TLS, and not of this machine: nobody has said that this may be.
    #[error(
        "{address} is open to other hosts ({found}) and without TLS: whoever reaches it could take the \
         guest over. Write tls: in place of tcp:, with certificates from `vmft keys`; or say --insecure"
    )]
    Exposed {
        /// The address.
        address: PeerAddress,
        /// What it was found to be.
        found: IpAddr,
    },
    /// The peer cannot be reached.
    #[error("connecting to {address}")]
    Connect {
        /// The address.
        address: PeerAddress,
        /// The reason.
        #[source]
        source: Box<TransportError>,
    },
    /// The channel's thread or its runtime cannot be started.
    #[error("starting the channel's thread")]
    Thread(#[source] io::Error),
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A certificate that is good no more.
    #[error(transparent)]
    Certificate(#[from] CertificateRefusal),
    /// The peer is not who it should be, or not one for TLS.
    #[error("TLS handshake failed")]
    TlsHandshake(#[source] io::Error),
    /// TLS is configured here, and not there.
    #[error("the peer does not use TLS, this side does: name it with tls: on both sides")]
    PeerIsPlain,
    /// TLS is configured there, and not here.
    #[error("the peer uses TLS, this side does not: name it with tls: on both sides")]
    PeerUsesTls,
    /// The peer did not answer or go on.
    #[error("the peer did not go on with {what} for {} ms", limit.as_millis())]
    TimedOut {
        /// What was due.
        what: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The peer closed the connection.
    #[error("the peer closed the connection during {what}")]
    Closed {
        /// What was due.
        what: &'static str,
    },
    /// It had shown nothing for itself, and had to make way for others who came.
    #[error("it was sent away to make way for others")]
    MadeWay,
    /// The connection failed.
    #[error("connection failed")]
    Io(#[source] io::Error),
    /// What came is no frame.
    #[error("the peer does not speak this protocol")]
    Frame(#[source] FrameError),
    /// The sides did not agree.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The checkpoint is no good.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The machine has no checkpoint to send, or one that does not fit the format.
    #[error("there is no checkpoint to send: {0}")]
    NoCheckpoint(String),
    /// The other side left before the session began.
    #[error(transparent)]
    Departed(GoodbyeReason),
    /// The first frame of the session was not acceptable.
    #[error("the session did not begin")]
    Violation(#[from] Violation),
}

impl TransportError {
    /// True if this side has turned the other away because it has its backups, or takes none now.
    pub const fn is_no_place(&self) -> bool {
        matches!(
            self,
            Self::Handshake(HandshakeError::Refused(Refusal::HasBackup | Refusal::NotAccepting(_)))
        )
    }

    /// An error of a TLS handshake.
    fn of_tls_handshake(error: io::Error) -> Self {
        CertificateRefusal::of(&error).map_or_else(|| Self::TlsHandshake(error), Self::Certificate)
    }

    /// A stranger's bytes: TLS where none is expected shows by its record types and version.
    fn from_frame_error(error: FrameError) -> Self {
        match error {
            // The first byte may have come alone.
            FrameError::Magic { found: [0x14..=0x17, 3, _] | [0x14..=0x17, 0, 0] } => {
                Self::PeerUsesTls
            }
            FrameError::Version { found } => {
                Self::Handshake(HandshakeError::Refused(Refusal::Version {
                    ours: crate::frame::PROTOCOL_VERSION,
                    theirs: found,
                }))
            }
            other => Self::Frame(other),
        }
    }
}

impl From<io::Error> for TransportError {
    /// A server looks at the certificate last: its client hears of it with the first bytes it reads.
    fn from(error: io::Error) -> Self {
        CertificateRefusal::of(&error).map_or_else(|| Self::Io(error), Self::Certificate)
    }
}

impl From<EncodeError> for TransportError {
    fn from(error: EncodeError) -> Self {
        Self::NoCheckpoint(error.to_string())
    }
}

/// How a peer broke the rules of a session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// It sent what is no frame of the session.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A backup broke the rules.
    #[error(transparent)]
    Backup(#[from] SendError),
    /// A primary broke the rules.
    #[error(transparent)]
    Primary(#[from] ReceiveError),
    /// What came was not authentic.
    #[error("TLS: {0}")]
    Tls(ForeignText),
}

/// Why a session ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndCause {
    /// The peer said goodbye, or the log says that the machine was stopped. No failure.
    #[error("{0}")]
    Departed(GoodbyeReason),
    /// This side said goodbye or closed the channel. No failure.
    #[error("this side left")]
    Left,
    /// This side goes on without the peer, which was too far behind. It was told goodbye, but may not
    /// have heard it.
    #[error("{0}")]
    GivenUp(String),
    /// The peer is silent or gone.
    #[error("the peer is lost: {0}")]
    Lost(Suspicion),
    /// The backup did not get as far as the log.
    #[error("the session did not begin: {0}")]
    NotBegun(String),
    /// The peer sent what it must not.
    #[error("the peer broke the protocol: {0}")]
    Violation(Violation),
}

/// The end of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionEnd {
    /// Why.
    pub cause: EndCause,
    /// When the peer was last heard, on the host's monotonic clock.
    pub last_contact: MonotonicTime,
    /// When this side knew, on the same clock.
    pub ended_at: MonotonicTime,
    /// True if the backup may have had the whole checkpoint: it can have taken itself for one that
    /// may go live, whether or not it has said so.
    pub protected: bool,
    /// On a primary: which backup it was, and how many others follow.
    pub backup: Option<BackupKey>,
    /// See [`Self::backup`].
    pub others: usize,
}

impl SessionEnd {
    /// True if the peer must be taken to have failed, or says that its machine has; false after an
    /// orderly end.
    pub const fn is_failure(&self) -> bool {
        matches!(
            self.cause,
            EndCause::Lost(_)
                | EndCause::Violation(_)
                | EndCause::Departed(
                    GoodbyeReason::Failed(_)
                        | GoodbyeReason::HandedOver
                        | GoodbyeReason::StorageFailed(_)
                )
        )
    }
}

fn fresh_nonce() -> Nonce {
    let mut nonce = [0; 16];
    tls::provider().secure_random.fill(&mut nonce).expect("the host has randomness");
    Nonce(nonce)
}

/// A current-thread runtime on a thread of its own, which runs `main` to its end.
fn spawn_thread<F>(
    name: &str,
    main: impl FnOnce() -> F + Send + 'static,
) -> Result<std::thread::JoinHandle<()>, TransportError>
where
    F: Future<Output = ()>,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(TransportError::Thread)?;
    let run = move || tokio::task::LocalSet::new().block_on(&runtime, main());
    vmft_sandbox::spawn(Task::Channel, name, run).map_err(TransportError::Thread)
}

/// Waits for a channel's thread, unless that is where we are: a handler may hold the channel's
/// last handle.
fn join_thread(thread: Option<std::thread::JoinHandle<()>>) {
    let elsewhere =
        |thread: &std::thread::JoinHandle<()>| thread.thread().id() != std::thread::current().id();
    if let Some(thread) = thread.filter(elsewhere) {
        // Its panic was reported when it happened.
        let _ = thread.join();
    }
}
