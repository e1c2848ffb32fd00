//! What goes over the wire: numbers and layouts, all big-endian, without any input or output.

/// First word of a server.
pub const MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// Before each option, and second word of a server.
pub const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// Before each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Before each request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Before a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags, of both sides: fixed newstyle.
pub const FIXED_NEWSTYLE: u16 = 1;
/// No padding after the reply to [`OPTION_EXPORT_NAME`].
pub const NO_ZEROES: u16 = 2;

/// Choose an export, with neither reply nor error but the end of the connection.
pub const OPTION_EXPORT_NAME: u32 = 1;
/// The client goes.
pub const OPTION_ABORT: u32 = 2;
/// Name the exports.
pub const OPTION_LIST: u32 = 3;
/// Go on with TLS.
pub const OPTION_STARTTLS: u32 = 5;
/// Tell about an export.
pub const OPTION_INFO: u32 = 6;
/// Tell about an export, and use it.
pub const OPTION_GO: u32 = 7;
/// Replies to requests may be structured.
pub const OPTION_STRUCTURED_REPLY: u32 = 8;
/// A call of this project's own: the data is the call, the reply's data its answer.
pub const OPTION_VMFT: u32 = u32::from_be_bytes(*b"vmft");

/// The option is done.
pub const REPLY_ACK: u32 = 1;
/// The name of an export.
pub const REPLY_SERVER: u32 = 2;
/// Something about an export.
pub const REPLY_INFO: u32 = 3;
/// The answer to [`OPTION_VMFT`].
pub const REPLY_VMFT: u32 = OPTION_VMFT;
/// Set in all replies that are errors.
pub const REPLY_ERROR: u32 = 1 << 31;
/// The server does not know the option.
pub const ERROR_UNSUPPORTED: u32 = REPLY_ERROR | 1;
/// The server will not do it.
pub const ERROR_POLICY: u32 = REPLY_ERROR | 2;
/// The option makes no sense.
pub const ERROR_INVALID: u32 = REPLY_ERROR | 3;
/// Not before TLS.
pub const ERROR_TLS_REQUIRED: u32 = REPLY_ERROR | 5;
/// There is no such export.
pub const ERROR_UNKNOWN: u32 = REPLY_ERROR | 6;

/// About an export: its size and flags.
pub const INFO_EXPORT: u16 = 0;
/// About an export: sizes of blocks.
pub const INFO_BLOCK_SIZE: u16 = 3;

/// Transmission flags: set always.
pub const HAS_FLAGS: u16 = 1;
/// It cannot be written.
pub const READ_ONLY: u16 = 1 << 1;
/// It knows [`COMMAND_FLUSH`].
pub const SEND_FLUSH: u16 = 1 << 2;
/// It knows [`FLAG_FUA`].
pub const SEND_FUA: u16 = 1 << 3;
/// It knows [`COMMAND_TRIM`].
pub const SEND_TRIM: u16 = 1 << 5;
/// It knows [`COMMAND_WRITE_ZEROES`].
pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
/// A flush on one connection is one of all that was completed on any.
pub const CAN_MULTI_CONN: u16 = 1 << 8;

/// Read.
pub const COMMAND_READ: u16 = 0;
/// Write.
pub const COMMAND_WRITE: u16 = 1;
/// The client goes; nothing is answered.
pub const COMMAND_DISCONNECT: u16 = 2;
/// Make durable what was completed.
pub const COMMAND_FLUSH: u16 = 3;
/// The content is not needed any more.
pub const COMMAND_TRIM: u16 = 4;
/// Write zeroes.
pub const COMMAND_WRITE_ZEROES: u16 = 6;
/// Of a command: durable before it is answered.
pub const FLAG_FUA: u16 = 1;
/// Of [`COMMAND_WRITE_ZEROES`]: the room is to stay allocated.
pub const FLAG_NO_HOLE: u16 = 2;

/// Of [`COMMAND_READ`]: the reply is not to be in pieces, which no reply of this server is.
pub const FLAG_DF: u16 = 4;

/// Not permitted.
pub const EPERM: u32 = 1;
/// The storage failed.
pub const EIO: u32 = 5;
/// No memory.
pub const ENOMEM: u32 = 12;
/// The request makes no sense.
pub const EINVAL: u32 = 22;
/// No room.
pub const ENOSPC: u32 = 28;
/// Not known.
pub const ENOTSUP: u32 = 95;

/// Of a chunk: the last one of its reply.
pub const CHUNK_DONE: u16 = 1;
/// A chunk with nothing in it.
pub const CHUNK_NONE: u16 = 0;
/// A chunk with an offset and data.
pub const CHUNK_DATA: u16 = 1;
/// A chunk with an offset and the length of a hole.
pub const CHUNK_HOLE: u16 = 2;
/// Set in all chunks that are errors.
pub const CHUNK_ERROR: u16 = 1 << 15;

/// Most bytes of data in one request, which is what the protocol says that every server takes.
pub const MAX_DATA: u32 = 32 << 20;
/// Most bytes of an option's data.
pub const MAX_OPTION: u32 = 64 << 10;
/// Most bytes of an export's name (the protocol's limit for strings).
pub const MAX_NAME: usize = 4096;

/// Bytes that are no frame of the protocol, or one that its limits forbid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A word that should be there is not.
    #[error("{0} is not what the NBD protocol begins it with")]
    Magic(&'static str),
    /// Something is longer than may be.
    #[error("{what} of {len} bytes: at most {limit} may be")]
    TooLong {
        /// What.
        what: &'static str,
        /// How long it is said to be.
        len: u64,
        /// The most.
        limit: u64,
    },
    /// Data that ends early, or late.
    #[error("{0} is cut short, or too long")]
    Length(&'static str),
    /// A name that is no text.
    #[error("a name that is no UTF-8")]
    Name,
}

/// Reads integers from data of a known length.
#[derive(Debug)]
struct Fields<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(WireError::Length(self.what))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        Ok(self.take(N)?.try_into().expect("as many bytes as asked for"))
    }

    fn u16(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    fn end(&self) -> Result<(), WireError> {
        if self.rest.is_empty() { Ok(()) } else { Err(WireError::Length(self.what)) }
    }
}

/// Bytes of an option before its data.
pub const OPTION_HEAD: usize = 16;

/// The head of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHead {
    /// Which.
    pub option: u32,
    /// Bytes of data behind it.
    pub len: u32,
}

impl OptionHead {
    /// As a client sends it, with the data.
    pub fn encode(option: u32, data: &[u8]) -> Vec<u8> {
        let len = u32::try_from(data.len()).expect("options are small");
        let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes.extend(data);
        bytes
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`WireError::Magic`]; [`WireError::TooLong`] for more than [`MAX_OPTION`] of data.
    pub fn parse(bytes: &[u8; OPTION_HEAD]) -> Result<Self, WireError> {
        let what = "an option";
        let mut fields = Fields { rest: bytes, what };
        if fields.u64()? != OPTION_MAGIC {
            return Err(WireError::Magic(what));
        }
        let head = Self { option: fields.u32()?, len: fields.u32()? };
        within(what, head.len, MAX_OPTION)?;
        Ok(head)
    }
}

fn within(what: &'static str, len: u32, limit: u32) -> Result<(), WireError> {
    if len <= limit {
        return Ok(());
    }
    Err(WireError::TooLong { what, len: len.into(), limit: limit.into() })
}

/// Bytes of a reply to an option before its data.
pub const OPTION_REPLY_HEAD: usize = 20;

/// The head of a reply to an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHead {
    /// The option.
    pub option: u32,
    /// What kind of reply.
    pub kind: u32,
    /// Bytes of data behind it.
    pub len: u32,
}

impl OptionReplyHead {
    /// As a server sends it, with the data.
    pub fn encode(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
        let len = u32::try_from(data.len()).expect("replies to options are small");
        let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        for word in [option, kind, len] {
            bytes.extend(word.to_be_bytes());
        }
        bytes.extend(data);
        bytes
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`WireError::Magic`]; [`WireError::TooLong`] for more than [`MAX_OPTION`] of data.
    pub fn parse(bytes: &[u8; OPTION_REPLY_HEAD]) -> Result<Self, WireError> {
        let what = "a reply to an option";
        let mut fields = Fields { rest: bytes, what };
        if fields.u64()? != OPTION_REPLY_MAGIC {
            return Err(WireError::Magic(what));
        }
        let head = Self { option: fields.u32()?, kind: fields.u32()?, len: fields.u32()? };
        within(what, head.len, MAX_OPTION)?;
        Ok(head)
    }
}

/// The data of [`OPTION_INFO`] and [`OPTION_GO`] that asks for an export, and for the sizes of its blocks.
pub fn encode_go(name: &str) -> Vec<u8> {
    let len = u32::try_from(name.len()).expect("names are short");
    let mut data = len.to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend(1u16.to_be_bytes());
    data.extend(INFO_BLOCK_SIZE.to_be_bytes());
    data
}

/// The export that such data names.
///
/// # Errors
/// [`WireError`]
pub fn parse_go(data: &[u8]) -> Result<&str, WireError> {
    let mut fields = Fields { rest: data, what: "the choice of an export" };
    let len = fields.u32()?;
    within("a name", len, MAX_NAME as u32)?;
    let name = std::str::from_utf8(fields.take(len as usize)?).map_err(|_| WireError::Name)?;
    for _ in 0..fields.u16()? {
        fields.u16()?;
    }
    fields.end()?;
    Ok(name)
}

/// What is told about an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Info {
    /// Its size and its flags.
    Export {
        /// Bytes.
        size: u64,
        /// Transmission flags.
        flags: u16,
    },
    /// Sizes of blocks.
    BlockSize {
        /// The smallest that can be written.
        minimum: u32,
        /// The best.
        preferred: u32,
        /// The largest.
        maximum: u32,
    },
    /// Something that is of no use here.
    Other,
}

impl Info {
    /// The data of a [`REPLY_INFO`].
    pub fn encode(self) -> Vec<u8> {
        let mut data = Vec::new();
        match self {
            Self::Export { size, flags } => {
                data.extend(INFO_EXPORT.to_be_bytes());
                data.extend(size.to_be_bytes());
                data.extend(flags.to_be_bytes());
            }
            Self::BlockSize { minimum, preferred, maximum } => {
                data.extend(INFO_BLOCK_SIZE.to_be_bytes());
                for size in [minimum, preferred, maximum] {
                    data.extend(size.to_be_bytes());
                }
            }
            Self::Other => unreachable!("nothing is told that is of no use"),
        }
        data
    }

    /// Reads it.
    ///
    /// # Errors
    /// [`WireError::Length`]
    pub fn parse(data: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields { rest: data, what: "something about an export" };
        let info = match fields.u16()? {
            INFO_EXPORT => Self::Export { size: fields.u64()?, flags: fields.u16()? },
            INFO_BLOCK_SIZE => Self::BlockSize {
                minimum: fields.u32()?,
                preferred: fields.u32()?,
                maximum: fields.u32()?,
            },
            _ => return Ok(Self::Other),
        };
        fields.end()?;
        Ok(info)
    }
}

/// Bytes of a request before its data.
pub const REQUEST_HEAD: usize = 28;

/// The head of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHead {
    /// `FLAG_*`
    pub flags: u16,
    /// `COMMAND_*`
    pub command: u16,
    /// Comes back in the reply.
    pub cookie: u64,
    /// First byte of the export.
    pub offset: u64,
    /// Bytes of the export.
    pub len: u32,
}

impl RequestHead {
    /// As a client sends it; the data of a write follows.
    pub fn encode(&self) -> [u8; REQUEST_HEAD] {
        let mut bytes = [0; REQUEST_HEAD];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.len.to_be_bytes());
        bytes
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`WireError::Magic`]; [`WireError::TooLong`] for a read or write of more than [`MAX_DATA`].
    pub fn parse(bytes: &[u8; REQUEST_HEAD]) -> Result<Self, WireError> {
        let what = "a request";
        let mut fields = Fields { rest: bytes, what };
        if fields.u32()? != REQUEST_MAGIC {
            return Err(WireError::Magic(what));
        }
        let head = Self {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            len: fields.u32()?,
        };
        if head.command == COMMAND_WRITE {
            // What follows could not be found if it were passed over.
            within("a write", head.len, MAX_DATA)?;
        }
        Ok(head)
    }
}

/// A simple reply; the data of a successful read follows.
pub fn encode_simple_reply(error: u32, cookie: u64) -> Vec<u8> {
    let mut bytes = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend(error.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes
}

/// The chunk that is all of a reply to a read, but for the `len` bytes of data that follow.
pub fn encode_data_chunk(cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = encode_chunk(CHUNK_DATA, cookie, 8 + len);
    bytes.extend(offset.to_be_bytes());
    bytes
}

/// The chunk that is all of a reply that is an error.
pub fn encode_error_chunk(cookie: u64, error: u32) -> Vec<u8> {
    let mut bytes = encode_chunk(CHUNK_ERROR | 1, cookie, 6);
    bytes.extend(error.to_be_bytes());
    bytes.extend(0u16.to_be_bytes());
    bytes
}

fn encode_chunk(kind: u16, cookie: u64, len: u32) -> Vec<u8> {
    let mut bytes = STRUCTURED_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend(CHUNK_DONE.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

/// Words of the protocol that a person can read for its error numbers.
pub const fn error_text(error: u32) -> &'static str {
    match error {
        EPERM => "not permitted",
        EIO => "the storage failed",
        ENOMEM => "the server has no memory left",
        EINVAL => "the server takes the request for senseless",
        ENOSPC => "the storage is full",
        ENOTSUP => "the server does not know the request",
        _ => "an error of the server",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_parsed() {
        let option = OptionHead::encode(OPTION_GO, &encode_go("disk"));
        let (head, data) = option.split_first_chunk().expect("a head");
        assert_eq!(OptionHead::parse(head), Ok(OptionHead { option: OPTION_GO, len: 12 }));
        assert_eq!(parse_go(data), Ok("disk"));
        let infos = [
            Info::Export { size: 1 << 40, flags: HAS_FLAGS | READ_ONLY },
            Info::BlockSize { minimum: 1, preferred: 4096, maximum: MAX_DATA },
        ];
        for info in infos {
            let reply = OptionReplyHead::encode(OPTION_GO, REPLY_INFO, &info.encode());
            let (head, data) = reply.split_first_chunk().expect("a head");
            let head = OptionReplyHead::parse(head).expect("good");
            assert_eq!((head.kind, head.len as usize), (REPLY_INFO, data.len()));
            assert_eq!(Info::parse(data), Ok(info));
        }
        let request =
            RequestHead { flags: FLAG_FUA, command: COMMAND_WRITE, cookie: 7, offset: 512, len: 8 };
        assert_eq!(RequestHead::parse(&request.encode()), Ok(request));
    }

    #[test]
    fn lengths_are_believed_only_within_their_limits() {
        let option = |len: u32| {
            let mut bytes = OptionHead::encode(OPTION_LIST, &[]);
            bytes[12..].copy_from_slice(&len.to_be_bytes());
            OptionHead::parse(&bytes.try_into().expect("a head"))
        };
        assert!(option(MAX_OPTION).is_ok());
        assert!(matches!(option(MAX_OPTION + 1), Err(WireError::TooLong { .. })));
        let write =
            |len| RequestHead { flags: 0, command: COMMAND_WRITE, cookie: 0, offset: 0, len };
        assert!(RequestHead::parse(&write(MAX_DATA).encode()).is_ok());
        let refused = RequestHead::parse(&write(MAX_DATA + 1).encode());
        assert!(matches!(refused, Err(WireError::TooLong { .. })));
        for wrong in [&b"\0\0\0\x05disk\0\0"[..], b"", b"\xFF\xFF\xFF\xFF", b"\0\0\0\x01\xFF\0\0"] {
            assert!(parse_go(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(
            parse_go(b"\0\0\0\0\0\x02\0\0"),
            Err(WireError::Length("the choice of an export"))
        );
    }
}
