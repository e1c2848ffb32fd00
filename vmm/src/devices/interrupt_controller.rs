//! Two cascaded 8259A interrupt controllers, with the ELCR of later chip sets.
//!
//! Source: Intel 8259A data sheet (231468); ELCR: Intel 82371SB data sheet, §2.5.5. As in KVM's
//! model, an edge stays latched until it is acknowledged even if the line falls before.
//! The input that joins the second controller to the first (line 2) follows the second
//! one's output at once, so it needs no edge.

use super::{InvalidState, IrqLine, require};
use serde::{Deserialize, Serialize};

/// Input of the first controller that the second one drives.
const CASCADE: u8 = 2;
/// ELCR bits that can be set: lines 0–2 are always edge-triggered, as are 8 and 13.
const ELCR_WRITABLE: [u8; 2] = [0xF8, 0xDE];
/// The input that an acknowledgement without a request reports (data sheet: "default IR7").
const SPURIOUS: u8 = 7;

/// Which initialisation word a controller expects at its odd port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Initialisation {
    /// None: writes are OCW1, the mask.
    Done,
    /// The vector base.
    Icw2,
    /// The cascade wiring.
    Icw3,
    /// The mode.
    Icw4,
}

/// The registers of one 8259A.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControllerState {
    /// Edges latched and not yet acknowledged.
    pub latched: u8,
    /// Levels of the inputs.
    pub lines: u8,
    /// Inputs in service (ISR).
    pub in_service: u8,
    /// Masked inputs (IMR).
    pub mask: u8,
    /// Level-triggered inputs (ELCR).
    pub level_triggered: u8,
    /// Vector of input 0.
    pub vector_base: u8,
    /// The input that has the lowest priority.
    pub lowest: u8,
    /// Progress of the initialisation sequence.
    pub initialisation: Initialisation,
    /// ICW1 announced no ICW3.
    pub single: bool,
    /// ICW1 announced an ICW4.
    pub expects_icw4: bool,
    /// The even port reads the ISR, not the IRR.
    pub read_in_service: bool,
    /// The next read is a poll.
    pub poll: bool,
    /// Special mask mode.
    pub special_mask: bool,
    /// Automatic end of interrupt.
    pub auto_eoi: bool,
    /// Priorities rotate at automatic ends of interrupt.
    pub rotate_on_auto_eoi: bool,
    /// Special fully nested mode.
    pub fully_nested: bool,
}

impl ControllerState {
    fn new(level_triggered: u8) -> Self {
        Self {
            latched: 0,
            lines: 0,
            in_service: 0,
            mask: 0,
            level_triggered,
            vector_base: 0,
            lowest: 7,
            initialisation: Initialisation::Done,
            single: false,
            expects_icw4: false,
            read_in_service: false,
            poll: false,
            special_mask: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            fully_nested: false,
        }
    }

    /// The IRR: latched edges and active levels.
    fn requests(&self) -> u8 {
        (self.latched & !self.level_triggered) | (self.lines & self.level_triggered)
    }

    /// Distance of the most urgent input in `inputs` from the highest priority.
    fn priority(&self, inputs: u8) -> Option<u8> {
        let rotated = inputs.rotate_right(u32::from((self.lowest + 1) & 7));
        (rotated != 0).then(|| rotated.trailing_zeros() as u8)
    }

    fn input_at(&self, priority: u8) -> u8 {
        (priority + self.lowest + 1) & 7
    }

    /// The input to be served now, `cascade` being the second controller's output.
    fn pending(&self, cascade: u8) -> Option<u8> {
        let wanted = self.priority((self.requests() | cascade) & !self.mask)?;
        let mut blocking = self.in_service;
        if self.special_mask {
            blocking &= !self.mask;
        }
        if self.fully_nested {
            blocking &= !cascade;
        }
        match self.priority(blocking) {
            Some(serving) if wanted >= serving => None,
            _ => Some(self.input_at(wanted)),
        }
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        self.latched &= !bit;
        if !self.auto_eoi {
            self.in_service |= bit;
        } else if self.rotate_on_auto_eoi {
            self.lowest = input;
        }
    }

    fn set_line(&mut self, input: u8, high: bool) {
        let bit = 1 << input;
        if high {
            self.latched |= bit & !self.lines & !self.level_triggered;
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.start_initialisation(value);
        } else if value & 0x08 != 0 {
            self.write_ocw3(value);
        } else {
            self.write_ocw2(value);
        }
    }

    fn start_initialisation(&mut self, icw1: u8) {
        let Self { lines, level_triggered, .. } = *self;
        *self = Self {
            lines,
            initialisation: Initialisation::Icw2,
            single: icw1 & 0x02 != 0,
            expects_icw4: icw1 & 0x01 != 0,
            ..Self::new(level_triggered)
        };
    }

    fn write_ocw2(&mut self, value: u8) {
        let named = value & 7;
        // Bits of OCW2: 7 rotate, 6 specific, 5 end of interrupt.
        match value >> 5 {
            0b000 => self.rotate_on_auto_eoi = false,
            0b100 => self.rotate_on_auto_eoi = true,
            0b110 => self.lowest = named,
            0b011 => self.in_service &= !(1 << named),
            0b111 => {
                self.in_service &= !(1 << named);
                self.lowest = named;
            }
            command @ (0b001 | 0b101) => {
                let hidden = if self.special_mask { self.mask } else { 0 };
                if let Some(priority) = self.priority(self.in_service & !hidden) {
                    let input = self.input_at(priority);
                    self.in_service &= !(1 << input);
                    if command == 0b101 {
                        self.lowest = input;
                    }
                }
            }
            _ => {}
        }
    }

    fn write_ocw3(&mut self, value: u8) {
        if value & 0x04 != 0 {
            self.poll = true;
        }
        if value & 0x02 != 0 {
            self.read_in_service = value & 0x01 != 0;
        }
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
    }

    fn write_data(&mut self, value: u8) {
        self.initialisation = match self.initialisation {
            Initialisation::Done => {
                self.mask = value;
                Initialisation::Done
            }
            Initialisation::Icw2 => {
                self.vector_base = value & 0xF8;
                match (self.single, self.expects_icw4) {
                    (false, _) => Initialisation::Icw3,
                    (true, true) => Initialisation::Icw4,
                    (true, false) => Initialisation::Done,
                }
            }
            Initialisation::Icw3 if self.expects_icw4 => Initialisation::Icw4,
            Initialisation::Icw3 => Initialisation::Done,
            Initialisation::Icw4 => {
                self.fully_nested = value & 0x10 != 0;
                self.auto_eoi = value & 0x02 != 0;
                Initialisation::Done
            }
        };
    }

    fn validate(&self, elcr_writable: u8) -> Result<(), InvalidState> {
        let check = |holds, reason| require("interrupt controller", holds, reason);
        check(self.lowest < 8, "priority out of range")?;
        check(self.vector_base & 7 == 0, "vector base is not a multiple of 8")?;
        check(self.level_triggered & !elcr_writable == 0, "a fixed line is level-triggered")
    }
}

/// A register of the pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// Ports 0x20 and 0xA0.
    Command(Which),
    /// Ports 0x21 and 0xA1.
    Data(Which),
    /// Ports 0x4D0 and 0x4D1.
    Elcr(Which),
}

/// One controller of the pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Lines 0 to 7.
    First,
    /// Lines 8 to 15, seen by the CPU through line 2 of the first.
    Second,
}

/// The two controllers.
///
/// ```
/// use vmft_vmm::devices::IrqLine;
/// use vmft_vmm::devices::interrupt_controller::{InterruptController, Register, Which};
///
/// let mut pic = InterruptController::new(0);
/// pic.write(Register::Command(Which::First), 0x11);
/// for word in [0x30, 0x04, 0x01, 0x00] {
///     pic.write(Register::Data(Which::First), word);
/// }
/// pic.set_line(IrqLine::new(4), true);
/// assert!(pic.interrupt_pending());
/// assert_eq!(pic.acknowledge(), 0x34);
/// assert!(!pic.interrupt_pending());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterruptController {
    pair: [ControllerState; 2],
    /// Output of the pair; always what [`Self::update`] computes from the rest.
    output: bool,
}

impl InterruptController {
    /// Both controllers after power-on, with the lines set in `level_triggered` (bit n is
    /// line n) as firmware would have left the ELCR.
    pub fn new(level_triggered: u16) -> Self {
        let [low, high] = level_triggered.to_le_bytes();
        let pair = [
            ControllerState::new(low & ELCR_WRITABLE[0]),
            ControllerState::new(high & ELCR_WRITABLE[1]),
        ];
        Self { pair, output: false }
    }

    /// Drives a request line.
    pub fn set_line(&mut self, line: IrqLine, high: bool) {
        if self.line(line) != high {
            self.pair[usize::from(line.0 >> 3)].set_line(line.0 & 7, high);
            self.update();
        }
    }

    /// The level a line is driven to.
    pub fn line(&self, line: IrqLine) -> bool {
        self.pair[usize::from(line.0 >> 3)].lines >> (line.0 & 7) & 1 != 0
    }

    /// Raises a line and lowers it again: one edge.
    pub fn pulse(&mut self, line: IrqLine) {
        self.set_line(line, true);
        self.set_line(line, false);
    }

    /// The INTR signal to the CPU.
    #[inline]
    pub fn interrupt_pending(&self) -> bool {
        self.output
    }

    /// True while the CPU gets no INTR whatever the lines do: all that comes to it comes through the first
    /// controller, which masks every input.
    #[inline]
    pub fn is_masked(&self) -> bool {
        self.pair[0].mask == 0xFF
    }

    /// The CPU's acknowledge cycle: takes the most urgent request into service and returns
    /// its vector; without a request, the vector of input 7.
    pub fn acknowledge(&mut self) -> u8 {
        let cascade = self.cascade();
        let [first, second] = &mut self.pair;
        let input = first.pending(cascade);
        if let Some(input) = input {
            first.acknowledge(input);
        }
        let vector = if input == Some(CASCADE) && cascade != 0 {
            let input = second.pending(0);
            if let Some(input) = input {
                second.acknowledge(input);
            }
            second.vector_base | input.unwrap_or(SPURIOUS)
        } else {
            first.vector_base | input.unwrap_or(SPURIOUS)
        };
        self.update();
        vector
    }

    /// The guest reads a register.
    pub fn read(&mut self, register: Register) -> u8 {
        match register {
            Register::Elcr(which) => self.pair[which as usize].level_triggered,
            Register::Command(which) | Register::Data(which) if self.pair[which as usize].poll => {
                self.poll(which)
            }
            Register::Data(which) => self.pair[which as usize].mask,
            Register::Command(which) => {
                let cascade = if which == Which::First { self.cascade() } else { 0 };
                let controller = &self.pair[which as usize];
                if controller.read_in_service {
                    controller.in_service
                } else {
                    controller.requests() | cascade
                }
            }
        }
    }

    /// The guest writes a register.
    pub fn write(&mut self, register: Register, value: u8) {
        match register {
            Register::Command(which) => self.pair[which as usize].write_command(value),
            Register::Data(which) => self.pair[which as usize].write_data(value),
            Register::Elcr(which) => {
                let level = value & ELCR_WRITABLE[which as usize];
                self.pair[which as usize].level_triggered = level;
            }
        }
        self.update();
    }

    /// A poll read: acknowledges, and says which input in the answer (data sheet, "poll command").
    fn poll(&mut self, which: Which) -> u8 {
        let cascade = if which == Which::First { self.cascade() } else { 0 };
        let controller = &mut self.pair[which as usize];
        controller.poll = false;
        let answer = match controller.pending(cascade) {
            Some(input) => {
                controller.acknowledge(input);
                0x80 | input
            }
            None => 0,
        };
        self.update();
        answer
    }

    /// The second controller's output, as a bit of the first one's inputs.
    fn cascade(&self) -> u8 {
        u8::from(self.pair[1].pending(0).is_some()) << CASCADE
    }

    fn update(&mut self) {
        self.output = self.pair[0].pending(self.cascade()).is_some();
    }

    /// Everything a restored pair needs.
    pub fn save(&self) -> [ControllerState; 2] {
        let Self { pair, output: _ } = self;
        pair.clone()
    }

    /// A pair in the saved state.
    ///
    /// # Errors
    /// [`InvalidState`] if a register holds what it cannot hold.
    pub fn restore(state: &[ControllerState; 2]) -> Result<Self, InvalidState> {
        for (controller, writable) in state.iter().zip(ELCR_WRITABLE) {
            controller.validate(writable)?;
        }
        let mut restored = Self { pair: state.clone(), output: false };
        restored.update();
        Ok(restored)
    }
}

#[cfg(test)]
#[path = "interrupt_controller_tests.rs"]
mod tests;
