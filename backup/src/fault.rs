//! Faults planted on purpose, for people who study what a pair does about them.
//!
//! A bit of memory flips on one side, as it would in bad memory: to the other side that is a divergence. Or a
//! backup stops replaying for a while, and goes on receiving and acknowledging, as on a host that is too busy.
//! Or a live machine fails, as if its guest had met a fault of this program.
//! All happen at a point of the guest, between two instructions, so what follows is the pair's own doing.

use crate::events::{self, Event};
use crate::requests::Requests;
use crate::status::{Role, StatusBoard};
use crate::tell;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};
use vmft_cpu::ExitRecord;
use vmft_cpu::memory::GuestRam;
use vmft_log::entry::StateDigest;
use vmft_log::point::{CodeAddress, ExecutionPoint};
use vmft_logging_channel::transport::BackupChannel;
use vmft_threads::{Mutex, MutexGuard};
use vmft_vmm::inputs::{Boundary, DeviceRequest, InputError, Inputs, Step};
use vmft_vmm::machine::Delta;
use vmft_vmm::world::Mailbox;

/// How long a fault waits for the guest to come to a point: an idle one may take a while.
const POINT_PATIENCE: Duration = Duration::from_secs(20);
/// How long a replay that is held waits before it looks for another fault.
const HOLD_STEP: Duration = Duration::from_millis(20);
/// The longest a replay may be held.
pub const MAX_HOLD: Duration = Duration::from_secs(600);

/// What is to go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// A bit of guest memory flips.
    FlipBit {
        /// The guest-physical address of its byte.
        address: u64,
        /// Its place in the byte, 0 to 7.
        bit: u8,
    },
    /// A backup replays nothing for so long, or until its primary is lost, and goes on receiving.
    HoldReplay {
        /// In milliseconds, at most [`MAX_HOLD`].
        ms: u64,
    },
    /// The machine of a live side fails.
    Fail,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FlipBit { address, bit } => {
                write!(f, "bit {bit} of the byte at {address:#x} flipped")
            }
            Self::HoldReplay { ms } => write!(f, "replay held for {ms} ms"),
            Self::Fail => f.write_str("the machine fails"),
        }
    }
}

/// A fault, and whether the side that runs the guest may have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultOrder {
    /// What is to go wrong.
    pub fault: Fault,
    /// Also on a live side, where it changes the guest itself.
    #[serde(default)]
    pub live: bool,
}

/// Where a fault was planted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Planted {
    /// The guest's point.
    pub point: ExecutionPoint,
}

/// Why a fault is not planted. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FaultError {
    /// Not an address of memory.
    #[error("the guest has no memory at {address:#x}")]
    NoMemory {
        /// The address.
        address: u64,
    },
    /// A byte has eight bits.
    #[error("bit {bit}: a byte has bits 0 to 7")]
    NoBit {
        /// The bit.
        bit: u8,
    },
    /// Too long.
    #[error("a replay is held for at most {} s", MAX_HOLD.as_secs())]
    TooLong,
    /// The side is live, and nobody said that it may be this one.
    #[error(
        "this side runs the guest: a bit flipped here is the guest's own, and its backup is mended to it; \
         ask the backup, or say live=on"
    )]
    Live,
    /// Only a machine that runs the guest fails here.
    #[error("this side does not run the guest; ask the one that is live")]
    NotLive,
    /// The side replays nothing that could be held.
    #[error("this side does not replay; ask a backup that follows in lockstep")]
    NotReplaying,
    /// The side keeps a machine by epochs.
    #[error(
        "this side is kept by checkpoints and executes nothing, so nobody would notice; faults are for \
         lockstep"
    )]
    Epochs,
    /// There is no guest here now.
    #[error("this side has no guest now, its role is {role:?}")]
    NoGuest {
        /// What the side is doing.
        role: Role,
    },
    /// No point came.
    #[error("the guest has come to no point within {} s", POINT_PATIENCE.as_secs())]
    NoPoint,
    /// The session, or the guest, ended first.
    #[error("the guest, or its replay here, ended first")]
    Over,
}

impl Fault {
    /// Looks at what can be known without a guest.
    fn check(self) -> Result<(), FaultError> {
        match self {
            Self::FlipBit { bit, .. } if bit > 7 => Err(FaultError::NoBit { bit }),
            Self::HoldReplay { ms } if Duration::from_millis(ms) > MAX_HOLD => {
                Err(FaultError::TooLong)
            }
            Self::FlipBit { .. } | Self::HoldReplay { .. } | Self::Fail => Ok(()),
        }
    }
}

/// Flips a bit of `ram`.
fn flip(ram: &GuestRam, address: u64, bit: u8) -> Result<(), FaultError> {
    let (memory, place) = (ram.memory(), GuestAddress(address));
    let no_memory = |_| FaultError::NoMemory { address };
    let byte: u8 = memory.read_obj(place).map_err(no_memory)?;
    memory.write_obj(byte ^ 1 << bit, place).map_err(no_memory)
}

type Reply = Sender<Result<Planted, FaultError>>;

/// Who replays on this side.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Replay {
    #[default]
    None,
    Lockstep,
    Epochs,
}

#[derive(Debug, Default)]
struct Waiting {
    replay: Replay,
    faults: VecDeque<(Fault, Reply)>,
}

/// Faults on their way to a replaying machine.
#[derive(Debug, Default)]
pub struct Faults {
    waiting: Mutex<Waiting>,
    any: AtomicBool,
}

impl Faults {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock()
    }

    /// A machine replays in lockstep until the guard is dropped.
    pub(crate) fn lockstep(self: &Arc<Self>) -> ReplayGuard {
        self.begin(Replay::Lockstep)
    }

    /// A machine is kept by epochs until the guard is dropped.
    pub(crate) fn epochs(self: &Arc<Self>) -> ReplayGuard {
        self.begin(Replay::Epochs)
    }

    fn begin(self: &Arc<Self>, replay: Replay) -> ReplayGuard {
        self.lock().replay = replay;
        ReplayGuard(Arc::clone(self))
    }

    /// True if a machine follows here: in lockstep, or by epochs.
    pub fn has_replay(&self) -> bool {
        self.lock().replay != Replay::None
    }

    fn take(&self) -> Option<(Fault, Reply)> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        let mut waiting = self.lock();
        let next = waiting.faults.pop_front();
        self.any.store(!waiting.faults.is_empty(), Ordering::Release);
        next
    }

    /// Hands a fault to whoever replays. `None` if nobody does.
    fn hand_in(
        &self,
        fault: Fault,
    ) -> Result<Option<Receiver<Result<Planted, FaultError>>>, FaultError> {
        let mut waiting = self.lock();
        match waiting.replay {
            Replay::None => Ok(None),
            Replay::Epochs => Err(FaultError::Epochs),
            Replay::Lockstep => {
                let (reply, planted) = channel();
                waiting.faults.push_back((fault, reply));
                self.any.store(true, Ordering::Release);
                Ok(Some(planted))
            }
        }
    }
}

/// While it lives, faults are taken by a machine that replays.
#[derive(Debug)]
pub(crate) struct ReplayGuard(Arc<Faults>);

impl Drop for ReplayGuard {
    /// Whoever waits is told that it is over.
    fn drop(&mut self) {
        *self.0.lock() = Waiting::default();
        self.0.any.store(false, Ordering::Release);
    }
}

/// Where operators ask for faults.
#[derive(Debug, Clone)]
pub struct FaultDesk {
    /// A replaying machine's.
    pub faults: Arc<Faults>,
    /// A live machine's.
    pub requests: Arc<Requests>,
    /// How a live machine is made to rest.
    pub mailbox: Arc<Mailbox>,
    /// What the side is doing.
    pub status: Arc<StatusBoard>,
}

impl FaultDesk {
    /// Plants a fault at the guest's next point, and waits for that.
    ///
    /// # Errors
    /// [`FaultError`]
    pub fn plant(&self, order: FaultOrder) -> Result<Planted, FaultError> {
        let FaultOrder { fault, live } = order;
        fault.check()?;
        let planted = match self.faults.hand_in(fault)? {
            Some(planted) => match planted.recv_timeout(POINT_PATIENCE) {
                Ok(planted) => planted?,
                Err(RecvTimeoutError::Timeout) => return Err(FaultError::NoPoint),
                Err(RecvTimeoutError::Disconnected) => return Err(FaultError::Over),
            },
            None => self.plant_live(fault, live)?,
        };
        events::note(|| Event::FaultPlanted { fault, point: planted.point.get() });
        tell!("fault planted at point {}: {fault}", planted.point);
        Ok(planted)
    }

    fn plant_live(&self, fault: Fault, live: bool) -> Result<Planted, FaultError> {
        let role = self.status.status().role;
        match role {
            Role::Unprotected | Role::WaitingForBackup | Role::Primary | Role::Alone => {}
            Role::Starting
            | Role::Joining
            | Role::Backup
            | Role::Deciding
            | Role::Halted
            | Role::Stopped => return Err(FaultError::NoGuest { role }),
        }
        match fault {
            Fault::HoldReplay { .. } => return Err(FaultError::NotReplaying),
            Fault::FlipBit { .. } if !live => return Err(FaultError::Live),
            Fault::FlipBit { .. } | Fault::Fail => {}
        }
        let plant = move |machine: &mut vmft_vmm::machine::Machine| {
            match fault {
                Fault::FlipBit { address, bit } => flip(machine.ram(), address, bit)?,
                Fault::HoldReplay { .. } => {}
                Fault::Fail => machine.fail(),
            }
            Ok(Planted { point: machine.point() })
        };
        self.requests.at_rest(&self.mailbox, plant).map_err(|_| FaultError::Over)?
    }
}

/// Replayed inputs, with faults at points.
#[derive(Debug)]
pub(crate) struct Faulty<'a, I> {
    inputs: I,
    faults: &'a Faults,
    ram: GuestRam,
    channel: &'a BackupChannel,
}

impl<'a, I: Inputs> Faulty<'a, I> {
    pub(crate) fn new(
        inputs: I,
        faults: &'a Faults,
        ram: GuestRam,
        channel: &'a BackupChannel,
    ) -> Self {
        Self { inputs, faults, ram, channel }
    }

    pub(crate) fn inputs(&mut self) -> &mut I {
        &mut self.inputs
    }

    /// Plants what waits, with the guest at `point`. A held replay is at a point all the time, so more
    /// can be planted meanwhile.
    fn plant(&self, point: ExecutionPoint) {
        let mut hold_until: Option<Instant> = None;
        loop {
            while let Some((fault, reply)) = self.faults.take() {
                let planted = match fault {
                    Fault::FlipBit { address, bit } => flip(&self.ram, address, bit),
                    Fault::HoldReplay { ms } => {
                        hold_until = Some(Instant::now() + Duration::from_millis(ms));
                        Ok(())
                    }
                    Fault::Fail => Err(FaultError::NotLive),
                };
                // Whoever asked may have gone.
                let _ = reply.send(planted.map(|()| Planted { point }));
            }
            let Some(until) = hold_until else { return };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.channel.wait_end(left.min(HOLD_STEP)) {
                return;
            }
        }
    }
}

impl<I: Inputs> Inputs for Faulty<'_, I> {
    fn next(&mut self, boundary: &Boundary) -> Result<Step, InputError> {
        if boundary.here().is_some() {
            self.plant(boundary.point);
        }
        self.inputs.next(boundary)
    }

    fn branch_before(&self, point: ExecutionPoint) -> Option<CodeAddress> {
        self.inputs.branch_before(point)
    }

    fn is_base(&self) -> bool {
        self.inputs.is_base()
    }

    fn request(&mut self, request: DeviceRequest) -> Result<(), InputError> {
        self.inputs.request(request)
    }

    fn stood_still(&mut self, time: Duration) {
        self.inputs.stood_still(time);
    }

    fn digest(&mut self, point: ExecutionPoint, digest: StateDigest) -> Result<(), InputError> {
        self.inputs.digest(point, digest)
    }

    fn checkpoint(&mut self, delta: Option<Delta>) -> Result<(), InputError> {
        self.inputs.checkpoint(delta)
    }

    fn watches_exits(&self) -> bool {
        self.inputs.watches_exits()
    }

    fn exits(&mut self, point: ExecutionPoint, exits: &[ExitRecord]) -> Result<(), InputError> {
        self.inputs.exits(point, exits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmft_cpu::memory::MIN_MEMORY;

    fn desk(role: Role) -> FaultDesk {
        let status = Arc::new(StatusBoard::default());
        status.update(|status| status.role = role);
        let (faults, requests, mailbox) = (Arc::default(), Arc::default(), Arc::default());
        FaultDesk { faults, requests, mailbox, status }
    }

    const FLIP: Fault = Fault::FlipBit { address: 0x1000, bit: 3 };

    fn order(fault: Fault) -> FaultOrder {
        FaultOrder { fault, live: false }
    }

    #[test]
    fn a_bit_flips_in_memory_and_nowhere_else() {
        let ram = GuestRam::new(MIN_MEMORY).expect("64 MiB is allowed");
        flip(&ram, 0x1000, 3).expect("memory");
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(0x1000)).expect("memory"), 8);
        flip(&ram, 0x1000, 3).expect("memory");
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(0x1000)).expect("memory"), 0);
        for address in [MIN_MEMORY, u64::MAX] {
            assert_eq!(flip(&ram, address, 0), Err(FaultError::NoMemory { address }));
        }
    }

    #[test]
    fn what_no_side_can_do_is_refused() {
        let desk = desk(Role::Backup);
        let bit = Fault::FlipBit { address: 0, bit: 8 };
        assert_eq!(desk.plant(order(bit)), Err(FaultError::NoBit { bit: 8 }));
        assert_eq!(desk.plant(order(Fault::HoldReplay { ms: 600_001 })), Err(FaultError::TooLong));
        let no_guest = FaultError::NoGuest { role: Role::Backup };
        assert_eq!(desk.plant(order(FLIP)), Err(no_guest), "it is between two sessions");
    }

    #[test]
    fn a_live_side_is_spared_unless_it_is_named() {
        for role in [Role::Unprotected, Role::Primary, Role::Alone] {
            let desk = desk(role);
            assert_eq!(desk.plant(order(FLIP)), Err(FaultError::Live), "{role:?}");
            let hold = FaultOrder { fault: Fault::HoldReplay { ms: 1 }, live: true };
            assert_eq!(desk.plant(hold), Err(FaultError::NotReplaying), "{role:?}");
        }
    }

    #[test]
    fn a_side_kept_by_epochs_says_that_nobody_would_notice() {
        let desk = desk(Role::Backup);
        let _guard = desk.faults.epochs();
        assert_eq!(desk.plant(order(FLIP)), Err(FaultError::Epochs));
    }

    #[test]
    fn whoever_waits_for_a_replay_that_ends_is_told() {
        let desk = desk(Role::Backup);
        let guard = desk.faults.lockstep();
        let planted = desk.faults.hand_in(FLIP).expect("it replays").expect("in lockstep");
        drop(guard);
        assert!(planted.recv().is_err());
        assert!(desk.faults.take().is_none());
    }
}
