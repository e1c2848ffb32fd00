//! A 16550A serial port.
//!
//! Source: National PC16550D data sheet. Transmission takes no time: a byte written is an
//! effect at once, and the transmitter is empty again. Reception is as fast as the guest reads:
//! what does not fit in the receiver's FIFO waits in a bounded queue before it. The interrupt
//! output is a level computed from the registers, so it needs no state of its own.
//!
//! `vm_superio::Serial` is not used: it signals edges through a trigger, also while being
//! restored, has no FIFO control register, and forgets a receive interrupt when IIR is read.

use super::{InvalidState, require};
use crate::board::EffectQueue;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Bytes of console input that may wait for the guest.
pub const CONSOLE_INPUT_LIMIT: usize = 4096;
const FIFO_DEPTH: usize = 16;

const IER_RECEIVE: u8 = 0x01;
const IER_TRANSMIT: u8 = 0x02;
const IER_LINE_STATUS: u8 = 0x04;
const IER_MODEM: u8 = 0x08;
const IER_WRITABLE: u8 = 0x0F;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM: u8 = 0x00;
const IIR_TRANSMIT: u8 = 0x02;
const IIR_RECEIVE: u8 = 0x04;
const IIR_LINE_STATUS: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0C;
const IIR_FIFOS: u8 = 0xC0;

const FCR_ENABLE: u8 = 0x01;
const FCR_CLEAR_RECEIVER: u8 = 0x02;

const LCR_DIVISOR: u8 = 0x80;
const MCR_OUT2: u8 = 0x08;
const MCR_LOOP: u8 = 0x10;
const MCR_WRITABLE: u8 = 0x1F;

const LSR_DATA_READY: u8 = 0x01;
const LSR_OVERRUN: u8 = 0x02;
const LSR_TRANSMITTER_EMPTY: u8 = 0x60;

/// Clear to send, data set ready, carrier: a terminal that is always there.
const MODEM_LINES: u8 = 0xB0;
const MODEM_RING: u8 = 0x40;
/// Ring counts as changed on its trailing edge only.
const DELTA_RING: u8 = 0x04;

/// The port's registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Line control register.
    pub line_control: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Changes of modem lines since the modem status was read, its low four bits.
    pub modem_delta: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Divisor latch.
    pub divisor: u16,
    /// FIFO control register: enable bit and trigger level.
    pub fifo_control: u8,
    /// Received bytes the guest can read.
    pub receiver: VecDeque<u8>,
    /// Bytes that wait for room in the receiver.
    pub input: VecDeque<u8>,
    /// A byte was lost since the line status was read.
    pub overrun: bool,
    /// The transmitter has become empty, and the guest has not been told.
    pub transmit_pending: bool,
}

/// The port.
///
/// ```
/// use vmft_vmm::board::{Effect, EffectQueue};
/// use vmft_vmm::devices::serial::Serial;
///
/// let (mut port, mut effects) = (Serial::new(), EffectQueue::default());
/// for byte in *b"hello" {
///     port.write(0, byte, &mut effects);
/// }
/// assert_eq!(effects.drain().collect::<Vec<_>>(), [Effect::Console(b"hello".to_vec())]);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Serial {
    state: SerialState,
}

impl Default for Serial {
    fn default() -> Self {
        Self::new()
    }
}

impl Serial {
    /// A port after power-on.
    pub fn new() -> Self {
        Self {
            state: SerialState {
                interrupt_enable: 0,
                line_control: 0,
                modem_control: 0,
                modem_delta: 0,
                scratch: 0,
                divisor: 12,
                fifo_control: 0,
                receiver: VecDeque::new(),
                input: VecDeque::new(),
                overrun: false,
                transmit_pending: false,
            },
        }
    }

    /// The bus is reset: every register is as after power-on, and what the receiver held is
    /// lost. Input that waits before it is kept.
    pub fn reset(&mut self) {
        let input = std::mem::take(&mut self.state.input);
        *self = Self::new();
        self.state.input = input;
        self.refill();
    }

    /// Bytes of input the port takes now.
    pub fn input_room(&self) -> usize {
        CONSOLE_INPUT_LIMIT - self.state.input.len()
    }

    /// Bytes come in from the outside; the caller has checked [`Self::input_room`].
    ///
    /// # Panics
    /// If there is no room for all of them.
    pub fn receive(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= self.input_room(), "console input exceeds the room announced");
        self.state.input.extend(bytes);
        self.refill();
    }

    /// The level of the interrupt output; OUT2 connects it to the bus, as on a PC.
    #[inline]
    pub fn line(&self) -> bool {
        self.state.modem_control & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2
            && self.interrupt_source() != IIR_NONE
    }

    /// The guest reads register `offset`, 0 to 7.
    pub fn read(&mut self, offset: u8) -> u8 {
        let state = &mut self.state;
        let divisor = state.line_control & LCR_DIVISOR != 0;
        match offset {
            0 if divisor => state.divisor.to_le_bytes()[0],
            1 if divisor => state.divisor.to_le_bytes()[1],
            0 => {
                let byte = state.receiver.pop_front().unwrap_or(0);
                self.refill();
                byte
            }
            1 => state.interrupt_enable,
            2 => self.read_identification(),
            3 => state.line_control,
            4 => state.modem_control,
            5 => {
                let ready = if state.receiver.is_empty() { 0 } else { LSR_DATA_READY };
                let overrun = if std::mem::take(&mut state.overrun) { LSR_OVERRUN } else { 0 };
                LSR_TRANSMITTER_EMPTY | ready | overrun
            }
            6 => modem_lines(state.modem_control) | std::mem::take(&mut state.modem_delta),
            _ => state.scratch,
        }
    }

    /// The guest writes register `offset`, 0 to 7.
    pub fn write(&mut self, offset: u8, value: u8, effects: &mut EffectQueue) {
        let state = &mut self.state;
        let divisor = state.line_control & LCR_DIVISOR != 0;
        match offset {
            0 if divisor => state.divisor = state.divisor & 0xFF00 | u16::from(value),
            1 if divisor => state.divisor = state.divisor & 0x00FF | u16::from(value) << 8,
            0 => self.transmit(value, effects),
            1 => {
                let value = value & IER_WRITABLE;
                // Enabling it while the transmitter is empty interrupts at once.
                state.transmit_pending |= value & !state.interrupt_enable & IER_TRANSMIT != 0;
                state.interrupt_enable = value;
            }
            2 => self.write_fifo_control(value),
            3 => state.line_control = value,
            4 => self.write_modem_control(value & MCR_WRITABLE),
            7 => state.scratch = value,
            _ => {}
        }
    }

    fn transmit(&mut self, byte: u8, effects: &mut EffectQueue) {
        if self.looped() {
            if self.state.receiver.len() < self.depth() {
                self.state.receiver.push_back(byte);
            } else {
                self.state.overrun = true;
            }
        } else {
            effects.console(byte);
        }
        self.state.transmit_pending = true;
    }

    fn write_fifo_control(&mut self, value: u8) {
        let was = self.state.fifo_control;
        // Trigger and clear bits count only together with the enable bit; changing that clears.
        self.state.fifo_control = if value & FCR_ENABLE != 0 { value & 0xC1 } else { 0 };
        let clears = value & FCR_ENABLE != 0 && value & FCR_CLEAR_RECEIVER != 0;
        if clears || (was ^ value) & FCR_ENABLE != 0 {
            self.state.receiver.clear();
        }
        self.refill();
    }

    fn write_modem_control(&mut self, value: u8) {
        let before = modem_lines(self.state.modem_control);
        let after = modem_lines(value);
        let changed = (before ^ after) >> 4 & !DELTA_RING;
        let ring_ended = before & !after & MODEM_RING != 0;
        self.state.modem_delta |= changed | if ring_ended { DELTA_RING } else { 0 };
        self.state.modem_control = value;
        self.refill();
    }

    /// Reading the identification takes back the transmitter's request if it is the one shown.
    fn read_identification(&mut self) -> u8 {
        let source = self.interrupt_source();
        if source == IIR_TRANSMIT {
            self.state.transmit_pending = false;
        }
        source | if self.state.fifo_control & FCR_ENABLE != 0 { IIR_FIFOS } else { 0 }
    }

    /// The most urgent enabled interrupt, as the low four bits of IIR.
    fn interrupt_source(&self) -> u8 {
        let state = &self.state;
        let enabled = state.interrupt_enable;
        if enabled & IER_LINE_STATUS != 0 && state.overrun {
            IIR_LINE_STATUS
        } else if enabled & IER_RECEIVE != 0 && !state.receiver.is_empty() {
            // Below the trigger level the real part waits four character times.
            if state.receiver.len() >= self.trigger() { IIR_RECEIVE } else { IIR_TIMEOUT }
        } else if enabled & IER_TRANSMIT != 0 && state.transmit_pending {
            IIR_TRANSMIT
        } else if enabled & IER_MODEM != 0 && state.modem_delta != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    fn trigger(&self) -> usize {
        match self.state.fifo_control {
            control if control & FCR_ENABLE == 0 => 1,
            control => [1, 4, 8, 14][usize::from(control >> 6)],
        }
    }

    fn depth(&self) -> usize {
        if self.state.fifo_control & FCR_ENABLE != 0 { FIFO_DEPTH } else { 1 }
    }

    fn looped(&self) -> bool {
        self.state.modem_control & MCR_LOOP != 0
    }

    /// Moves waiting input into the receiver; the loop-back disconnects it.
    fn refill(&mut self) {
        if self.looped() {
            return;
        }
        while self.state.receiver.len() < self.depth() {
            let Some(byte) = self.state.input.pop_front() else { break };
            self.state.receiver.push_back(byte);
        }
    }

    /// Everything a restored port needs.
    pub fn save(&self) -> SerialState {
        self.state.clone()
    }

    /// A port in the saved state.
    ///
    /// # Errors
    /// [`InvalidState`] if a register holds what it cannot hold.
    pub fn restore(state: &SerialState) -> Result<Self, InvalidState> {
        let check = |holds, reason| require("serial port", holds, reason);
        let restored = Self { state: state.clone() };
        check(state.interrupt_enable & !IER_WRITABLE == 0, "no such interrupt")?;
        check(state.modem_control & !MCR_WRITABLE == 0, "no such modem control")?;
        check(state.modem_delta < 16, "no such modem line")?;
        let control = state.fifo_control;
        check(control & !0xC1 == 0 && (control == 0 || control & 1 != 0), "no such FIFO control")?;
        check(state.receiver.len() <= restored.depth(), "receiver overfull")?;
        check(state.input.len() <= CONSOLE_INPUT_LIMIT, "input queue overfull")?;
        let waits = restored.looped() || state.receiver.len() == restored.depth();
        check(waits || state.input.is_empty(), "input waits beside an empty receiver")?;
        Ok(restored)
    }
}

/// The upper half of the modem status: the terminal's lines, or in loop-back the port's own.
fn modem_lines(modem_control: u8) -> u8 {
    if modem_control & MCR_LOOP == 0 {
        return MODEM_LINES;
    }
    // DTR → DSR, RTS → CTS, OUT1 → RI, OUT2 → DCD.
    let bit = |from: u8, to: u8| if modem_control & from != 0 { to } else { 0 };
    bit(0x01, 0x20) | bit(0x02, 0x10) | bit(0x04, 0x40) | bit(0x08, 0x80)
}

#[cfg(test)]
#[path = "serial_tests.rs"]
mod tests;
