//! Segment registers, descriptor tables, and the instructions that inspect descriptors.

use crate::soft::cpu::{CR4_UMIP, Cpu, gpr, slot};
use crate::soft::event::{Flow, Trap};
use crate::soft::exception::Exception;
use crate::soft::flags::cut;
use crate::soft::operand::by_width;
use crate::state::Segment;
use iced_x86::{Instruction, Mnemonic, OpKind};

/// Attribute bits of [`Segment::attributes`].
pub(in super::super) mod attribute {
    /// Accessed (code and data).
    pub(in super::super::super) const ACCESSED: u16 = 1;
    /// Readable (code), writable (data).
    pub(in super::super::super) const READ_WRITE: u16 = 1 << 1;
    /// Conforming (code), expand-down (data).
    pub(in super::super::super) const CONFORMING: u16 = 1 << 2;
    /// Code.
    pub(in super::super::super) const CODE: u16 = 1 << 3;
    /// Code or data, not system.
    pub(in super::super::super) const NOT_SYSTEM: u16 = 1 << 4;
    /// Present.
    pub(in super::super::super) const PRESENT: u16 = 1 << 7;
    /// 64-bit code.
    pub(in super::super::super) const LONG: u16 = 1 << 9;
    /// Default operand size.
    pub(in super::super::super) const BIG: u16 = 1 << 10;
    /// The limit counts pages.
    pub(in super::super::super) const PAGES: u16 = 1 << 11;
}

const LDT_TYPE: u16 = 2;
const TSS_AVAILABLE: u16 = 9;
const TSS_BUSY: u16 = 11;

/// A descriptor as read from its table.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Descriptor {
    /// The first eight bytes.
    pub(in super::super) bits: u64,
    /// Their linear address.
    pub(in super::super) address: u64,
}

impl Descriptor {
    /// As in [`Segment::attributes`].
    pub(in super::super) fn attributes(&self) -> u16 {
        (((self.bits >> 40) & 0xFF) | (((self.bits >> 52) & 0xF) << 8)) as u16
    }

    /// Descriptor privilege level.
    pub(in super::super) fn dpl(&self) -> u8 {
        ((self.bits >> 45) & 3) as u8
    }

    /// True if all bits of `wanted` are set in the attributes.
    pub(in super::super) fn has(&self, wanted: u16) -> bool {
        self.attributes() & wanted == wanted
    }

    fn kind(&self) -> u16 {
        self.attributes() & 0xF
    }

    fn limit(&self) -> u32 {
        let raw = ((self.bits & 0xFFFF) | ((self.bits >> 32) & 0xF_0000)) as u32;
        if self.has(attribute::PAGES) { (raw << 12) | 0xFFF } else { raw }
    }

    fn base(&self) -> u64 {
        ((self.bits >> 16) & 0xFF_FFFF) | ((self.bits >> 32) & 0xFF00_0000)
    }

    /// The segment register contents it stands for.
    pub(in super::super) fn segment(&self, selector: u16) -> Segment {
        Segment { selector, base: self.base(), limit: self.limit(), attributes: self.attributes() }
    }
}

/// The selector without its privilege bits: what error codes show.
pub(in super::super) const fn error_of(selector: u16) -> u16 {
    selector & !3
}

impl Cpu {
    /// `#GP(0)` if CR4.UMIP keeps programs from reading system registers.
    pub(in super::super) fn check_umip(&mut self) -> Flow {
        if self.cpl > 0 && self.cr4 & CR4_UMIP != 0 {
            return Err(self.general_protection(0));
        }
        Ok(())
    }

    /// Where the descriptor of `selector` lies, if its table reaches that far (`bytes` long).
    fn descriptor_address(&self, selector: u16, bytes: u64) -> Option<u64> {
        let offset = u64::from(selector & !7);
        let (base, limit) = if selector & 4 != 0 {
            if self.segments.ldtr.attributes & attribute::PRESENT == 0 {
                return None;
            }
            (self.segments.ldtr.base, u64::from(self.segments.ldtr.limit))
        } else {
            (self.gdtr.base, u64::from(self.gdtr.limit))
        };
        (offset + bytes - 1 <= limit).then(|| base.wrapping_add(offset))
    }

    /// Reads a descriptor; `None` if it lies beyond its table.
    pub(in super::super) fn find_descriptor(
        &mut self,
        selector: u16,
    ) -> Result<Option<Descriptor>, Trap> {
        let Some(address) = self.descriptor_address(selector, 8) else { return Ok(None) };
        let bits = self.load_system::<u64>(address)?;
        Ok(Some(Descriptor { bits, address }))
    }

    /// Reads a descriptor; `#GP(selector)` if it lies beyond its table.
    pub(in super::super) fn descriptor(&mut self, selector: u16) -> Result<Descriptor, Trap> {
        match self.find_descriptor(selector)? {
            Some(descriptor) => Ok(descriptor),
            None => Err(self.general_protection(error_of(selector))),
        }
    }

    /// Sets the accessed bit in the table if it is clear.
    pub(in super::super) fn mark_accessed(&mut self, descriptor: &mut Descriptor) -> Flow {
        if !descriptor.has(attribute::ACCESSED) {
            descriptor.bits |= u64::from(attribute::ACCESSED) << 40;
            let byte = cut::<u8>(descriptor.bits >> 40);
            self.store_system::<u8>(descriptor.address.wrapping_add(5), byte)?;
        }
        Ok(())
    }

    /// Loads ES, SS, DS, FS or GS (`number` 0, 2 to 5) as `MOV` and `POP` do.
    pub(in super::super) fn load_segment(&mut self, number: u8, selector: u16) -> Flow {
        let is_stack = number == 2;
        if selector & !3 == 0 {
            let rpl = (selector & 3) as u8;
            if is_stack && (self.cpl == 3 || rpl != self.cpl || !self.is_long()) {
                return Err(self.general_protection(0));
            }
            return self.set_segment(number, Segment { selector, ..Segment::default() });
        }
        let mut descriptor = self.descriptor(selector)?;
        let error = error_of(selector);
        if !self.is_loadable(&descriptor, selector, is_stack) {
            return Err(self.general_protection(error));
        }
        if !descriptor.has(attribute::PRESENT) {
            let absent = if is_stack {
                Exception::StackFault(error)
            } else {
                Exception::SegmentNotPresent(error)
            };
            return Err(self.raise(absent));
        }
        self.mark_accessed(&mut descriptor)?;
        self.set_segment(number, descriptor.segment(selector))
    }

    fn is_loadable(&self, descriptor: &Descriptor, selector: u16, is_stack: bool) -> bool {
        if !descriptor.has(attribute::NOT_SYSTEM) {
            return false;
        }
        let rpl = (selector & 3) as u8;
        let dpl = descriptor.dpl();
        let code = descriptor.has(attribute::CODE);
        if is_stack {
            return !code && descriptor.has(attribute::READ_WRITE) && rpl == self.cpl && dpl == rpl;
        }
        let readable = !code || descriptor.has(attribute::READ_WRITE);
        let conforming = code && descriptor.has(attribute::CONFORMING);
        readable && (conforming || (dpl >= rpl && dpl >= self.cpl))
    }

    fn set_segment(&mut self, number: u8, segment: Segment) -> Flow {
        *self.segment_mut(number) = segment;
        match number {
            4 => self.set_full(slot::FS, segment.base),
            5 => self.set_full(slot::GS, segment.base),
            _ => {}
        }
        Ok(())
    }
}

/// `MOV` to a segment register.
pub(in super::super) fn mov_to_segment(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let number = i.op0_register().number() as u8;
    if number == 1 {
        return Err(cpu.raise(Exception::InvalidOpcode));
    }
    let selector = cpu.get(i, 1)? as u16;
    cpu.load_segment(number, selector)?;
    if number == 2 {
        cpu.cast_stack_shadow();
    }
    Ok(())
}

/// `MOV` from a segment register: memory gets 16 bits, a register is cleared above.
pub(in super::super) fn mov_from_segment(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let selector = cpu.register(i.op1_register());
    if i.op0_kind() == OpKind::Memory {
        let address = cpu.address_of(i);
        return cpu.store::<u16>(address, selector);
    }
    cpu.put(i, 0, selector)
}

/// `LSS`, `LFS`, `LGS`, `LES`, `LDS`: a segment register and a general one from a far pointer.
pub(in super::super) fn load_far_pointer(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let number = match i.mnemonic() {
        Mnemonic::Les => 0,
        Mnemonic::Lss => 2,
        Mnemonic::Lds => 3,
        Mnemonic::Lfs => 4,
        _ => 5,
    };
    let bytes = i.op0_register().size() as u64;
    let address = cpu.address_of(i);
    let selector = cpu.load::<u16>(address.wrapping_add(bytes))? as u16;
    let offset = match bytes {
        2 => cpu.load::<u16>(address)?,
        4 => cpu.load::<u32>(address)?,
        _ => cpu.load::<u64>(address)?,
    };
    cpu.load_segment(number, selector)?;
    cpu.put(i, 0, offset)
}

/// `POP` to a segment register.
pub(in super::super) fn pop_segment(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let bytes = i.stack_pointer_increment() as usize;
    let value = by_width!(bytes, T => cpu.top::<T>())?;
    let number = i.op0_register().number() as u8;
    // By the stack as it was, also if it is SS that is loaded.
    let pointer = cpu.stack_pointer(bytes as i64);
    let before = cpu.full(gpr::RSP);
    cpu.set_stack_pointer(pointer);
    if let Err(trap) = cpu.load_segment(number, value as u16) {
        cpu.set_full(gpr::RSP, before);
        return Err(trap);
    }
    if number == 2 {
        cpu.cast_stack_shadow();
    }
    Ok(())
}

/// `LGDT`, `LIDT`.
pub(in super::super) fn load_table(cpu: &mut Cpu, i: &Instruction) -> Flow {
    cpu.require_supervisor()?;
    let address = cpu.address_of(i);
    let mut bytes = [0; 10];
    let len = table_len(cpu);
    cpu.load_bytes(address, &mut bytes[..len])?;
    let limit = u16::from_le_bytes([bytes[0], bytes[1]]);
    let base = u64::from_le_bytes(bytes[2..].try_into().expect("ten bytes less two are eight"));
    if !crate::soft::cpu::is_canonical(base) {
        return Err(cpu.general_protection(0));
    }
    let table = if i.mnemonic() == Mnemonic::Lgdt { &mut cpu.gdtr } else { &mut cpu.idtr };
    *table = crate::state::DescriptorTable { base, limit };
    Ok(())
}

/// `SGDT`, `SIDT`.
pub(in super::super) fn store_table(cpu: &mut Cpu, i: &Instruction) -> Flow {
    cpu.check_umip()?;
    let table = if i.mnemonic() == Mnemonic::Sgdt { cpu.gdtr } else { cpu.idtr };
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let address = cpu.address_of(i);
    let len = table_len(cpu);
    cpu.store_bytes(address, &bytes[..len])
}

/// Bytes of a limit and a base in memory.
fn table_len(cpu: &Cpu) -> usize {
    if cpu.is_long() { 10 } else { 6 }
}

/// `SLDT`, `STR`.
pub(in super::super) fn store_selector(cpu: &mut Cpu, i: &Instruction) -> Flow {
    cpu.check_umip()?;
    let segments = &cpu.segments;
    let from = if i.mnemonic() == Mnemonic::Sldt { segments.ldtr } else { segments.tr };
    if i.op0_kind() == OpKind::Memory {
        let address = cpu.address_of(i);
        return cpu.store::<u16>(address, from.selector.into());
    }
    cpu.put(i, 0, from.selector.into())
}

/// Reads a 16-byte system descriptor of one of the two `kinds`.
fn system_segment(cpu: &mut Cpu, selector: u16, kind: u16) -> Result<(Segment, u64), Trap> {
    let error = error_of(selector);
    if selector & 4 != 0 {
        return Err(cpu.general_protection(error));
    }
    let Some(address) = cpu.descriptor_address(selector, 16) else {
        return Err(cpu.general_protection(error));
    };
    let bits = cpu.load_system::<u64>(address)?;
    let high = cpu.load_system::<u64>(address.wrapping_add(8))?;
    let descriptor = Descriptor { bits, address };
    if descriptor.has(attribute::NOT_SYSTEM) || descriptor.kind() != kind {
        return Err(cpu.general_protection(error));
    }
    if !descriptor.has(attribute::PRESENT) {
        return Err(cpu.raise(Exception::SegmentNotPresent(error)));
    }
    let mut segment = descriptor.segment(selector);
    segment.base |= high << 32;
    if !crate::soft::cpu::is_canonical(segment.base) {
        return Err(cpu.general_protection(error));
    }
    Ok((segment, address))
}

/// `LLDT`.
pub(in super::super) fn lldt(cpu: &mut Cpu, i: &Instruction) -> Flow {
    cpu.require_supervisor()?;
    let selector = cpu.get(i, 0)? as u16;
    cpu.segments.ldtr = if selector & !3 == 0 {
        Segment { selector, ..Segment::default() }
    } else {
        system_segment(cpu, selector, LDT_TYPE)?.0
    };
    Ok(())
}

/// `LTR`: marks the task-state segment busy.
pub(in super::super) fn ltr(cpu: &mut Cpu, i: &Instruction) -> Flow {
    cpu.require_supervisor()?;
    let selector = cpu.get(i, 0)? as u16;
    if selector & !3 == 0 {
        return Err(cpu.general_protection(0));
    }
    let (mut segment, address) = system_segment(cpu, selector, TSS_AVAILABLE)?;
    segment.attributes = (segment.attributes & !0xF) | TSS_BUSY;
    cpu.store_system::<u8>(address.wrapping_add(5), u64::from(segment.attributes & 0xFF))?;
    cpu.segments.tr = segment;
    Ok(())
}

/// The descriptor that an inspecting instruction may see at the current privilege.
fn visible(cpu: &mut Cpu, selector: u16, system: &[u16]) -> Result<Option<Descriptor>, Trap> {
    if selector & !3 == 0 {
        return Ok(None);
    }
    let Some(descriptor) = cpu.find_descriptor(selector)? else { return Ok(None) };
    let rpl = (selector & 3) as u8;
    let reachable = descriptor.dpl() >= cpu.cpl.max(rpl);
    let seen = if descriptor.has(attribute::NOT_SYSTEM) {
        let conforming = descriptor.has(attribute::CODE | attribute::CONFORMING);
        conforming || reachable
    } else {
        system.contains(&descriptor.kind()) && reachable
    };
    Ok(seen.then_some(descriptor))
}

/// `LAR`.
pub(in super::super) fn lar(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let selector = cpu.get(i, 1)? as u16;
    let found = visible(cpu, selector, &[LDT_TYPE, TSS_AVAILABLE, TSS_BUSY, 12])?;
    if let Some(descriptor) = found {
        cpu.put(i, 0, (descriptor.bits >> 32) & 0x00FF_FF00)?;
    }
    cpu.flags.set_zero(found.is_some());
    Ok(())
}

/// `LSL`.
pub(in super::super) fn lsl(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let selector = cpu.get(i, 1)? as u16;
    let found = visible(cpu, selector, &[LDT_TYPE, TSS_AVAILABLE, TSS_BUSY])?;
    if let Some(descriptor) = found {
        cpu.put(i, 0, descriptor.limit().into())?;
    }
    cpu.flags.set_zero(found.is_some());
    Ok(())
}

/// `VERR`, `VERW`.
pub(in super::super) fn verify(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let selector = cpu.get(i, 0)? as u16;
    let for_writing = i.mnemonic() == Mnemonic::Verw;
    let allowed = visible(cpu, selector, &[])?.is_some_and(|descriptor| {
        let code = descriptor.has(attribute::CODE);
        if for_writing {
            !code && descriptor.has(attribute::READ_WRITE)
        } else {
            !code || descriptor.has(attribute::READ_WRITE)
        }
    });
    cpu.flags.set_zero(allowed);
    Ok(())
}

impl Cpu {
    /// No interrupt and no single-step trap between a load of SS and the next instruction.
    pub(in super::super) fn cast_stack_shadow(&mut self) {
        use crate::soft::cpu::{SHADOW, SS_SHADOW};
        self.system_flags |= SHADOW | SS_SHADOW;
    }
}
