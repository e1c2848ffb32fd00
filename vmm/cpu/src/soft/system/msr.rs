//! Model-specific registers, the time-stamp counter, `CPUID`.

use crate::cpu_model;
use crate::msr::*;
use crate::soft::cpu::{
    CR4_FSGSBASE, CR4_TSD, Cpu, EFER_LONG, EFER_NXE, EFER_SCE, gpr, is_canonical, slot,
};
use crate::soft::event::{Flow, Trap};
use crate::soft::exception::Exception;
use crate::soft::flags::cut;
use crate::soft::operand::width;
use iced_x86::Instruction;

impl Cpu {
    fn read_msr(&mut self, number: u32) -> Result<u64, Trap> {
        Ok(match number {
            TSC => self.time_stamp()?,
            TSC_ADJUST => self.msrs.tsc_adjust,
            MICROCODE_REVISION => 0,
            SYSENTER_CS => self.msrs.sysenter_cs,
            SYSENTER_ESP => self.msrs.sysenter_esp,
            SYSENTER_EIP => self.msrs.sysenter_eip,
            PAT => self.msrs.pat,
            EFER => self.msrs.efer,
            STAR => self.msrs.star,
            LSTAR => self.msrs.lstar,
            CSTAR => self.msrs.cstar,
            SFMASK => self.msrs.sfmask,
            FS_BASE => self.full(slot::FS),
            GS_BASE => self.full(slot::GS),
            KERNEL_GS_BASE => self.msrs.kernel_gs_base,
            TSC_AUX => self.msrs.tsc_aux,
            _ => return Err(self.general_protection(0)),
        })
    }

    fn write_msr(&mut self, number: u32, value: u64) -> Flow {
        let valid = match number {
            LSTAR | CSTAR | FS_BASE | GS_BASE | KERNEL_GS_BASE | SYSENTER_ESP | SYSENTER_EIP => {
                is_canonical(value)
            }
            TSC_AUX | SFMASK => value >> 32 == 0,
            PAT => value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7)),
            EFER => {
                value & !(EFER_SCE | EFER_LONG | EFER_NXE) == 0 && value & EFER_LONG == EFER_LONG
            }
            _ => true,
        };
        if !valid {
            return Err(self.general_protection(0));
        }
        match number {
            TSC => {
                let now = self.time_stamp()?;
                self.msrs.tsc_adjust = self.msrs.tsc_adjust.wrapping_add(value).wrapping_sub(now);
            }
            TSC_ADJUST => self.msrs.tsc_adjust = value,
            MICROCODE_REVISION => {}
            SYSENTER_CS => self.msrs.sysenter_cs = value,
            SYSENTER_ESP => self.msrs.sysenter_esp = value,
            SYSENTER_EIP => self.msrs.sysenter_eip = value,
            PAT => self.msrs.pat = value,
            EFER => {
                if (value ^ self.msrs.efer) & EFER_NXE != 0 {
                    self.tlb.flush();
                }
                self.msrs.efer = value;
            }
            STAR => self.msrs.star = value,
            LSTAR => self.msrs.lstar = value,
            CSTAR => self.msrs.cstar = value,
            SFMASK => self.msrs.sfmask = value,
            FS_BASE => self.set_full(slot::FS, value),
            GS_BASE => self.set_full(slot::GS, value),
            KERNEL_GS_BASE => self.msrs.kernel_gs_base = value,
            TSC_AUX => self.msrs.tsc_aux = value,
            _ => return Err(self.general_protection(0)),
        }
        Ok(())
    }

    fn set_edx_eax(&mut self, value: u64) {
        self.set_full(gpr::RAX, cut::<u32>(value));
        self.set_full(gpr::RDX, value >> 32);
    }
}

/// `RDMSR`.
pub(in super::super) fn rdmsr(cpu: &mut Cpu, _: &Instruction) -> Flow {
    cpu.require_supervisor()?;
    let value = cpu.read_msr(cpu.reg::<u32>(gpr::RCX) as u32)?;
    cpu.set_edx_eax(value);
    Ok(())
}

/// `WRMSR`.
pub(in super::super) fn wrmsr(cpu: &mut Cpu, _: &Instruction) -> Flow {
    cpu.require_supervisor()?;
    let value = cpu.reg::<u32>(gpr::RAX) | (cpu.reg::<u32>(gpr::RDX) << 32);
    cpu.write_msr(cpu.reg::<u32>(gpr::RCX) as u32, value)
}

fn check_time_stamp_allowed(cpu: &mut Cpu) -> Flow {
    if cpu.cpl > 0 && cpu.cr4 & CR4_TSD != 0 {
        return Err(cpu.general_protection(0));
    }
    Ok(())
}

/// `RDTSC`.
pub(in super::super) fn rdtsc(cpu: &mut Cpu, _: &Instruction) -> Flow {
    check_time_stamp_allowed(cpu)?;
    let value = cpu.time_stamp()?;
    cpu.set_edx_eax(value);
    Ok(())
}

/// `RDTSCP`.
pub(in super::super) fn rdtscp(cpu: &mut Cpu, i: &Instruction) -> Flow {
    rdtsc(cpu, i)?;
    cpu.set_full(gpr::RCX, cpu.msrs.tsc_aux);
    Ok(())
}

/// `RDPMC`: there are no counters to read.
pub(in super::super) fn rdpmc(cpu: &mut Cpu, _: &Instruction) -> Flow {
    Err(cpu.general_protection(0))
}

/// `CPUID`.
pub(in super::super) fn cpuid(cpu: &mut Cpu, _: &Instruction) -> Flow {
    let leaf = cpu.reg::<u32>(gpr::RAX) as u32;
    let subleaf = cpu.reg::<u32>(gpr::RCX) as u32;
    let answer = cpu_model::leaf(leaf, subleaf, cpu.time_stamp_counter);
    cpu.set_full(gpr::RAX, answer.eax.into());
    cpu.set_full(gpr::RBX, answer.ebx.into());
    cpu.set_full(gpr::RCX, answer.ecx.into());
    cpu.set_full(gpr::RDX, answer.edx.into());
    Ok(())
}

fn base_access(cpu: &mut Cpu) -> Flow {
    if cpu.cr4 & CR4_FSGSBASE == 0 {
        return Err(cpu.raise(Exception::InvalidOpcode));
    }
    Ok(())
}

fn read_base(cpu: &mut Cpu, i: &Instruction, segment: u8) -> Flow {
    base_access(cpu)?;
    let value = cpu.full(segment);
    cpu.put(i, 0, value)
}

fn write_base(cpu: &mut Cpu, i: &Instruction, segment: u8) -> Flow {
    base_access(cpu)?;
    let value = cpu.get(i, 0)?;
    if width(i, 0) == 8 && !is_canonical(value) {
        return Err(cpu.general_protection(0));
    }
    cpu.set_full(segment, value);
    Ok(())
}

/// `RDFSBASE`.
pub(in super::super) fn rdfsbase(cpu: &mut Cpu, i: &Instruction) -> Flow {
    read_base(cpu, i, slot::FS)
}

/// `RDGSBASE`.
pub(in super::super) fn rdgsbase(cpu: &mut Cpu, i: &Instruction) -> Flow {
    read_base(cpu, i, slot::GS)
}

/// `WRFSBASE`.
pub(in super::super) fn wrfsbase(cpu: &mut Cpu, i: &Instruction) -> Flow {
    write_base(cpu, i, slot::FS)
}

/// `WRGSBASE`.
pub(in super::super) fn wrgsbase(cpu: &mut Cpu, i: &Instruction) -> Flow {
    write_base(cpu, i, slot::GS)
}

/// `SWAPGS`.
pub(in super::super) fn swapgs(cpu: &mut Cpu, _: &Instruction) -> Flow {
    cpu.require_supervisor()?;
    let base = cpu.full(slot::GS);
    let other = std::mem::replace(&mut cpu.msrs.kernel_gs_base, base);
    cpu.set_full(slot::GS, other);
    Ok(())
}
