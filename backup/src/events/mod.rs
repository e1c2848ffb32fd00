//! What happens to a side, as records that programs read: `--event-log FILE`.
//!
//! [`Record`] is a line of the file, [`Event`] what it tells. Whoever has news calls [`note`], which costs a
//! few microseconds and never waits: a thread of its own writes the lines. A file that takes nothing holds
//! no side up; what does not fit into the queue is counted, and the count is written once there is room.
//!
//! The two judges ([`crate::reign`]) have their inputs recorded with the time that they were told, and what
//! they ordered. [`JudgeReplay`] gives the inputs to judges of its own and compares: a failover becomes a
//! file that explains itself.
//!
//! **Invariant.** Every line that is begun is written to its end, if the process lives: a line is cut by the
//! death of its process or host only, and is the last one then.

mod judges;
mod queue;
mod schema;

pub use judges::{JudgeMismatch, JudgeReplay};
pub use schema::{
    Ending, Event, Judge, JudgeInput, JudgeOrder, LOWEST_UNUSED_NUMBER, MAX_LINE, Peer, Record,
    RecordError, VERSION,
};

use crate::status::{Role, ms};
use crate::tell;
use queue::Queue;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use vmft_log::entry::Generation;
use vmft_log::foreign::ForeignText;
use vmft_logging_channel::transport::now;
use vmft_sandbox::Task;
use vmft_threads::{Mutex, MutexGuard};

static LOG: OnceLock<Log> = OnceLock::new();

/// What every record says of its side.
#[derive(Debug, Default)]
struct Place {
    side: ForeignText,
    role: Role,
    generation: u64,
    number: u64,
    judges: u64,
    /// Records that did not fit since the last one that did.
    lost: u64,
    /// The same, since the beginning.
    lost_ever: u64,
}

#[derive(Debug)]
struct Log {
    place: Mutex<Place>,
    queue: Queue,
}

impl Place {
    /// The next record's line.
    fn line(&mut self, event: Event) -> Vec<u8> {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let record = Record {
            v: VERSION,
            number: self.number,
            wall_us: u64::try_from(wall.as_micros()).unwrap_or(u64::MAX),
            boot_ns: now().as_ns(),
            side: self.side.clone(),
            role: self.role,
            generation: self.generation,
            event,
        };
        self.number += 1;
        record.to_line()
    }
}

impl Log {
    fn lock(&self) -> MutexGuard<'_, Place> {
        // A panic is noted here, too.
        self.place.lock()
    }

    /// Numbers and queues a record; counts it where there is no room.
    fn add(&self, place: &mut Place, event: Event) {
        if place.lost > 0 && self.queue.has_room() {
            let count = std::mem::take(&mut place.lost);
            let line = place.line(Event::EventsLost { count });
            self.queue.put(line);
        }
        let line = place.line(event);
        if !self.queue.put(line) {
            place.lost += 1;
            place.lost_ever += 1;
        }
    }
}

/// From now on what happens is written to `file`, which messages call `path`; `side` names this side in each
/// record, and `begin` is the first of them. Only the first call counts.
///
/// # Errors
/// The host's, where it starts no thread.
pub fn to_file(
    mut file: File,
    path: PathBuf,
    side: ForeignText,
    begin: Event,
) -> std::io::Result<()> {
    let place = Mutex::new(Place { side, ..Place::default() });
    if LOG.set(Log { place, queue: Queue::default() }).is_err() {
        return Ok(());
    }
    note(|| begin);
    let log = LOG.get().expect("just set");
    let write = move || {
        log.queue.write_all(&mut |bytes| file.write(bytes), &mut |trouble| match trouble {
            Some(error) => tell!("the event log {} takes nothing: {error}", path.display()),
            None => {
                let lost = lost();
                tell!("the event log {} is written again; {lost} events are lost", path.display());
                // So that the count is in the file even if nothing else happens.
                let mut place = log.lock();
                if place.lost > 0 {
                    let count = std::mem::take(&mut place.lost);
                    let line = place.line(Event::EventsLost { count });
                    log.queue.put(line);
                }
            }
        });
    };
    vmft_sandbox::spawn(Task::Messages, "events", write).map(drop)
}

/// Something has happened. `event` is not called where there is no log.
pub fn note(event: impl FnOnce() -> Event) {
    if let Some(log) = LOG.get() {
        let event = event();
        log.add(&mut log.lock(), event);
    }
}

/// The channel's thread was late, by so much.
pub(crate) fn note_late_heartbeat(late: Duration) {
    note(|| Event::HeartbeatLate { late_ms: ms(late) });
}

/// The side has another role, or generation.
pub(crate) fn note_role(role: Role, generation: Generation) {
    if let Some(log) = LOG.get() {
        let mut place = log.lock();
        if (place.role, place.generation) != (role, generation.0) {
            let from = std::mem::replace(&mut place.role, role);
            place.generation = generation.0;
            log.add(&mut place, Event::Role { from });
        }
    }
}

/// A judge of this side, whose inputs and orders are recorded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct JudgeLog(u64);

impl JudgeLog {
    /// A judge begins its work.
    pub(crate) fn begin(judge: Judge) -> Self {
        let Some(log) = LOG.get() else { return Self(0) };
        let mut place = log.lock();
        place.judges += 1;
        let number = place.judges;
        log.add(&mut place, Event::JudgeBegins { number, judge });
        Self(number)
    }

    /// It is told something; `input` is not called where there is no log.
    pub(crate) fn heard(
        self,
        at: vmft_logging_channel::time::MonotonicTime,
        input: impl FnOnce() -> JudgeInput,
    ) {
        note(|| Event::Heard { judge: self.0, at, input: input() });
    }

    /// It orders something.
    pub(crate) fn ordered(self, order: impl FnOnce() -> JudgeOrder) {
        note(|| Event::Ordered { judge: self.0, order: order() });
    }
}

/// How many events did not fit, because the file took nothing.
pub fn lost() -> u64 {
    LOG.get().map_or(0, |log| log.lock().lost_ever)
}

/// Waits until everything is written, for at most `limit`: before a process ends. What is not written then is
/// said.
pub fn finish(limit: Duration) {
    let Some(log) = LOG.get() else { return };
    let left = log.queue.wait_written(limit);
    let lost = log.lock().lost;
    if left + lost > 0 {
        tell!("{} events are not in the event log", left + lost);
    }
}
