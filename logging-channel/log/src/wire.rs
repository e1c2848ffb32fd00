//! The primitives of the hand-written encodings: little-endian words, and unsigned variable-length
//! integers of seven bits a byte, least significant first, in their shortest form.

/// Why bytes are no valid encoding.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The bytes end inside a field.
    #[error("encoding ends inside {what}")]
    Truncated {
        /// The field.
        what: &'static str,
    },
    /// A variable-length integer is longer than its shortest form, or than 64 bits.
    #[error("{what} is not a shortest-form integer")]
    Integer {
        /// The field.
        what: &'static str,
    },
    /// A tag that stands for nothing.
    #[error("unknown {what} {tag}")]
    Tag {
        /// What the tag chooses.
        what: &'static str,
        /// The tag found.
        tag: u8,
    },
    /// A length or number beyond its limit.
    #[error("{what} is {found}, the limit is {limit}")]
    Limit {
        /// The quantity.
        what: &'static str,
        /// What was found.
        found: u64,
        /// The most there may be.
        limit: u64,
    },
    /// Bytes are left over after the last field.
    #[error("{count} bytes left over after the last field")]
    Trailing {
        /// How many.
        count: usize,
    },
    /// A control message is not what its kind promises.
    #[error("control message cannot be read: {0}")]
    Control(postcard::Error),
    /// Compressed data does not decompress to the promised size.
    #[error("compressed data is damaged")]
    Compression,
    /// A value breaks a rule of the format.
    #[error("{0}")]
    Rule(&'static str),
}

/// The highest number of an entry or a generation that is taken from anybody: nothing counts so far, and
/// whoever counts on from it does not overflow.
pub const MAX_COUNT: u64 = 1 << 62;

/// Makes sure that a count is one that can be counted on from.
///
/// # Errors
/// [`DecodeError::Limit`] above [`MAX_COUNT`].
pub fn check_count(what: &'static str, found: u64) -> Result<(), DecodeError> {
    if found > MAX_COUNT {
        return Err(DecodeError::Limit { what, found, limit: MAX_COUNT });
    }
    Ok(())
}

/// Appends `value` as a variable-length integer of 1 to 10 bytes.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7F) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Reads fields from the front of a slice. Its methods name the field (`what`) in their errors:
/// [`DecodeError::Truncated`] where the bytes end inside it, and what else they say.
#[derive(Debug)]
pub struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    /// At the front of `bytes`.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Bytes not yet read.
    pub const fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) =
            self.rest.split_at_checked(len).ok_or(DecodeError::Truncated { what })?;
        self.rest = rest;
        Ok(taken)
    }

    /// Everything that is left.
    pub fn take_rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], DecodeError> {
        let bytes = self.take(N, what)?;
        Ok(bytes.try_into().expect("take returned exactly N bytes"))
    }

    /// The next byte.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn byte(&mut self, what: &'static str) -> Result<u8, DecodeError> {
        Ok(self.array::<1>(what)?[0])
    }

    /// A little-endian word of 16 bits.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn word16(&mut self, what: &'static str) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array(what)?))
    }

    /// A little-endian word of 64 bits.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn word64(&mut self, what: &'static str) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A variable-length integer.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`], or [`DecodeError::Integer`] for one that is not in its shortest form.
    pub fn varint(&mut self, what: &'static str) -> Result<u64, DecodeError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte(what)?;
            let bits = u64::from(byte & 0x7F);
            if shift == 63 && bits > 1 {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                let shortest = byte != 0 || shift == 0;
                return if shortest { Ok(value) } else { Err(DecodeError::Integer { what }) };
            }
        }
        Err(DecodeError::Integer { what })
    }

    /// A variable-length integer of at most `limit`.
    ///
    /// # Errors
    /// As [`Self::varint`], and [`DecodeError::Limit`].
    pub fn bounded(&mut self, what: &'static str, limit: u64) -> Result<u64, DecodeError> {
        match self.varint(what)? {
            found if found > limit => Err(DecodeError::Limit { what, found, limit }),
            found => Ok(found),
        }
    }

    /// A length of at most `limit`, and so many bytes.
    ///
    /// # Errors
    /// As [`Self::bounded`].
    pub fn bytes(&mut self, what: &'static str, limit: usize) -> Result<&'a [u8], DecodeError> {
        let len = self.bounded(what, limit as u64)?;
        self.take(len as usize, what)
    }

    /// Makes sure that nothing is left.
    ///
    /// # Errors
    /// [`DecodeError::Trailing`].
    pub const fn finish(&self) -> Result<(), DecodeError> {
        match self.rest.len() {
            0 => Ok(()),
            count => Err(DecodeError::Trailing { count }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_come_back_and_only_their_shortest_form_is_read() {
        for value in [0, 1, 0x7F, 0x80, 0x3FFF, 0x4000, u64::from(u32::MAX), u64::MAX] {
            let mut bytes = Vec::new();
            put_varint(&mut bytes, value);
            let mut cursor = Cursor::new(&bytes);
            assert_eq!(cursor.varint("value"), Ok(value));
            assert_eq!(cursor.finish(), Ok(()));
        }
        let too_long = [0x80, 0x00];
        let error = Err(DecodeError::Integer { what: "value" });
        assert_eq!(Cursor::new(&too_long).varint("value"), error);
        let over_64_bits = [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x02];
        assert_eq!(Cursor::new(&over_64_bits).varint("value"), error);
        assert_eq!(
            Cursor::new(&[0x80]).varint("value"),
            Err(DecodeError::Truncated { what: "value" })
        );
    }
}
