//! Guests whose retired conditional branches are known by arithmetic.

use crate::trust::facts::Level;
use crate::trust::lab::{END, Lab, LabError, Program};
use crate::trust::layout::{CODE, DATA, DATA_PAGES, PAGE, gate, gate_address};
use kvm_bindings::kvm_regs;

/// A guest with a counted loop.
#[derive(Debug, Clone, Copy)]
pub struct Branches {
    /// What it does between its branches.
    pub what: &'static str,
    /// Up to its end, without [`END`].
    code: &'static [u8],
    /// Turns of the loop.
    pub turns: u32,
    /// Conditional branches a turn retires.
    per_turn: u64,
    /// Whether every access to the data pages is to fault in the host first.
    pub fresh_pages: bool,
}

/// Where the handler is that skips the faulting load.
const SKIP_HANDLER: u64 = CODE + 0x800;
/// `add rsp, 8`, `add qword [rsp], 7`, `iretq`
const SKIP: [u8; 11] = [0x48, 0x83, 0xC4, 0x08, 0x48, 0x83, 0x04, 0x24, 0x07, 0x48, 0xCF];
const PF: u8 = 14;

/// `dec ecx`, `jnz` back to it
const LOOP: &[u8] = &[0xFF, 0xC9, 0x75, 0xFC];
/// `mov ecx, 100`, `dec ecx`, `jnz`, `out 0x80, al`, `dec edx`, `jnz` to the start
const EXITS: &[u8] =
    &[0xB9, 0x64, 0x00, 0x00, 0x00, 0xFF, 0xC9, 0x75, 0xFC, 0xE6, 0x80, 0xFF, 0xCA, 0x75, 0xF1];
/// `mov al, [0x400000]`, `dec ecx`, `jnz` to the start
const FAULTS: &[u8] = &[0x8A, 0x04, 0x25, 0x00, 0x00, 0x40, 0x00, 0xFF, 0xC9, 0x75, 0xF5];
/// `mov [rsi], al`, `add rsi, 4096`, `dec ecx`, `jnz` to the start
const PAGES: &[u8] =
    &[0x88, 0x06, 0x48, 0x81, 0xC6, 0x00, 0x10, 0x00, 0x00, 0xFF, 0xC9, 0x75, 0xF3];
/// `lock inc dword [rsi]`, `dec ecx`, `jnz` to the start
const LOCKS: &[u8] = &[0xF0, 0xFF, 0x06, 0xFF, 0xC9, 0x75, 0xF9];
/// `mov rsi, r9`, `mov rdi, r10`, `mov ecx, 64`, `rep movsb`, `xor eax, eax`, `cpuid`,
/// `movups xmm1, [r9]`, `addps xmm1, xmm1`, `dec r8d`, `jnz` to the start
const MIXTURE: &[u8] = &[
    0x4C, 0x89, 0xCE, 0x4C, 0x89, 0xD7, 0xB9, 0x40, 0x00, 0x00, 0x00, 0xF3, 0xA4, 0x31, 0xC0, 0x0F,
    0xA2, 0x41, 0x0F, 0x10, 0x09, 0x0F, 0x58, 0xC9, 0x41, 0xFF, 0xC8, 0x75, 0xE3,
];

impl Branches {
    /// Nothing but branches.
    pub const fn plain(turns: u32) -> Self {
        Self { what: "a loop", code: LOOP, turns, per_turn: 1, fresh_pages: false }
    }

    /// A port written after every hundred branches.
    pub const fn exits(turns: u32) -> Self {
        Self { what: "port I/O each 100", code: EXITS, turns, per_turn: 101, fresh_pages: false }
    }

    /// A page fault that the guest handles, in every turn.
    pub const fn faults(turns: u32) -> Self {
        Self { what: "page faults", code: FAULTS, turns, per_turn: 1, fresh_pages: false }
    }

    /// A fault of the second-level page tables in every turn.
    pub const fn pages() -> Self {
        Self {
            what: "pages new to the host",
            code: PAGES,
            turns: DATA_PAGES,
            per_turn: 1,
            fresh_pages: true,
        }
    }

    /// A locked instruction in every turn.
    pub const fn locks(turns: u32) -> Self {
        Self { what: "locked instructions", code: LOCKS, turns, per_turn: 1, fresh_pages: false }
    }

    /// `REP MOVSB`, `CPUID` and denormal numbers in every turn.
    pub const fn mixture(turns: u32) -> Self {
        Self {
            what: "REP, CPUID, denormals",
            code: MIXTURE,
            turns,
            per_turn: 1,
            fresh_pages: false,
        }
    }

    /// Conditional branches it retires from start to end.
    pub fn expected(&self) -> u64 {
        u64::from(self.turns) * self.per_turn
    }

    /// Puts the guest at its start.
    ///
    /// # Errors
    /// What KVM refuses.
    pub fn load(&self, lab: &mut Lab, level: Level) -> Result<(), LabError> {
        let code = [self.code, &END].concat();
        let turns = u64::from(self.turns);
        let registers = kvm_regs {
            rcx: turns,
            rdx: turns,
            r8: turns,
            rsi: DATA,
            r9: DATA,
            r10: DATA + PAGE,
            ..Default::default()
        };
        lab.load(&Program { registers, ..Program::new(level, &code) })?;
        lab.write(SKIP_HANDLER, &SKIP)?;
        for (at, word) in (gate_address(PF)..).step_by(8).zip(gate(SKIP_HANDLER)) {
            lab.write(at, &word.to_le_bytes())?;
        }
        // Four of the smallest denormal numbers.
        lab.write(DATA, &[1, 0, 0, 0].repeat(4))?;
        if self.fresh_pages {
            lab.forget_data_pages();
        }
        Ok(())
    }
}

/// All kinds, `scale` turns each where their number is free.
pub fn all(scale: u32) -> [Branches; 6] {
    [
        Branches::plain(scale),
        Branches::exits(scale / 200),
        Branches::faults(scale / 20),
        Branches::pages(),
        Branches::locks(scale),
        Branches::mixture(scale / 100),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction};

    fn instructions(code: &[u8]) -> Vec<Instruction> {
        Decoder::with_ip(64, code, CODE, DecoderOptions::NONE).into_iter().collect()
    }

    #[test]
    fn every_branch_leads_to_an_instruction_of_the_loop_and_the_last_one_to_its_start() {
        for program in all(1000) {
            let instructions = instructions(program.code);
            assert!(instructions.iter().all(|instruction| !instruction.is_invalid()));
            let branches = instructions
                .iter()
                .filter(|each| each.flow_control() == FlowControl::ConditionalBranch)
                .map(Instruction::near_branch_target)
                .collect::<Vec<_>>();
            assert_eq!(branches.last(), Some(&CODE), "{}", program.what);
            for target in branches {
                assert!(instructions.iter().any(|each| each.ip() == target), "{}", program.what);
            }
        }
    }

    #[test]
    fn the_handler_skips_exactly_the_faulting_load() {
        assert_eq!(instructions(FAULTS)[0].len(), usize::from(SKIP[8]));
        assert_eq!(instructions(&SKIP).len(), 3);
    }
}
