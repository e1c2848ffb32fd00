//! A client of one export.
//!
//! Requests wait for a server that is away, for as long as it takes: they are sent again on the
//! next connection. A server that has lived on keeps what it has completed; of one that has not,
//! nobody knows whether it has lost what was not flushed yet, so the next flush fails.

use crate::connection::{Connect, Export, Negotiation, NegotiationError, Stream};
use crate::replies::{Extent, read_reply};
use crate::wire::{
    COMMAND_DISCONNECT, COMMAND_FLUSH, COMMAND_READ, COMMAND_WRITE, EINVAL, MAX_DATA, RequestHead,
    SEND_FLUSH, WireError, error_text,
};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use tokio::io::{AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::sync::mpsc as tasks;
use tokio::task::{LocalSet, spawn_local};
use vmft_sandbox::Task;

/// How long connecting may take, and how long to wait before the next try.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_millis(100);
/// Bytes read at a time.
const READ_BYTES: usize = 256 << 10;
/// Most requests under way.
const MAX_UNDER_WAY: usize = 64;

/// What is asked of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Bytes from an offset on.
    Read {
        /// The first.
        offset: u64,
        /// How many, at most [`MAX_DATA`].
        len: u32,
    },
    /// To write.
    Write {
        /// The first byte.
        offset: u64,
        /// At most [`MAX_DATA`] bytes.
        data: Arc<[u8]>,
    },
    /// To make durable what was completed.
    Flush,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The server says so.
    #[error("{}", error_text(*.0))]
    Server(u32),
    /// The server does not take the connection that the request needs.
    #[error("{0}")]
    Refused(String),
    /// The server has begun anew, and may have lost what was completed and not flushed.
    #[error(
        "the server has started anew since earlier writes were completed, and may have lost them"
    )]
    Lost,
    /// The connection's thread is gone.
    #[error("the connection is closed")]
    Closed,
}

/// What happens to a connection.
#[derive(Debug)]
pub enum Event {
    /// It is lost; requests wait.
    Lost(NegotiationError),
    /// There is another one.
    Back,
}

type Answer = Result<Vec<u8>, ClientError>;

#[derive(Debug)]
struct Job {
    request: Request,
    /// The call that the connection must have begun with; `None` if any will do.
    binding: Option<Vec<u8>>,
    answer: mpsc::Sender<Answer>,
    /// Writes completed when it was sent.
    completed_before: u64,
}

/// An export in use. What it is asked for is done in any order.
#[derive(Debug)]
pub struct Client {
    jobs: tasks::UnboundedSender<Job>,
    export: Export,
}

impl Client {
    /// Connects, and goes on doing that whenever the connection is lost, which `on_event` hears of.
    /// A connection without a binding begins with the call `life`, if the server knows such calls;
    /// two that get the same answer, to it or to a binding, have not lost what was completed in
    /// between.
    ///
    /// # Errors
    /// [`NegotiationError`] of the first connection.
    pub fn open(
        connect: impl Connect,
        name: &str,
        life: Vec<u8>,
        on_event: impl Fn(Event) + Send + 'static,
    ) -> Result<Self, NegotiationError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let name = name.to_owned();
        let (jobs, waiting) = tasks::unbounded_channel();
        let (opened, open) = mpsc::channel();
        let run = move || {
            LocalSet::new().block_on(&runtime, async move {
                let place = Place { connect, name, life };
                let line = match place.connect(None).await {
                    Ok(line) => line,
                    Err(error) => {
                        // Whoever opens waits for it.
                        let _ = opened.send(Err(error));
                        return;
                    }
                };
                let _ = opened.send(Ok(line.export));
                let worker = Worker {
                    place,
                    on_event: Box::new(on_event),
                    jobs: waiting,
                    under_way: UnderWay::default(),
                    held: None,
                    cookie: 0,
                    size: line.export.size,
                    life: Life::default(),
                    is_away: false,
                };
                worker.run(line).await;
            });
        };
        vmft_sandbox::spawn(Task::Channel, "nbd", run)?;
        let export = open.recv().map_err(|_| io::Error::other("the thread is gone"))??;
        Ok(Self { jobs, export })
    }

    /// What the server told of the export.
    pub fn export(&self) -> Export {
        self.export
    }

    /// Does a request, and waits for its end. With a `binding`, on a connection that has begun with this call
    /// ([`crate::wire::OPTION_VMFT`]).
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn request(&self, binding: Option<&[u8]>, request: Request) -> Answer {
        let (answer, answered) = mpsc::channel();
        let binding = binding.map(<[u8]>::to_vec);
        let job = Job { request, binding, answer, completed_before: 0 };
        self.jobs.send(job).map_err(|_| ClientError::Closed)?;
        answered.recv().map_err(|_| ClientError::Closed)?
    }
}

/// Requests that were sent, or will be on the next connection, by their cookies.
type UnderWay = Rc<RefCell<BTreeMap<u64, Job>>>;

/// One connection.
struct Line {
    export: Export,
    binding: Option<Vec<u8>>,
    /// What the server answered to the binding, or of its life.
    bound: Option<Vec<u8>>,
    writer: WriteHalf<Stream>,
    reader: BufReader<ReadHalf<Stream>>,
}

/// Where connections go, and how they begin.
struct Place<C> {
    connect: C,
    name: String,
    /// Asks which of its lives the server is in.
    life: Vec<u8>,
}

impl<C: Connect> Place<C> {
    async fn connect(&self, binding: Option<Vec<u8>>) -> Result<Line, NegotiationError> {
        let begin = async {
            let mut begun = Negotiation::begin(&self.connect).await?;
            begun.structure_replies().await?;
            let bound = match &binding {
                Some(call) => Some(begun.call(call).await?),
                None => match begun.call(&self.life).await {
                    Ok(life) => Some(life),
                    Err(NegotiationError::Unsupported) => None,
                    Err(error) => return Err(error),
                },
            };
            let (export, stream) = begun.go(&self.name).await?;
            let (reader, writer) = tokio::io::split(stream);
            let reader = BufReader::with_capacity(READ_BYTES, reader);
            Ok(Line { export, binding, bound, writer, reader })
        };
        match tokio::time::timeout(CONNECT_LIMIT, begin).await {
            Ok(begun) => begun,
            Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
        }
    }
}

/// What of the completed writes may not be durable yet, and whether the server still has it.
#[derive(Debug, Default)]
struct Life {
    /// What the last connection's server answered.
    bound: Option<Vec<u8>>,
    completed: u64,
    flushed: u64,
    is_lost: bool,
}

impl Life {
    /// A connection has begun, after another.
    fn goes_on(&mut self, bound: Option<&Vec<u8>>) {
        let is_same = bound.is_some() && self.bound.as_ref() == bound;
        self.is_lost |= !is_same && self.completed > self.flushed;
        self.bound = bound.cloned();
    }

    /// True once, if what a flush would be about is lost.
    fn take_lost(&mut self) -> bool {
        if self.is_lost {
            self.flushed = self.completed;
        }
        std::mem::take(&mut self.is_lost)
    }
}

/// What the reader of a connection has found.
enum Heard {
    Reply(u64, Result<Vec<u8>, u32>),
    Ended(NegotiationError),
}

/// How a connection's time ends.
enum End {
    /// Nobody asks any more.
    Over,
    /// The connection is lost.
    Lost(NegotiationError),
    /// The request that is held needs another one, and nothing is under way.
    Rebind,
}

/// How looking for another connection ends.
enum Found {
    Line(Line),
    Refused(NegotiationError),
    Over,
}

struct Worker<C> {
    place: Place<C>,
    on_event: Box<dyn Fn(Event) + Send>,
    jobs: tasks::UnboundedReceiver<Job>,
    under_way: UnderWay,
    /// Waits for everything that is under way, and for a connection of its own.
    held: Option<Job>,
    cookie: u64,
    size: u64,
    life: Life,
    is_away: bool,
}

impl<C: Connect> Worker<C> {
    async fn run(mut self, first: Line) {
        let mut line = first;
        loop {
            let binding = match self.serve(&mut line).await {
                End::Over => return,
                End::Lost(error) => {
                    self.lose(error);
                    line.binding.take()
                }
                End::Rebind => {
                    let job = self.held.take().expect("it is held");
                    let binding = job.binding.clone();
                    self.put(job);
                    binding
                }
            };
            line = match self.find(binding).await {
                Some(line) => line,
                None => return,
            };
        }
    }

    /// Finds a connection with this binding, or, where that is refused, one for what needs another.
    async fn find(&mut self, mut binding: Option<Vec<u8>>) -> Option<Line> {
        loop {
            let error = match self.look(binding.clone()).await {
                Found::Line(line) => return Some(line),
                Found::Over => return None,
                Found::Refused(error) => ClientError::Refused(error.to_string()),
            };
            // What needs no binding is not refused with one.
            let all = std::mem::take(&mut *self.under_way.borrow_mut());
            for (cookie, job) in all {
                if binding.is_none() || job.binding.is_some() {
                    job.finish(Err(error.clone()));
                } else {
                    self.under_way.borrow_mut().insert(cookie, job);
                }
            }
            binding = None;
            if self.under_way.borrow().is_empty() {
                let job = match self.held.take() {
                    Some(job) => job,
                    None => self.jobs.recv().await?,
                };
                binding = job.binding.clone();
                self.put(job);
            }
        }
    }

    async fn look(&mut self, binding: Option<Vec<u8>>) -> Found {
        loop {
            match self.place.connect(binding.clone()).await {
                Ok(line) if line.export.size != self.size => {
                    let why = format!("it has {} bytes now", line.export.size);
                    return Found::Refused(NegotiationError::Refused(why));
                }
                Ok(line) => {
                    if std::mem::take(&mut self.is_away) {
                        (self.on_event)(Event::Back);
                    }
                    return Found::Line(line);
                }
                Err(error @ (NegotiationError::Refused(_) | NegotiationError::Unsupported)) => {
                    return Found::Refused(error);
                }
                Err(error) => self.lose(error),
            }
            if self.jobs.is_closed() {
                return Found::Over;
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Tells that the server is away, once.
    fn lose(&mut self, error: NegotiationError) {
        if !std::mem::replace(&mut self.is_away, true) {
            (self.on_event)(Event::Lost(error));
        }
    }

    fn put(&mut self, job: Job) -> u64 {
        self.cookie += 1;
        self.under_way.borrow_mut().insert(self.cookie, job);
        self.cookie
    }

    async fn serve(&mut self, line: &mut Line) -> End {
        self.life.goes_on(line.bound.as_ref());
        let (tell, mut heard) = tasks::unbounded_channel();
        let (none, _) = tokio::io::split(Box::new(tokio::io::empty()) as Stream);
        let reader = std::mem::replace(&mut line.reader, BufReader::new(none));
        let under_way = Rc::clone(&self.under_way);
        let reading = spawn_local(async move {
            let mut reader = reader;
            let ended = loop {
                match read_reply(&mut reader, |cookie| asked(&under_way, cookie)).await {
                    Ok((cookie, result)) => {
                        if tell.send(Heard::Reply(cookie, result)).is_err() {
                            return;
                        }
                    }
                    Err(error) => break error,
                }
            };
            let _ = tell.send(Heard::Ended(ended));
        });
        let end = self.exchange(line, &mut heard).await;
        reading.abort();
        if let Err(error) = reading.await
            && let Ok(panic) = error.try_into_panic()
        {
            std::panic::resume_unwind(panic);
        }
        end
    }

    async fn exchange(
        &mut self,
        line: &mut Line,
        heard: &mut tasks::UnboundedReceiver<Heard>,
    ) -> End {
        let cookies: Vec<u64> = self.under_way.borrow().keys().copied().collect();
        for cookie in cookies {
            if let Err(error) = self.send(line, cookie).await {
                return End::Lost(error.into());
            }
        }
        loop {
            let free = self.under_way.borrow().len();
            if free == 0 && self.held.is_some() {
                return End::Rebind;
            }
            tokio::select! {
                biased;
                heard = heard.recv() => match heard {
                    Some(Heard::Reply(cookie, result)) => self.replied(cookie, result),
                    Some(Heard::Ended(error)) => return End::Lost(error),
                    None => return End::Lost(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                },
                job = self.jobs.recv(), if free < MAX_UNDER_WAY && self.held.is_none() => {
                    let Some(job) = job else {
                        self.leave(line).await;
                        return End::Over;
                    };
                    if job.binding.is_some() && job.binding != line.binding {
                        self.held = Some(job);
                        continue;
                    }
                    let cookie = self.put(job);
                    if let Err(error) = self.send(line, cookie).await {
                        return End::Lost(error.into());
                    }
                }
            }
        }
    }

    /// Sends a request that is under way. One that can be answered here is.
    async fn send(&mut self, line: &mut Line, cookie: u64) -> io::Result<()> {
        let (head, data) = {
            let mut under_way = self.under_way.borrow_mut();
            let Some(job) = under_way.get_mut(&cookie) else { return Ok(()) };
            let (command, offset, len, data) = match &job.request {
                Request::Read { offset, len } => (COMMAND_READ, *offset, *len, Arc::default()),
                Request::Write { offset, data } => {
                    let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
                    (COMMAND_WRITE, *offset, len, Arc::clone(data))
                }
                Request::Flush => (COMMAND_FLUSH, 0, 0, Arc::default()),
            };
            let answer = match job.request {
                Request::Flush if self.life.take_lost() => Some(Err(ClientError::Lost)),
                Request::Flush if line.export.flags & SEND_FLUSH == 0 => Some(Ok(Vec::new())),
                _ if len > MAX_DATA => Some(Err(ClientError::Server(EINVAL))),
                _ => None,
            };
            if let Some(answer) = answer {
                under_way.remove(&cookie).expect("it is there").finish(answer);
                return Ok(());
            }
            job.completed_before = self.life.completed;
            (RequestHead { flags: 0, command, cookie, offset, len }.encode(), data)
        };
        line.writer.write_all(&head).await?;
        line.writer.write_all(&data).await?;
        line.writer.flush().await
    }

    fn replied(&mut self, cookie: u64, result: Result<Vec<u8>, u32>) {
        let Some(job) = self.under_way.borrow_mut().remove(&cookie) else { return };
        match (&job.request, &result) {
            (Request::Write { .. }, Ok(_)) => self.life.completed += 1,
            (Request::Flush, Ok(_)) => {
                self.life.flushed = self.life.flushed.max(job.completed_before);
            }
            _ => {}
        }
        job.finish(result.map_err(ClientError::Server));
    }

    async fn leave(&mut self, line: &mut Line) {
        let head =
            RequestHead { flags: 0, command: COMMAND_DISCONNECT, cookie: 0, offset: 0, len: 0 };
        // The server sees the end of the connection as well.
        let _ = line.writer.write_all(&head.encode()).await;
        let _ = line.writer.shutdown().await;
    }
}

impl Job {
    fn finish(self, answer: Answer) {
        // Whoever asked may have gone.
        let _ = self.answer.send(answer);
    }
}

/// What the request with this cookie reads, if it does.
fn asked(under_way: &UnderWay, cookie: u64) -> Result<Option<Extent>, WireError> {
    match under_way.borrow().get(&cookie).map(|job| &job.request) {
        Some(Request::Read { offset, len }) => Ok(Some((*offset, *len))),
        Some(_) => Ok(None),
        None => Err(WireError::Magic("a reply to a request")),
    }
}
