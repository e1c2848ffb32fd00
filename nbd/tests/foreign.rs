//! Whatever a client or a server sends, the other end says what is wrong with it, and takes no more
//! memory than the protocol allows.

use std::io::{self, Cursor};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::JoinError;
use vmft_fuzzing::{Random, cases, damage};
use vmft_nbd::rustls::ClientConfig;
use vmft_nbd::rustls::pki_types::ServerName;
use vmft_nbd::server::{CallRefusal, Opened, Visitor, greet};
use vmft_nbd::wire::*;
use vmft_nbd::{ByteStream, Client, ClientError, Connect, Request};

/// Cases of a quick run.
const CASES: u64 = 10_000;
const SIZE: u64 = 1 << 16;

/// The other end says something, and something more once it has heard of a request; it hears
/// everything, and goes.
#[derive(Debug)]
struct Said {
    first: Cursor<Vec<u8>>,
    then: Cursor<Vec<u8>>,
    is_asked: bool,
    reader: Option<Waker>,
}

impl AsyncRead for Said {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.first.position() < self.first.get_ref().len() as u64 {
            return Pin::new(&mut self.first).poll_read(context, buffer);
        }
        if self.is_asked || self.then.get_ref().is_empty() {
            return Pin::new(&mut self.then).poll_read(context, buffer);
        }
        self.reader = Some(context.waker().clone());
        Poll::Pending
    }
}

impl AsyncWrite for Said {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if bytes.starts_with(&REQUEST_MAGIC.to_be_bytes()) {
            self.is_asked = true;
            self.reader.take().into_iter().for_each(Waker::wake);
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fn said(first: Vec<u8>, then: Vec<u8>) -> Box<dyn ByteStream> {
    let (first, then) = (Cursor::new(first), Cursor::new(then));
    Box::new(Said { first, then, is_asked: false, reader: None })
}

/// An export that notes requests which are not within its size.
#[derive(Debug, Default)]
struct Bounded(AtomicBool);

impl Bounded {
    fn within(&self, offset: u64, len: usize) {
        let is_within = len > 0 && offset.checked_add(len as u64).is_some_and(|end| end <= SIZE);
        self.0.fetch_or(!is_within, Ordering::Relaxed);
    }
}

impl Visitor for Bounded {
    fn names(&self) -> Vec<String> {
        vec!["disk".to_owned(), "other".to_owned()]
    }

    fn look(&self, name: &str) -> Option<Opened> {
        (name == "disk").then_some(Opened { size: SIZE, read_only: false, block: 512 })
    }

    fn open(&self, name: &str) -> Option<Opened> {
        self.look(name)
    }

    fn call(&self, call: &[u8]) -> Result<Vec<u8>, CallRefusal> {
        Ok(call.to_vec())
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), u32> {
        self.within(offset, data.len());
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8], _: bool) -> Result<(), u32> {
        self.within(offset, data.len());
        Ok(())
    }

    fn flush(&self) -> Result<(), u32> {
        Ok(())
    }

    fn trim(&self, offset: u64, len: u32) -> Result<(), u32> {
        self.within(offset, len as usize);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u32, _: bool, _: bool) -> Result<(), u32> {
        self.within(offset, len as usize);
        Ok(())
    }
}

/// What a good client says, piece by piece.
fn client_pieces() -> Vec<Vec<u8>> {
    let mut named = (4u32).to_be_bytes().to_vec();
    named.extend(b"disk");
    let request = |command, offset, len| {
        RequestHead { flags: 0, command, cookie: u64::from(command), offset, len }.encode().to_vec()
    };
    let mut write = request(COMMAND_WRITE, 512, 1024);
    write.extend([7; 1024]);
    vec![
        u32::from(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes().to_vec(),
        OptionHead::encode(OPTION_LIST, &[]),
        OptionHead::encode(OPTION_STRUCTURED_REPLY, &[]),
        OptionHead::encode(OPTION_VMFT, b"a call"),
        OptionHead::encode(OPTION_INFO, &encode_go("other")),
        OptionHead::encode(OPTION_GO, &encode_go("disk")),
        write,
        request(COMMAND_READ, 0, 4096),
        request(COMMAND_FLUSH, 0, 0),
        request(COMMAND_TRIM, 4096, 4096),
        request(COMMAND_WRITE_ZEROES, 8192, 512),
        request(COMMAND_DISCONNECT, 0, 0),
    ]
}

#[test]
fn a_server_outlives_whatever_its_client_sends() {
    let pieces = client_pieces();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let talk = |bytes: Vec<u8>| {
        let visitor = Arc::new(Bounded::default());
        let served = async {
            match greet(said(bytes, Vec::new()), None).await? {
                Some(greeting) => greeting.serve(Arc::clone(&visitor)).await,
                None => Ok(()),
            }
        };
        let ended = tokio::task::LocalSet::new().block_on(&runtime, served);
        assert!(!visitor.0.load(Ordering::Relaxed), "a request beyond the export");
        if let Err(error) = &ended {
            let has_panicked = error.get_ref().is_some_and(|error| error.is::<JoinError>());
            assert!(!has_panicked, "{error}");
        }
        ended
    };
    talk(pieces.concat()).expect("a good client");
    cases(CASES, |mut random| {
        let mut bytes = some(&mut random, &pieces);
        damage(&mut random, &mut bytes, &pieces);
        // An error ends the connection, and is told to nobody but the operator.
        drop(talk(bytes));
    });
}

/// Most of the pieces, in order.
fn some(random: &mut Random, pieces: &[Vec<u8>]) -> Vec<u8> {
    pieces.iter().filter(|_| random.below(8) > 0).flatten().copied().collect()
}

/// Pieces of what a good server says before the first request.
fn server_pieces(structured: bool) -> Vec<Vec<u8>> {
    let mut hello = MAGIC.to_be_bytes().to_vec();
    hello.extend(OPTION_MAGIC.to_be_bytes());
    hello.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    let info = |info: Info| OptionReplyHead::encode(OPTION_GO, REPLY_INFO, &info.encode());
    vec![
        hello,
        OptionReplyHead::encode(
            OPTION_STRUCTURED_REPLY,
            if structured { REPLY_ACK } else { ERROR_UNSUPPORTED },
            &[],
        ),
        OptionReplyHead::encode(OPTION_VMFT, REPLY_VMFT, b"a life"),
        info(Info::Export { size: SIZE, flags: HAS_FLAGS | SEND_FLUSH }),
        info(Info::BlockSize { minimum: 1, preferred: 4096, maximum: MAX_DATA }),
        OptionReplyHead::encode(OPTION_GO, REPLY_ACK, &[]),
    ]
}

/// What it says to a client that reads 4096 bytes from the beginning.
fn reply_pieces(structured: bool) -> Vec<Vec<u8>> {
    let head = if structured { encode_data_chunk(1, 0, 4096) } else { encode_simple_reply(0, 1) };
    vec![head, vec![5; 4096]]
}

/// A server that has said this the first time, and refuses the client later.
#[derive(Debug)]
struct Scripted {
    first: Vec<u8>,
    then: Vec<u8>,
    connections: AtomicUsize,
}

impl Connect for Scripted {
    async fn connect(&self) -> io::Result<Box<dyn ByteStream>> {
        if self.connections.fetch_add(1, Ordering::Relaxed) == 0 {
            return Ok(said(self.first.clone(), self.then.clone()));
        }
        let refused = OptionReplyHead::encode(OPTION_VMFT, ERROR_POLICY, b"no more");
        let pieces = server_pieces(true);
        let first = [&pieces[0], &pieces[1], &refused].map(Vec::as_slice).concat();
        Ok(said(first, Vec::new()))
    }

    fn tls(&self) -> io::Result<Option<(Arc<ClientConfig>, ServerName<'static>)>> {
        Ok(None)
    }
}

fn read(first: Vec<u8>, then: Vec<u8>) -> Option<Vec<u8>> {
    let scripted = Scripted { first, then, connections: AtomicUsize::new(0) };
    let client = match Client::open(scripted, "disk", b"life".to_vec(), |_| {}) {
        Ok(client) => client,
        Err(error) => {
            assert!(!error.to_string().contains("thread is gone"), "it has panicked");
            return None;
        }
    };
    let read = client.request(None, Request::Read { offset: 0, len: 4096 });
    assert_ne!(read, Err(ClientError::Closed), "its thread has panicked");
    read.ok()
}

#[test]
fn a_client_outlives_whatever_its_server_sends() {
    for structured in [true, false] {
        let (first, then) = (server_pieces(structured).concat(), reply_pieces(structured).concat());
        assert!(read(first, then) == Some(vec![5; 4096]), "a good server");
    }
    cases(CASES / 2, |mut random| {
        let structured = random.below(2) == 0;
        let (first, then) = (server_pieces(structured), reply_pieces(structured));
        let (mut begin, mut end) = (first.concat(), then.concat());
        if random.below(4) == 0 {
            begin = some(&mut random, &first);
            damage(&mut random, &mut begin, &first);
            // It goes then, and does not let the client wait for the rest of what it began with.
            begin.append(&mut end);
        } else if random.below(4) == 0 {
            damage(&mut random, &mut end, &then);
        } else {
            // Few bytes of a reply are not data.
            let mut head = then[0].clone();
            damage(&mut random, &mut head, &then);
            end = [head, then[1].clone()].concat();
        }
        if let Some(data) = read(begin, end) {
            assert_eq!(data.len(), 4096);
        }
    });
}
