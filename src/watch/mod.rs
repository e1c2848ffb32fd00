//! `vmft status --watch`: the sides of a pair, live in a terminal.
//!
//! | file | what |
//! |---|---|
//! | `ask.rs` | asks the sides, each on a thread of its own |
//! | `model.rs` | what their answers come to: samples and keys in, a view out |
//! | `facts.rs` | what one status says, in words |
//! | `changes.rs` | what has happened between two statuses |
//! | `draw.rs` | a view as a picture |
//! | `screen.rs` | the terminal: its modes, its keys, and how it was before |
//!
//! All but the first and the last are pure: they are told the time, and neither wait nor write. A page
//! (`src/dashboard/`) shows the same.

mod ask;
mod changes;
mod draw;
pub(crate) mod facts;
pub(crate) mod model;
pub mod screen;
#[cfg(test)]
mod tests;

use crate::options::{OptionError, parse_time};
use crate::terminal::printable;
use anyhow::{Result, bail};
use model::{Flow, Key, Model, Sample, Stamp};
use screen::Screen;
use std::io::{self, IsTerminal};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How often sides may be asked: a status costs one some tens of microseconds.
const INTERVALS: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(60);
/// How long a picture stays where nothing comes: it tells how long a side has been gone.
const REDRAW: Duration = Duration::from_millis(500);

/// `--interval 500ms`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IntervalOption(pub Duration);

impl FromStr for IntervalOption {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let time = parse_time(text)?;
        if INTERVALS.contains(&time) {
            return Ok(Self(time));
        }
        Err(OptionError::WatchInterval(text.to_owned()))
    }
}

/// What comes to the view.
#[derive(Debug)]
enum Input {
    /// A side has answered, or has not.
    Sample(Sample),
    /// A key.
    Key(Key),
    /// The terminal has another size.
    Resized,
    /// A signal, or a terminal that is gone.
    Quit,
}

/// How the sides are called: by their sockets' names, or whole paths where names are alike.
pub(crate) fn names(sockets: &[PathBuf]) -> Vec<String> {
    let short =
        |socket: &PathBuf| socket.file_name().map(|name| printable(&name.to_string_lossy()));
    sockets
        .iter()
        .map(|socket| {
            let alike = sockets.iter().filter(|other| other.file_name() == socket.file_name());
            match short(socket).filter(|_| alike.count() == 1) {
                Some(name) => name,
                None => printable(&socket.to_string_lossy()),
            }
        })
        .collect()
}

/// Shows the sides at `sockets`, asked every `interval`, until somebody ends it.
///
/// # Errors
/// Standard output is no terminal, or the terminal fails.
pub fn watch(sockets: &[PathBuf], interval: Duration) -> Result<ExitCode> {
    if !io::stdout().is_terminal() {
        bail!(
            "--watch draws on a terminal, and standard output is none; for programs there are --json \
             and --check"
        );
    }
    let (sender, inputs) = channel();
    let quit = sender.clone();
    ctrlc::set_handler(move || {
        // Without a receiver the view is over already.
        let _ = quit.send(Input::Quit);
    })?;
    let began = Instant::now();
    let mut model = Model::new(names(sockets), interval);
    let mut screen = Screen::open()?;
    screen::read_keys(sender.clone())?;
    for (side, socket) in sockets.iter().enumerate() {
        ask::begin(ask::Asked { side, socket: socket.clone(), interval, began }, sender.clone())?;
    }
    loop {
        screen.draw(&model.view(Stamp::now(began)))?;
        let first = match inputs.recv_timeout(REDRAW) {
            Ok(input) => Some(input),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return Ok(ExitCode::SUCCESS),
        };
        for input in first.into_iter().chain(inputs.try_iter()) {
            let flow = match input {
                Input::Sample(sample) => model.handle_sample(sample),
                Input::Key(key) => model.handle_key(key, Stamp::now(began)),
                Input::Resized => Flow::GoOn,
                Input::Quit => Flow::End,
            };
            if flow == Flow::End {
                return Ok(ExitCode::SUCCESS);
            }
        }
    }
}
