//! Control registers, and the flushes.

use crate::cpu_model::PHYSICAL_BITS;
use crate::soft::cpu::{
    CR0_ALWAYS, CR0_AM, CR0_EM, CR0_MP, CR0_TS, CR0_WP, CR4_FSGSBASE, CR4_OSFXSR, CR4_PAE, CR4_PCE,
    CR4_PGE, CR4_SMEP, CR4_TSD, CR4_UMIP, Cpu,
};
use crate::soft::event::{Flow, Trap};
use crate::soft::exception::Exception;
use iced_x86::{Instruction, OpKind, Register};

const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_WRITABLE: u64 =
    CR0_ALWAYS | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD;

/// CR4.DE.
pub(in super::super) const CR4_DE: u64 = 1 << 3;
const CR4_PSE: u64 = 1 << 4;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
/// The bits of CR4 that the CPU model has.
pub(in super::super) const CR4_OFFERED: u64 = CR4_TSD
    | CR4_DE
    | CR4_PSE
    | CR4_PAE
    | CR4_PGE
    | CR4_PCE
    | CR4_OSFXSR
    | CR4_OSXMMEXCPT
    | CR4_UMIP
    | CR4_FSGSBASE
    | CR4_SMEP;

/// CR3 bits 3 and 4 choose caching of the top table, which has no meaning here.
const CR3_KEPT: u64 = ((1 << PHYSICAL_BITS) - 1) & !0xFE7;

impl Cpu {
    /// Writes CR0. Leaving long mode is not offered: `#GP(0)`.
    fn set_cr0(&mut self, value: u64) -> Flow {
        let invalid = value & CR0_ALWAYS != CR0_ALWAYS
            || value >> 32 != 0
            || (value & CR0_NW != 0 && value & CR0_CD == 0);
        if invalid {
            return Err(self.general_protection(0));
        }
        let value = (value & CR0_WRITABLE) | CR0_ET;
        if (value ^ self.cr0) & CR0_WP != 0 {
            self.tlb.flush();
        }
        self.cr0 = value;
        self.update_view();
        Ok(())
    }

    fn set_cr3(&mut self, value: u64) -> Flow {
        if value >> PHYSICAL_BITS != 0 {
            return Err(self.general_protection(0));
        }
        self.cr3 = value & (CR3_KEPT | 0x18);
        if self.cr4 & CR4_PGE != 0 {
            self.tlb.flush_non_global();
        } else {
            self.tlb.flush();
        }
        Ok(())
    }

    fn set_cr4(&mut self, value: u64) -> Flow {
        if value & !CR4_OFFERED != 0 || value & CR4_PAE == 0 {
            return Err(self.general_protection(0));
        }
        if (value ^ self.cr4) & (CR4_PGE | CR4_SMEP | CR4_PSE) != 0 {
            self.tlb.flush();
        }
        self.cr4 = value;
        self.arm();
        Ok(())
    }

    fn control(&mut self, register: Register) -> Result<u64, Trap> {
        match register {
            Register::CR0 => Ok(self.cr0),
            Register::CR2 => Ok(self.cr2),
            Register::CR3 => Ok(self.cr3),
            Register::CR4 => Ok(self.cr4),
            Register::CR8 => Ok(self.cr8),
            _ => Err(self.raise(Exception::InvalidOpcode)),
        }
    }

    fn set_control(&mut self, register: Register, value: u64) -> Flow {
        match register {
            Register::CR0 => self.set_cr0(value),
            Register::CR2 => {
                self.cr2 = value;
                Ok(())
            }
            Register::CR3 => self.set_cr3(value),
            Register::CR4 => self.set_cr4(value),
            Register::CR8 if value > 15 => Err(self.general_protection(0)),
            Register::CR8 => {
                self.cr8 = value;
                Ok(())
            }
            _ => Err(self.raise(Exception::InvalidOpcode)),
        }
    }
}

/// `MOV` to and from control registers.
pub(in super::super) fn mov_control(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let (target, source) = (i.op0_register(), i.op1_register());
    if target.is_cr() {
        if !matches!(target.number(), 0 | 2 | 3 | 4 | 8) {
            return Err(cpu.raise(Exception::InvalidOpcode));
        }
        cpu.require_supervisor()?;
        let value = cpu.register(source);
        return cpu.set_control(target, value);
    }
    if !matches!(source.number(), 0 | 2 | 3 | 4 | 8) {
        return Err(cpu.raise(Exception::InvalidOpcode));
    }
    cpu.require_supervisor()?;
    let value = cpu.control(source)?;
    cpu.set_register(target, value);
    Ok(())
}

/// `SMSW`.
pub(in super::super) fn smsw(cpu: &mut Cpu, i: &Instruction) -> Flow {
    cpu.check_umip()?;
    let value = cpu.cr0;
    cpu.put(i, 0, value)
}

/// `LMSW`: sets MP, EM, TS; PE cannot be cleared.
pub(in super::super) fn lmsw(cpu: &mut Cpu, i: &Instruction) -> Flow {
    cpu.require_supervisor()?;
    let value = cpu.get(i, 0)?;
    let changed = CR0_MP | CR0_EM | CR0_TS;
    cpu.set_cr0((cpu.cr0 & !changed) | (value & changed))
}

/// `CLTS`.
pub(in super::super) fn clts(cpu: &mut Cpu, _: &Instruction) -> Flow {
    cpu.require_supervisor()?;
    cpu.cr0 &= !CR0_TS;
    Ok(())
}

/// `INVLPG`.
pub(in super::super) fn invlpg(cpu: &mut Cpu, i: &Instruction) -> Flow {
    cpu.require_supervisor()?;
    debug_assert_eq!(i.op0_kind(), OpKind::Memory);
    let address = cpu.address_of(i);
    if crate::soft::cpu::is_canonical(address) {
        cpu.tlb.flush_page(address);
    }
    Ok(())
}

/// `WBINVD`, `INVD`: the caches they would flush are not there.
pub(in super::super) fn wbinvd(cpu: &mut Cpu, _: &Instruction) -> Flow {
    cpu.require_supervisor()
}
