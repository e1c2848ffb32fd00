//! Far jumps, calls and returns, to 64-bit and other code. Call gates are refused.

use super::segments::{Descriptor, attribute, error_of};
use crate::soft::compat::CodeSize;
use crate::soft::cpu::{Cpu, gpr, is_canonical};
use crate::soft::event::{Flow, Trap};
use crate::soft::exception::Exception;
use crate::soft::flags::{Int, cut};
use crate::state::Segment;
use iced_x86::{Code, Instruction, OpKind};

impl Cpu {
    /// A descriptor that code can run in: `#GP(selector)` if it is not code, `#NP` if it is
    /// absent. `allowed` judges privilege.
    fn code_descriptor(
        &mut self,
        selector: u16,
        allowed: impl Fn(&Descriptor) -> bool,
    ) -> Result<Descriptor, Trap> {
        if selector & !3 == 0 {
            return Err(self.general_protection(0));
        }
        let descriptor = self.descriptor(selector)?;
        let error = error_of(selector);
        let code = descriptor.has(attribute::NOT_SYSTEM | attribute::CODE);
        if !code || !allowed(&descriptor) {
            return Err(self.general_protection(error));
        }
        if !descriptor.has(attribute::PRESENT) {
            return Err(self.raise(Exception::SegmentNotPresent(error)));
        }
        if descriptor.has(attribute::LONG | attribute::BIG) {
            return Err(self.general_protection(error));
        }
        Ok(descriptor)
    }

    /// The code segment of a far jump or call, which keeps the privilege level.
    fn jump_segment(&mut self, selector: u16) -> Result<Segment, Trap> {
        let cpl = self.cpl;
        let mut descriptor = self.code_descriptor(selector, |descriptor| {
            if descriptor.has(attribute::CONFORMING) {
                descriptor.dpl() <= cpl
            } else {
                (selector & 3) as u8 <= cpl && descriptor.dpl() == cpl
            }
        })?;
        self.mark_accessed(&mut descriptor)?;
        Ok(descriptor.segment((selector & !3) | u16::from(cpl)))
    }

    /// `#GP(0)` unless code in the segment can be at `rip`.
    fn check_target(&mut self, code: &Segment, rip: u64) -> Flow {
        let within = if CodeSize::of(code) == CodeSize::Long {
            is_canonical(rip)
        } else {
            rip <= u64::from(code.limit)
        };
        if within { Ok(()) } else { Err(self.general_protection(0)) }
    }

    /// Goes to `cs:rip` with the stack `ss:rsp`, at the same or a less privileged level.
    pub(in super::super) fn return_to(&mut self, cs: u16, rip: u64, rsp: u64, ss: u16) -> Flow {
        let privilege = (cs & 3) as u8;
        let mut code = self.return_code(cs)?;
        self.check_target(&code.segment(cs), rip)?;
        let long = CodeSize::of(&code.segment(cs)) == CodeSize::Long;
        let stack = self.return_stack(ss, privilege, long)?;
        self.mark_accessed(&mut code)?;
        let outward = privilege > self.cpl;
        self.set_code_segment(code.segment(cs));
        self.segments.ss = stack;
        self.set_full(gpr::RSP, rsp);
        self.next_rip = rip;
        self.set_cpl(privilege);
        if outward {
            self.drop_privileged_segments();
        }
        Ok(())
    }

    /// Goes to `cs:rip` at the same privilege level, with the same stack.
    pub(in super::super) fn return_within(&mut self, cs: u16, rip: u64) -> Flow {
        let mut code = self.return_code(cs)?;
        self.check_target(&code.segment(cs), rip)?;
        self.mark_accessed(&mut code)?;
        self.set_code_segment(code.segment(cs));
        self.next_rip = rip;
        Ok(())
    }

    fn return_code(&mut self, cs: u16) -> Result<Descriptor, Trap> {
        let rpl = (cs & 3) as u8;
        if cs & !3 != 0 && rpl < self.cpl {
            return Err(self.general_protection(error_of(cs)));
        }
        self.code_descriptor(cs, |descriptor| {
            if descriptor.has(attribute::CONFORMING) {
                descriptor.dpl() <= rpl
            } else {
                descriptor.dpl() == rpl
            }
        })
    }

    fn return_stack(&mut self, ss: u16, privilege: u8, long: bool) -> Result<Segment, Trap> {
        if ss & !3 == 0 {
            if privilege == 3 || !long || (ss & 3) as u8 != privilege {
                return Err(self.general_protection(0));
            }
            return Ok(Segment { selector: ss, ..Segment::default() });
        }
        let error = error_of(ss);
        let mut descriptor = self.descriptor(ss)?;
        let data = descriptor.has(attribute::NOT_SYSTEM | attribute::READ_WRITE)
            && !descriptor.has(attribute::CODE);
        if !data || (ss & 3) as u8 != privilege || descriptor.dpl() != privilege {
            return Err(self.general_protection(error));
        }
        if !descriptor.has(attribute::PRESENT) {
            return Err(self.raise(Exception::StackFault(error)));
        }
        self.mark_accessed(&mut descriptor)?;
        Ok(descriptor.segment(ss))
    }

    /// A return to a less privileged level takes the segments it may not have.
    fn drop_privileged_segments(&mut self) {
        let cpl = u16::from(self.cpl);
        let segments = &mut self.segments;
        for segment in [&mut segments.es, &mut segments.ds, &mut segments.fs, &mut segments.gs] {
            let kind = segment.attributes;
            let conforming = kind & (attribute::CODE | attribute::CONFORMING)
                == attribute::CODE | attribute::CONFORMING;
            if kind & attribute::PRESENT != 0 && (kind >> 5) & 3 < cpl && !conforming {
                *segment = Segment { base: segment.base, ..Segment::default() };
            }
        }
    }
}

/// Reads a far pointer, of the instruction or from memory: offset, then selector.
fn far_pointer(cpu: &mut Cpu, i: &Instruction, bytes: u64) -> Result<(u16, u64), Trap> {
    match i.op0_kind() {
        OpKind::FarBranch16 => return Ok((i.far_branch_selector(), i.far_branch16().into())),
        OpKind::FarBranch32 => return Ok((i.far_branch_selector(), i.far_branch32().into())),
        _ => {}
    }
    let address = cpu.address_of(i);
    let selector = cpu.load::<u16>(address.wrapping_add(bytes))? as u16;
    let offset = match bytes {
        2 => cpu.load::<u16>(address)?,
        4 => cpu.load::<u32>(address)?,
        _ => cpu.load::<u64>(address)?,
    };
    Ok((selector, offset))
}

/// Far `JMP`.
pub(in super::super) fn jmp_far(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let bytes = match i.code() {
        Code::Jmp_m1616 => 2,
        Code::Jmp_m1632 => 4,
        _ => 8,
    };
    let (selector, target) = far_pointer(cpu, i, bytes)?;
    let segment = cpu.jump_segment(selector)?;
    cpu.check_target(&segment, target)?;
    cpu.next_rip = target;
    cpu.set_code_segment(segment);
    Ok(())
}

/// Far `CALL`.
pub(in super::super) fn call_far(cpu: &mut Cpu, i: &Instruction) -> Flow {
    match i.code() {
        Code::Call_m1616 | Code::Call_ptr1616 => call_far_of::<u16>(cpu, i),
        Code::Call_m1632 | Code::Call_ptr1632 => call_far_of::<u32>(cpu, i),
        _ => call_far_of::<u64>(cpu, i),
    }
}

fn call_far_of<T: Int>(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let (selector, target) = far_pointer(cpu, i, T::BYTES as u64)?;
    let segment = cpu.jump_segment(selector)?;
    cpu.check_target(&segment, target)?;
    let words = [cut::<T>(cpu.next_rip), u64::from(cpu.segments.cs.selector)];
    let top = cpu.stack_pointer(-(2 * T::BYTES as i64));
    if top > cpu.stack_pointer(-(T::BYTES as i64)) {
        // The frame goes on at the other end of the stack segment.
        let pointer = cpu.full(gpr::RSP);
        cpu.push::<T>(words[1])?;
        if let Err(trap) = cpu.push::<T>(words[0]) {
            cpu.set_full(gpr::RSP, pointer);
            return Err(trap);
        }
    } else {
        let mut frame = Vec::with_capacity(2 * T::BYTES);
        for word in words {
            frame.extend_from_slice(&word.to_le_bytes()[..T::BYTES]);
        }
        let address = cpu.on_stack_at(top, frame.len());
        cpu.store_bytes(address, &frame).map_err(|trap| cpu.on_stack(trap))?;
        cpu.set_stack_pointer(top);
    }
    cpu.set_code_segment(segment);
    cpu.next_rip = target;
    Ok(())
}

/// Far `RET`.
pub(in super::super) fn ret_far(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let extra = if i.op_count() == 1 { u64::from(i.immediate16()) } else { 0 };
    match i.code() {
        Code::Retfw | Code::Retfw_imm16 => ret_far_of::<u16>(cpu, extra),
        Code::Retfd | Code::Retfd_imm16 => ret_far_of::<u32>(cpu, extra),
        _ => ret_far_of::<u64>(cpu, extra),
    }
}

fn ret_far_of<T: Int>(cpu: &mut Cpu, extra: u64) -> Flow {
    let bytes = T::BYTES as u64;
    let rip = cpu.on_top::<T>(0)?;
    let cs = cpu.on_top::<T>(bytes)? as u16;
    if (cs & 3) as u8 <= cpu.cpl {
        let pointer = cpu.stack_pointer((2 * bytes + extra) as i64);
        cpu.return_within(cs, rip)?;
        cpu.set_stack_pointer(pointer);
        return Ok(());
    }
    let rsp = cpu.on_top::<T>(2 * bytes + extra)?;
    let ss = cpu.on_top::<T>(3 * bytes + extra)? as u16;
    cpu.return_to(cs, rip, rsp.wrapping_add(extra), ss)
}
