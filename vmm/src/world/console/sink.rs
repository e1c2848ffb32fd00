//! Where the console's main sink writes to, and what happens when that does not take bytes.
//!
//! A sink that fails is tried again, with what it did not take, for as long as it takes: a file system
//! that is full may have room later. What waits meanwhile is bounded by stopping the guest (see
//! [`crate::outputs::HeldOutputs::is_full`]). Only a reader that is gone for good, such as the other end
//! of a pipe, is given up: then its bytes count as out, and how many those are is said at the end.

use super::{ConsoleError, ConsoleHub};
use crate::world::Repeats;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use vmft_sandbox::{Task, outside_of_landlock};

/// How long a sink that failed is left alone at first, and at most.
const FIRST_RETRY: Duration = Duration::from_millis(20);
const LAST_RETRY: Duration = Duration::from_secs(1);
/// How long one wait for a stream may take that does not wait by itself, in milliseconds.
const LOOK_AGAIN: u8 = 100;

/// Something that takes the console's bytes.
pub(super) trait Sink: Send {
    /// What it is, for messages.
    fn name(&self) -> String;
    /// Writes bytes that belong at `offset`, and says how many it took. May wait.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<usize>;
    /// True if it will take nothing any more.
    fn is_gone(&self, error: &io::Error) -> bool;
}

/// A terminal or a pipe: bytes come one after the other.
#[derive(Debug)]
struct Stream {
    name: String,
    file: File,
}

impl Sink for Stream {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn write(&mut self, _: u64, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes);
        if written.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock) {
            // Whoever shares this terminal has made it so that a write does not wait.
            let mut writable = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
            poll(&mut writable, PollTimeout::from(LOOK_AGAIN))?;
            return Err(ErrorKind::Interrupted.into());
        }
        written
    }

    fn is_gone(&self, error: &io::Error) -> bool {
        // A pipe without a reader, a terminal that was hung up, a device or socket that is no more.
        matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)
            || matches!(error.raw_os_error(), Some(libc::EIO | libc::ENXIO | libc::EBADF))
    }
}

/// A file in which every byte has its place.
#[derive(Debug)]
struct Placed {
    path: PathBuf,
    file: File,
    /// The end of what was written here: before it, another side may have written elsewhere.
    end: u64,
    cut: Repeats,
}

impl Placed {
    /// Notices that somebody has removed the file, or cut it: both lose what is not this side's to
    /// write again.
    fn look(&mut self, offset: u64) -> io::Result<()> {
        let found = self.file.metadata();
        let is_removed = match &found {
            Ok(found) => found.nlink() == 0,
            // By another client of a network file system.
            Err(error) => error.raw_os_error() == Some(libc::ESTALE),
        };
        if is_removed {
            self.file = create(&self.path)?;
            self.end = 0;
            if let Some(times) = self.cut.note("removed") {
                let path = self.path.display();
                tracing::warn!(
                    "console file {path} was removed: it is made anew, and begins at byte \
                     {offset}{times}"
                );
            }
            return Ok(());
        }
        let len = found?.len();
        if len < self.end
            && let Some(times) = self.cut.note("cut")
        {
            let (path, end) = (self.path.display(), self.end);
            tracing::warn!(
                "console file {path} has {len} bytes, and had {end}: it goes on at byte {offset}, \
                 after a gap{times}"
            );
        }
        Ok(())
    }
}

impl Sink for Placed {
    fn name(&self) -> String {
        format!("console file {}", self.path.display())
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        self.look(offset)?;
        let taken = self.file.write_at(bytes, offset)?;
        self.end = offset + taken as u64;
        Ok(taken)
    }

    fn is_gone(&self, _: &io::Error) -> bool {
        false
    }
}

fn create(path: &Path) -> io::Result<File> {
    let path = path.to_owned();
    // What a guest prints is for whoever may see the guest. Made again where somebody has moved it away,
    // which no rule about the file that was there covers.
    let open =
        || OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path);
    outside_of_landlock(open)
}

/// This process's standard output.
pub(super) fn standard_output() -> Result<Box<dyn Sink>, ConsoleError> {
    // Not the library's: that keeps what it could not write and writes it once more.
    let file = io::stdout().as_fd().try_clone_to_owned().map_err(ConsoleError::Output)?;
    Ok(Box::new(Stream { name: "standard output".to_owned(), file: file.into() }))
}

/// A file at `path`: one whose bytes have places, or a device or named pipe that is there.
pub(super) fn file(path: &Path) -> Result<Box<dyn Sink>, ConsoleError> {
    let error = |source| ConsoleError::File { path: path.to_owned(), source };
    let file = create(path).map_err(error)?;
    let is_placed = file.metadata().map_err(error)?.is_file();
    let path = path.to_owned();
    match is_placed {
        true => Ok(Box::new(Placed { path, file, end: 0, cut: Repeats::new() })),
        false => Ok(Box::new(Stream { name: path.display().to_string(), file })),
    }
}

/// Starts the thread that writes to `sink`.
pub(super) fn start(hub: &Arc<ConsoleHub>, mut sink: Box<dyn Sink>) -> Result<(), ConsoleError> {
    let hub = Arc::clone(hub);
    let run = move || run(&hub, &mut *sink);
    vmft_sandbox::spawn(Task::Console, "console", run).map(drop).map_err(ConsoleError::Thread)
}

/// Writes what the hub has until it is closed, or the sink is gone.
fn run(hub: &ConsoleHub, sink: &mut dyn Sink) {
    let repeats = Repeats::new();
    let mut retry = FIRST_RETRY;
    while let Some((offset, bytes)) = hub.next_for_sink() {
        let error = match sink.write(offset, &bytes) {
            Ok(0) => ErrorKind::WriteZero.into(),
            Ok(taken) => {
                if hub.sink_wrote(offset + taken as u64) {
                    retry = FIRST_RETRY;
                    if let Some(times) = repeats.note("taken again") {
                        tracing::warn!("{} takes the guest's console again{times}", sink.name());
                    }
                }
                continue;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => error,
        };
        if sink.is_gone(&error) {
            tracing::error!(
                "nobody reads {} any more ({error}): the guest's console is not shown from byte \
                 {offset} on",
                sink.name()
            );
            hub.sink_is_gone();
            return;
        }
        hub.sink_failed(format!("{} cannot be written: {error}", sink.name()));
        if let Some(times) = repeats.note(&error.to_string()) {
            tracing::error!(
                "{} cannot be written: {error}; what the guest writes waits, and it is tried \
                 again{times}",
                sink.name()
            );
        }
        hub.wait_retry(retry);
        retry = (retry * 2).min(LAST_RETRY);
    }
}
