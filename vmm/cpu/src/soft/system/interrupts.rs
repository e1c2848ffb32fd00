//! Delivery of exceptions and interrupts (SDM volume 3, chapter 6.14), and `IRET`.

use super::segments::{attribute, error_of};
use crate::soft::cpu::{ARMED, Cpu, HALTED, SHADOW, SHUT_DOWN, SS_SHADOW, gpr, is_canonical};
use crate::soft::event::{Event, Flow, Trap};
use crate::soft::exception::Exception;
use crate::soft::flags::{self, Int};
use crate::state::Segment;
use iced_x86::{Code, Instruction};

/// Bit of a selector error code that says it names a gate in the IDT.
const IN_IDT: u16 = 2;
const INTERRUPT_GATE: u64 = 0xE;
const TRAP_GATE: u64 = 0xF;
/// Offset of RSP0 in a task-state segment.
const TSS_RSP0: u64 = 4;
/// Offset of IST1 in a task-state segment.
const TSS_IST1: u64 = 36;

/// Where an event comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Source {
    /// The interrupt line.
    External,
    /// A fault of the instruction at RIP.
    Fault,
    /// A trap after an instruction, not asked for by it.
    Trap,
    /// `INT n`, `INT3`: the gate's privilege counts.
    Software,
}

/// What the gate and its code segment say.
#[derive(Debug, Clone, Copy)]
struct Gate {
    target: u64,
    code: Segment,
    privilege: u8,
    stack_index: u64,
    masks_interrupts: bool,
}

impl Cpu {
    /// Delivers an exception, and what delivering it leads to.
    pub(in super::super) fn deliver_exception(&mut self, first: Exception) {
        let mut exception = first;
        loop {
            if let Exception::PageFault { address, .. } = exception {
                self.cr2 = address;
            }
            let flow = self.deliver(exception.vector(), exception.error_code(), Source::Fault);
            if flow.is_ok() {
                return;
            }
            let second = self.take_exception();
            if exception == Exception::DoubleFault {
                self.system_flags |= SHUT_DOWN;
                return;
            }
            exception = if second.doubles(exception) { Exception::DoubleFault } else { second };
        }
    }

    /// Delivers an interrupt from the line, or a single-step trap.
    pub(in super::super) fn deliver_event(&mut self, vector: u8, source: Source) {
        if self.deliver(vector, None, source).is_err() {
            let exception = self.take_exception();
            self.deliver_exception(exception);
        }
    }

    /// The exception that the last trap stands for.
    pub(in super::super) fn take_exception(&mut self) -> Exception {
        match std::mem::take(&mut self.event) {
            Event::Exception(exception) => exception,
            _ => Exception::GeneralProtection(0),
        }
    }

    /// Delivers one event, whole or not at all. The return address is RIP.
    pub(in super::super) fn deliver(
        &mut self,
        vector: u8,
        error: Option<u16>,
        source: Source,
    ) -> Flow {
        if self.delivered_at != self.retired {
            self.delivered_at = self.retired;
            self.deliveries = 0;
        }
        self.deliveries += 1;
        self.restart.finish();
        self.restart.code_writes = true;
        self.restart.detached = true;
        let flow = self.enter_gate(vector, error, source);
        self.restart.finish();
        if flow.is_err()
            && source != Source::Software
            && let Event::Exception(exception) = self.event
        {
            self.event = Event::Exception(exception.external());
        }
        flow
    }

    fn enter_gate(&mut self, vector: u8, error: Option<u16>, source: Source) -> Flow {
        let gate = self.read_gate(vector, source)?;
        let stack = self.gate_stack(&gate)? & !15;
        let mut rflags = self.rflags();
        if source == Source::Fault {
            rflags |= flags::RF;
        }
        let words: [u64; 6] = [
            error.unwrap_or_default().into(),
            self.own_rip(),
            self.segments.cs.selector.into(),
            rflags,
            self.full(gpr::RSP),
            self.segments.ss.selector.into(),
        ];
        let mut bytes = [0; 48];
        for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let frame = if error.is_some() { &bytes[..] } else { &bytes[8..] };
        let top = stack.wrapping_sub(frame.len() as u64);
        let written = self.store_bytes_as(top, frame, gate.privilege == 3);
        written.map_err(|trap| self.on_stack(trap))?;

        if gate.privilege != self.cpl {
            self.segments.ss =
                Segment { selector: u16::from(gate.privilege), ..Segment::default() };
        }
        self.set_code_segment(gate.code);
        self.set_full(gpr::RSP, top);
        self.set_rip(gate.target);
        let mut cleared = flags::TF | flags::NT | flags::RF;
        if gate.masks_interrupts {
            cleared |= flags::IF;
        }
        self.system_flags &= !(cleared | SHADOW | SS_SHADOW | HALTED);
        self.set_cpl(gate.privilege);
        Ok(())
    }

    fn read_gate(&mut self, vector: u8, source: Source) -> Result<Gate, Trap> {
        let error = (u16::from(vector) << 3) | IN_IDT;
        let offset = u64::from(vector) * 16;
        if offset + 15 > u64::from(self.idtr.limit) {
            return Err(self.general_protection(error));
        }
        let address = self.idtr.base.wrapping_add(offset);
        let low = self.load_system::<u64>(address)?;
        let high = self.load_system::<u64>(address.wrapping_add(8))?;
        let kind = (low >> 40) & 0x1F;
        if kind != INTERRUPT_GATE && kind != TRAP_GATE {
            return Err(self.general_protection(error));
        }
        let gate_privilege = ((low >> 45) & 3) as u8;
        if source == Source::Software && gate_privilege < self.cpl {
            return Err(self.general_protection(error));
        }
        if low & (1 << 47) == 0 {
            return Err(self.raise(Exception::SegmentNotPresent(error)));
        }
        let target = (low & 0xFFFF) | ((low >> 32) & 0xFFFF_0000) | (high << 32);
        let (code, privilege) = self.gate_code((low >> 16) as u16)?;
        if !is_canonical(target) {
            return Err(self.general_protection(0));
        }
        Ok(Gate {
            target,
            code,
            privilege,
            stack_index: (low >> 32) & 7,
            masks_interrupts: kind == INTERRUPT_GATE,
        })
    }

    fn gate_code(&mut self, selector: u16) -> Result<(Segment, u8), Trap> {
        if selector & !3 == 0 {
            return Err(self.general_protection(0));
        }
        let error = error_of(selector);
        let mut descriptor = self.descriptor(selector)?;
        let is_code = descriptor.has(attribute::NOT_SYSTEM | attribute::CODE);
        if !is_code || descriptor.dpl() > self.cpl {
            return Err(self.general_protection(error));
        }
        if !descriptor.has(attribute::PRESENT) {
            return Err(self.raise(Exception::SegmentNotPresent(error)));
        }
        if !descriptor.has(attribute::LONG) || descriptor.has(attribute::BIG) {
            return Err(self.general_protection(error));
        }
        self.mark_accessed(&mut descriptor)?;
        let conforming = descriptor.has(attribute::CONFORMING);
        let privilege = if conforming { self.cpl } else { descriptor.dpl() };
        let selector = (selector & !3) | u16::from(privilege);
        Ok((descriptor.segment(selector), privilege))
    }

    fn gate_stack(&mut self, gate: &Gate) -> Result<u64, Trap> {
        let offset = if gate.stack_index != 0 {
            TSS_IST1 + 8 * (gate.stack_index - 1)
        } else if gate.privilege < self.cpl {
            TSS_RSP0 + 8 * u64::from(gate.privilege)
        } else {
            return Ok(self.full(gpr::RSP));
        };
        let tss = self.segments.tr;
        if offset + 7 > u64::from(tss.limit) {
            return Err(self.raise(Exception::InvalidTss(error_of(tss.selector))));
        }
        let stack = self.load_system::<u64>(tss.base.wrapping_add(offset))?;
        if !is_canonical(stack) {
            return Err(self.raise(Exception::StackFault(0)));
        }
        Ok(stack)
    }

    /// True if an interrupt from the line can be taken at this boundary.
    pub(in super::super) fn can_take_interrupt(&self) -> bool {
        self.system_flags & flags::IF != 0 && self.system_flags & (SHADOW | SHUT_DOWN) == 0
    }
}

/// `IRET` of any operand size.
pub(in super::super) fn iret(cpu: &mut Cpu, i: &Instruction) -> Flow {
    match i.code() {
        Code::Iretq => iret_of::<u64>(cpu),
        Code::Iretd => iret_of::<u32>(cpu),
        _ => iret_of::<u16>(cpu),
    }
}

fn iret_of<T: Int>(cpu: &mut Cpu) -> Flow {
    if cpu.system_flags & flags::NT != 0 {
        return Err(cpu.general_protection(0));
    }
    let word = |cpu: &mut Cpu, number: u64| cpu.on_top::<T>(number * T::BYTES as u64);
    let [rip, cs, rflags] = [word(cpu, 0)?, word(cpu, 1)?, word(cpu, 2)?];
    let mut changed = cpu.changeable_flags();
    if T::BITS == 16 {
        changed &= 0xFFFF;
    }
    // 64-bit code always pops the stack, other code if the privilege level changes.
    if cpu.is_long() || (cs & 3) as u8 > cpu.cpl {
        let [rsp, ss] = [word(cpu, 3)?, word(cpu, 4)?];
        cpu.return_to(cs as u16, rip, rsp, ss as u16)?;
    } else {
        let pointer = cpu.stack_pointer(3 * T::BYTES as i64);
        cpu.return_within(cs as u16, rip)?;
        cpu.set_stack_pointer(pointer);
    }
    // RF lasts for one instruction. It matters to breakpoints, and shows in the frame of a step.
    let steps = (cpu.system_flags | rflags) & flags::TF != 0;
    let matters = cpu.system_flags & ARMED != 0 || steps;
    let resume = if matters { 0 } else { flags::RF };
    let old = cpu.rflags();
    cpu.load_rflags(((old & !changed) | (rflags & changed)) & !resume);
    Ok(())
}
