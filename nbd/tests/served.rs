//! The client and the server, over sockets of this machine: what is asked is done, what is refused
//! is refused, and a server that goes and comes back is waited for.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use vmft_nbd::rustls::ClientConfig;
use vmft_nbd::rustls::pki_types::ServerName;
use vmft_nbd::server::{CallRefusal, Opened, Visitor, greet};
use vmft_nbd::wire::{EINVAL, EIO, ENOSPC, EPERM, MAX_DATA};
use vmft_nbd::{
    ByteStream, CallError, Client, ClientError, Connect, Control, Event, NegotiationError, Request,
};

const SIZE: usize = 1 << 20;
const LIMIT: Duration = Duration::from_secs(60);

/// What all connections share.
#[derive(Debug)]
struct Store {
    bytes: Mutex<Vec<u8>>,
    /// What was asked, in order.
    log: Mutex<Vec<String>>,
    /// The only binding that is taken.
    binding: Mutex<Vec<u8>>,
    /// The server's answer to it: which of its lives this is.
    life: Mutex<Vec<u8>>,
}

impl Store {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(vec![0; SIZE]),
            log: Mutex::default(),
            binding: Mutex::new(b"one".to_vec()),
            life: Mutex::new(b"first life".to_vec()),
        })
    }

    fn note(&self, what: impl Into<String>) {
        self.log.lock().unwrap().push(what.into());
    }

    fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

#[derive(Debug)]
struct Guest {
    store: Arc<Store>,
    bound: Mutex<Option<Vec<u8>>>,
}

impl Visitor for Guest {
    fn names(&self) -> Vec<String> {
        vec!["disk".to_owned()]
    }

    fn look(&self, name: &str) -> Option<Opened> {
        (name == "disk").then_some(Opened { size: SIZE as u64, read_only: false, block: 1 })
    }

    fn open(&self, name: &str) -> Option<Opened> {
        self.look(name)
    }

    fn call(&self, call: &[u8]) -> Result<Vec<u8>, CallRefusal> {
        self.store.note(format!("call {}", String::from_utf8_lossy(call)));
        if call == b"unknown" {
            return Err(CallRefusal::Unsupported);
        }
        if call == b"life" {
            return Ok(self.store.life.lock().unwrap().clone());
        }
        if call != *self.store.binding.lock().unwrap() {
            return Err(CallRefusal::Refused("\u{1b}[31mnot that".to_owned()));
        }
        *self.bound.lock().unwrap() = Some(call.to_vec());
        Ok(self.store.life.lock().unwrap().clone())
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), u32> {
        if offset == 4096 {
            return Err(EIO);
        }
        let start = offset as usize;
        data.copy_from_slice(&self.store.bytes.lock().unwrap()[start..start + data.len()]);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8], durable: bool) -> Result<(), u32> {
        if *self.bound.lock().unwrap() != Some(self.store.binding.lock().unwrap().clone()) {
            return Err(EPERM);
        }
        let start = offset as usize;
        self.store.bytes.lock().unwrap()[start..start + data.len()].copy_from_slice(data);
        self.store.note(format!("write {} at {offset}, durable {durable}", data.len()));
        Ok(())
    }

    fn flush(&self) -> Result<(), u32> {
        self.store.note("flush");
        Ok(())
    }

    fn trim(&self, _: u64, _: u32) -> Result<(), u32> {
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u32, _: bool, _: bool) -> Result<(), u32> {
        let start = offset as usize;
        self.store.bytes.lock().unwrap()[start..start + len as usize].fill(0);
        Ok(())
    }
}

/// A server on a thread of its own; its connections end with it.
struct Server {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(path: &Path, store: &Arc<Store>) -> Self {
        if path.exists() {
            std::fs::remove_file(path).unwrap();
        }
        let listener = UnixListener::bind(path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let store = Arc::clone(store);
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            tokio::task::LocalSet::new().block_on(&runtime.unwrap(), async move {
                let listener = tokio::net::UnixListener::from_std(listener).unwrap();
                let accept = async {
                    loop {
                        let (stream, _) = listener.accept().await.unwrap();
                        let store = Arc::clone(&store);
                        let guest = Arc::new(Guest { store, bound: Mutex::default() });
                        tokio::task::spawn_local(async move {
                            // How it ends is the client's to see.
                            if let Ok(Some(greeting)) = greet(Box::new(stream), None).await {
                                let _ = greeting.serve(guest).await;
                            }
                        });
                    }
                };
                tokio::select! {
                    _ = stopped => {}
                    () = accept => {}
                }
            });
        });
        Self { stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        self.thread.take().unwrap().join().unwrap();
    }
}

#[derive(Debug, Clone)]
struct At(PathBuf);

impl Connect for At {
    async fn connect(&self) -> io::Result<Box<dyn ByteStream>> {
        Ok(Box::new(UnixStream::connect(&self.0).await?))
    }

    fn tls(&self) -> io::Result<Option<(Arc<ClientConfig>, ServerName<'static>)>> {
        Ok(None)
    }
}

struct Stage {
    store: Arc<Store>,
    path: PathBuf,
    server: Option<Server>,
    events: Receiver<Event>,
    client: Client,
    _directory: tempfile::TempDir,
}

impl Stage {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let store = Store::new();
        let server = Some(Server::start(&path, &store));
        let (tell, events) = channel();
        let on_event = move |event| tell.send(event).unwrap_or_default();
        let client = Client::open(At(path.clone()), "disk", b"life".to_vec(), on_event).unwrap();
        Self { store, path, server, events, client, _directory: directory }
    }

    fn write(&self, binding: &[u8], offset: u64, data: &[u8]) -> Result<Vec<u8>, ClientError> {
        self.client.request(Some(binding), Request::Write { offset, data: data.into() })
    }

    fn read(&self, offset: u64, len: u32) -> Result<Vec<u8>, ClientError> {
        self.client.request(None, Request::Read { offset, len })
    }

    fn stop_server(&mut self) {
        self.server = None;
        let event = self.events.recv_timeout(LIMIT).unwrap();
        assert!(matches!(event, Event::Lost(_)), "{event:?}");
    }

    /// Asks while the server is away, which is started again then.
    fn ask_and_start_server(
        &mut self,
        binding: Option<&[u8]>,
        request: Request,
    ) -> Result<Vec<u8>, ClientError> {
        std::thread::scope(|scope| {
            let (client, (done, is_done)) = (&self.client, channel());
            scope.spawn(move || done.send(client.request(binding, request)).unwrap());
            self.server = Some(Server::start(&self.path, &self.store));
            is_done.recv_timeout(LIMIT).unwrap()
        })
    }

    /// Starts the server again, and waits until the client has found it.
    fn start_server(&mut self) {
        self.server = Some(Server::start(&self.path, &self.store));
        while !matches!(self.events.recv_timeout(LIMIT).unwrap(), Event::Back) {}
    }
}

#[test]
fn what_is_written_is_read_and_a_flush_is_one() {
    let stage = Stage::new();
    assert_eq!(stage.client.export().size, SIZE as u64);
    stage.write(b"one", 512, b"hello").unwrap();
    assert_eq!(stage.read(510, 8), Ok(b"\0\0hello\0".to_vec()));
    assert_eq!(stage.client.request(None, Request::Flush), Ok(vec![]));
    let all = stage.read(8192, SIZE as u32 - 8192).unwrap();
    assert!(all.iter().all(|byte| *byte == 0) && all.len() == SIZE - 8192);
    let log = stage.store.log();
    assert_eq!(log, ["call life", "call one", "write 5 at 512, durable false", "flush"]);
}

#[test]
fn errors_of_one_request_are_its_own() {
    let stage = Stage::new();
    assert_eq!(stage.read(4096, 1), Err(ClientError::Server(EIO)));
    assert_eq!(stage.read(SIZE as u64, 1), Err(ClientError::Server(EINVAL)));
    assert_eq!(stage.read(u64::MAX, 2), Err(ClientError::Server(EINVAL)));
    assert_eq!(stage.read(0, 0), Err(ClientError::Server(EINVAL)));
    assert_eq!(stage.read(0, MAX_DATA + 1), Err(ClientError::Server(EINVAL)));
    assert_eq!(stage.write(b"one", SIZE as u64, b"x"), Err(ClientError::Server(ENOSPC)));
    assert_eq!(stage.read(0, 1), Ok(vec![0]));
}

#[test]
fn a_connection_is_bound_anew_for_another_binding_and_one_that_is_over_is_refused() {
    let stage = Stage::new();
    stage.write(b"one", 0, b"1").unwrap();
    *stage.store.binding.lock().unwrap() = b"two".to_vec();
    // The server itself refuses what the old connection brings, and then the old binding.
    assert_eq!(stage.write(b"one", 0, b"x"), Err(ClientError::Server(EPERM)));
    stage.write(b"two", 1, b"2").unwrap();
    let refused = stage.write(b"one", 0, b"x").unwrap_err();
    let ClientError::Refused(why) = &refused else { panic!("{refused}") };
    assert!(why.contains("not that") && !why.contains('\u{1b}'), "{why}");
    stage.write(b"two", 2, b"3").unwrap();
    assert_eq!(stage.read(0, 3), Ok(b"123".to_vec()));
    assert!(stage.events.try_recv().is_err(), "nothing was lost");
}

#[test]
fn requests_wait_for_a_server_that_is_away_and_nothing_is_lost_by_it() {
    let mut stage = Stage::new();
    stage.write(b"one", 0, b"1").unwrap();
    stage.stop_server();
    let write = Request::Write { offset: 1, data: (*b"2").into() };
    assert_eq!(stage.ask_and_start_server(Some(b"one"), write), Ok(vec![]));
    assert!(matches!(stage.events.recv_timeout(LIMIT), Ok(Event::Back)));
    // The server says that it is the same as before: what it had completed is there.
    assert_eq!(stage.client.request(None, Request::Flush), Ok(vec![]));
    assert_eq!(stage.read(0, 2), Ok(b"12".to_vec()));
}

#[test]
fn a_flush_fails_once_after_a_server_has_lost_its_memory() {
    let mut stage = Stage::new();
    stage.write(b"one", 0, b"1").unwrap();
    stage.stop_server();
    *stage.store.life.lock().unwrap() = b"second life".to_vec();
    stage.start_server();
    assert_eq!(stage.client.request(None, Request::Flush), Err(ClientError::Lost));
    assert_eq!(stage.client.request(None, Request::Flush), Ok(vec![]));
    // With nothing unflushed there is nothing to lose.
    stage.stop_server();
    *stage.store.life.lock().unwrap() = b"third life".to_vec();
    stage.start_server();
    assert_eq!(stage.client.request(None, Request::Flush), Ok(vec![]));
}

#[test]
fn a_read_outlives_the_binding_of_its_connection() {
    let mut stage = Stage::new();
    stage.write(b"one", 0, b"1").unwrap();
    stage.stop_server();
    // Somebody else has it now, and this client has not heard of that when it connects again.
    *stage.store.binding.lock().unwrap() = b"two".to_vec();
    let read = Request::Read { offset: 0, len: 1 };
    assert_eq!(stage.ask_and_start_server(None, read), Ok(b"1".to_vec()));
    assert_eq!(stage.client.request(None, Request::Flush), Ok(vec![]), "of the same life");
    assert!(matches!(stage.write(b"one", 0, b"x"), Err(ClientError::Refused(_))));
    stage.write(b"two", 0, b"2").unwrap();
}

#[test]
fn what_cannot_be_used_is_refused_at_the_start() {
    let stage = Stage::new();
    let open = |path: &Path, name: &str| {
        let opened = Client::open(At(path.to_owned()), name, b"life".to_vec(), |_| {});
        opened.map(|client| client.export()).unwrap_err()
    };
    assert!(matches!(open(&stage.path, "other"), NegotiationError::Unknown));
    assert!(matches!(open(Path::new("/nowhere"), "disk"), NegotiationError::Io(_)));
    // Something else that listens.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("http");
    let listener = UnixListener::bind(&path).unwrap();
    let answer = std::thread::spawn(move || {
        use std::io::Write;
        listener.accept().unwrap().0.write_all(&[b'H'; 64]).unwrap();
    });
    assert!(matches!(open(&path, "disk"), NegotiationError::Wire(_)));
    answer.join().unwrap();
}

#[test]
fn calls_are_answered_in_order_and_standing_ones_said_again() {
    let mut stage = Stage::new();
    let control = Control::start(At(stage.path.clone()), LIMIT).unwrap();
    assert_eq!(control.call(b"one".to_vec()).unwrap(), b"first life");
    control.stand(b"one".to_vec());
    control.stand(b"one".to_vec());
    let unknown = control.call(b"unknown".to_vec());
    let unsupported =
        |error: &CallError| matches!(error, CallError::Negotiation(NegotiationError::Unsupported));
    assert!(unsupported(&unknown.unwrap_err()));
    let refused = control.call(b"other".to_vec()).unwrap_err();
    assert!(matches!(refused, CallError::Negotiation(NegotiationError::Refused(_))), "{refused}");
    stage.store.log();
    control.call(b"one".to_vec()).unwrap();
    assert_eq!(stage.store.log(), ["call one", "call one"], "on a new connection");
    stage.server = None;
    let away = control.call(b"one".to_vec()).unwrap_err();
    assert!(matches!(away, CallError::Unreachable(_)), "{away}");
    stage.start_server();
    assert_eq!(control.call(b"one".to_vec()).unwrap(), b"first life");
}
