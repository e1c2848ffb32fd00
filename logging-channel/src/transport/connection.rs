//! One connection: frames over a byte stream, plain or TLS.

use super::address::Resolved;
use super::lobby::Visit;
use super::tls;
use super::{TransportError, clock};
use crate::frame::{Frame, FrameDecoder, FrameError, UnsealedFrame};
use crate::session::SessionId;
use rustls::{ClientConfig, ServerConfig};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Bytes asked of a socket at a time.
const READ_BYTES: usize = 256 << 10;

/// What a connection reads and writes.
pub trait ByteStream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> ByteStream for T {}

/// A stream of any kind.
pub type Stream = Box<dyn ByteStream>;

/// A stream whose first byte was looked at.
struct Begun {
    first: Option<u8>,
    stream: Stream,
}

impl AsyncRead for Begun {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.first.take_if(|_| buffer.remaining() > 0) {
            Some(first) => {
                buffer.put_slice(&[first]);
                Poll::Ready(Ok(()))
            }
            None => Pin::new(&mut self.stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Begun {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

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
    /// A connection over a stream, with nothing said yet.
    pub(super) fn new(stream: Stream) -> Self {
        let (input, output) = tokio::io::split(stream);
        let decoder = FrameDecoder::new(SessionId::HANDSHAKE);
        let reader = FrameReader { input, decoder, chunk: vec![0; READ_BYTES] };
        Self { reader, writer: FrameWriter { output } }
    }

    /// Takes over an accepted stream, whose first byte must come within `first_byte`; with TLS, after the
    /// client has proved who it is.
    pub(super) async fn accept(
        mut stream: Stream,
        tls: Option<Arc<ServerConfig>>,
        first_byte: Duration,
        visit: &Visit,
    ) -> Result<Self, TransportError> {
        let mut first = [0];
        let what = "its first byte";
        let timed_out = TransportError::TimedOut { what, limit: first_byte };
        if clock::within(first_byte, stream.read(&mut first)).await.ok_or(timed_out)?? == 0 {
            return Err(TransportError::Closed { what });
        }
        visit.speaks();
        let [first] = first;
        let stream = Begun { first: Some(first), stream };
        let Some(config) = tls else { return Ok(Self::new(Box::new(stream))) };
        if first == crate::frame::MAGIC[0] {
            return Err(TransportError::PeerIsPlain);
        }
        match TlsAcceptor::from(config).accept(stream).into_fallible().await {
            Ok(stream) => {
                visit.is_authenticated();
                Ok(Self::new(Box::new(stream)))
            }
            Err((error, mut stream)) => {
                // The alert says why: the peer should read it before it is cut off.
                clock::within(super::LINGER, drain(&mut stream)).await;
                Err(TransportError::of_tls_handshake(error))
            }
        }
    }

    /// Connects to the place, or to the first of its addresses that answers.
    pub(super) async fn connect(
        place: &Resolved,
        tls: Option<Arc<ClientConfig>>,
    ) -> Result<Self, TransportError> {
        let stream = open(place, |_| Ok(())).await?;
        let Some(config) = tls else { return Ok(Self::new(stream)) };
        let connected = TlsConnector::from(config).connect(tls::side_name(), stream).await;
        Ok(Self::new(Box::new(connected.map_err(TransportError::of_tls_handshake)?)))
    }
}

impl Connection {
    /// Says one last thing, and lets the peer read it before the connection is closed.
    pub(super) async fn tell_and_drain(&mut self, frame: UnsealedFrame, limit: Duration) {
        let telling = async {
            // The peer may be gone; that it is let go is what matters here.
            let _ = self.writer.send(frame, limit, "taking a last word").await;
            let _ = self.writer.shutdown().await;
            while matches!(self.reader.fill().await, Ok(true)) {}
        };
        clock::within(limit, telling).await;
    }
}

/// Connects to the place, or to the first of its addresses that answers, and sets a socket of TCP up.
pub(super) async fn open(
    place: &Resolved,
    set_up: impl Fn(&TcpStream) -> io::Result<()>,
) -> io::Result<Stream> {
    Ok(match place {
        Resolved::Unix(path) => Box::new(UnixStream::connect(path).await?),
        Resolved::Tcp(addresses) => {
            let stream = TcpStream::connect(&addresses[..]).await?;
            stream.set_nodelay(true)?;
            set_up(&stream)?;
            Box::new(stream)
        }
    })
}

/// Says that nothing follows, and reads until the peer closes.
async fn drain(stream: &mut Begun) {
    let _ = stream.shutdown().await;
    while matches!(stream.read(&mut [0; 1024]).await, Ok(1..)) {}
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
