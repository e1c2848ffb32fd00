//! The beginning of a client's connection: from the stream to the chosen export.

use crate::wire::{
    ERROR_POLICY, ERROR_TLS_REQUIRED, ERROR_UNKNOWN, ERROR_UNSUPPORTED, FIXED_NEWSTYLE, Info,
    MAGIC, NO_ZEROES, OPTION_GO, OPTION_MAGIC, OPTION_REPLY_HEAD, OPTION_STARTTLS,
    OPTION_STRUCTURED_REPLY, OPTION_VMFT, OptionHead, OptionReplyHead, REPLY_ACK, REPLY_ERROR,
    REPLY_INFO, REPLY_VMFT, WireError, encode_go,
};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use std::fmt;
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::TlsConnector;

/// What both sides speak over.
pub trait ByteStream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> ByteStream for T {}

/// A stream of any kind.
pub(crate) type Stream = Box<dyn ByteStream>;

/// How a client gets to its server.
pub trait Connect: fmt::Debug + Send + Sync + 'static {
    /// Connects, on a thread that has a runtime of tokio.
    fn connect(&self) -> impl Future<Output = io::Result<Box<dyn ByteStream>>>;

    /// Whom the client trusts and who it is; `None` for no TLS. Asked at each connection.
    ///
    /// # Errors
    /// What keeps TLS from being set up.
    fn tls(&self) -> io::Result<Option<(Arc<ClientConfig>, ServerName<'static>)>>;
}

/// Why there is no export to be used.
#[derive(Debug, thiserror::Error)]
pub enum NegotiationError {
    /// The connection failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What is there does not speak the protocol as it should.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The server is of the protocol's first form, or an older one.
    #[error(
        "the server does not know options (only the fixed newstyle form of NBD is spoken here)"
    )]
    OldStyle,
    /// The server wants TLS, and the client has none.
    #[error("the server speaks to no one without TLS")]
    TlsRequired,
    /// The client wants TLS, and the server has none.
    #[error("the server has no TLS")]
    NoTls,
    /// There is no export of that name.
    #[error("the server has no export of that name")]
    Unknown,
    /// The server does not let this client use it.
    #[error("the server refuses{}", said(.0))]
    Refused(String),
    /// An option that must be known is not.
    #[error("the server does not know what it was asked for")]
    Unsupported,
}

fn said(why: &str) -> String {
    if why.is_empty() { String::new() } else { format!(": {why}") }
}

/// An export as the server tells of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Export {
    /// Bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
    /// The smallest block that can be written, in bytes.
    pub block: u32,
}

/// A connection whose options are being settled.
pub(crate) struct Negotiation {
    stream: Stream,
}

/// Most characters of a server's words that are repeated.
const MAX_WORDS: usize = 200;

impl Negotiation {
    /// Connects, and goes on with TLS if the client has it.
    pub(crate) async fn begin(connect: &impl Connect) -> Result<Self, NegotiationError> {
        let mut stream = connect.connect().await?;
        if stream.read_u64().await? != MAGIC {
            return Err(WireError::Magic("a server").into());
        }
        if stream.read_u64().await? != OPTION_MAGIC {
            return Err(NegotiationError::OldStyle);
        }
        let flags = stream.read_u16().await?;
        if flags & FIXED_NEWSTYLE == 0 {
            return Err(NegotiationError::OldStyle);
        }
        stream.write_u32(u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES))).await?;
        let mut begun = Self { stream };
        if let Some((config, name)) = connect.tls()? {
            match begun.ask(OPTION_STARTTLS, &[]).await? {
                (REPLY_ACK, _) => {}
                (ERROR_UNSUPPORTED | ERROR_POLICY, _) => return Err(NegotiationError::NoTls),
                (kind, data) => return Err(refusal(kind, &data)),
            }
            let stream = TlsConnector::from(config).connect(name, begun.stream).await?;
            begun.stream = Box::new(stream);
        }
        Ok(begun)
    }

    async fn send(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        self.stream.write_all(&OptionHead::encode(option, data)).await?;
        self.stream.flush().await
    }

    async fn receive(&mut self, option: u32) -> Result<(u32, Vec<u8>), NegotiationError> {
        let mut head = [0; OPTION_REPLY_HEAD];
        self.stream.read_exact(&mut head).await?;
        let head = OptionReplyHead::parse(&head)?;
        if head.option != option {
            return Err(WireError::Magic("a reply to this option").into());
        }
        let mut data = vec![0; head.len as usize];
        self.stream.read_exact(&mut data).await?;
        Ok((head.kind, data))
    }

    async fn ask(&mut self, option: u32, data: &[u8]) -> Result<(u32, Vec<u8>), NegotiationError> {
        self.send(option, data).await?;
        self.receive(option).await
    }

    /// A call of this project's own.
    pub(crate) async fn call(&mut self, call: &[u8]) -> Result<Vec<u8>, NegotiationError> {
        match self.ask(OPTION_VMFT, call).await? {
            (REPLY_VMFT, answer) => Ok(answer),
            (kind, data) => Err(refusal(kind, &data)),
        }
    }

    /// Asks for structured replies. True if the server sends them from now on.
    pub(crate) async fn structure_replies(&mut self) -> Result<bool, NegotiationError> {
        let (kind, _) = self.ask(OPTION_STRUCTURED_REPLY, &[]).await?;
        Ok(kind == REPLY_ACK)
    }

    /// Chooses an export: from here on there are requests and replies.
    pub(crate) async fn go(mut self, name: &str) -> Result<(Export, Stream), NegotiationError> {
        self.send(OPTION_GO, &encode_go(name)).await?;
        let (mut size, mut block) = (None, 1);
        loop {
            match self.receive(OPTION_GO).await? {
                (REPLY_ACK, _) => break,
                (REPLY_INFO, data) => match Info::parse(&data)? {
                    Info::Export { size: bytes, flags } => size = Some((bytes, flags)),
                    Info::BlockSize { minimum, .. } => block = minimum,
                    Info::Other => {}
                },
                (kind, data) => return Err(refusal(kind, &data)),
            }
        }
        let (size, flags) = size.ok_or(WireError::Length("what is told about an export"))?;
        Ok((Export { size, flags, block }, self.stream))
    }
}

fn refusal(kind: u32, data: &[u8]) -> NegotiationError {
    match kind {
        ERROR_TLS_REQUIRED => NegotiationError::TlsRequired,
        ERROR_UNKNOWN => NegotiationError::Unknown,
        ERROR_UNSUPPORTED => NegotiationError::Unsupported,
        kind if kind & REPLY_ERROR != 0 => {
            // Foreign text, shown on terminals.
            let text = String::from_utf8_lossy(data);
            NegotiationError::Refused(text.escape_debug().take(MAX_WORDS).collect())
        }
        _ => WireError::Magic("a reply that is known").into(),
    }
}
