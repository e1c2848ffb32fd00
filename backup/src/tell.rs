//! What a side says to its operator: single lines, on standard error or in the file that was
//! chosen for them.
//!
//! Whoever says something never waits: lines are queued, and a thread of their own writes them. A reader
//! that has gone away, a terminal that is stopped or a full pipe stops no side, and delays neither its
//! guest nor its heartbeats. What does not fit in the queue is counted, and the count is said. Things that
//! happen again and again are said through [`Repeats`], once and then counted.

pub use vmft_vmm::world::Repeats;

use std::collections::VecDeque;
use std::fmt::Arguments;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Once, OnceLock};
use std::time::Duration;
use vmft_log::foreign::Printable;
use vmft_sandbox::Task;
use vmft_threads::{Condvar, Mutex, MutexGuard};

/// Bytes of lines that wait to be written. More are dropped and counted.
const QUEUE_BYTES: usize = 256 << 10;

static FILE: OnceLock<File> = OnceLock::new();
static QUEUE: Queue = Queue::new();

/// From now on messages go to `file`. Only the first call counts.
pub fn to_file(file: File) {
    FILE.get_or_init(|| file);
}

/// Says one line; see [`crate::tell!`].
pub fn say(message: Arguments<'_>) {
    // Whatever foreign text came into it: one line, which no terminal obeys.
    QUEUE.add(format!("vmft: {}\n", Printable(&message.to_string())).into_bytes());
}

/// Waits until everything said is written, for at most `limit`: before a process ends.
pub fn finish(limit: Duration) {
    QUEUE.wait_written(limit);
}

/// A process that panics says so here as well: the panic of one whose terminal is stopped must not
/// leave it half alive.
pub fn say_panics(limit: Duration) {
    std::panic::set_hook(Box::new(move |panic| {
        let trace = std::backtrace::Backtrace::capture();
        say(format_args!("{panic}"));
        if trace.status() == std::backtrace::BacktraceStatus::Captured {
            trace.to_string().lines().for_each(|line| say(format_args!("{line}")));
        }
        crate::events::finish(limit);
        finish(limit);
    }));
}

/// A writer of whole lines, for a log: they join the queue.
pub fn writer() -> LineWriter {
    LineWriter(())
}

/// See [`writer`].
#[derive(Debug)]
pub struct LineWriter(());

impl Write for LineWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        QUEUE.add(bytes.to_vec());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Tells the operator something, in one line.
#[macro_export]
macro_rules! tell {
    ($($argument:tt)*) => {
        $crate::tell::say(format_args!($($argument)*))
    };
}

#[derive(Debug)]
struct Lines {
    waiting: VecDeque<Vec<u8>>,
    bytes: usize,
    dropped: u64,
    is_writing: bool,
}

/// Lines on their way to whoever reads them.
#[derive(Debug)]
struct Queue {
    lines: Mutex<Lines>,
    changed: Condvar,
    started: Once,
}

impl Queue {
    const fn new() -> Self {
        let lines = Lines { waiting: VecDeque::new(), bytes: 0, dropped: 0, is_writing: false };
        Self { lines: Mutex::new(lines), changed: Condvar::new(), started: Once::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        // A panic is said here, too.
        self.lines.lock()
    }

    fn add(&'static self, line: Vec<u8>) {
        self.put(line);
        self.started.call_once(|| {
            let write = || {
                let stderr = io::stderr().as_fd().try_clone_to_owned().map(File::from);
                self.write_all(|line| {
                    // Nobody may be listening any more: a message is not worth a guest.
                    let _ = match (FILE.get(), &stderr) {
                        (Some(mut file), _) => file.write_all(line),
                        (None, Ok(stderr)) => (&*stderr).write_all(line),
                        (None, Err(_)) => Ok(()),
                    };
                });
            };
            // A host that cannot start a thread runs no machine that would have something to say.
            let _ = vmft_sandbox::spawn(Task::Messages, "messages", write);
        });
    }

    /// Adds a line; drops it if there is no room.
    fn put(&self, line: Vec<u8>) {
        let mut lines = self.lock();
        if lines.bytes + line.len() > QUEUE_BYTES {
            lines.dropped += 1;
            return;
        }
        lines.bytes += line.len();
        lines.waiting.push_back(line);
        drop(lines);
        self.changed.notify_all();
    }

    /// Takes the next line, if there is one: a count of those dropped before those that came later.
    fn take(lines: &mut Lines) -> Option<Vec<u8>> {
        if let Some(line) = lines.waiting.pop_front() {
            lines.bytes -= line.len();
            return Some(line);
        }
        let dropped = std::mem::take(&mut lines.dropped);
        (dropped > 0)
            .then(|| format!("vmft: {dropped} messages that nobody read are lost\n").into())
    }

    /// Gives lines to `write` for ever.
    fn write_all(&self, mut write: impl FnMut(&[u8])) -> ! {
        let mut lines = self.lock();
        loop {
            let Some(line) = Self::take(&mut lines) else {
                lines = self.changed.wait(lines);
                continue;
            };
            lines.is_writing = true;
            drop(lines);
            write(&line);
            lines = self.lock();
            lines.is_writing = false;
            self.changed.notify_all();
        }
    }

    fn wait_written(&self, limit: Duration) {
        let waits = |lines: &mut Lines| !lines.waiting.is_empty() || lines.is_writing;
        // Written or not, the process ends.
        drop(self.changed.wait_timeout_while(self.lock(), limit, waits));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    /// A queue with a reader that takes a line whenever the test says so.
    #[test]
    fn a_reader_that_is_stuck_delays_nobody_and_what_does_not_fit_is_counted() {
        let queue = Arc::new(Queue::new());
        let (allow, allowed) = channel::<()>();
        let (tell, told) = channel();
        let writing = Arc::clone(&queue);
        std::thread::spawn(move || {
            writing.write_all(|line| {
                // Without the test nobody reads.
                if allowed.recv().is_ok() {
                    let _ = tell.send(line.to_vec());
                }
            });
        });
        let line = vec![b'x'; QUEUE_BYTES / 4];
        // One may be in the writer's hands already.
        (0..10).for_each(|_| queue.put(line.clone()));
        queue.wait_written(Duration::from_millis(1));
        assert!(queue.lock().bytes <= QUEUE_BYTES);
        let mut lines = 0;
        loop {
            allow.send(()).expect("the writer lives");
            let next = told.recv().expect("written");
            if next != line {
                let text = String::from_utf8(next).expect("a message");
                assert_eq!(
                    text,
                    format!("vmft: {} messages that nobody read are lost\n", 10 - lines)
                );
                break;
            }
            lines += 1;
        }
        assert!((4..=5).contains(&lines), "{lines}");
        queue.put(b"late".to_vec());
        allow.send(()).expect("the writer lives");
        assert_eq!(told.recv().expect("written"), b"late");
    }
}
