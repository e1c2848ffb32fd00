//! The server's side of one connection.
//!
//! Options are settled one after the other; requests are done side by side, each on a thread of its
//! own, and answered as they end, which the protocol allows: what must not overtake another is the
//! client's to keep apart.

use crate::connection::{ByteStream, Stream};
use crate::wire::{
    CAN_MULTI_CONN, COMMAND_DISCONNECT, COMMAND_FLUSH, COMMAND_READ, COMMAND_TRIM, COMMAND_WRITE,
    COMMAND_WRITE_ZEROES, EINVAL, ENOSPC, ENOTSUP, EPERM, ERROR_INVALID, ERROR_POLICY,
    ERROR_TLS_REQUIRED, ERROR_UNKNOWN, ERROR_UNSUPPORTED, FIXED_NEWSTYLE, FLAG_DF, FLAG_FUA,
    FLAG_NO_HOLE, HAS_FLAGS, Info, MAGIC, MAX_DATA, MAX_NAME, NO_ZEROES, OPTION_ABORT,
    OPTION_EXPORT_NAME, OPTION_GO, OPTION_HEAD, OPTION_INFO, OPTION_LIST, OPTION_MAGIC,
    OPTION_STARTTLS, OPTION_STRUCTURED_REPLY, OPTION_VMFT, OptionHead, OptionReplyHead, READ_ONLY,
    REPLY_ACK, REPLY_INFO, REPLY_SERVER, REPLY_VMFT, REQUEST_HEAD, RequestHead, SEND_FLUSH,
    SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES, WireError, encode_data_chunk, encode_error_chunk,
    encode_simple_reply, parse_go,
};
use rustls::ServerConfig;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader, BufWriter, ReadHalf, WriteHalf};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{spawn_blocking, spawn_local};
use tokio_rustls::TlsAcceptor;

/// How long a client may take for its first option, and for TLS.
const GREETING_LIMIT: Duration = Duration::from_secs(10);
/// Requests under way on one connection, and their KiB of data in all.
const MAX_UNDER_WAY: usize = 64;
const MAX_KIB_UNDER_WAY: usize = 64 << 10;
/// Bytes read at a time.
const READ_BYTES: usize = 256 << 10;
/// Blocks are best of this size.
const PREFERRED_BLOCK: u32 = 4096;

/// An export as one connection has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    /// Bytes.
    pub size: u64,
    /// This connection cannot write to it.
    pub read_only: bool,
    /// The smallest block, in bytes, that is written without being read first: a client that writes
    /// parts of one keeps them apart.
    pub block: u32,
}

/// Why a call of this project's own is not answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallRefusal {
    /// Nobody knows such calls here.
    Unsupported,
    /// It will not be done, for this reason.
    Refused(String),
}

/// What one connection may do. Everything here may block; requests come from several threads at
/// once. Errors are numbers of the protocol ([`crate::wire::EIO`] and its like).
pub trait Visitor: fmt::Debug + Send + Sync + 'static {
    /// The names of all exports.
    fn names(&self) -> Vec<String>;

    /// Tells about an export. `None` if there is none of that name.
    fn look(&self, name: &str) -> Option<Opened>;

    /// Chooses an export, which the requests that follow are about. `None` if there is none of that name.
    fn open(&self, name: &str) -> Option<Opened>;

    /// Answers a call.
    ///
    /// # Errors
    /// [`CallRefusal`]
    fn call(&self, call: &[u8]) -> Result<Vec<u8>, CallRefusal>;

    /// Fills `data` from `offset` on.
    ///
    /// # Errors
    /// What the client is told.
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), u32>;

    /// Writes `data` at `offset`; `durable` before it returns.
    ///
    /// # Errors
    /// What the client is told.
    fn write(&self, offset: u64, data: &[u8], durable: bool) -> Result<(), u32>;

    /// Makes durable what any connection has been told is written.
    ///
    /// # Errors
    /// What the client is told.
    fn flush(&self) -> Result<(), u32>;

    /// Gives the room back where the storage can.
    ///
    /// # Errors
    /// What the client is told.
    fn trim(&self, offset: u64, len: u32) -> Result<(), u32>;

    /// Writes zeroes; `durable` before it returns; with `keep` the room stays allocated.
    ///
    /// # Errors
    /// What the client is told.
    fn write_zeroes(&self, offset: u64, len: u32, durable: bool, keep: bool) -> Result<(), u32>;
}

/// Who the server is, for clients with TLS. Asked at each connection.
pub trait ServerTls: fmt::Debug {
    /// The configuration of now.
    ///
    /// # Errors
    /// What keeps TLS from being set up.
    fn config(&self) -> io::Result<Arc<ServerConfig>>;
}

/// Lets a client in: with `tls`, it is told nothing before it has proved who it is. `None` if it
/// goes by itself. To be run in a `LocalSet`, as what follows.
///
/// # Errors
/// What ended the connection, if it was not the client's word.
pub async fn greet(
    stream: Box<dyn ByteStream>,
    tls: Option<&dyn ServerTls>,
) -> io::Result<Option<Greeting>> {
    let greet = async {
        let mut greeting = Greeting::begin(stream).await?;
        if let Some(tls) = tls
            && !greeting.start_tls(tls).await?
        {
            return Ok(None);
        }
        let Some(first) = greeting.option().await? else { return Ok(None) };
        greeting.first = Some(first);
        Ok(Some(greeting))
    };
    match tokio::time::timeout(GREETING_LIMIT, greet).await {
        Ok(greeting) => greeting,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// A client that was let in, and whose options are being settled.
pub struct Greeting {
    stream: Stream,
    pads: bool,
    has_structured_replies: bool,
    /// An option that has come and was not answered yet.
    first: Option<(u32, Vec<u8>)>,
}

impl fmt::Debug for Greeting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Greeting").field("pads", &self.pads).finish_non_exhaustive()
    }
}

fn invalid(error: WireError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl Greeting {
    async fn begin(mut stream: Stream) -> io::Result<Self> {
        let mut hello = MAGIC.to_be_bytes().to_vec();
        hello.extend(OPTION_MAGIC.to_be_bytes());
        hello.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
        stream.write_all(&hello).await?;
        stream.flush().await?;
        let flags = stream.read_u32().await?;
        if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return Err(invalid(WireError::Magic("the flags of a client")));
        }
        let pads = flags & u32::from(NO_ZEROES) == 0;
        Ok(Self { stream, pads, has_structured_replies: false, first: None })
    }

    /// Serves the client until it goes.
    ///
    /// # Errors
    /// What ended the connection, if it was not the client's word.
    pub async fn serve<V: Visitor>(mut self, visitor: Arc<V>) -> io::Result<()> {
        match self.settle(&visitor).await? {
            Some(opened) => transmit(self, opened, visitor).await,
            None => Ok(()),
        }
    }

    /// The next option; `None` if the client goes.
    async fn option(&mut self) -> io::Result<Option<(u32, Vec<u8>)>> {
        if let Some(first) = self.first.take() {
            return Ok(Some(first));
        }
        let mut head = [0; OPTION_HEAD];
        match self.stream.read_exact(&mut head).await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        };
        let head = OptionHead::parse(&head).map_err(invalid)?;
        let mut data = vec![0; head.len as usize];
        self.stream.read_exact(&mut data).await?;
        Ok(Some((head.option, data)))
    }

    async fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        self.stream.write_all(&OptionReplyHead::encode(option, kind, data)).await?;
        self.stream.flush().await
    }

    /// Waits for the client to begin TLS. False if it goes.
    async fn start_tls(&mut self, tls: &dyn ServerTls) -> io::Result<bool> {
        loop {
            let Some(option) = self.option().await? else { return Ok(false) };
            match option {
                (OPTION_STARTTLS, data) if data.is_empty() => break,
                (OPTION_ABORT, _) => {
                    self.reply(OPTION_ABORT, REPLY_ACK, &[]).await?;
                    return Ok(false);
                }
                // There is no way to refuse but to go.
                (OPTION_EXPORT_NAME, _) => return Ok(false),
                (option, _) => self.reply(option, ERROR_TLS_REQUIRED, &[]).await?,
            }
        }
        let config = tls.config()?;
        self.reply(OPTION_STARTTLS, REPLY_ACK, &[]).await?;
        let none = Box::new(tokio::io::empty());
        let stream = std::mem::replace(&mut self.stream, none);
        self.stream = Box::new(TlsAcceptor::from(config).accept(stream).await?);
        Ok(true)
    }

    /// Answers options until the client chooses an export. `None` if it goes.
    async fn settle<V: Visitor>(&mut self, visitor: &Arc<V>) -> io::Result<Option<Opened>> {
        loop {
            let Some((option, data)) = self.option().await? else { return Ok(None) };
            match option {
                OPTION_EXPORT_NAME => {
                    let name = String::from_utf8(data).ok().filter(|name| name.len() <= MAX_NAME);
                    let opened = find(visitor, name, V::open).await?;
                    let Some(opened) = opened else { return Ok(None) };
                    let mut told = opened.size.to_be_bytes().to_vec();
                    told.extend(flags(opened).to_be_bytes());
                    if self.pads {
                        told.extend([0; 124]);
                    }
                    self.stream.write_all(&told).await?;
                    self.stream.flush().await?;
                    return Ok(Some(opened));
                }
                OPTION_ABORT => {
                    self.reply(option, REPLY_ACK, &[]).await?;
                    return Ok(None);
                }
                OPTION_LIST if data.is_empty() => self.list(visitor).await?,
                OPTION_INFO | OPTION_GO => match parse_go(&data) {
                    Ok(name) => {
                        let name = name.to_owned();
                        if let Some(opened) = self.tell(option, name, visitor).await?
                            && option == OPTION_GO
                        {
                            return Ok(Some(opened));
                        }
                    }
                    Err(_) => self.reply(option, ERROR_INVALID, &[]).await?,
                },
                OPTION_STRUCTURED_REPLY if data.is_empty() => {
                    self.has_structured_replies = true;
                    self.reply(option, REPLY_ACK, &[]).await?;
                }
                OPTION_VMFT => {
                    let visitor = Arc::clone(visitor);
                    match spawn_blocking(move || visitor.call(&data)).await? {
                        Ok(answer) => self.reply(option, REPLY_VMFT, &answer).await?,
                        Err(CallRefusal::Refused(why)) => {
                            self.reply(option, ERROR_POLICY, why.as_bytes()).await?;
                        }
                        Err(CallRefusal::Unsupported) => {
                            self.reply(option, ERROR_UNSUPPORTED, &[]).await?;
                        }
                    }
                }
                OPTION_LIST | OPTION_STRUCTURED_REPLY | OPTION_STARTTLS => {
                    self.reply(option, ERROR_INVALID, &[]).await?;
                }
                _ => self.reply(option, ERROR_UNSUPPORTED, &[]).await?,
            }
        }
    }

    async fn list<V: Visitor>(&mut self, visitor: &Arc<V>) -> io::Result<()> {
        let names = Arc::clone(visitor);
        for name in spawn_blocking(move || names.names()).await? {
            let len = u32::try_from(name.len()).expect("names are short");
            let mut data = len.to_be_bytes().to_vec();
            data.extend(name.as_bytes());
            self.reply(OPTION_LIST, REPLY_SERVER, &data).await?;
        }
        self.reply(OPTION_LIST, REPLY_ACK, &[]).await
    }

    async fn tell<V: Visitor>(
        &mut self,
        option: u32,
        name: String,
        visitor: &Arc<V>,
    ) -> io::Result<Option<Opened>> {
        let how = if option == OPTION_GO { V::open } else { V::look };
        let Some(opened) = find(visitor, Some(name), how).await? else {
            self.reply(option, ERROR_UNKNOWN, &[]).await?;
            return Ok(None);
        };
        let infos = [
            Info::Export { size: opened.size, flags: flags(opened) },
            Info::BlockSize {
                minimum: opened.block,
                preferred: opened.block.max(PREFERRED_BLOCK),
                maximum: MAX_DATA,
            },
        ];
        for info in infos {
            self.reply(option, REPLY_INFO, &info.encode()).await?;
        }
        self.reply(option, REPLY_ACK, &[]).await?;
        Ok(Some(opened))
    }
}

async fn find<V: Visitor>(
    visitor: &Arc<V>,
    name: Option<String>,
    how: fn(&V, &str) -> Option<Opened>,
) -> io::Result<Option<Opened>> {
    let Some(name) = name else { return Ok(None) };
    let visitor = Arc::clone(visitor);
    Ok(spawn_blocking(move || how(&visitor, &name)).await?)
}

fn flags(opened: Opened) -> u16 {
    let all = HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN;
    all | if opened.read_only { READ_ONLY } else { SEND_TRIM | SEND_WRITE_ZEROES }
}

/// A reply ready to be sent: what comes before the data, and the data.
type Reply = (Vec<u8>, Vec<u8>);

async fn transmit<V: Visitor>(
    greeting: Greeting,
    opened: Opened,
    visitor: Arc<V>,
) -> io::Result<()> {
    let Greeting { stream, has_structured_replies, .. } = greeting;
    let (reader, writer) = tokio::io::split(stream);
    let (replies, waiting) = mpsc::channel(MAX_UNDER_WAY);
    let sending = spawn_local(send_replies(writer, waiting));
    let receive = Receive {
        reader: BufReader::with_capacity(READ_BYTES, reader),
        replies,
        opened,
        has_structured_replies,
        visitor,
        room: Arc::new(Semaphore::new(MAX_UNDER_WAY)),
        data_room: Arc::new(Semaphore::new(MAX_KIB_UNDER_WAY)),
    };
    let received = receive.run().await;
    // It ends when the last request is done.
    let sent = sending.await?;
    received.and(sent)
}

async fn send_replies(
    writer: WriteHalf<Stream>,
    mut replies: mpsc::Receiver<Reply>,
) -> io::Result<()> {
    let mut writer = BufWriter::with_capacity(READ_BYTES, writer);
    while let Some((head, data)) = replies.recv().await {
        writer.write_all(&head).await?;
        writer.write_all(&data).await?;
        if replies.is_empty() {
            writer.flush().await?;
        }
    }
    writer.shutdown().await
}

struct Receive<V> {
    reader: BufReader<ReadHalf<Stream>>,
    replies: mpsc::Sender<Reply>,
    opened: Opened,
    has_structured_replies: bool,
    visitor: Arc<V>,
    room: Arc<Semaphore>,
    data_room: Arc<Semaphore>,
}

impl<V: Visitor> Receive<V> {
    async fn run(mut self) -> io::Result<()> {
        let closed = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        loop {
            let mut head = [0; REQUEST_HEAD];
            match self.reader.read_exact(&mut head).await {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                other => other?,
            };
            let head = RequestHead::parse(&head).map_err(invalid)?;
            if head.command == COMMAND_DISCONNECT {
                return Ok(());
            }
            let refused = refuse(&head, self.opened);
            let carries = [COMMAND_READ, COMMAND_WRITE].contains(&head.command);
            let kib = if carries && head.len <= MAX_DATA { head.len.div_ceil(1024) } else { 0 };
            let place = Arc::clone(&self.room).acquire_owned().await.expect("never closed");
            let data_place =
                Arc::clone(&self.data_room).acquire_many_owned(kib).await.expect("never closed");
            let mut data = Vec::new();
            if head.command == COMMAND_WRITE {
                data.resize(head.len as usize, 0);
                self.reader.read_exact(&mut data).await?;
            }
            let (replies, structured) = (self.replies.clone(), self.has_structured_replies);
            if let Some(error) = refused {
                replies.send(reply(&head, structured, Err(error))).await.map_err(closed)?;
                continue;
            }
            let visitor = Arc::clone(&self.visitor);
            spawn_blocking(move || {
                let done = execute(&*visitor, &head, data);
                // Whoever asked may have gone.
                let _ = replies.blocking_send(reply(&head, structured, done));
                drop((place, data_place));
            });
        }
    }
}

/// What makes a request one that is not even tried.
fn refuse(head: &RequestHead, opened: Opened) -> Option<u32> {
    let (allowed, writes) = match head.command {
        COMMAND_READ => (FLAG_FUA | FLAG_DF, false),
        COMMAND_FLUSH => (FLAG_FUA, false),
        COMMAND_WRITE | COMMAND_TRIM => (FLAG_FUA, true),
        COMMAND_WRITE_ZEROES => (FLAG_FUA | FLAG_NO_HOLE, true),
        _ => return Some(ENOTSUP),
    };
    if head.flags & !allowed != 0 {
        return Some(EINVAL);
    }
    if writes && opened.read_only {
        return Some(EPERM);
    }
    if head.command == COMMAND_FLUSH {
        return (head.offset != 0 || head.len != 0).then_some(EINVAL);
    }
    if head.command == COMMAND_READ && head.len > MAX_DATA {
        return Some(EINVAL);
    }
    let is_within = head.offset.checked_add(head.len.into()).is_some_and(|end| end <= opened.size);
    match (is_within, writes) {
        (true, _) => (head.len == 0).then_some(EINVAL),
        (false, true) => Some(ENOSPC),
        (false, false) => Some(EINVAL),
    }
}

fn execute(visitor: &impl Visitor, head: &RequestHead, data: Vec<u8>) -> Result<Vec<u8>, u32> {
    let durable = head.flags & FLAG_FUA != 0;
    let done = |done: Result<(), u32>| done.map(|()| Vec::new());
    match head.command {
        COMMAND_READ => {
            let mut data = vec![0; head.len as usize];
            visitor.read(head.offset, &mut data).map(|()| data)
        }
        COMMAND_WRITE => done(visitor.write(head.offset, &data, durable)),
        COMMAND_FLUSH => done(visitor.flush()),
        COMMAND_TRIM => done(visitor.trim(head.offset, head.len)),
        COMMAND_WRITE_ZEROES => {
            let keep = head.flags & FLAG_NO_HOLE != 0;
            done(visitor.write_zeroes(head.offset, head.len, durable, keep))
        }
        _ => Err(ENOTSUP),
    }
}

fn reply(head: &RequestHead, structured: bool, done: Result<Vec<u8>, u32>) -> Reply {
    if head.command != COMMAND_READ || !structured {
        let (error, data) = match done {
            Ok(data) => (0, data),
            Err(error) => (error, Vec::new()),
        };
        return (encode_simple_reply(error, head.cookie), data);
    }
    match done {
        Ok(data) => (encode_data_chunk(head.cookie, head.offset, head.len), data),
        Err(error) => (encode_error_chunk(head.cookie, error), Vec::new()),
    }
}
