//! Debug registers: breakpoints, watchpoints, and the exceptions they raise (SDM volume 3,
//! chapter "Debug, branch profile, TSC"; APM volume 2, section 13.1).
//!
//! While DR7 enables nothing, none of this is looked at. While it enables something, the run loop
//! executes instructions one by one and looks before each for a breakpoint on it; while it enables
//! a watchpoint on data, every access to memory takes the slow path, which notes the watchpoints it
//! hits. These are delivered after the instruction, with a single step if one is due.
//!
//! Where vendors differ, the vendor of the CPU model is followed: an exception of a breakpoint
//! replaces the four bits of DR6 that say which it was. Every access of an instruction counts, and
//! those of the delivery of an event too, but not those of a page walk, nor of the delivery of
//! `#DB` itself.

use super::control::CR4_DE;
use super::interrupts::Source;
use crate::soft::cpu::{ARMED, Cpu};
use crate::soft::event::{Event, Flow, Trap};
use crate::soft::exception::Exception;
use crate::soft::mmu::Intent;
use iced_x86::{Instruction, Register};

const DR6_FIXED: u64 = 0xFFFF_0FF0;
const DR6_WRITABLE: u64 = 0xE00F;
/// B0 to B3: the breakpoints that were met.
const DR6_MET: u64 = 0xF;
/// BD: a debug register was to be accessed.
const DR6_ACCESS: u64 = 1 << 13;
/// BS: a single step.
const DR6_STEP: u64 = 1 << 14;

const DR7_FIXED: u64 = 1 << 10;
const DR7_WRITABLE: u64 = 0xFFFF_2BFF;
/// GD: accesses to debug registers fault.
const DR7_GENERAL_DETECT: u64 = 1 << 13;

/// What a breakpoint waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Execute,
    Write,
    Port,
    ReadWrite,
}

/// An enabled breakpoint.
#[derive(Debug, Clone, Copy)]
struct Breakpoint {
    kind: Kind,
    /// The first byte, or port, that it covers.
    first: u64,
    /// How many.
    len: u64,
}

impl Breakpoint {
    /// Breakpoint `number` of DR7, if it is enabled and means something.
    fn of(debug: &[u64; 8], number: usize, knows_ports: bool) -> Option<Self> {
        let control = debug[7];
        if control >> (2 * number) & 3 == 0 {
            return None;
        }
        let field = control >> (16 + 4 * number);
        let kind = match field & 3 {
            0 => Kind::Execute,
            1 => Kind::Write,
            // Not defined without CR4.DE.
            2 if knows_ports => Kind::Port,
            2 => return None,
            _ => Kind::ReadWrite,
        };
        let len = match field >> 2 & 3 {
            0 => 1,
            1 => 2,
            2 => 8,
            _ => 4,
        };
        let address = debug[number];
        let first = if kind == Kind::Execute { address } else { address & !(len - 1) };
        Some(Self { kind, first, len })
    }

    fn overlaps(&self, first: u64, len: u64) -> bool {
        first.wrapping_sub(self.first) < self.len || self.first.wrapping_sub(first) < len
    }
}

/// The enabled breakpoints, as DR0 to DR3, DR7 and CR4.DE come to.
#[derive(Debug, Clone, Copy, Default)]
pub(in super::super) struct Breakpoints {
    each: [Option<Breakpoint>; 4],
    /// Some wait for memory accesses.
    pub(in super::super) on_memory: bool,
}

impl Breakpoints {
    fn of(debug: &[u64; 8], knows_ports: bool) -> Self {
        let each = std::array::from_fn(|number| Breakpoint::of(debug, number, knows_ports));
        let waits =
            |breakpoint: &Breakpoint| matches!(breakpoint.kind, Kind::Write | Kind::ReadWrite);
        Self { each, on_memory: each.iter().flatten().any(waits) }
    }

    /// The bits of DR6 of those for which `met` holds.
    fn met(&self, met: impl Fn(&Breakpoint) -> bool) -> u64 {
        let bit = |(number, each): (usize, &Option<Breakpoint>)| {
            u64::from(each.as_ref().is_some_and(&met)) << number
        };
        self.each.iter().enumerate().map(bit).sum()
    }
}

/// The slot of [`crate::CpuState::debug`] with what waits for the next boundary: DR4,
/// which is no register of its own.
pub(in super::super) const WAITING: usize = 4;
/// Of that slot: the next instruction is shielded by a load of SS.
pub(in super::super) const WAITING_SHIELDED: u64 = 1 << 15;
/// Every bit that the slot may have.
pub(in super::super) const WAITING_KNOWN: u64 = DR6_MET | WAITING_SHIELDED;
/// Of that slot: the watchpoints that were hit.
pub(in super::super) const WAITING_HITS: u64 = DR6_MET;

impl Cpu {
    /// Arms the breakpoints, after DR0 to DR3, DR7 or CR4.DE changed.
    pub(in super::super) fn arm(&mut self) {
        self.breakpoints = Breakpoints::of(&self.debug, self.cr4 & CR4_DE != 0);
        if self.breakpoints.each.iter().any(Option::is_some) {
            self.system_flags |= ARMED;
        } else {
            self.system_flags &= !ARMED;
        }
        self.update_view();
    }

    /// Notes the watchpoints that an access to memory hits.
    #[cold]
    pub(in super::super) fn note_access(&mut self, address: u64, len: usize, intent: Intent) {
        self.hits |= self.breakpoints.met(|breakpoint| {
            let kind = match breakpoint.kind {
                Kind::ReadWrite => true,
                Kind::Write => intent == Intent::Write,
                _ => false,
            };
            kind && breakpoint.overlaps(address, len as u64)
        });
    }

    /// Notes the breakpoints that an access to ports hits.
    pub(in super::super) fn note_port(&mut self, port: u16, len: usize) {
        self.hits |= self.breakpoints.met(|breakpoint| {
            breakpoint.kind == Kind::Port && breakpoint.overlaps(port.into(), len as u64)
        });
    }

    /// Delivers the fault of a breakpoint on the next instruction, if there is one. RF is the
    /// caller's concern.
    pub(in super::super) fn break_at(&mut self, address: u64) -> bool {
        let met = self
            .breakpoints
            .met(|breakpoint| breakpoint.kind == Kind::Execute && breakpoint.first == address);
        if met != 0 {
            // A fault, but the one whose frame has RF as it is.
            self.deliver_debug(met, Source::Trap);
        }
        met != 0
    }

    /// Delivers what was noted, and a single step if one is due.
    pub(in super::super) fn deliver_debug_trap(&mut self, step: bool) {
        let status = self.hits | if step { DR6_STEP } else { 0 };
        self.deliver_debug(status, Source::Trap);
    }

    /// Delivers the fault of an access to a debug register under DR7.GD.
    pub(in super::super) fn deliver_general_detect(&mut self) {
        self.deliver_debug(DR6_ACCESS, Source::Fault);
    }

    fn deliver_debug(&mut self, status: u64, source: Source) {
        if status & (DR6_MET | DR6_ACCESS) != 0 {
            self.debug[6] &= !DR6_MET;
        }
        self.debug[6] |= status;
        self.debug[7] &= !DR7_GENERAL_DETECT;
        self.deliver_event(1, source);
        // Else a watchpoint on the handler's stack would never let it begin.
        self.hits = 0;
    }

    /// DR4 and DR5 are other names of DR6 and DR7 unless CR4.DE is set.
    fn debug_number(&mut self, register: Register) -> Result<usize, Trap> {
        let number = register.number();
        match number {
            4 | 5 if self.cr4 & CR4_DE == 0 => Ok(number + 2),
            0..=3 | 6 | 7 => Ok(number),
            _ => Err(self.raise(Exception::InvalidOpcode)),
        }
    }

    fn check_debug_access(&mut self) -> Flow {
        self.require_supervisor()?;
        if self.debug[7] & DR7_GENERAL_DETECT != 0 {
            self.event = Event::GeneralDetect;
            return Err(Trap);
        }
        Ok(())
    }
}

/// `MOV` to and from debug registers.
pub(in super::super) fn mov_debug(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let (target, source) = (i.op0_register(), i.op1_register());
    if target.is_dr() {
        let number = cpu.debug_number(target)?;
        cpu.check_debug_access()?;
        let value = cpu.register(source);
        if number >= 6 && value >> 32 != 0 {
            return Err(cpu.general_protection(0));
        }
        cpu.debug[number] = match number {
            6 => (value & DR6_WRITABLE) | DR6_FIXED,
            7 => (value & DR7_WRITABLE) | DR7_FIXED,
            _ => value,
        };
        cpu.arm();
        return Ok(());
    }
    let number = cpu.debug_number(source)?;
    cpu.check_debug_access()?;
    let value = match number {
        6 => cpu.debug[6] | DR6_FIXED,
        7 => cpu.debug[7] | DR7_FIXED,
        _ => cpu.debug[number],
    };
    cpu.set_register(target, value);
    Ok(())
}
