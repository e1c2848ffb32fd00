//! Instructions that a KVM without hardware support may not know, and instructions that the
//! guest should not have.

use super::{BREAKPOINT, execution};
use crate::doctor::facts::{Execution, HiddenFact, HostFacts, InstructionFact, Level};
use kvm_bindings::kvm_regs;
use vmft_kvm::trust::lab::{CR4_OSXSAVE, END, END_PORT, Lab, Program, Stop};
use vmft_kvm::trust::layout;

/// Name, bytes, and the CPU feature without which it is undefined (`/proc/cpuinfo`'s name).
type Instruction = (&'static str, &'static [u8], Option<&'static str>);

/// With RSI at an aligned place in memory and EDX:EAX asking for the x87 and SSE state.
const INSTRUCTIONS: &[Instruction] = &[
    ("int3", &[0xCC], None),
    ("cmpxchg16b [rsi]", &[0x48, 0x0F, 0xC7, 0x0E], Some("cx16")),
    ("popcnt eax, ecx", &[0xF3, 0x0F, 0xB8, 0xC1], Some("popcnt")),
    ("clac", &[0x0F, 0x01, 0xCA], Some("smap")),
    ("stac", &[0x0F, 0x01, 0xCB], Some("smap")),
    ("xsave [rsi]", &[0x0F, 0xAE, 0x26], Some("xsave")),
    ("xrstor [rsi]", &[0x0F, 0xAE, 0x2E], Some("xsave")),
    ("fxsave [rsi]", &[0x0F, 0xAE, 0x06], None),
    ("rdtscp", &[0x0F, 0x01, 0xF9], Some("rdtscp")),
    ("movups [rsi], xmm0", &[0x0F, 0x11, 0x06], None),
    ("addps xmm0, xmm1", &[0x0F, 0x58, 0xC1], None),
    ("pxor xmm0, xmm0", &[0x66, 0x0F, 0xEF, 0xC0], None),
    ("lock xadd [rsi], eax", &[0xF0, 0x0F, 0xC1, 0x06], None),
    ("rep movsb [rdi], [rsi]", &[0xF3, 0xA4], None),
    ("cpuid", &[0x0F, 0xA2], None),
];

/// Hidden by [`super::cpuid::hide`].
const HIDDEN: &[Instruction] = &[
    ("rdrand eax", &[0x0F, 0xC7, 0xF0], None),
    ("rdseed eax", &[0x0F, 0xC7, 0xF8], None),
    ("rdtscp", &[0x0F, 0x01, 0xF9], None),
];

const HLT: u8 = 0xF4;
const UD: u8 = 6;

/// Executes every instruction of the list at CPL 0.
pub fn run(lab: &mut Lab, host: &HostFacts) -> Vec<InstructionFact> {
    let has = |feature: &Option<&str>| feature.is_none_or(|feature| host.has(feature));
    let fact = |(name, bytes, feature): &Instruction| InstructionFact {
        name: (*name).to_owned(),
        expected: match *name {
            "int3" => Execution::Faults(BREAKPOINT),
            _ if has(feature) => Execution::Executes,
            _ => Execution::Faults(UD),
        },
        measured: at_kernel(lab, bytes, *feature == Some("xsave") && has(feature)),
    };
    INSTRUCTIONS.iter().map(fact).collect()
}

fn at_kernel(lab: &mut Lab, bytes: &[u8], with_xsave: bool) -> Execution {
    let code = [bytes, &[HLT]].concat();
    let registers = kvm_regs {
        rax: 3,
        rcx: 16,
        rsi: layout::DATA,
        rdi: layout::DATA + layout::PAGE,
        ..Default::default()
    };
    let cr4 = if with_xsave { CR4_OSXSAVE } else { 0 };
    if let Err(error) = lab.load(&Program { level: Level::Kernel, code: &code, cr4, registers }) {
        return Execution::Odd(error.to_string());
    }
    let end = Stop::Halted { rip: layout::CODE + code.len() as u64 };
    execution(&lab.run(), &end)
}

/// Executes what CPUID hides, at both levels.
pub fn hidden(lab: &mut Lab) -> Vec<HiddenFact> {
    let mut facts = Vec::new();
    for level in [Level::Kernel, Level::User] {
        for (name, bytes, _) in HIDDEN {
            let code = [bytes, &END[..]].concat();
            let measured = match lab.load(&Program::new(level, &code)) {
                Ok(()) => execution(&lab.run(), &Stop::Out(END_PORT)),
                Err(error) => Execution::Odd(error.to_string()),
            };
            facts.push(HiddenFact { name: (*name).to_owned(), level, measured });
        }
    }
    facts
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

    #[test]
    fn every_instruction_is_what_its_name_says() {
        let mut formatter = IntelFormatter::new();
        let options = formatter.options_mut();
        options.set_memory_size_options(iced_x86::MemorySizeOptions::Never);
        options.set_space_after_operand_separator(true);
        for (name, bytes, _) in INSTRUCTIONS.iter().chain(HIDDEN) {
            let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
            let mut text = String::new();
            formatter.format(&instruction, &mut text);
            assert_eq!(&text, name);
            assert_eq!(instruction.len(), bytes.len(), "{name}");
        }
    }
}
