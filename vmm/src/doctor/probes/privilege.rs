//! `SYSCALL`, and the delivery of exceptions.

use crate::doctor::facts::{ExceptionFact, Level, Outcome, Syscall};
use vmft_kvm::trust::lab::{Lab, LabError, Program, Stop};
use vmft_kvm::trust::layout;

/// `syscall`
pub const SYSCALL: [u8; 2] = [0x0F, 0x05];
/// `ud2`
const UNDEFINED: [u8; 2] = [0x0F, 0x0B];
/// `mov al, [0x400000]`
const UNMAPPED_LOAD: [u8; 7] = [0x8A, 0x04, 0x25, 0x00, 0x00, 0x40, 0x00];

const UD: u8 = 6;
const GP: u8 = 13;
const PF: u8 = 14;

/// Where `SYSCALL` leads from CPL 3.
pub fn syscall(lab: &mut Lab) -> Outcome<Syscall> {
    Outcome::of(syscall_once(lab))
}

fn syscall_once(lab: &mut Lab) -> Result<Outcome<Syscall>, LabError> {
    lab.load(&Program::new(Level::User, &SYSCALL))?;
    let arrived = Stop::Halted { rip: layout::SYSCALL_ENTRY + 1 };
    Ok(match lab.run() {
        stop if stop == arrived => {
            let (system, rcx) = (lab.system_registers()?, lab.registers()?.rcx);
            let (cs, ss) = (system.cs.selector, system.ss.selector);
            let right = (layout::KERNEL_CS, layout::KERNEL_SS, layout::CODE + 2);
            Outcome::Measured(if (cs, ss, rcx) == right {
                Syscall::Works
            } else {
                Syscall::WrongRegisters { cs, ss, rcx }
            })
        }
        // The entry's HLT is not allowed at CPL 3.
        Stop::Exception { vector: GP, frame }
            if frame.rip == layout::SYSCALL_ENTRY && frame.cs & 3 == 3 =>
        {
            Outcome::Measured(Syscall::StaysAtUser)
        }
        other => Outcome::Odd(other.to_string()),
    })
}

/// An undefined instruction and an unmapped address, at both levels.
pub fn exceptions(lab: &mut Lab) -> Vec<ExceptionFact> {
    let mut facts = Vec::new();
    for level in [Level::Kernel, Level::User] {
        for (name, code, vector) in [("#UD", &UNDEFINED[..], UD), ("#PF", &UNMAPPED_LOAD[..], PF)] {
            let delivered = Outcome::of(exception(lab, level, code, vector));
            facts.push(ExceptionFact { name: name.to_owned(), level, delivered });
        }
    }
    facts
}

fn exception(
    lab: &mut Lab,
    level: Level,
    code: &[u8],
    wanted: u8,
) -> Result<Outcome<bool>, LabError> {
    lab.load(&Program::new(level, code))?;
    let (selector, user_bit) = match level {
        Level::Kernel => (layout::KERNEL_CS, 0),
        Level::User => (layout::USER_CS, 1 << 2),
    };
    Ok(match lab.run() {
        Stop::Exception { vector, frame } if vector == wanted => {
            let system = lab.system_registers()?;
            let mut right = frame.rip == layout::CODE
                && frame.cs == selector
                && system.cs.selector == layout::KERNEL_CS;
            if wanted == PF {
                right &= frame.error_code == user_bit && system.cr2 == layout::UNMAPPED;
            }
            Outcome::Measured(right)
        }
        other => Outcome::Odd(other.to_string()),
    })
}
