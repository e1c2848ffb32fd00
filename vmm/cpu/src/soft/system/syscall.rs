//! `SYSCALL` and `SYSRET`, from and to 64-bit and 32-bit code.
//!
//! `SYSENTER` does not exist in long mode on the vendor the CPU model follows. Unlike there,
//! `SYSRET` loads the hidden part of SS too, as the other vendor's does: a kernel that works around
//! a stale one finds nothing to do.

use super::segments::attribute;
use crate::soft::cpu::{Cpu, EFER_SCE, gpr};
use crate::soft::event::Flow;
use crate::soft::exception::Exception;
use crate::soft::flags::{self, cut};
use crate::state::Segment;
use iced_x86::{Code, Instruction};

/// What the segment is for.
#[derive(Debug, Clone, Copy)]
enum Use {
    Code64,
    Code32,
    Stack,
}

fn flat(selector: u16, privilege: u16, purpose: Use) -> Segment {
    use attribute::{ACCESSED, BIG, CODE, LONG, NOT_SYSTEM, PAGES, PRESENT, READ_WRITE};
    let kind = match purpose {
        Use::Code64 => CODE | LONG,
        Use::Code32 => CODE | BIG,
        Use::Stack => BIG,
    };
    let attributes = ACCESSED | READ_WRITE | NOT_SYSTEM | PRESENT | PAGES | kind | (privilege << 5);
    Segment { selector, base: 0, limit: u32::MAX, attributes }
}

/// `SYSCALL`.
pub(in super::super) fn syscall(cpu: &mut Cpu, _: &Instruction) -> Flow {
    if cpu.msrs.efer & EFER_SCE == 0 {
        return Err(cpu.raise(Exception::InvalidOpcode));
    }
    let rflags = cpu.rflags();
    let target = if cpu.is_long() { cpu.msrs.lstar } else { cpu.msrs.cstar };
    cpu.set_full(gpr::RCX, cpu.next_rip);
    cpu.set_full(gpr::R11, rflags & !flags::RF);
    let selector = (cpu.msrs.star >> 32) as u16 & !3;
    cpu.set_code_segment(flat(selector, 0, Use::Code64));
    cpu.segments.ss = flat(selector.wrapping_add(8), 0, Use::Stack);
    cpu.set_rflags(rflags & !cpu.msrs.sfmask & !flags::RF);
    cpu.set_cpl(0);
    cpu.next_rip = target;
    Ok(())
}

/// `SYSRET`: to 64-bit code with REX.W, else to 32-bit code.
pub(in super::super) fn sysret(cpu: &mut Cpu, i: &Instruction) -> Flow {
    if cpu.msrs.efer & EFER_SCE == 0 {
        return Err(cpu.raise(Exception::InvalidOpcode));
    }
    cpu.require_supervisor()?;
    let base = (cpu.msrs.star >> 48) as u16;
    let target = cpu.full(gpr::RCX);
    let (code, target) = if i.code() == Code::Sysretq {
        // A target that is not canonical faults when it is fetched, at privilege level 3.
        (flat(base.wrapping_add(16) | 3, 3, Use::Code64), target)
    } else {
        (flat(base | 3, 3, Use::Code32), cut::<u32>(target))
    };
    cpu.set_code_segment(code);
    cpu.segments.ss = flat(base.wrapping_add(8) | 3, 3, Use::Stack);
    let kept = flags::ALL & !flags::RF;
    cpu.set_rflags(cpu.full(gpr::R11) & kept);
    cpu.set_cpl(3);
    cpu.next_rip = target;
    Ok(())
}
