//! The place where a backup may join, taken before anything depends on it.

use super::{PeerAddress, TransportError, clock, join_thread, spawn_thread, tls};
use rustls::ServerConfig;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::Notify;

/// How long not to accept after an error of the socket.
const PAUSE: Duration = Duration::from_millis(50);

/// An address that is ours: nobody else can listen there. Whoever connects is turned away at once
/// until a [`super::PrimaryChannel`] hears him: a standby tries the next side then.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    /// Turns away whoever connects, until the channel begins.
    doorman: Mutex<Option<Doorman>>,
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
        let doorman = Doorman::post(socket.try_clone().map_err(listen_error)?)?;
        Ok(Self { socket, doorman: Mutex::new(Some(doorman)), tls, local_address })
    }

    /// Where it is; the port is the one that was picked for port 0.
    pub const fn local_address(&self) -> SocketAddr {
        self.local_address
    }

    /// The socket, for a channel that hears whoever connects from now on.
    pub(super) fn socket(&self) -> std::io::Result<TcpListener> {
        self.doorman.lock().expect("no holder of this lock panics").take();
        self.socket.try_clone()
    }
}

/// A thread that accepts and closes.
#[derive(Debug)]
struct Doorman {
    leave: Arc<Notify>,
    thread: Option<JoinHandle<()>>,
}

impl Doorman {
    fn post(socket: TcpListener) -> Result<Self, TransportError> {
        let leave = Arc::new(Notify::new());
        let told = Arc::clone(&leave);
        let thread = spawn_thread("vmft-doorman", move || async move {
            let Ok(socket) = tokio::net::TcpListener::from_std(socket) else { return };
            loop {
                tokio::select! {
                    biased;
                    () = told.notified() => return,
                    // What was accepted is closed at once; after an error others may come.
                    accepted = socket.accept() => if accepted.is_err() {
                        clock::sleep_until(Some(clock::now().after(PAUSE))).await;
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
