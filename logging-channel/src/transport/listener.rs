//! The place where a backup may join, taken before anything depends on it.

use super::{PeerAddress, TransportError, tls};
use rustls::ServerConfig;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

/// An address that is ours: nobody else can listen there. Whoever connects waits until a
/// [`super::PrimaryChannel`] hears him.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    pub(super) tls: Option<Arc<ServerConfig>>,
    local_address: SocketAddr,
}

impl Listener {
    /// Takes the address, and reads its certificates if it has any.
    ///
    /// # Errors
    /// [`TransportError::Listen`] if the address is in use or not ours, [`TransportError::Tls`].
    pub fn bind(address: &PeerAddress) -> Result<Self, TransportError> {
        let tls = address.tls_dir.as_deref().map(tls::server_config).transpose()?;
        let listen_error = |source| TransportError::Listen { address: address.clone(), source };
        let addresses = address.resolve().map_err(listen_error)?;
        let socket = TcpListener::bind(&addresses[..]).map_err(listen_error)?;
        socket.set_nonblocking(true).map_err(listen_error)?;
        let local_address = socket.local_addr().map_err(listen_error)?;
        Ok(Self { socket, tls, local_address })
    }

    /// Where it is; the port is the one that was picked for port 0.
    pub const fn local_address(&self) -> SocketAddr {
        self.local_address
    }

    pub(super) fn socket(&self) -> std::io::Result<TcpListener> {
        self.socket.try_clone()
    }
}
