//! Single-stepping with the trap flag, and what the guest can see of it.

use super::privilege::SYSCALL;
use crate::doctor::facts::{Level, Outcome, Stepping, Syscall};
use vmft_kvm::trust::lab::{Lab, LabError, PATIENCE, Program, RFLAGS_TF, Stop};
use vmft_kvm::trust::layout;

/// `nop`, `inc eax`, `nop`, `jmp +0`, `lea rdx, [rdx+1]`, `nop`, `jmp $`
const MIXED: [u8; 13] =
    [0x90, 0xFF, 0xC0, 0x90, 0xEB, 0x00, 0x48, 0x8D, 0x52, 0x01, 0x90, 0xEB, 0xFE];
/// Where each of them ends.
const ENDS: [u64; 7] = [1, 3, 4, 6, 10, 11, 11];
/// `pushfq`, `nop`
const PUSH_FLAGS: [u8; 2] = [0x9C, 0x90];
const DB: u8 = 1;

/// A few instructions without surprises.
pub fn plain(lab: &mut Lab, level: Level) -> Outcome<Stepping> {
    Outcome::of(plain_steps(lab, level))
}

fn plain_steps(lab: &mut Lab, level: Level) -> Result<Outcome<Stepping>, LabError> {
    lab.load(&Program::new(level, &MIXED))?;
    let limit = lab.limit(PATIENCE);
    for (after, end) in (0..).zip(ENDS) {
        let place = layout::CODE + end;
        match lab.step_under(&limit) {
            Stop::Trap { pc } if pc == place && lab.registers()?.rip == place => {}
            Stop::Exception { vector: DB, .. } => {
                return Ok(Outcome::Measured(Stepping::IntoGuest));
            }
            Stop::Trap { pc } if layout::is_in_handler(pc, DB) => {
                return Ok(Outcome::Measured(Stepping::IntoGuest));
            }
            // The last instruction jumps to itself.
            Stop::TimeUp | Stop::Trap { .. } => {
                return Ok(Outcome::Measured(Stepping::Lost { after }));
            }
            other => return Ok(Outcome::Odd(other.to_string())),
        }
    }
    Ok(Outcome::Measured(Stepping::Exact))
}

/// Whether the guest sees the debugger's trap flag in the flags it pushes.
pub fn pushf(lab: &mut Lab) -> Outcome<bool> {
    Outcome::of(pushf_step(lab))
}

fn pushf_step(lab: &mut Lab) -> Result<Outcome<bool>, LabError> {
    lab.load(&Program::new(Level::Kernel, &PUSH_FLAGS))?;
    let limit = lab.limit(PATIENCE);
    Ok(match lab.step_under(&limit) {
        Stop::Trap { .. } => {
            let image = lab.read_word(layout::KERNEL_STACK - 8)?;
            Outcome::Measured(image & RFLAGS_TF != 0)
        }
        other => Outcome::Odd(other.to_string()),
    })
}

/// Whether the step over `SYSCALL` ends at the kernel's entry.
pub fn syscall(lab: &mut Lab, works: &Outcome<Syscall>) -> Outcome<bool> {
    if !works.is(|syscall| *syscall == Syscall::Works) {
        return Outcome::Odd("SYSCALL itself does not work".to_owned());
    }
    Outcome::of(syscall_step(lab))
}

fn syscall_step(lab: &mut Lab) -> Result<Outcome<bool>, LabError> {
    lab.load(&Program::new(Level::User, &SYSCALL))?;
    let limit = lab.limit(PATIENCE);
    Ok(match lab.step_under(&limit) {
        Stop::Trap { pc } => Outcome::Measured(pc == layout::SYSCALL_ENTRY),
        // The entry's HLT was executed: the guest ran on.
        Stop::Halted { .. } => Outcome::Measured(false),
        other => Outcome::Odd(other.to_string()),
    })
}
