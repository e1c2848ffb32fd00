//! One connection: frames over a byte stream, plain or TLS.

use super::tls;
use super::{TransportError, clock};
use crate::frame::{Frame, FrameDecoder, FrameError, UnsealedFrame};
use crate::session::SessionId;
use rustls::{ClientConfig, ServerConfig};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Bytes asked of a socket at a time.
const READ_BYTES: usize = 256 << 10;

trait ByteStream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> ByteStream for T {}

/// Finds the frames in what a connection delivers.
pub(super) struct FrameReader {
    input: ReadHalf<Box<dyn ByteStream>>,
    decoder: FrameDecoder,
    chunk: Vec<u8>,
}

/// Puts sealed frames on a connection.
pub(super) struct FrameWriter {
    output: WriteHalf<Box<dyn ByteStream>>,
}

/// Both directions of a connection.
pub(super) struct Connection {
    pub(super) reader: FrameReader,
    pub(super) writer: FrameWriter,
}

impl Connection {
    fn new(stream: Box<dyn ByteStream>) -> Self {
        let (input, output) = tokio::io::split(stream);
        let decoder = FrameDecoder::new(SessionId::HANDSHAKE);
        let reader = FrameReader { input, decoder, chunk: vec![0; READ_BYTES] };
        Self { reader, writer: FrameWriter { output } }
    }

    /// Takes over an accepted stream; with TLS, after the client has proved who it is.
    pub(super) async fn accept(
        stream: TcpStream,
        tls: Option<Arc<ServerConfig>>,
    ) -> Result<Self, TransportError> {
        stream.set_nodelay(true)?;
        let Some(config) = tls else { return Ok(Self::new(Box::new(stream))) };
        let mut first = [0];
        if stream.peek(&mut first).await? == 1 && first[0] == crate::frame::MAGIC[0] {
            return Err(TransportError::PeerIsPlain);
        }
        let stream =
            TlsAcceptor::from(config).accept(stream).await.map_err(TransportError::TlsHandshake)?;
        Ok(Self::new(Box::new(stream)))
    }

    /// Connects to the first of `addresses` that answers.
    pub(super) async fn connect(
        addresses: &[SocketAddr],
        tls: Option<Arc<ClientConfig>>,
    ) -> Result<Self, TransportError> {
        let stream = TcpStream::connect(addresses).await?;
        stream.set_nodelay(true)?;
        let Some(config) = tls else { return Ok(Self::new(Box::new(stream))) };
        let connector = TlsConnector::from(config);
        let stream = connector
            .connect(tls::side_name(), stream)
            .await
            .map_err(TransportError::TlsHandshake)?;
        Ok(Self::new(Box::new(stream)))
    }
}

impl FrameReader {
    /// From here on, frames must belong to `session`.
    pub(super) const fn set_session(&mut self, session: SessionId) {
        self.decoder.set_session(session);
    }

    /// A frame that has arrived already.
    pub(super) fn buffered_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        self.decoder.next_frame()
    }

    /// Waits for more bytes; false when the connection is closed. Can be dropped without loss.
    pub(super) async fn fill(&mut self) -> io::Result<bool> {
        let len = self.input.read(&mut self.chunk).await?;
        self.decoder.feed(&self.chunk[..len]);
        Ok(len > 0)
    }

    /// Waits for a frame, for at most `limit` without any byte.
    pub(super) async fn next_frame(
        &mut self,
        limit: Duration,
        what: &'static str,
    ) -> Result<Frame, TransportError> {
        loop {
            if let Some(frame) = self.buffered_frame().map_err(TransportError::from_frame_error)? {
                return Ok(frame);
            }
            match clock::within(limit, self.fill()).await {
                None => return Err(TransportError::TimedOut { what, limit }),
                Some(Ok(true)) => {}
                Some(Ok(false)) => return Err(TransportError::Closed { what }),
                Some(Err(error)) => return Err(error.into()),
            }
        }
    }
}

impl FrameWriter {
    /// Writes a frame's bytes. Not to be dropped halfway if anything is to follow.
    pub(super) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.output.write_all(bytes).await
    }

    /// Makes sure that everything written has left this process.
    pub(super) async fn flush(&mut self) -> io::Result<()> {
        self.output.flush().await
    }

    /// Says that nothing follows; the other direction stays open.
    pub(super) async fn shutdown(&mut self) -> io::Result<()> {
        self.output.shutdown().await
    }

    /// Writes one frame and flushes, in at most `limit`.
    pub(super) async fn send(
        &mut self,
        frame: UnsealedFrame,
        limit: Duration,
        what: &'static str,
    ) -> Result<(), TransportError> {
        self.send_bytes(&frame.seal(), limit, what).await
    }

    /// Writes the bytes of sealed frames and flushes, in at most `limit`.
    pub(super) async fn send_bytes(
        &mut self,
        bytes: &[u8],
        limit: Duration,
        what: &'static str,
    ) -> Result<(), TransportError> {
        let sending = async {
            self.write(bytes).await?;
            self.flush().await
        };
        match clock::within(limit, sending).await {
            None => Err(TransportError::TimedOut { what, limit }),
            Some(result) => Ok(result?),
        }
    }
}
