//! String instructions.
//!
//! One retired step executes at most [`CHUNK`] iterations. If iterations are left, the step
//! ends with RIP unchanged, so that a huge count neither delays an interrupt nor the engine's
//! bound. An iteration that used the bus or hit a watchpoint also ends its step. A fault leaves
//! the registers as after the last complete iteration.

use crate::memory::{PAGE_SIZE, PageNumber};
use crate::soft::cpu::{Cpu, UNFINISHED, gpr, port_width};
use crate::soft::event::{BusRequest, Flow, Trap};
use crate::soft::flags::{self, Int, cut};
use crate::soft::mmu::Intent;
use crate::soft::operand::by_width;
use crate::soft::ops::alu::{Alu, Cmp};
use crate::soft::tlb::View;
use iced_x86::{Code, Instruction, OpKind, Register};

/// Most iterations of one retired step. A page of bytes: what kernels clear at once.
pub(in super::super) const CHUNK: u64 = 4096;

/// What a string instruction's prefixes and operand sizes come to.
#[derive(Debug, Clone, Copy)]
struct Shape {
    /// The bits of an offset, and of the count.
    mask: u64,
    /// The source's segment.
    segment: Register,
    /// Added to the pointers after each iteration.
    step: u64,
    /// Bytes of an element.
    bytes: usize,
    /// Offsets are linear addresses, whatever they are.
    flat: bool,
}

/// What one call of an iteration's body did.
#[derive(Debug, Clone, Copy)]
struct Done {
    iterations: u64,
    /// The comparison ends the repetition.
    stop: bool,
}

const ONE: Done = Done { iterations: 1, stop: false };

/// The bits of the offsets of a string instruction.
fn offset_mask(i: &Instruction) -> u64 {
    let kinds = [i.op0_kind(), i.op1_kind()];
    for kind in kinds {
        match kind {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => return 0xFFFF,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => {
                return u64::from(u32::MAX);
            }
            _ => {}
        }
    }
    u64::MAX
}

impl Shape {
    fn of<T: Int>(cpu: &Cpu, i: &Instruction) -> Self {
        let down = cpu.system_flags & flags::DF != 0;
        let bytes = T::BYTES as u64;
        let segment = i.memory_segment();
        Self {
            mask: offset_mask(i),
            segment,
            step: if down { bytes.wrapping_neg() } else { bytes },
            bytes: T::BYTES,
            flat: cpu.is_long() || (cpu.is_flat(segment) && cpu.is_flat(Register::ES)),
        }
    }

    fn offset(&self, cpu: &Cpu, register: u8) -> u64 {
        cpu.full(register) & self.mask
    }

    fn source(&self, cpu: &Cpu) -> u64 {
        cpu.in_segment(self.segment, self.offset(cpu, gpr::RSI), self.bytes, || false)
    }

    /// Where an element is read from ES.
    fn compared(&self, cpu: &Cpu) -> u64 {
        cpu.in_segment(Register::ES, self.offset(cpu, gpr::RDI), self.bytes, || false)
    }

    /// Where an element is written.
    fn target(&self, cpu: &Cpu) -> u64 {
        cpu.in_segment(Register::ES, self.offset(cpu, gpr::RDI), self.bytes, || true)
    }

    fn advance(&self, cpu: &mut Cpu, register: u8, iterations: u64) {
        let moved = cpu.full(register).wrapping_add(self.step.wrapping_mul(iterations));
        match self.mask {
            0xFFFF => cpu.set_reg::<u16>(register, cut::<u16>(moved)),
            mask => cpu.set_full(register, moved & mask),
        }
    }
}

/// Runs `body` once, or as often as the `REP` prefix and RCX say.
fn repeat(
    cpu: &mut Cpu,
    i: &Instruction,
    mask: u64,
    mut body: impl FnMut(&mut Cpu, u64) -> Result<Done, Trap>,
) -> Flow {
    if !i.has_rep_prefix() && !i.has_repne_prefix() {
        return body(cpu, 1).map(|_| ());
    }
    let mut left = cpu.full(gpr::RCX) & mask;
    let quota = if cpu.system_flags & flags::TF != 0 { 1 } else { CHUNK };
    let mut budget = quota - cpu.restart.iterations.min(quota - 1);
    let before = cpu.flags;
    let mut stop = false;
    while left > 0 && budget > 0 && !stop {
        let done = match body(cpu, left.min(budget)) {
            Ok(done) => done,
            Err(trap) => {
                // A fault shows the flags from before the comparisons (SDM volume 2, REP).
                cpu.flags = before;
                cpu.restart.iterations = quota - budget;
                return Err(trap);
            }
        };
        left -= done.iterations;
        budget -= done.iterations;
        stop = done.stop;
        cpu.set_counter(mask, left);
        if cpu.restart.used_bus() || cpu.hits != 0 {
            break;
        }
    }
    if left > 0 && !stop {
        // As in a fault: the comparisons show in the flags when the last is done.
        cpu.flags = before;
        cpu.next_rip = cpu.own_address(i);
        cpu.system_flags |= UNFINISHED;
    }
    Ok(())
}

/// Bytes from `address` to the end of its page.
fn room(address: u64) -> u64 {
    PAGE_SIZE - address % PAGE_SIZE
}

/// Where a run of writes may go straight to memory: the physical address, unless the page
/// holds decoded code.
fn plain_target(cpu: &mut Cpu, address: u64) -> Result<Option<u64>, Trap> {
    let user = cpu.cpl == 3;
    let physical = cpu.translate(address, Intent::Write, user)?;
    let code = cpu.code.has_code(PageNumber::containing(physical));
    Ok((!code).then_some(physical))
}

fn may_run(cpu: &Cpu, shape: Shape, max: u64, bytes: usize, addresses: &[u64]) -> u64 {
    let usable = shape.flat
        && (shape.mask == u64::MAX || !cpu.is_long())
        && shape.mask != 0xFFFF
        && shape.step == bytes as u64
        && cpu.view != View::None
        && addresses.iter().all(|address| crate::soft::cpu::is_canonical(*address));
    if !usable {
        return 0;
    }
    let pages = addresses.iter().map(|address| room(*address) / bytes as u64).min();
    pages.unwrap_or(0).min(max)
}

fn movs<T: Int>(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let shape = Shape::of::<T>(cpu, i);
    repeat(cpu, i, shape.mask, |cpu, max| {
        let (source, target) = (shape.source(cpu), shape.target(cpu));
        let run = may_run(cpu, shape, max, T::BYTES, &[source, target]);
        if run > 1 {
            let user = cpu.cpl == 3;
            let from = cpu.translate(source, Intent::Read, user)?;
            let to = plain_target(cpu, target)?;
            let len = run as usize * T::BYTES;
            if to.is_some_and(|to| cpu.ram.move_up(from, to, len, T::BYTES)) {
                shape.advance(cpu, gpr::RSI, run);
                shape.advance(cpu, gpr::RDI, run);
                return Ok(Done { iterations: run, stop: false });
            }
        }
        let value = cpu.load::<T>(source)?;
        cpu.store::<T>(target, value)?;
        shape.advance(cpu, gpr::RSI, 1);
        shape.advance(cpu, gpr::RDI, 1);
        Ok(ONE)
    })
}

fn stos<T: Int>(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let shape = Shape::of::<T>(cpu, i);
    repeat(cpu, i, shape.mask, |cpu, max| {
        let target = shape.target(cpu);
        let value = cpu.reg::<T>(gpr::RAX);
        let run = may_run(cpu, shape, max, T::BYTES, &[target]);
        if run > 1 {
            let to = plain_target(cpu, target)?;
            let len = run as usize * T::BYTES;
            if to.is_some_and(|to| cpu.ram.fill(to, len, T::BYTES, value)) {
                shape.advance(cpu, gpr::RDI, run);
                return Ok(Done { iterations: run, stop: false });
            }
        }
        cpu.store::<T>(target, value)?;
        shape.advance(cpu, gpr::RDI, 1);
        Ok(ONE)
    })
}

fn lods<T: Int>(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let shape = Shape::of::<T>(cpu, i);
    repeat(cpu, i, shape.mask, |cpu, _| {
        let value = cpu.load::<T>(shape.source(cpu))?;
        cpu.set_reg::<T>(gpr::RAX, value);
        shape.advance(cpu, gpr::RSI, 1);
        Ok(ONE)
    })
}

/// Whether a repeated comparison ends: at the first difference for `REPE`, at the first match
/// for `REPNE`.
fn ends(cpu: &Cpu, i: &Instruction) -> bool {
    cpu.flags.zero() == i.has_repne_prefix()
}

fn cmps<T: Int>(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let shape = Shape::of::<T>(cpu, i);
    repeat(cpu, i, shape.mask, |cpu, _| {
        // In the order of Intel's processors, which shows if both fault.
        let b = cpu.load::<T>(shape.compared(cpu))?;
        let a = cpu.load::<T>(shape.source(cpu))?;
        Cmp::apply::<T>(&mut cpu.flags, a, b);
        shape.advance(cpu, gpr::RSI, 1);
        shape.advance(cpu, gpr::RDI, 1);
        Ok(Done { iterations: 1, stop: ends(cpu, i) })
    })
}

fn scas<T: Int>(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let shape = Shape::of::<T>(cpu, i);
    repeat(cpu, i, shape.mask, |cpu, _| {
        let b = cpu.load::<T>(shape.compared(cpu))?;
        let a = cpu.reg::<T>(gpr::RAX);
        Cmp::apply::<T>(&mut cpu.flags, a, b);
        shape.advance(cpu, gpr::RDI, 1);
        Ok(Done { iterations: 1, stop: ends(cpu, i) })
    })
}

fn ins<T: Int>(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let shape = Shape::of::<T>(cpu, i);
    let port = cpu.reg::<u16>(gpr::RDX) as u16;
    cpu.check_port(port, T::BYTES)?;
    repeat(cpu, i, shape.mask, |cpu, _| {
        let target = shape.target(cpu);
        // The store must not fault once the port has been read.
        cpu.probe_store(target, T::BYTES)?;
        let value = cpu.bus(BusRequest::PortRead { port, width: port_width(T::BYTES) })?;
        cpu.store::<T>(target, value)?;
        shape.advance(cpu, gpr::RDI, 1);
        Ok(ONE)
    })
}

fn outs<T: Int>(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let shape = Shape::of::<T>(cpu, i);
    let port = cpu.reg::<u16>(gpr::RDX) as u16;
    cpu.check_port(port, T::BYTES)?;
    repeat(cpu, i, shape.mask, |cpu, _| {
        let value = cpu.load::<T>(shape.source(cpu))? as u32;
        cpu.bus(BusRequest::PortWrite { port, width: port_width(T::BYTES), value })?;
        shape.advance(cpu, gpr::RSI, 1);
        Ok(ONE)
    })
}

/// `MASKMOVDQU` and its like store here: DS:[RDI] with its override.
pub(in super::super) fn implicit_target(cpu: &Cpu, i: &Instruction) -> u64 {
    let offset = cpu.full(gpr::RDI) & offset_mask(i);
    let segment = match i.memory_segment() {
        Register::None => Register::DS,
        other => other,
    };
    cpu.in_segment(segment, offset, i.memory_size().size(), || true)
}

macro_rules! dispatch {
    ($name:ident, $function:ident, $doc:literal) => {
        #[doc = $doc]
        pub(in super::super) fn $name(cpu: &mut Cpu, i: &Instruction) -> Flow {
            by_width!(element(i.code()), T => $function::<T>(cpu, i))
        }
    };
}
dispatch!(any_movs, movs, "`MOVS`.");
dispatch!(any_stos, stos, "`STOS`.");
dispatch!(any_lods, lods, "`LODS`.");
dispatch!(any_cmps, cmps, "`CMPS`.");
dispatch!(any_scas, scas, "`SCAS`.");
dispatch!(any_ins, ins, "`INS`.");
dispatch!(any_outs, outs, "`OUTS`.");

/// Bytes of one element.
fn element(code: Code) -> usize {
    match code {
        Code::Movsb_m8_m8
        | Code::Stosb_m8_AL
        | Code::Lodsb_AL_m8
        | Code::Cmpsb_m8_m8
        | Code::Scasb_AL_m8
        | Code::Insb_m8_DX
        | Code::Outsb_DX_m8 => 1,
        Code::Movsw_m16_m16
        | Code::Stosw_m16_AX
        | Code::Lodsw_AX_m16
        | Code::Cmpsw_m16_m16
        | Code::Scasw_AX_m16
        | Code::Insw_m16_DX
        | Code::Outsw_DX_m16 => 2,
        Code::Movsd_m32_m32
        | Code::Stosd_m32_EAX
        | Code::Lodsd_EAX_m32
        | Code::Cmpsd_m32_m32
        | Code::Scasd_EAX_m32
        | Code::Insd_m32_DX
        | Code::Outsd_DX_m32 => 4,
        _ => 8,
    }
}
