//! What the buttons of a page do, and which of them there are.

use crate::api_client;
use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use vmft_backup::fault::{Fault, FaultOrder};
use vmft_backup::status::{DiskState, Role, SideStatus};

/// Where a bit flips: low in the memory of any guest, in its kernel's or in nobody's.
const FLIPPED: Fault = Fault::FlipBit { address: 0x5_0123, bit: 4 };

/// Something that can be done to a side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Act {
    /// Its guest is handed over to its backup.
    Switch,
    /// Its guest stands still.
    Pause,
    /// Its guest goes on.
    Resume,
    /// A bit of its memory flips.
    FlipBit,
    /// Its process is killed, as a power failure would.
    Kill,
    /// Its process stands still, as a host that hangs would.
    Freeze,
    /// Its process goes on.
    Thaw,
    /// Its process is started again, as a standby.
    Start,
    /// Its guest is stopped, and the pair with it.
    Stop,
}

impl Act {
    /// All of them, in the order of their buttons.
    pub const ALL: [Self; 9] = [
        Self::Switch,
        Self::Pause,
        Self::Resume,
        Self::FlipBit,
        Self::Kill,
        Self::Freeze,
        Self::Thaw,
        Self::Start,
        Self::Stop,
    ];

    /// The word on its button.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Switch => "Switch",
            Self::Pause => "Pause",
            Self::Resume => "Resume",
            Self::FlipBit => "Flip a bit",
            Self::Kill => "Kill",
            Self::Freeze => "Freeze",
            Self::Thaw => "Thaw",
            Self::Start => "Start again",
            Self::Stop => "Stop",
        }
    }

    /// What it does, in some more words.
    pub const fn hint(self) -> &'static str {
        match self {
            Self::Switch => "hand the guest over to its backup",
            Self::Pause => "the guest stands still, protected as before",
            Self::Resume => "the guest goes on",
            Self::FlipBit => "a bit of this side's memory flips: it diverges, and is mended",
            Self::Kill => "SIGKILL: its host has lost its power",
            Self::Freeze => "SIGSTOP: its host hangs",
            Self::Thaw => "SIGCONT: its host comes back",
            Self::Start => "as a standby, which follows whoever is live",
            Self::Stop => "the guest ends, and both sides with it",
        }
    }

    /// True if it is done to a process: by whoever has started it.
    pub const fn is_of_processes(self) -> bool {
        matches!(self, Self::Kill | Self::Freeze | Self::Thaw | Self::Start)
    }
}

/// A side's process, as whoever has started it knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessState {
    /// It runs.
    Runs,
    /// It has been stopped, and goes on when it is told to.
    Frozen,
    /// It has ended.
    Gone,
}

/// What may be done to a side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    /// Nothing: it is only looked at.
    Looks,
    /// What an operator may ask of it.
    Asks,
    /// Anything: its process was started from here.
    Owns(ProcessState),
}

/// True for a role in which the guest runs here, or rests here until it may.
pub(crate) const fn has_guest(role: Role) -> bool {
    match role {
        Role::Unprotected | Role::WaitingForBackup | Role::Primary | Role::Alone => true,
        Role::Starting
        | Role::Joining
        | Role::Backup
        | Role::Deciding
        | Role::Halted
        | Role::Stopped => false,
    }
}

/// Whether there is a button for it, by what a side that answers says of itself.
pub(super) fn is_offered(act: Act, power: Power, status: Option<&SideStatus>) -> bool {
    let owned = match power {
        Power::Looks => return false,
        Power::Asks => None,
        Power::Owns(state) => Some(state),
    };
    match (act, owned) {
        (Act::Kill, state) => matches!(state, Some(ProcessState::Runs | ProcessState::Frozen)),
        (Act::Thaw, state) => state == Some(ProcessState::Frozen),
        (Act::Start, state) => state == Some(ProcessState::Gone),
        (Act::Freeze, state) => state == Some(ProcessState::Runs),
        (_, Some(ProcessState::Frozen | ProcessState::Gone)) => false,
        (_, owned) => {
            let Some(status) = status else { return false };
            let has_guest = has_guest(status.role) && status.role != Role::WaitingForBackup;
            let is_stopped =
                status.disk_troubles.iter().any(|disk| disk.state == DiskState::Stopped);
            match act {
                Act::Switch => status.role == Role::Primary && status.followers > 0,
                Act::Pause => has_guest && !status.is_paused,
                Act::Resume => has_guest && (status.is_paused || is_stopped),
                Act::Stop => has_guest,
                // A bit of a guest that runs would be the guest's own.
                Act::FlipBit => owned.is_some() && status.role == Role::Backup,
                Act::Kill | Act::Freeze | Act::Thaw | Act::Start => false,
            }
        }
    }
}

/// Whoever does what the buttons ask for.
pub trait Hands: fmt::Debug + Send + Sync {
    /// What may be done to a side.
    fn power(&self, side: usize) -> Power;

    /// Does it, and returns when it is done or refused.
    ///
    /// # Errors
    /// What the side, or this host, has to say against it.
    fn act(&self, side: usize, act: Act) -> Result<()>;
}

/// Hands that ask sides by their API sockets, as `vmft switch` and the like do.
#[derive(Debug, Clone)]
pub struct ByApi(pub Vec<PathBuf>);

impl Hands for ByApi {
    fn power(&self, _side: usize) -> Power {
        Power::Asks
    }

    fn act(&self, side: usize, act: Act) -> Result<()> {
        ensure!(side < self.0.len(), "there is no such side");
        let socket = &self.0[side];
        match act {
            Act::Switch => api_client::switch(socket),
            Act::Pause => api_client::pause(socket),
            Act::Resume => api_client::resume(socket),
            Act::Stop => api_client::shutdown(socket),
            Act::FlipBit | Act::Kill | Act::Freeze | Act::Thaw | Act::Start => {
                bail!("that is for a demo, whose sides are its own")
            }
        }
    }
}

/// Flips a bit of the memory of the side at a socket.
///
/// # Errors
/// What the side has to say against it.
pub fn flip_bit(socket: &std::path::Path) -> Result<()> {
    api_client::fault(socket, FaultOrder { fault: FLIPPED, live: false }).map(drop)
}
