//! The place where a backup may join, taken before anything depends on it.

use super::address::Resolved;
use super::connection::{ByteStream, Stream};
use super::tls::ServerIdentity;
use super::{PeerAddress, TransportError, clock, join_thread, spawn_thread};
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::Notify;
use vmft_sandbox::bind_private_socket;
use vmft_threads::Mutex;

/// How long not to accept after an error of the socket: out of descriptors, for instance.
pub(super) const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Where a channel listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LocalAddress {
    /// At a TCP port; the one that was picked for port 0.
    Tcp(SocketAddr),
    /// At a Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for LocalAddress {
    /// As a peer names it, but for its certificates and `tcp:`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl LocalAddress {
    /// The TCP port.
    ///
    /// # Panics
    /// If it is a Unix socket.
    pub fn socket_address(&self) -> SocketAddr {
        match self {
            Self::Tcp(address) => *address,
            Self::Unix(path) => panic!("{} is no TCP port", path.display()),
        }
    }
}

/// Where somebody who connects comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// From this address and port.
    Tcp(SocketAddr),
    /// From this machine, by the Unix socket.
    Unix,
}

/// All addresses that one peer is likely to have: limits are for them together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Neighbourhood {
    /// One IPv4 address, or the 64 first bits of an IPv6 address: what a host is given.
    Ip(IpAddr),
    ThisMachine,
}

impl Origin {
    pub(super) fn neighbourhood(self) -> Neighbourhood {
        match self {
            Self::Unix => Neighbourhood::ThisMachine,
            Self::Tcp(address) => match address.ip().to_canonical() {
                IpAddr::V6(ip) => {
                    let [a, b, c, d, ..] = ip.segments();
                    Neighbourhood::Ip(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into())
                }
                ip => Neighbourhood::Ip(ip),
            },
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix => f.write_str("somebody on this host"),
        }
    }
}

/// The socket itself.
#[derive(Debug)]
enum ListenSocket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl ListenSocket {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(socket) => Self::Tcp(socket.try_clone()?),
            Self::Unix(socket) => Self::Unix(socket.try_clone()?),
        })
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Tcp(socket) => socket.set_nonblocking(true),
            Self::Unix(socket) => socket.set_nonblocking(true),
        }
    }
}

/// The socket, as the channel's thread uses it.
#[derive(Debug)]
pub(super) enum Acceptor {
    Tcp(tokio::net::TcpListener),
    Unix(tokio::net::UnixListener),
}

impl Acceptor {
    /// To be called on a thread with a runtime.
    fn new(socket: ListenSocket) -> io::Result<Self> {
        Ok(match socket {
            ListenSocket::Tcp(socket) => Self::Tcp(tokio::net::TcpListener::from_std(socket)?),
            ListenSocket::Unix(socket) => Self::Unix(tokio::net::UnixListener::from_std(socket)?),
        })
    }

    /// Waits for the next one who connects. Can be dropped without loss.
    pub(super) async fn accept(&self) -> io::Result<(Stream, Origin)> {
        self.accept_with(|_| Ok(())).await
    }

    /// The same; sets a socket of TCP up.
    pub(super) async fn accept_with(
        &self,
        set_up: impl Fn(&tokio::net::TcpStream) -> io::Result<()>,
    ) -> io::Result<(Stream, Origin)> {
        match self {
            Self::Tcp(socket) => {
                let (stream, peer) = socket.accept().await?;
                stream.set_nodelay(true)?;
                set_up(&stream)?;
                Ok((Box::new(stream) as Box<dyn ByteStream>, Origin::Tcp(peer)))
            }
            Self::Unix(socket) => {
                let (stream, _) = socket.accept().await?;
                Ok((Box::new(stream), Origin::Unix))
            }
        }
    }
}

/// An address that is ours: nobody else can listen there. Whoever connects is turned away at once
/// until a [`super::PrimaryChannel`] hears him: a standby tries the next side then.
#[derive(Debug)]
pub struct Listener {
    socket: ListenSocket,
    /// Turns away whoever connects, until the channel begins.
    doorman: Mutex<Option<Doorman>>,
    pub(super) tls: Option<Arc<ServerIdentity>>,
    local_address: LocalAddress,
}

impl Listener {
    /// Takes the address, and reads its certificates if it has any.
    ///
    /// # Errors
    /// [`TransportError::Exposed`] for an address that needs certificates and has none,
    /// [`TransportError::Listen`] if it is in use or not ours, [`TransportError::Tls`].
    pub fn bind(address: &PeerAddress) -> Result<Self, TransportError> {
        let listener = Self::reserve(address)?;
        let socket = listener.socket.try_clone();
        let listen_error = |source| TransportError::Listen { address: address.clone(), source };
        let doorman = Doorman::post(socket.map_err(listen_error)?)?;
        Ok(Self { doorman: Mutex::new(Some(doorman)), ..listener })
    }

    /// The same, but whoever connects waits until he is heard.
    ///
    /// # Errors
    /// As [`Self::bind`].
    pub fn reserve(address: &PeerAddress) -> Result<Self, TransportError> {
        let tls = address.tls_dir.as_deref().map(ServerIdentity::load).transpose()?;
        let listen_error = |source| TransportError::Listen { address: address.clone(), source };
        let (socket, local_address) = match address.resolve() {
            Ok(Resolved::Tcp(addresses)) => {
                let socket = TcpListener::bind(&addresses[..]).map_err(listen_error)?;
                let local = LocalAddress::Tcp(socket.local_addr().map_err(listen_error)?);
                (ListenSocket::Tcp(socket), local)
            }
            Ok(Resolved::Unix(path)) => {
                let socket = bind_private_socket(&path).map_err(listen_error)?;
                (ListenSocket::Unix(socket), LocalAddress::Unix(path))
            }
            Err(TransportError::Io(source)) => return Err(listen_error(source)),
            Err(other) => return Err(other),
        };
        socket.set_nonblocking().map_err(listen_error)?;
        Ok(Self { socket, doorman: Mutex::new(None), tls, local_address })
    }

    /// Where it is; the port is the one that was picked for port 0.
    pub const fn local_address(&self) -> &LocalAddress {
        &self.local_address
    }

    /// The socket, for a channel that hears whoever connects from now on.
    pub(super) fn socket(&self) -> io::Result<HeardSocket> {
        self.doorman.lock().take();
        self.socket.try_clone().map(HeardSocket)
    }
}

/// A socket on its way to the thread that hears it.
#[derive(Debug)]
pub(super) struct HeardSocket(ListenSocket);

impl HeardSocket {
    /// To be called on the channel's thread.
    pub(super) fn acceptor(self) -> Acceptor {
        Acceptor::new(self.0).expect("a listening socket, non-blocking")
    }
}

/// A thread that accepts and closes.
#[derive(Debug)]
struct Doorman {
    leave: Arc<Notify>,
    thread: Option<JoinHandle<()>>,
}

impl Doorman {
    fn post(socket: ListenSocket) -> Result<Self, TransportError> {
        let leave = Arc::new(Notify::new());
        let told = Arc::clone(&leave);
        let thread = spawn_thread("vmft-doorman", move || async move {
            let Ok(socket) = Acceptor::new(socket) else { return };
            loop {
                tokio::select! {
                    biased;
                    () = told.notified() => return,
                    // What was accepted is closed at once; after an error others may come.
                    accepted = socket.accept() => if accepted.is_err() {
                        clock::sleep_until(Some(clock::now().after(ACCEPT_PAUSE))).await;
                    },
                }
            }
        })?;
        Ok(Self { leave, thread: Some(thread) })
    }
}

impl Drop for Doorman {
    fn drop(&mut self) {
        self.leave.notify_one();
        join_thread(self.thread.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hosts_addresses_count_together() {
        let from = |text: &str| Origin::Tcp(text.parse().expect("an address")).neighbourhood();
        assert_eq!(from("192.0.2.1:1"), from("192.0.2.1:2"));
        assert_eq!(from("192.0.2.1:1"), from("[::ffff:192.0.2.1]:1"));
        assert_ne!(from("192.0.2.1:1"), from("192.0.2.2:1"));
        assert_eq!(from("[2001:db8::1]:1"), from("[2001:db8::2:3:4:5]:1"));
        assert_ne!(from("[2001:db8::1]:1"), from("[2001:db8:0:1::1]:1"));
    }
}
