//! How two sides agree on a session, or say why not.
//!
//! ```text
//!   backup                              primary
//!   Offered ── Hello ─────────────────▶ (checks)
//!   (checks) ◀──────── HelloReply ───── Answered
//!   session ── HelloConfirm ──────────▶ session
//! ```
//! In place of any message a side may send a [`Refusal`]. Each side draws a nonce; the session's
//! name is derived from both, and each side must give the other's nonce back, so a recorded
//! conversation cannot be played again to either. Timeouts and connections are the transport's.

use crate::fingerprint::{Identity, Mismatch, PairId};
use crate::frame::{Frame, FrameKind};
use crate::session::{SessionId, check_text};
use serde::{Deserialize, Serialize};
use vmft_log::control::ControlMessage;
use vmft_log::entry::Generation;
use vmft_log::foreign::ForeignText;
use vmft_log::wire::DecodeError;

/// A number drawn at random for one session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nonce(pub [u8; 16]);

/// Which side of a pair speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Runs the guest and writes the log.
    Primary,
    /// Replays the log.
    Backup,
}

/// The first message: a backup asks to follow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The sender's side; only a backup says hello.
    pub role: Role,
    /// Who it is; the generation is the last one it knows of.
    pub identity: Identity,
    /// Drawn for this session.
    pub nonce: Nonce,
}

/// The answer of a primary that accepts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloReply {
    /// The sender's side; only a primary replies.
    pub role: Role,
    /// Who it is; the generation is the one the session belongs to.
    pub identity: Identity,
    /// Drawn for this session.
    pub nonce: Nonce,
    /// The backup's nonce, given back.
    pub echo: Nonce,
}

/// The backup's last word: it accepts as well. The first frame that bears the session's name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloConfirm {
    /// The primary's nonce, given back.
    pub echo: Nonce,
}

/// Why a side will not have a session with the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The other side speaks another version of the protocol.
    #[error(
        "protocol version {theirs} is spoken there, {ours} here: run the same vmft on both sides"
    )]
    Version {
        /// Version of the side that refuses.
        ours: u8,
        /// Version of the side refused.
        theirs: u8,
    },
    /// Two primaries or two backups met.
    #[error("the peer is no {0:?}: one side must be the primary and the other the backup")]
    WrongRole(Role),
    /// The sides belong to different pairs.
    #[error("the primary belongs to pair {primary} and the backup to pair {backup}")]
    WrongPair {
        /// The primary's pair.
        primary: PairId,
        /// The backup's pair.
        backup: PairId,
    },
    /// The machines differ.
    #[error("the machines differ: {0}")]
    Fingerprint(Mismatch),
    /// The backup knows of a later reign than the primary's.
    #[error("the primary is of generation {}, which generation {} has replaced", primary.0, backup.0)]
    WrongGeneration {
        /// The primary's reign.
        primary: Generation,
        /// The last reign the backup knows of.
        backup: Generation,
    },
    /// A backup is connected already.
    #[error("the primary has a backup already")]
    HasBackup,
    /// The primary takes no backup now.
    #[error("the primary takes no backup: {0}")]
    NotAccepting(ForeignText),
    /// A nonce was not given back.
    #[error("the handshake was replayed from another session")]
    Replayed,
    /// What differs is not for the other side to know, which has shown no certificate.
    #[error("its log says why; without TLS it does not tell")]
    Undisclosed,
    /// What the backup left with its arbiter is not to be found with the primary's: theirs are not one.
    #[error("the backup's arbiter is not the primary's: it is a copy of it, or another one")]
    OtherStorage,
}

impl Refusal {
    /// The same for a side of which nothing is known: without the name of a pair and without the
    /// values, and names, of fields. Who can learn from refusals what was expected needs but a few
    /// attempts to meet it.
    #[must_use]
    pub fn to_a_stranger(&self) -> Self {
        match self {
            Self::WrongPair { .. } | Self::Fingerprint(_) => Self::Undisclosed,
            // Who hears these speaks for the same pair and machine, or hears what he has sent.
            Self::Version { .. }
            | Self::WrongRole(_)
            | Self::WrongGeneration { .. }
            | Self::HasBackup
            | Self::NotAccepting(_)
            | Self::Replayed
            | Self::OtherStorage
            | Self::Undisclosed => self.clone(),
        }
    }
}

impl ControlMessage for Hello {
    fn validate(&self) -> Result<(), DecodeError> {
        self.identity.validate()
    }
}

impl ControlMessage for HelloReply {
    fn validate(&self) -> Result<(), DecodeError> {
        self.identity.validate()
    }
}

impl ControlMessage for HelloConfirm {
    fn validate(&self) -> Result<(), DecodeError> {
        Ok(())
    }
}

impl ControlMessage for Refusal {
    fn validate(&self) -> Result<(), DecodeError> {
        match self {
            Self::NotAccepting(text) => check_text("refusal text", text),
            Self::Fingerprint(mismatch) => mismatch.validate(),
            _ => Ok(()),
        }
    }
}

/// Why a handshake did not end in a session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// This side refused the other; the refusal should be sent to it.
    #[error("refused the peer: {0}")]
    Refused(Refusal),
    /// The other side refused this one.
    #[error("the peer refused: {0}")]
    RefusedByPeer(Refusal),
    /// A frame that has no place here.
    #[error("{found} came where {expected} was due")]
    Unexpected {
        /// What came.
        found: FrameKind,
        /// What was due.
        expected: FrameKind,
    },
}

/// What was agreed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionTerms {
    /// The name in every later frame.
    pub session: SessionId,
    /// The reign the session belongs to: the primary's.
    pub generation: Generation,
    /// The other side.
    pub peer: Identity,
}

fn session_of(pair: &PairId, generation: Generation, backup: Nonce, primary: Nonce) -> SessionId {
    let mut bytes = pair.to_string().into_bytes();
    bytes.extend_from_slice(&generation.0.to_le_bytes());
    bytes.extend_from_slice(&backup.0);
    bytes.extend_from_slice(&primary.0);
    SessionId::derive(&bytes)
}

/// The rules both sides check, whichever refuses first.
fn check_sides(primary: &Identity, backup: &Identity) -> Result<(), HandshakeError> {
    let refusal = if primary.pair != backup.pair {
        Refusal::WrongPair { primary: primary.pair.clone(), backup: backup.pair.clone() }
    } else if let Some(mismatch) = primary.fingerprint.mismatch(&backup.fingerprint) {
        Refusal::Fingerprint(mismatch)
    } else if primary.generation < backup.generation {
        Refusal::WrongGeneration { primary: primary.generation, backup: backup.generation }
    } else {
        return Ok(());
    };
    Err(HandshakeError::Refused(refusal))
}

fn unexpected(found: &Frame, expected: FrameKind) -> HandshakeError {
    match found {
        Frame::Refusal(refusal) => HandshakeError::RefusedByPeer(refusal.clone()),
        other => HandshakeError::Unexpected { found: other.kind(), expected },
    }
}

/// The backup has said hello and waits for the reply.
#[derive(Debug)]
pub struct Offered {
    identity: Identity,
    nonce: Nonce,
}

impl Offered {
    /// Begins a handshake: the frame is to be sent to the primary.
    pub fn new(identity: Identity, nonce: Nonce) -> (Self, Frame) {
        let hello = Hello { role: Role::Backup, identity: identity.clone(), nonce };
        (Self { identity, nonce }, Frame::Hello(hello))
    }

    /// Takes the primary's answer; the frame returned is to be sent in the new session.
    ///
    /// # Errors
    /// [`HandshakeError`]. A refusal of ours is to be sent (in [`SessionId::HANDSHAKE`], like all
    /// refusals).
    pub fn handle_frame(self, frame: &Frame) -> Result<(SessionTerms, Frame), HandshakeError> {
        let Frame::HelloReply(reply) = frame else {
            return Err(unexpected(frame, FrameKind::HelloReply));
        };
        if reply.role != Role::Primary {
            return Err(HandshakeError::Refused(Refusal::WrongRole(Role::Primary)));
        }
        if reply.echo != self.nonce {
            return Err(HandshakeError::Refused(Refusal::Replayed));
        }
        check_sides(&reply.identity, &self.identity)?;
        let generation = reply.identity.generation;
        let terms = SessionTerms {
            session: session_of(&self.identity.pair, generation, self.nonce, reply.nonce),
            generation,
            peer: reply.identity.clone(),
        };
        Ok((terms, Frame::HelloConfirm(HelloConfirm { echo: reply.nonce })))
    }
}

/// Whether a primary takes a backup now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// The next backup is welcome.
    Open,
    /// One is being served.
    HasBackup,
    /// None is wanted, for a reason that is told to those who ask.
    Closed(String),
}

/// The primary has accepted a hello and waits for the confirmation.
#[derive(Debug)]
pub struct Answered {
    terms: SessionTerms,
    nonce: Nonce,
}

impl Answered {
    /// Takes a backup's hello; the frame returned is the reply.
    ///
    /// # Errors
    /// [`HandshakeError`]; a refusal of ours is to be sent.
    pub fn new(
        frame: &Frame,
        identity: Identity,
        nonce: Nonce,
        admission: &Admission,
    ) -> Result<(Self, Frame), HandshakeError> {
        let Frame::Hello(hello) = frame else {
            return Err(unexpected(frame, FrameKind::Hello));
        };
        if hello.role != Role::Backup {
            return Err(HandshakeError::Refused(Refusal::WrongRole(Role::Backup)));
        }
        check_sides(&identity, &hello.identity)?;
        match admission {
            Admission::Open => {}
            Admission::HasBackup => return Err(HandshakeError::Refused(Refusal::HasBackup)),
            Admission::Closed(reason) => {
                return Err(HandshakeError::Refused(Refusal::NotAccepting(reason.clone().into())));
            }
        }
        let generation = identity.generation;
        let terms = SessionTerms {
            session: session_of(&identity.pair, generation, hello.nonce, nonce),
            generation,
            peer: hello.identity.clone(),
        };
        let echo = hello.nonce;
        let reply = HelloReply { role: Role::Primary, identity, nonce, echo };
        Ok((Self { terms, nonce }, Frame::HelloReply(reply)))
    }

    /// The session that begins if the backup confirms; its next frame bears this name.
    pub const fn session(&self) -> SessionId {
        self.terms.session
    }

    /// Takes the backup's confirmation.
    ///
    /// # Errors
    /// [`HandshakeError`] for anything else.
    pub fn handle_frame(self, frame: &Frame) -> Result<SessionTerms, HandshakeError> {
        match frame {
            Frame::HelloConfirm(confirm) if confirm.echo == self.nonce => Ok(self.terms),
            Frame::HelloConfirm(_) => Err(HandshakeError::Refused(Refusal::Replayed)),
            other => Err(unexpected(other, FrameKind::HelloConfirm)),
        }
    }
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
