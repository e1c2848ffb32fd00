//! Streams and certificates for other protocols than the channel's, under its rules: without TLS
//! nothing leaves this machine, and with it both ends prove who they are.

pub use super::connection::{ByteStream, Stream};
pub use super::lobby::{Lobby, Visit};
pub use super::tls::{ServerIdentity, TlsError};

use super::connection::open;
use super::listener::Acceptor;
use super::{Listener, Origin, PeerAddress, Place, TransportError, tls};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;

/// How long a connection may be silent before the host asks whether its other end is still there,
/// how often it asks again, and how often in all.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(10), Duration::from_secs(5), 3);

/// Lets the host find out that the other end of a connection is gone without a word, also while it
/// is not spoken to. The channel has its own heartbeats, and may be told to wait longer.
fn keep_alive(socket: &TcpStream) -> io::Result<()> {
    let (time, interval, retries) = KEEPALIVE;
    let keepalive =
        TcpKeepalive::new().with_time(time).with_interval(interval).with_retries(retries);
    let socket = SockRef::from(socket);
    socket.set_tcp_keepalive(&keepalive)?;
    // The same for what was sent and is not acknowledged.
    socket.set_tcp_user_timeout(Some(time + interval * retries))
}

impl PeerAddress {
    /// Connects. The host is looked up now, which blocks.
    ///
    /// # Errors
    /// [`TransportError`]
    pub async fn open_stream(&self) -> Result<Stream, TransportError> {
        Ok(open(&self.resolve()?, keep_alive).await?)
    }

    /// Who this side is and whom it trusts, as its directory says now, and the name that the other
    /// end has; `None` without TLS.
    ///
    /// # Errors
    /// [`TlsError`]
    pub fn client_identity(
        &self,
    ) -> Result<Option<(Arc<ClientConfig>, ServerName<'static>)>, TlsError> {
        let Some(dir) = &self.tls_dir else { return Ok(None) };
        Ok(Some((tls::client_config(dir)?, tls::side_name())))
    }

    /// Who this side is to somebody else's service, and the name that the service must have: its host's.
    /// `None` without TLS.
    ///
    /// # Errors
    /// [`TlsError`]
    pub fn service_identity(
        &self,
    ) -> Result<Option<(Arc<ClientConfig>, ServerName<'static>)>, TlsError> {
        let (Some(dir), Place::Tcp { host, .. }) = (&self.tls_dir, &self.place) else {
            return Ok(None);
        };
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(host)
            .map_err(|error| TlsError::Unusable { dir: dir.clone(), problem: error.to_string() })?;
        Ok(Some((tls::service_config(dir)?, name)))
    }
}

/// Hears whoever connects to a [`Listener`].
#[derive(Debug)]
pub struct StreamAcceptor {
    acceptor: Acceptor,
    tls: Option<Arc<ServerIdentity>>,
}

impl Listener {
    /// Hears whoever connects from now on, in the place of a channel. To be called on a thread with
    /// a runtime.
    ///
    /// # Errors
    /// The host's.
    pub fn accept_streams(&self) -> io::Result<StreamAcceptor> {
        Ok(StreamAcceptor { acceptor: self.socket()?.acceptor(), tls: self.tls.clone() })
    }
}

impl StreamAcceptor {
    /// Waits for the next one who connects. Can be dropped without loss.
    ///
    /// # Errors
    /// The host's: out of descriptors, for instance.
    pub async fn accept(&self) -> io::Result<(Stream, Origin)> {
        self.acceptor.accept_with(keep_alive).await
    }

    /// Who the listening side is; `None` without TLS.
    pub fn identity(&self) -> Option<Arc<ServerIdentity>> {
        self.tls.clone()
    }
}
