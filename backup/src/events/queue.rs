//! Lines on their way to a file that may take nothing for a while.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;
use vmft_threads::{Condvar, Mutex, MutexGuard};

/// Bytes of lines that wait to be written: some thousand events.
const QUEUE_BYTES: usize = 1 << 20;
/// How long a file that takes nothing is left alone.
const RETRY: Duration = Duration::from_millis(500);

#[derive(Debug, Default)]
struct Lines {
    waiting: VecDeque<Vec<u8>>,
    bytes: usize,
    is_writing: bool,
    /// The file takes nothing.
    is_stuck: bool,
}

/// The lines.
#[derive(Debug, Default)]
pub(super) struct Queue {
    lines: Mutex<Lines>,
    changed: Condvar,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock()
    }

    /// True if a line of ordinary length would be taken.
    pub(super) fn has_room(&self) -> bool {
        self.lock().bytes + 4096 <= QUEUE_BYTES
    }

    /// Adds a line. False if there is no room.
    pub(super) fn put(&self, line: Vec<u8>) -> bool {
        let mut lines = self.lock();
        if lines.bytes + line.len() > QUEUE_BYTES {
            return false;
        }
        lines.bytes += line.len();
        lines.waiting.push_back(line);
        drop(lines);
        self.changed.notify_all();
        true
    }

    /// Gives lines to `write` for ever, each to its end before the next. `trouble` hears when it takes
    /// nothing any more, and when it takes something again.
    pub(super) fn write_all(
        &self,
        write: &mut dyn FnMut(&[u8]) -> io::Result<usize>,
        trouble: &mut dyn FnMut(Option<&io::Error>),
    ) -> ! {
        loop {
            let mut lines = self.lock();
            let line = loop {
                if let Some(line) = lines.waiting.pop_front() {
                    break line;
                }
                lines = self.changed.wait(lines);
            };
            lines.is_writing = true;
            drop(lines);
            let mut left = line.as_slice();
            while !left.is_empty() {
                match write(left) {
                    Ok(written) if written > 0 => {
                        left = &left[written..];
                        if std::mem::take(&mut self.lock().is_stuck) {
                            trouble(None);
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    refused => {
                        let error = refused.err().unwrap_or_else(|| {
                            io::Error::new(io::ErrorKind::WriteZero, "nothing was taken")
                        });
                        if !std::mem::replace(&mut self.lock().is_stuck, true) {
                            trouble(Some(&error));
                            // Whoever waits for the end need not wait for this file.
                            self.changed.notify_all();
                        }
                        std::thread::sleep(RETRY);
                    }
                }
            }
            // Its room is free only now, so that what waits is what is counted.
            let mut lines = self.lock();
            lines.bytes -= line.len();
            lines.is_writing = false;
            drop(lines);
            self.changed.notify_all();
        }
    }

    /// Waits until everything is written, for at most `limit`; not for a file that takes nothing. Returns how
    /// many lines are left.
    pub(super) fn wait_written(&self, limit: Duration) -> u64 {
        let waits =
            |lines: &mut Lines| !lines.is_stuck && (!lines.waiting.is_empty() || lines.is_writing);
        let lines = self.changed.wait_timeout_while(self.lock(), limit, waits).0;
        lines.waiting.len() as u64 + u64::from(lines.is_writing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    /// How long the writer may take.
    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn a_full_file_holds_nobody_up_and_no_line_is_cut() {
        let queue = Arc::new(Queue::default());
        let (answer, answers) = channel::<io::Result<usize>>();
        let (asked, asks) = channel::<Vec<u8>>();
        let (said, says) = channel();
        let writing = Arc::clone(&queue);
        std::thread::spawn(move || {
            writing.write_all(
                &mut |bytes| {
                    // Without the test nobody reads.
                    let _ = asked.send(bytes.to_vec());
                    answers.recv().unwrap_or(Ok(bytes.len()))
                },
                &mut |trouble| {
                    let _ = said.send(trouble.is_some());
                },
            );
        });
        let full = || Err(io::Error::from(io::ErrorKind::StorageFull));
        assert!(queue.put(b"first\n".to_vec()));
        assert_eq!(asks.recv_timeout(LIMIT), Ok(b"first\n".to_vec()));
        // The file takes a part, and is full then.
        answer.send(Ok(2)).expect("the writer lives");
        assert_eq!(asks.recv_timeout(LIMIT), Ok(b"rst\n".to_vec()));
        answer.send(full()).expect("the writer lives");
        assert_eq!(says.recv_timeout(LIMIT), Ok(true));
        // Meanwhile lines are taken until the queue is full, and nobody waits at the end.
        let long = vec![b'x'; QUEUE_BYTES / 4];
        let taken = (0..10).filter(|_| queue.put(long.clone())).count();
        assert_eq!(taken, 3);
        assert_eq!(queue.wait_written(Duration::from_secs(3600)), 4);
        // There is room again: the rest of the line comes first.
        assert_eq!(asks.recv_timeout(LIMIT), Ok(b"rst\n".to_vec()));
        answer.send(Ok(4)).expect("the writer lives");
        assert_eq!(says.recv_timeout(LIMIT), Ok(false));
        for _ in 0..taken {
            assert_eq!(asks.recv_timeout(LIMIT), Ok(long.clone()));
            answer.send(Ok(long.len())).expect("the writer lives");
        }
        assert_eq!(queue.wait_written(Duration::from_secs(3600)), 0);
        assert!(queue.has_room());
    }
}
