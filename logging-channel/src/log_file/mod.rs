//! Logs in files: the same frames as on the wire, so a log can be replayed offline.
//!
//! ```text
//! LogHeader · checkpoint stream · Entries × n · Goodbye
//! ```
//! All frames but the first bear a session derived from the header, so that a file cannot be
//! patched together from several. A file without its goodbye was cut (or its writer was); all that
//! is good in it can be read, and then where it stops being good. Opening and naming files is the
//! caller's.

mod reader;
mod writer;

pub use reader::{LogDamage, LogDamageCause, LogEntries, LogReader};
pub use writer::{LogWriteError, LogWriter};

use crate::fingerprint::Identity;
use crate::handshake::Nonce;
use crate::session::{SessionId, check_text};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use vmft_log::control::ControlMessage;
use vmft_log::foreign::ForeignText;
use vmft_log::wire::DecodeError;

/// Most facts in a header beside the fingerprint.
pub const MAX_METADATA: usize = 32;

/// What a log file begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogHeader {
    /// Whose log it is, and on what machine it can be replayed.
    pub identity: Identity,
    /// Facts for people, which nothing depends on: at most [`MAX_METADATA`], each name and value
    /// at most [`crate::session::MAX_TEXT`] bytes.
    pub metadata: BTreeMap<ForeignText, ForeignText>,
    /// Drawn for this recording.
    pub nonce: Nonce,
}

impl LogHeader {
    /// The session that the rest of the file bears.
    pub(crate) fn session(&self) -> SessionId {
        let bytes = postcard::to_stdvec(self).expect("a vector takes all a message has to write");
        SessionId::derive(&bytes)
    }
}

impl ControlMessage for LogHeader {
    fn validate(&self) -> Result<(), DecodeError> {
        self.identity.validate()?;
        let (found, limit) = (self.metadata.len() as u64, MAX_METADATA as u64);
        if found > limit {
            return Err(DecodeError::Limit { what: "metadata fields", found, limit });
        }
        for (name, value) in &self.metadata {
            check_text("metadata name", name)?;
            check_text("metadata value", value)?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
