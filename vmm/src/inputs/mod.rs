//! The one door in.
//!
//! Every nondeterministic value reaches the machine through [`Inputs`]. It has three
//! implementations: [`Live`] takes inputs from the world, [`Recording`] does the same and logs
//! them, [`Replaying`] takes them from the log. The run loop cannot tell them apart.

mod booting;
mod clock;
mod deltas;
mod exits;
mod gauges;
mod live;
mod recording;
mod replaying;
mod scale;

pub use booting::OnReboot;
pub use clock::{ClockControl, HostTime};
pub use exits::ExitDifference;
pub use gauges::Gauges;
pub use live::{Asked, InputSource, Live, WallClock};
pub use recording::{LogSink, Recording};
pub use replaying::{Difference, Divergence, LogEnd, LogSource, Replaying};
pub use scale::{Pace, PointScale};

use crate::board::DiskOperation;
use crate::machine::{BootSource, Delta};
use std::time::Duration;
use vmft_cpu::ExitRecord;
use vmft_log::entry::{Arrival, OutputSequence, RequestId, StateDigest, StopReason};
use vmft_log::point::{CodeAddress, ExecutionPoint, VirtualClock, VirtualTime};

/// Where the machine is when it asks for inputs: between two instructions.
#[derive(Debug, Clone, Copy)]
pub struct Boundary {
    /// The last point the machine has reached.
    pub point: ExecutionPoint,
    /// Whether it is there still.
    pub place: Place,
    /// Guest time here.
    pub time: VirtualTime,
    /// The function that gives it.
    pub clock: VirtualClock,
    /// True if the guest was reset and waits for what its disks boot. It is idle until then.
    pub awaits_boot: bool,
    /// How often the guest was reset.
    pub resets: Resets,
    /// True if an interrupt is pending, which the guest has not taken.
    pub interrupt_pending: bool,
    /// When the guest's next timer is due, in guest time.
    pub next_timer: Option<VirtualTime>,
    /// Outputs produced so far.
    pub outputs: OutputSequence,
    /// What the devices can take now.
    pub room: Room,
}

/// Where a machine is, as a log can say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// At the point itself.
    Point(AtPoint),
    /// Somewhere behind it, where the host made the engine come back: a place without a name, at which nothing
    /// may happen to the guest.
    Between {
        /// The nearest point ahead that the guest can be stopped at although it does not exit. `None` on an
        /// engine that stops at exits only.
        nearest: Option<ExecutionPoint>,
    },
}

/// A machine's word that it is at a point. What is done to a guest there needs it ([`Step::Here`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct AtPoint {
    /// If the point lies behind a branch: where that branch is, if whoever comes this way is sure to meet it
    /// there.
    pub branch: Option<CodeAddress>,
    /// True if the guest waits in `HLT` and no interrupt is pending: it cannot run on without an input.
    pub idle: bool,
}

impl Boundary {
    /// The machine's word that it is at the point, if it is.
    pub const fn here(&self) -> Option<AtPoint> {
        match self.place {
            Place::Point(here) => Some(here),
            Place::Between { .. } => None,
        }
    }

    /// True if the guest cannot run on without an input.
    pub const fn is_idle(&self) -> bool {
        matches!(self.place, Place::Point(AtPoint { idle: true, .. }))
    }
}

/// How often a guest was reset, as this side has seen it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Resets {
    /// In all.
    pub total: u64,
    /// In the last minute of guest time, since it wrote to a disk.
    pub fruitless: u32,
}

/// What the devices can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Room {
    /// Bytes of console input.
    pub console: usize,
    /// Whether a group of packets.
    pub packets: bool,
}

/// What the machine does next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Run, but not beyond this point, which lies after the boundary's. Never answered to an
    /// idle machine.
    RunTo(ExecutionPoint),
    /// Do this, at the point where the machine is.
    Here(AtPoint, PointStep),
    /// Give this place a name by its state, and hand that to [`Inputs::checkpoint`]: something waits
    /// for the guest, and no point comes; or whoever follows is far behind.
    Checkpoint,
    /// Start the guest, which waits for that, with this.
    Boot(Box<BootSource>),
    /// Give this place a name by all of the machine, and hand that to [`Inputs::checkpoint`]: the guest has
    /// just been started with what nobody else has.
    Whole,
    /// Become the machine that this was taken of.
    Adopt(Box<Delta>),
    /// Return to the caller, who may save the machine and call `run` again.
    Pause,
    /// Stop for good.
    Stop(StopReason),
    /// Run no further: this side has lost its generation.
    Halt,
    /// No more log: replaying is over.
    LogEnded,
}

/// What is done to a guest at a point, and nowhere else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PointStep {
    /// Apply this input.
    Deliver(Arrival),
    /// Take a digest, and hand it to [`Inputs::digest`].
    Digest,
    /// Forget what is cached of memory, as the side did that logged it: a backup started from here.
    Flush,
}

/// A request of a device that nobody outside can see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceRequest {
    /// Disk data.
    DiskRead {
        /// Which disk.
        disk: u8,
        /// The device's name for the request.
        request: RequestId,
        /// A [`DiskOperation::Read`].
        operation: DiskOperation,
    },
    /// Random bytes.
    Entropy {
        /// The device's name for the request.
        request: RequestId,
        /// How many.
        len: u32,
    },
}

/// Why inputs ran dry or were wrong.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// The replaying side is not where the log says it must be.
    #[error(transparent)]
    Divergence(#[from] Box<Divergence>),
    /// The log could not be written.
    #[error("writing the log")]
    Log(#[source] std::io::Error),
    /// The host has no random bytes.
    #[error("reading random bytes from the host")]
    Entropy(#[source] std::io::Error),
}

/// The source of everything the guest cannot compute by itself.
///
/// No method has a default body: inputs around other inputs that forgot to forward one would compile.
pub trait Inputs {
    /// What to do at this boundary. Called with the same boundary again after a step that
    /// retires no instruction.
    ///
    /// # Errors
    /// See [`InputError`].
    fn next(&mut self, boundary: &Boundary) -> Result<Step, InputError>;

    /// Where the branch is that `point` lies behind, if that is known beforehand: a hint for the engine
    /// that is to run there.
    fn branch_before(&self, point: ExecutionPoint) -> Option<CodeAddress>;

    /// A device wants something; it comes later, as an arrival.
    ///
    /// # Errors
    /// See [`InputError`].
    fn request(&mut self, request: DeviceRequest) -> Result<(), InputError>;

    /// The digest asked for by [`PointStep::Digest`].
    ///
    /// # Errors
    /// [`InputError::Divergence`] if the log says something else.
    fn digest(&mut self, point: ExecutionPoint, digest: StateDigest) -> Result<(), InputError>;

    /// True if the digest just given is where the next checkpoint in the log may begin from: whoever has
    /// passed it agrees on all of memory.
    fn is_base(&self) -> bool;

    /// What was asked for by [`Step::Checkpoint`]; `None` if there was nothing to take. The machine is
    /// at a point now, unless there was nothing.
    ///
    /// # Errors
    /// [`InputError::Log`] if it cannot be written.
    fn checkpoint(&mut self, delta: Option<Delta>) -> Result<(), InputError>;

    /// True if [`Self::exits`] wants to know what the guest exits for.
    fn watches_exits(&self) -> bool;

    /// The exits since the last call, which led to `point` or to places behind it.
    ///
    /// # Errors
    /// [`InputError::Log`] if they cannot be written.
    fn exits(&mut self, point: ExecutionPoint, exits: &[ExitRecord]) -> Result<(), InputError>;

    /// The machine was not run for so long, up to now, because its side had it stand still: that is no part of
    /// the guest's time. Nothing to whoever takes time from a log.
    fn stood_still(&mut self, time: Duration);
}
