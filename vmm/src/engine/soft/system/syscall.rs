//! `SYSCALL` and `SYSRET`, 64-bit.
//!
//! `SYSENTER` does not exist in long mode on the vendor the CPU model follows.

use super::segments::attribute;
use crate::engine::soft::cpu::{Cpu, EFER_SCE, gpr};
use crate::engine::soft::event::Flow;
use crate::engine::soft::exception::Exception;
use crate::engine::soft::flags;
use crate::engine::state::Segment;
use iced_x86::{Code, Instruction};

fn flat(selector: u16, privilege: u16, code: bool) -> Segment {
    use attribute::{ACCESSED, BIG, CODE, LONG, NOT_SYSTEM, PAGES, PRESENT, READ_WRITE};
    let kind = if code { CODE | LONG } else { BIG };
    let attributes = ACCESSED | READ_WRITE | NOT_SYSTEM | PRESENT | PAGES | kind | (privilege << 5);
    Segment { selector, base: 0, limit: u32::MAX, attributes }
}

/// `SYSCALL`.
pub(in super::super) fn syscall(cpu: &mut Cpu, _: &Instruction) -> Flow {
    if cpu.msrs.efer & EFER_SCE == 0 {
        return Err(cpu.raise(Exception::InvalidOpcode));
    }
    let rflags = cpu.rflags();
    cpu.set_full(gpr::RCX, cpu.next_rip);
    cpu.set_full(gpr::R11, rflags & !flags::RF);
    let selector = (cpu.msrs.star >> 32) as u16 & !3;
    cpu.segments.cs = flat(selector, 0, true);
    cpu.segments.ss = flat(selector.wrapping_add(8), 0, false);
    cpu.set_rflags(rflags & !cpu.msrs.sfmask & !flags::RF);
    cpu.set_cpl(0);
    cpu.next_rip = cpu.msrs.lstar;
    Ok(())
}

/// `SYSRET` to 64-bit code; to anything else it raises `#GP` of the selector.
pub(in super::super) fn sysret(cpu: &mut Cpu, i: &Instruction) -> Flow {
    if cpu.msrs.efer & EFER_SCE == 0 {
        return Err(cpu.raise(Exception::InvalidOpcode));
    }
    cpu.require_supervisor()?;
    let base = (cpu.msrs.star >> 48) as u16;
    if i.code() != Code::Sysretq {
        return Err(cpu.general_protection(base & !3));
    }
    cpu.segments.cs = flat(base.wrapping_add(16) | 3, 3, true);
    cpu.segments.ss = flat(base.wrapping_add(8) | 3, 3, false);
    let kept = flags::ALL & !flags::RF;
    cpu.set_rflags(cpu.full(gpr::R11) & kept);
    cpu.set_cpl(3);
    // A target that is not canonical faults when it is fetched, at privilege level 3.
    cpu.next_rip = cpu.full(gpr::RCX);
    Ok(())
}
