//! The devices around the CPU: a small PC that a stock distribution kernel boots.
//!
//! A device is a deterministic function of what the guest does to it and of the arrivals it is
//! given. It sees guest memory, an interrupt line and the moment of guest time it is called at;
//! never a clock, a socket, a file or a thread. What it wants from the outside world it says
//! with an [`Effect`].
//!
//! ```text
//!            ports, memory window                    arrivals
//!                    │                                  │
//!   ┌────────────────▼──────────────────────────────────▼────────────┐
//!   │ Board   8254 ─IRQ0─┐                                           │
//!   │         16550 ─IRQ4┼─► two 8259s ─► interrupt_pending          │
//!   │ guest clock ─IRQ0┤                                            │
//!   │         RTC ──IRQ8─┤                                           │
//!   │         PCI: host bridge, disks, network, entropy ─INTA#, lines …│
//!   └────────────────┬───────────────────────────────────────────────┘
//!                    ▼ effects
//! ```
//!
//! Here lives how the devices are joined; what each of them does is in [`crate::devices`].
//! The list of ports is in `ports.rs`.
//!
//! **Time.** Nothing happens between calls. Whoever runs the guest stops it at
//! [`Board::next_timer`] and calls [`Board::advance`]. Calling it earlier, later or more often
//! changes nothing that an earlier call at the due time would not have changed; so the two
//! sides of a pair may stop at different points in between.

mod arrivals;
mod config;
mod effect;
mod functions;
mod ports;
mod state;

use crate::devices::IrqLine;
use crate::devices::cmos_clock::CmosClock;
use crate::devices::guest_clock::GuestClock;
use crate::devices::interrupt_controller::InterruptController;
use crate::devices::interval_timer::IntervalTimer;
use crate::devices::pci::ConfigAddress;
use crate::devices::power_management::PowerManagementState;
use crate::devices::reset::{ResetCause, ResetState};
use crate::devices::serial::Serial;
use crate::devices::virtio::{DeviceContext, DeviceFault};
use functions::Functions;
use vmft_cpu::memory::GuestRam;
use vmft_cpu::{PortWidth, Vector};
use vmft_log::point::VirtualTime;

pub use arrivals::DeliveryError;
pub use config::{BoardConfig, BoardError, Bytes, DiskConfig, NetConfig, UnixSeconds};
pub use effect::{DiskOperation, Effect, EffectQueue};
pub use functions::FunctionsState;
pub(crate) use functions::{PCI_WINDOWS, line as interrupt_of_slot};
pub(crate) use ports::POWER_MANAGEMENT_PORT;
pub use state::BoardState;

/// Most disks a machine can have.
pub const MAX_DISKS: usize = 16;

const TIMER_LINE: IrqLine = IrqLine::new(0);
const SERIAL_LINE: IrqLine = IrqLine::new(4);
const CLOCK_LINE: IrqLine = IrqLine::new(8);

/// The devices of one machine.
///
/// ```
/// use vmft_log::point::VirtualTime;
/// use vmft_vmm::board::{Board, BoardConfig, Bytes, Effect, UnixSeconds};
/// use vmft_cpu::{CpuCount, PortWidth};
/// use vmft_cpu::memory::{GuestRam, MIN_MEMORY};
///
/// let ram = GuestRam::new(MIN_MEMORY)?;
/// let config = BoardConfig {
///     memory: Bytes(MIN_MEMORY),
///     clock_base: UnixSeconds(1_700_000_000),
///     disks: vec![],
///     entropy: true,
///     net: None,
///     cpus: CpuCount::ONE,
/// };
/// let mut board = Board::new(&config, &ram)?;
/// for byte in *b"hi" {
///     board.port_write(VirtualTime::ZERO, 0x3F8, PortWidth::Byte, byte.into());
/// }
/// assert_eq!(board.effects().collect::<Vec<_>>(), [Effect::Console(b"hi".to_vec())]);
/// let saved = board.save();
/// assert_eq!(Board::restore(&config, &ram, &saved)?.save(), saved);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Board {
    config: BoardConfig,
    ram: GuestRam,
    interrupts: InterruptController,
    timer: IntervalTimer,
    clock: CmosClock,
    guest_clock: GuestClock,
    serial: Serial,
    reset: ResetState,
    power: PowerManagementState,
    config_address: ConfigAddress,
    functions: Functions,
    effects: EffectQueue,
    /// Reports for the operator; no part of the machine's state.
    faults: Vec<DeviceFault>,
    /// When the timer or the clock is due next; always what they say.
    next_timer: VirtualTime,
}

impl Board {
    /// A board after power-on.
    ///
    /// # Errors
    /// [`BoardError`] if the configuration breaks a limit or `ram` is of another size.
    pub fn new(config: &BoardConfig, ram: &GuestRam) -> Result<Self, BoardError> {
        config.validate()?;
        let (configured, given) = (config.memory, Bytes(ram.size()));
        if configured != given {
            return Err(BoardError::Memory { configured, given });
        }
        Ok(Self {
            config: config.clone(),
            ram: ram.clone(),
            interrupts: InterruptController::new(functions::LEVEL_TRIGGERED),
            timer: IntervalTimer::new(),
            clock: CmosClock::new(config.clock_base.0),
            guest_clock: GuestClock::default(),
            serial: Serial::new(),
            reset: ResetState::default(),
            power: PowerManagementState::default(),
            config_address: ConfigAddress::default(),
            functions: Functions::new(config),
            effects: EffectQueue::default(),
            faults: Vec::new(),
            next_timer: VirtualTime::NEVER,
        })
    }

    /// What the board is made of.
    pub fn config(&self) -> &BoardConfig {
        &self.config
    }

    /// The guest reads a port; a port without a device reads as all ones.
    #[inline]
    pub fn port_read(&mut self, now: VirtualTime, port: u16, width: PortWidth) -> u32 {
        self.advance(now);
        self.read_port(now, port, width)
    }

    /// The guest writes the low bytes of `value` to a port.
    #[inline]
    pub fn port_write(&mut self, now: VirtualTime, port: u16, width: PortWidth, value: u32) {
        self.advance(now);
        self.write_port(now, port, width, value);
    }

    /// The guest loads from an address that is not memory; without a device there, all ones.
    pub fn memory_read(&mut self, now: VirtualTime, address: u64, data: &mut [u8]) {
        self.advance(now);
        let Self { ram, functions, effects, faults, .. } = self;
        let mut around = DeviceContext { memory: ram.memory(), effects, faults };
        match functions.claiming(address, data.len()) {
            Some((function, offset)) => function.window_read(offset, data, &mut around),
            None => data.fill(0xFF),
        }
        self.update_pci_lines();
    }

    /// The guest stores to an address that is not memory.
    pub fn memory_write(&mut self, now: VirtualTime, address: u64, data: &[u8]) {
        self.advance(now);
        let Self { ram, functions, effects, faults, .. } = self;
        let mut around = DeviceContext { memory: ram.memory(), effects, faults };
        if let Some((function, offset)) = functions.claiming(address, data.len()) {
            function.window_write(offset, data, &mut around);
        }
        self.update_pci_lines();
    }

    /// Takes what the devices have asked of the outside world since the last call, in order.
    pub fn effects(&mut self) -> std::vec::Drain<'_, Effect> {
        self.effects.drain()
    }

    /// True if [`Self::effects`] has something to give.
    #[inline]
    pub fn has_effects(&self) -> bool {
        !self.effects.is_empty()
    }

    /// Takes the reports of devices that stopped because their drivers broke the rules. They
    /// are no input and no output: both sides see the same, and neither depends on it.
    pub fn take_faults(&mut self) -> Vec<DeviceFault> {
        std::mem::take(&mut self.faults)
    }

    /// True if [`Self::take_faults`] has something to give.
    #[inline]
    pub fn has_faults(&self) -> bool {
        !self.faults.is_empty()
    }

    /// When [`Self::advance`] must be called at the latest; `None` if no timer runs.
    #[inline]
    pub fn next_timer(&self) -> Option<VirtualTime> {
        (self.next_timer != VirtualTime::NEVER).then_some(self.next_timer)
    }

    /// Raises the timer interrupts that are due. Changes nothing if none is.
    #[inline]
    pub fn advance(&mut self, now: VirtualTime) {
        if now >= self.next_timer {
            self.raise_timers(now);
        }
    }

    fn raise_timers(&mut self, now: VirtualTime) {
        // Both are to be told, whatever the first says.
        if self.timer.advance(now) | self.guest_clock.advance(now) {
            self.interrupts.pulse(TIMER_LINE);
        }
        self.clock.advance(now);
        self.interrupts.set_line(CLOCK_LINE, self.clock.line());
        self.update_next_timer();
    }

    fn update_next_timer(&mut self) {
        let timers =
            [self.timer.next_timer(), self.guest_clock.next_timer(), self.clock.next_timer()];
        self.next_timer = timers.into_iter().flatten().min().unwrap_or(VirtualTime::NEVER);
    }

    fn update_pci_lines(&mut self) {
        for (line, high) in self.functions.interrupt_lines() {
            self.interrupts.set_line(line, high);
        }
    }

    /// True while the interrupt controllers signal a request to the CPU.
    #[inline]
    pub fn interrupt_pending(&self) -> bool {
        self.interrupts.interrupt_pending()
    }

    /// The CPU acknowledges the interrupt: the vector it is to take.
    pub fn acknowledge_interrupt(&mut self) -> Vector {
        Vector(self.interrupts.acknowledge())
    }

    /// True once the guest has asked for a reset, until [`Self::reset`].
    #[inline]
    pub fn reset_requested(&self) -> bool {
        self.reset.requested
    }

    /// How it has asked for that.
    pub fn reset_cause(&self) -> ResetCause {
        self.reset.cause()
    }

    /// True once the guest has switched the machine off.
    #[inline]
    pub fn is_off(&self) -> bool {
        self.power.off
    }

    /// True while no device can interrupt the CPU, whatever happens, until the guest writes to a port again.
    #[inline]
    pub fn is_masked(&self) -> bool {
        self.interrupts.is_masked()
    }

    /// Resets every device, as the reset line of the bus does. The clock goes on, requests keep
    /// their numbering, and those that are on their way stay known as abandoned, so that their
    /// completions still find them. Effects not yet taken stay.
    pub fn reset(&mut self) {
        self.interrupts = InterruptController::new(functions::LEVEL_TRIGGERED);
        self.timer = IntervalTimer::new();
        self.clock.reset();
        self.guest_clock = GuestClock::default();
        self.serial.reset();
        self.reset = ResetState::default();
        self.power = PowerManagementState::default();
        self.config_address = ConfigAddress::default();
        self.functions.reset();
        self.update_next_timer();
    }
}
