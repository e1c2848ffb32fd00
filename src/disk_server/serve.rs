//! The server itself: a thread that accepts, and a task for each connection.

use super::ServedDisk;
use super::visitor::Connection;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::{LocalSet, spawn_local};
use vmft_backup::tell;
use vmft_logging_channel::transport::streams::{Lobby, ServerIdentity, StreamAcceptor};
use vmft_logging_channel::transport::{Listener, Origin};
use vmft_nbd::rustls::ServerConfig;
use vmft_nbd::server::{ServerTls, greet};
use vmft_vmm::world::{Repeats, Storage};

/// Most connections at a time that were let in; a side of a pair has four.
const MAX_CONNECTIONS: usize = 256;
/// How long not to accept after an error of the socket: out of descriptors, for instance.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Most requests at the storage at a time, of all connections.
const MAX_THREADS: usize = 64;

/// What is served, and where.
#[derive(Debug)]
pub struct Service {
    /// The exports.
    pub disks: Vec<ServedDisk>,
    /// Where clients come.
    pub listener: Listener,
}

#[derive(Debug)]
struct Identity(Arc<ServerIdentity>);

impl ServerTls for Identity {
    fn config(&self) -> io::Result<Arc<ServerConfig>> {
        self.0.config().map_err(io::Error::other)
    }
}

/// Serves until `stop` ends; then everything that was written is made durable.
///
/// # Errors
/// The host has no threads or sockets left, or an image cannot be made durable.
pub fn serve(service: Service, stop: impl Future<Output = ()>) -> io::Result<()> {
    let Service { disks, listener } = service;
    let disks: Arc<[Arc<ServedDisk>]> = disks.into_iter().map(Arc::new).collect();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_THREADS)
        .build()?;
    let served = Arc::clone(&disks);
    LocalSet::new().block_on(&runtime, async move {
        let acceptor = listener.accept_streams()?;
        tokio::select! {
            biased;
            () = stop => Ok::<(), io::Error>(()),
            () = accept_all(acceptor, served) => Ok(()),
        }
    })?;
    // What has begun at the storage is done.
    drop(runtime);
    for disk in disks.iter().filter(|disk| !disk.config.read_only) {
        disk.image.flush()?;
    }
    Ok(())
}

async fn accept_all(acceptor: StreamAcceptor, disks: Arc<[Arc<ServedDisk>]>) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let troubles = Arc::new(Repeats::new());
    let lobby = Rc::new(Lobby::default());
    let tls = acceptor.identity().map(Identity).map(Arc::new);
    loop {
        let (stream, origin) = match acceptor.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                say(&troubles, "accepting a connection", &error);
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let visit = lobby.enter(origin);
        let (disks, tls, troubles) = (Arc::clone(&disks), tls.clone(), Arc::clone(&troubles));
        let room = Arc::clone(&room);
        spawn_local(async move {
            let tls = tls.as_deref().map(|tls| tls as &dyn ServerTls);
            let served = async {
                let greeted = tokio::select! {
                    biased;
                    () = visit.sent_away() => return Ok(()),
                    greeted = greet(Box::new(stream), tls) => greeted?,
                };
                let Some(greeting) = greeted else { return Ok(()) };
                drop(visit);
                let full = |_| io::Error::other("there are too many connections");
                let _place = room.try_acquire().map_err(full)?;
                greeting.serve(Arc::new(Connection::new(disks))).await
            };
            if let Err(error) = served.await
                && !is_end(&error)
            {
                let of = match origin {
                    Origin::Tcp(address) => format!("the connection of {}", address.ip()),
                    Origin::Unix => "a connection of this host".to_owned(),
                };
                say(&troubles, &of, &error);
            }
        });
    }
}

/// A client that dies, or whose host does, says no more than that it is gone.
fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

/// Says it once, and then counts.
fn say(troubles: &Repeats, what: &str, error: &io::Error) {
    if let Some(times) = troubles.note(&format!("{what}: {error}")) {
        tell!("{what}: {error}{times}");
    }
}
