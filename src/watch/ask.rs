//! Asks the sides how they are.

use super::Input;
use super::facts::shown;
use super::model::{Sample, Stamp};
use crate::api_client;
use crate::remedy::one_line;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};
use vmft_sandbox::Task;

/// Who is asked, and how often.
#[derive(Debug)]
pub(super) struct Asked {
    /// Its number in the view.
    pub(super) side: usize,
    /// Its API socket.
    pub(super) socket: PathBuf,
    /// From one question to the next; an answer that takes longer delays it.
    pub(super) interval: Duration,
    /// When the view began.
    pub(super) began: Instant,
}

/// Asks on a thread of its own until nobody listens: a side that does not answer delays no other.
///
/// # Errors
/// The host's, where it starts no thread.
pub(super) fn begin(asked: Asked, told: Sender<Input>) -> io::Result<()> {
    let ask = move || {
        loop {
            let next = Instant::now() + asked.interval;
            let answer = api_client::look(&asked.socket).map(Box::new);
            let answer = answer.map_err(|error| shown(&one_line(&format!("{error:#}"))));
            let sample = Sample { side: asked.side, at: Stamp::now(asked.began), answer };
            if told.send(Input::Sample(sample)).is_err() {
                return;
            }
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    };
    vmft_sandbox::spawn(Task::Worker, "ask", ask).map(drop)
}
