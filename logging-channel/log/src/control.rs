//! Control messages: the small ones that postcard encodes, unlike entries and pages.

use crate::wire::DecodeError;
use serde::{Deserialize, Serialize};

/// A message that postcard encodes, and whose sizes are checked beyond that.
pub trait ControlMessage: Serialize + for<'de> Deserialize<'de> {
    /// Checks the limits that the type does not express.
    ///
    /// # Errors
    /// The limit or rule that the message breaks.
    fn validate(&self) -> Result<(), DecodeError>;
}

/// Decodes a control message and checks it.
///
/// # Errors
/// [`DecodeError::Control`] for bytes that are no such message, [`DecodeError::Trailing`] for bytes after it,
/// or what [`ControlMessage::validate`] says.
pub fn decode_control<T: ControlMessage>(payload: &[u8]) -> Result<T, DecodeError> {
    let (message, rest) = postcard::take_from_bytes::<T>(payload).map_err(DecodeError::Control)?;
    if !rest.is_empty() {
        return Err(DecodeError::Trailing { count: rest.len() });
    }
    message.validate()?;
    Ok(message)
}
