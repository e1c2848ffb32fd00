//! Frames on the virtio serial port between the box and its owner.
//!
//! The owner sends one byte, [`GO`], and then bytes that mean nothing. The box sends frames: a byte for
//! the kind, the length of what follows as 32 bits, little-endian, and that. The last says how the job
//! ended, so whoever has read it has read all output.

use std::io::{self, ErrorKind, Read, Write};

/// Sent into the box when somebody listens.
pub const GO: u8 = b'g';
/// Sent into the box ever after, to interrupt it; means nothing else.
pub const AWAKE: u8 = b'.';
/// Longest payload; a frame that claims more is damaged.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// What the box says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// A command wrote this to its standard output.
    Output(Vec<u8>),
    /// A command wrote this to its standard error.
    Errors(Vec<u8>),
    /// The job has ended with this exit status.
    Ended(u8),
}

impl Frame {
    fn kind(&self) -> u8 {
        match self {
            Self::Output(_) => 1,
            Self::Errors(_) => 2,
            Self::Ended(_) => 3,
        }
    }

    /// Writes the frame in one piece.
    ///
    /// # Errors
    /// Whatever writing gives.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let status;
        let payload = match self {
            Self::Output(bytes) | Self::Errors(bytes) => bytes.as_slice(),
            Self::Ended(code) => {
                status = [*code];
                &status
            }
        };
        let len = u32::try_from(payload.len()).map_err(io::Error::other)?;
        let mut bytes = vec![self.kind()];
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(payload);
        to.write_all(&bytes)
    }

    /// Reads the next frame; `None` where the stream ends between two.
    ///
    /// # Errors
    /// `UnexpectedEof` where it ends within one, `InvalidData` if it is none, or what reading gives.
    pub fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut kind = [0];
        match from.read_exact(&mut kind) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
            other => other?,
        }
        let mut len = [0; 4];
        from.read_exact(&mut len)?;
        let len = usize::try_from(u32::from_le_bytes(len)).map_err(io::Error::other)?;
        if len > MAX_PAYLOAD {
            return Err(ErrorKind::InvalidData.into());
        }
        let mut payload = vec![0; len];
        from.read_exact(&mut payload)?;
        match (kind[0], payload.as_slice()) {
            (1, _) => Ok(Some(Self::Output(payload))),
            (2, _) => Ok(Some(Self::Errors(payload))),
            (3, [code]) => Ok(Some(Self::Ended(*code))),
            _ => Err(ErrorKind::InvalidData.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_out_as_they_went_in_and_end_cleanly_only_between_two() {
        let frames = [Frame::Output(vec![0, 255]), Frame::Errors(Vec::new()), Frame::Ended(3)];
        let mut bytes = Vec::new();
        for frame in &frames {
            frame.write(&mut bytes).unwrap();
        }
        assert_eq!(bytes[..7], [1, 2, 0, 0, 0, 0, 255]);
        let mut reader = bytes.as_slice();
        for frame in frames {
            assert_eq!(Frame::read(&mut reader).unwrap(), Some(frame));
        }
        assert_eq!(Frame::read(&mut reader).unwrap(), None);
        let cut = Frame::read(&mut &bytes[..6]).unwrap_err();
        assert_eq!(cut.kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        for bytes in [[9, 0, 0, 0, 0].as_slice(), &[3, 0, 0, 0, 0], &[1, 255, 255, 255, 255]] {
            let error = Frame::read(&mut &bytes[..]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidData);
        }
    }
}
