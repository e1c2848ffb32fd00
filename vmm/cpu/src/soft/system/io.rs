//! Ports, the interrupt flag, `HLT`.

use crate::soft::cpu::{Cpu, HALTED, SHADOW, gpr, port_width};
use crate::soft::event::{BusRequest, Flow};
use crate::soft::flags;
use crate::soft::operand::width;
use iced_x86::{Instruction, OpKind};

/// Offset of the I/O map base in a task-state segment.
const TSS_MAP_BASE: u64 = 102;

impl Cpu {
    /// I/O instructions are allowed, and changes of IF.
    pub(in super::super) fn io_privileged(&self) -> bool {
        u64::from(self.cpl) <= (self.system_flags & flags::IOPL) >> 12
    }

    /// `#GP(0)` unless IOPL or the I/O permission map allows `bytes` ports from `port` on.
    pub(in super::super) fn check_port(&mut self, port: u16, bytes: usize) -> Flow {
        if self.io_privileged() {
            return Ok(());
        }
        let tss = self.segments.tr;
        let limit = u64::from(tss.limit);
        if limit < TSS_MAP_BASE + 1 {
            return Err(self.general_protection(0));
        }
        let map = self.load_system::<u16>(tss.base.wrapping_add(TSS_MAP_BASE))?;
        let offset = map + u64::from(port) / 8;
        if offset + 1 > limit {
            return Err(self.general_protection(0));
        }
        let bits = self.load_system::<u16>(tss.base.wrapping_add(offset))?;
        let mask = ((1u64 << bytes) - 1) << (port % 8);
        if bits & mask != 0 {
            return Err(self.general_protection(0));
        }
        Ok(())
    }
}

fn port(cpu: &mut Cpu, i: &Instruction, operand: u32) -> u16 {
    if i.op_kind(operand) == OpKind::Immediate8 {
        u16::from(i.immediate8())
    } else {
        cpu.reg::<u16>(gpr::RDX) as u16
    }
}

/// `IN`.
pub(in super::super) fn input(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let port = port(cpu, i, 1);
    let bytes = width(i, 0);
    cpu.check_port(port, bytes)?;
    let value = cpu.bus(BusRequest::PortRead { port, width: port_width(bytes) })?;
    cpu.put(i, 0, value)
}

/// `OUT`.
pub(in super::super) fn output(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let port = port(cpu, i, 0);
    let bytes = width(i, 1);
    cpu.check_port(port, bytes)?;
    let value = cpu.get(i, 1)? as u32;
    cpu.bus(BusRequest::PortWrite { port, width: port_width(bytes), value })?;
    Ok(())
}

/// `CLI`.
pub(in super::super) fn cli(cpu: &mut Cpu, _: &Instruction) -> Flow {
    if !cpu.io_privileged() {
        return Err(cpu.general_protection(0));
    }
    cpu.system_flags &= !flags::IF;
    Ok(())
}

/// `STI`: interrupts are taken one instruction later, if they were off.
pub(in super::super) fn sti(cpu: &mut Cpu, _: &Instruction) -> Flow {
    if !cpu.io_privileged() {
        return Err(cpu.general_protection(0));
    }
    if cpu.system_flags & flags::IF == 0 {
        cpu.system_flags |= flags::IF | SHADOW;
    }
    Ok(())
}

/// `HLT`.
pub(in super::super) fn hlt(cpu: &mut Cpu, _: &Instruction) -> Flow {
    cpu.require_supervisor()?;
    cpu.system_flags |= HALTED;
    Ok(())
}
