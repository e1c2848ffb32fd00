//! Saving a board and restoring it.

use super::{
    Board, BoardConfig, BoardError, CLOCK_LINE, Effect, EffectQueue, FunctionsState, SERIAL_LINE,
};
use crate::devices::cmos_clock::{CmosClock, CmosClockState};
use crate::devices::guest_clock::{GuestClock, GuestClockState};
use crate::devices::interrupt_controller::{ControllerState, InterruptController};
use crate::devices::interval_timer::{IntervalTimer, IntervalTimerState};
use crate::devices::pci::ConfigAddress;
use crate::devices::power_management::PowerManagementState;
use crate::devices::reset::ResetState;
use crate::devices::serial::{Serial, SerialState};
use crate::devices::virtio::block::completed::CompletedWrites;
use crate::devices::virtio::net::is_good;
use crate::devices::{IrqLine, require};
use serde::{Deserialize, Serialize};
use vmft_cpu::memory::GuestRam;

use super::functions::Functions;

/// Everything about the devices that the guest can ever notice, and the requests on their way.
///
/// Two boards of the same configuration with the same memory and equal states behave alike.
/// It contains no reports ([`Board::take_faults`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardState {
    /// The interrupt controllers.
    pub interrupts: [ControllerState; 2],
    /// The interval timer.
    pub timer: IntervalTimerState,
    /// The clock.
    pub clock: CmosClockState,
    /// The clock for guests that know they are guests.
    pub guest_clock: GuestClockState,
    /// The serial port.
    pub serial: SerialState,
    /// A reset in progress.
    pub reset: ResetState,
    /// Power management.
    pub power: PowerManagementState,
    /// Port 0xCF8.
    pub config_address: u32,
    /// What is on the PCI bus.
    pub functions: FunctionsState,
    /// Effects nobody has taken yet.
    pub effects: Vec<Effect>,
}

impl Board {
    /// The board's state.
    pub fn save(&self) -> BoardState {
        let Self {
            config: _,
            ram: _,
            interrupts,
            timer,
            clock,
            guest_clock,
            serial,
            reset,
            power,
            config_address,
            functions,
            effects,
            faults: _,
            next_timer: _,
        } = self;
        BoardState {
            interrupts: interrupts.save(),
            timer: timer.save(),
            clock: clock.save(),
            guest_clock: guest_clock.save(),
            serial: serial.save(),
            reset: *reset,
            power: *power,
            config_address: config_address.get(),
            functions: functions.save(),
            effects: effects.as_slice().to_vec(),
        }
    }

    /// A board that goes on from a saved state, of disks that keep no completed writes. Memory must already
    /// hold what it held.
    ///
    /// # Errors
    /// [`BoardError`] if the configuration breaks a limit, or the state is not one that a
    /// board of this configuration can be in.
    pub fn restore(
        config: &BoardConfig,
        ram: &GuestRam,
        state: &BoardState,
    ) -> Result<Self, BoardError> {
        Self::restore_with(config, ram, state, &[])
    }

    /// The same, with the completed writes of each disk that no flush has covered.
    ///
    /// # Errors
    /// As [`Self::restore`].
    pub fn restore_with(
        config: &BoardConfig,
        ram: &GuestRam,
        state: &BoardState,
        completed: &[CompletedWrites],
    ) -> Result<Self, BoardError> {
        let mut board = Self::new(config, ram)?;
        let BoardState {
            interrupts,
            timer,
            clock,
            guest_clock,
            serial,
            reset,
            power,
            config_address,
            functions,
            effects,
        } = state;
        board.interrupts = InterruptController::restore(interrupts)?;
        board.timer = IntervalTimer::restore(timer)?;
        board.clock = CmosClock::restore(clock)?;
        board.guest_clock = GuestClock::restore(*guest_clock)?;
        board.serial = Serial::restore(serial)?;
        reset.validate()?;
        board.reset = *reset;
        power.validate()?;
        board.power = *power;
        board.config_address = ConfigAddress::new(*config_address);
        require(
            "PCI bus",
            board.config_address.get() == *config_address,
            "the configuration address holds reserved bits",
        )?;
        board.functions = Functions::restore(config, functions, completed, ram.memory())?;
        board.effects = EffectQueue::from(effects.clone());
        board.check_lines()?;
        board.check_effects()?;
        board.update_next_timer();
        Ok(board)
    }

    /// What waits to be taken must be what a device has asked for: whoever takes it relies upon that.
    fn check_effects(&self) -> Result<(), BoardError> {
        let effects = self.effects.as_slice();
        if effects.is_empty() {
            return Ok(());
        }
        let outstanding = self.outstanding();
        let asked_for = |effect: &Effect| match effect {
            Effect::Console(bytes) => !bytes.is_empty(),
            Effect::Disk { .. } | Effect::Entropy { .. } => outstanding.contains(effect),
            Effect::Packet(packet) => self.functions.net.is_some() && is_good(packet),
        };
        require("board", effects.iter().all(asked_for), "an effect that no device has asked for")?;
        Ok(())
    }

    /// The interrupt lines must be what the devices drive.
    fn check_lines(&self) -> Result<(), BoardError> {
        let mut driven: Vec<(IrqLine, bool)> = self.functions.interrupt_lines().to_vec();
        driven.push((SERIAL_LINE, self.serial.line()));
        driven.push((CLOCK_LINE, self.clock.line()));
        for (line, high) in driven {
            let same = self.interrupts.line(line) == high;
            require("interrupt controller", same, "a line is not as its device drives it")?;
        }
        Ok(())
    }
}
