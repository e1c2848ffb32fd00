//! Telling a backup of a generation, until it is known to have heard.
//!
//! Frames keep their order, so what answers a later frame answers for the `Reign` frame as well: an
//! acknowledgement of an entry that was sent after it, or the echo of a heartbeat that was.

use crate::session::Heartbeat;
use crate::time::MonotonicTime;
use vmft_log::entry::{EntrySequence, Generation};

/// What shows that the backup has heard.
#[derive(Debug, Clone, Copy)]
struct Sent {
    /// An acknowledgement of a later entry than this one.
    entry: EntrySequence,
    /// An echo of this heartbeat, once it is sent, or of a later one.
    heartbeat: Option<MonotonicTime>,
}

/// The generation a backup is told of.
#[derive(Debug, Default)]
pub(crate) struct GenerationNews {
    /// It is still to be told of this one.
    pending: Option<Generation>,
    /// It has been told, and has not shown yet that it heard.
    sent: Option<Sent>,
}

impl GenerationNews {
    /// The backup is to be told.
    pub(crate) const fn tell(&mut self, generation: Generation) {
        self.pending = Some(generation);
    }

    /// True if there is something to tell.
    pub(crate) const fn is_due(&self) -> bool {
        self.pending.is_some()
    }

    /// True if the backup is known to have heard everything.
    pub(crate) const fn is_known(&self) -> bool {
        self.pending.is_none() && self.sent.is_none()
    }

    /// What is to be told now, with `last` the last entry sent.
    pub(crate) fn poll(&mut self, last: EntrySequence) -> Option<Generation> {
        let generation = self.pending.take()?;
        self.sent = Some(Sent { entry: last, heartbeat: None });
        Some(generation)
    }

    /// A heartbeat is sent at `now`.
    pub(crate) const fn heartbeat_sent(&mut self, now: MonotonicTime) {
        if let Some(Sent { heartbeat: heartbeat @ None, .. }) = &mut self.sent {
            *heartbeat = Some(now);
        }
    }

    /// The backup's heartbeat has come.
    pub(crate) fn heartbeat(&mut self, heartbeat: &Heartbeat) {
        let echoed = heartbeat.echo.map(|echo| echo.sent_at);
        let sent = self.sent.and_then(|sent| sent.heartbeat);
        if sent.zip(echoed).is_some_and(|(sent, echoed)| echoed >= sent) {
            self.sent = None;
        }
    }

    /// The backup has received every entry up to `received`.
    pub(crate) fn acknowledged(&mut self, received: EntrySequence) {
        if self.sent.is_some_and(|sent| received > sent.entry) {
            self.sent = None;
        }
    }
}
