//! The members of an etcd, of which any that has a majority behind it may answer.

use super::wire::{ANSWER_LIMIT, Answer, History, Question, WireError};
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper_util::rt::TokioIo;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc as tasks;
use tokio_rustls::TlsConnector;
use vmft_logging_channel::transport::PeerAddress;
use vmft_logging_channel::transport::streams::Stream;
use vmft_sandbox::Task;
use vmft_threads::Mutex;

/// How long a question may take, whoever is asked, before etcd counts as away. Less than etcd itself waits
/// for a majority; whoever asked asks again.
pub(super) const CALL_LIMIT: Duration = Duration::from_secs(3);
/// How long one member is waited for before the next is asked as well: many times what a round of etcd's
/// takes on a network, and no longer than a peer's silence.
const TURN: Duration = Duration::from_millis(250);
/// Most bytes of an answer's head.
const HEAD_LIMIT: usize = 64 << 10;

type Reply = io::Result<(u16, Vec<u8>)>;

/// What a member's thread is to ask.
struct Job {
    path: &'static str,
    body: Bytes,
    deadline: Instant,
    answer: mpsc::Sender<(usize, Reply)>,
}

/// The members, each with a thread and a connection of its own: what keeps one waiting, its name's lookup
/// included, keeps none of the others.
#[derive(Debug)]
pub(super) struct Members {
    jobs: Vec<tasks::UnboundedSender<Job>>,
    /// The one that has answered last.
    preferred: AtomicUsize,
    /// What is known of etcd's history.
    known: Mutex<Option<History>>,
}

impl Members {
    /// Of these addresses, at least one. Nothing is connected yet.
    ///
    /// # Errors
    /// The host's, where it starts no thread.
    pub(super) fn start(addresses: &[PeerAddress]) -> io::Result<Self> {
        let start = |(index, address): (usize, &PeerAddress)| {
            let (jobs, waiting) = tasks::unbounded_channel();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let member = Member { address: address.clone(), index };
            let run = move || runtime.block_on(member.serve(waiting));
            vmft_sandbox::spawn(Task::Channel, format!("etcd-{index}"), run)?;
            Ok(jobs)
        };
        let jobs = addresses.iter().enumerate().map(start).collect::<io::Result<_>>()?;
        Ok(Self { jobs, preferred: AtomicUsize::new(0), known: Mutex::default() })
    }

    /// Asks one member after the other until one answers, those that are slow beside the next. What was asked
    /// may have been done, and more than once, where there is no answer.
    ///
    /// # Errors
    /// What is wrong with the last member that was asked.
    pub(super) fn ask(&self, question: &Question, limit: Duration) -> io::Result<Answer> {
        let deadline = Instant::now() + limit;
        let body = Bytes::from(question.encode());
        let before = *self.known.lock();
        let first = self.preferred.load(Ordering::Relaxed);
        let (answer, answers) = mpsc::channel();
        let (mut asked, mut failed) = (0, 0);
        let mut why = io::Error::from(io::ErrorKind::TimedOut);
        while failed < self.jobs.len() {
            if asked == failed || asked < self.jobs.len() && Instant::now() < deadline {
                let index = (first + asked) % self.jobs.len();
                let (path, body, answer) = (question.path(), body.clone(), answer.clone());
                // A thread that is gone answers nothing.
                let _ = self.jobs[index].send(Job { path, body, deadline, answer });
                asked += 1;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let patience = if asked < self.jobs.len() { left.min(TURN) } else { left };
            match answers.recv_timeout(patience) {
                Ok((index, reply)) => match self.judge(question, before, reply) {
                    Ok(answer) => {
                        self.preferred.store(index, Ordering::Relaxed);
                        return Ok(answer);
                    }
                    Err(error) => {
                        failed += 1;
                        why = error;
                    }
                },
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
                Err(_) => break,
            }
        }
        Err(why)
    }

    /// The answer, if it is one, and of the etcd that has been asked so far: one that was put back to what
    /// it was before (restored from a copy) may have forgotten who has won.
    fn judge(
        &self,
        question: &Question,
        before: Option<History>,
        reply: Reply,
    ) -> io::Result<Answer> {
        let (status, body) = reply?;
        let answer = question.read(status, &body).map_err(|error| match error {
            WireError::Refused { .. } => io::Error::other(error),
            _ => io::Error::new(io::ErrorKind::InvalidData, error),
        })?;
        if let Answer::Transaction { history, .. } = &answer {
            let mut known = self.known.lock();
            let other = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidData, why));
            if known.is_some_and(|known| known.cluster != history.cluster) {
                return other("a member of another etcd");
            }
            if before.is_some_and(|before| history.revision < before.revision) {
                return other("an etcd that has been put back to what it was before");
            }
            let newest = known.map_or(0, |known| known.revision).max(history.revision);
            *known = Some(History { revision: newest, ..*history });
        }
        Ok(answer)
    }
}

/// The thread of a member.
struct Member {
    address: PeerAddress,
    index: usize,
}

type Connection = SendRequest<Full<Bytes>>;

impl Member {
    async fn serve(&self, mut jobs: tasks::UnboundedReceiver<Job>) {
        let mut connection = None;
        while let Some(job) = jobs.recv().await {
            // Nobody waits for it any more, if it had to wait for another one.
            let left = job.deadline.saturating_duration_since(Instant::now());
            let done = tokio::time::timeout(left, self.exchange(&mut connection, &job)).await;
            let done = done.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            if done.is_err() {
                // What would come next on it is not known.
                connection = None;
            }
            // Whoever asked may have another's answer.
            let _ = job.answer.send((self.index, done));
        }
    }

    async fn exchange(&self, connection: &mut Option<Connection>, job: &Job) -> Reply {
        if let Some(open) = connection
            && let Ok(reply) = self.post(open, job).await
        {
            return Ok(reply);
        }
        // The member may have begun anew since.
        self.post(connection.insert(self.connect().await?), job).await
    }

    async fn connect(&self) -> io::Result<Connection> {
        let stream = self.address.open_stream().await.map_err(io::Error::other)?;
        let stream: Stream = match self.address.service_identity().map_err(io::Error::other)? {
            None => stream,
            Some((config, name)) => {
                Box::new(TlsConnector::from(config).connect(name, stream).await?)
            }
        };
        let handshake =
            Builder::new().max_buf_size(HEAD_LIMIT).handshake(TokioIo::new(stream)).await;
        let (sender, driver) = handshake.map_err(io::Error::other)?;
        tokio::spawn(driver);
        Ok(sender)
    }

    async fn post(&self, connection: &mut Connection, job: &Job) -> Reply {
        connection.ready().await.map_err(io::Error::other)?;
        let request = Request::post(job.path)
            .header("host", self.address.place.to_string())
            .header("content-type", "application/json")
            .body(Full::from(job.body.clone()))
            .map_err(io::Error::other)?;
        let answer = connection.send_request(request).await.map_err(io::Error::other)?;
        let status = answer.status().as_u16();
        let body = Limited::new(answer.into_body(), ANSWER_LIMIT).collect().await;
        Ok((status, body.map_err(io::Error::other)?.to_bytes().to_vec()))
    }
}

#[cfg(test)]
#[path = "members_tests.rs"]
mod tests;
