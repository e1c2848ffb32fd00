//! A connection for calls alone.

use crate::connection::{Connect, Negotiation, NegotiationError};
use std::io;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc as tasks;
use vmft_sandbox::Task;

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The server cannot be reached now, or its answer does not come. The call may have been done.
    #[error("the server cannot be reached")]
    Unreachable(#[source] io::Error),
    /// The server, or its refusal, is not one that another call would change.
    #[error(transparent)]
    Negotiation(NegotiationError),
}

struct Job {
    call: Vec<u8>,
    answer: mpsc::Sender<Result<Vec<u8>, CallError>>,
}

/// Calls to a server, one after the other, over a connection that is made when it is needed. A call
/// that finds its connection gone is made again on another one, so each is one that can be made
/// twice. What was said with [`Self::stand`] is said again at the beginning of each connection:
/// what a server holds for a client goes with its connection.
#[derive(Debug)]
pub struct Control {
    jobs: tasks::UnboundedSender<Job>,
    standing: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Control {
    /// Calls that each may take as long as `limit`, and connecting as long again. Nothing is connected yet.
    ///
    /// # Errors
    /// The host's, where it starts no thread.
    pub fn start(connect: impl Connect, limit: Duration) -> io::Result<Self> {
        let (jobs, waiting) = tasks::unbounded_channel();
        let standing = Arc::new(Mutex::new(Vec::new()));
        let said = Arc::clone(&standing);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let run = move || runtime.block_on(serve(&connect, limit, &said, waiting));
        vmft_sandbox::spawn(Task::Channel, "nbd-control", run)?;
        Ok(Self { jobs, standing })
    }

    /// Calls, and waits for the answer.
    ///
    /// # Errors
    /// [`CallError`]
    pub fn call(&self, call: Vec<u8>) -> Result<Vec<u8>, CallError> {
        let gone = || CallError::Unreachable(io::Error::other("the connection's thread is gone"));
        let (answer, answered) = mpsc::channel();
        self.jobs.send(Job { call, answer }).map_err(|_| gone())?;
        answered.recv().map_err(|_| gone())?
    }

    /// Says this again at the beginning of each later connection. Whatever is answered there.
    ///
    /// # Panics
    /// If another thread has panicked in here.
    pub fn stand(&self, call: Vec<u8>) {
        let mut standing = self.standing.lock().expect("no holder of this lock panics");
        if !standing.contains(&call) {
            standing.push(call);
        }
    }
}

async fn serve(
    connect: &impl Connect,
    limit: Duration,
    standing: &Mutex<Vec<Vec<u8>>>,
    mut jobs: tasks::UnboundedReceiver<Job>,
) {
    let mut connection: Option<Negotiation> = None;
    while let Some(Job { call, answer }) = jobs.recv().await {
        let done = async {
            if let Some(begun) = &mut connection {
                match begun.call(&call).await {
                    // The server may have begun anew since.
                    Err(NegotiationError::Io(_)) => connection = None,
                    done => return done,
                }
            }
            connection.insert(begin(connect, standing).await?).call(&call).await
        };
        let done = match tokio::time::timeout(limit, done).await {
            Ok(done) => done,
            Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
        };
        let done = done.map_err(|error| match error {
            NegotiationError::Io(error) => CallError::Unreachable(error),
            other => CallError::Negotiation(other),
        });
        if done.is_err() {
            // What would come next on it is not known.
            connection = None;
        }
        // Whoever asked may have gone.
        let _ = answer.send(done);
    }
}

async fn begin(
    connect: &impl Connect,
    standing: &Mutex<Vec<Vec<u8>>>,
) -> Result<Negotiation, NegotiationError> {
    let mut begun = Negotiation::begin(connect).await?;
    let calls = standing.lock().expect("no holder of this lock panics").clone();
    for call in calls {
        begun.call(&call).await?;
    }
    Ok(begun)
}
