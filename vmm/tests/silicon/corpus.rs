//! Which instruction forms are tested, where in a snippet each may stand, and which are left out
//! and why. The forms are those the engine says it executes.

use crate::case::{Bits, Step, decodes_as_built};
use crate::operands;
use crate::rng::Rng;
use crate::vendor;
use iced_x86::{Code, Mnemonic, OpCodeOperandKind};

/// Where in a snippet a form may stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Anywhere.
    Anywhere,
    /// First, where the registers are known: its inputs need care, or it always faults in user mode.
    First,
    /// Last: part of its result is not exact, and must not feed anything.
    Last(Inexact),
    /// Nowhere, for this reason.
    Excluded(&'static str),
}

/// What is inexact about a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inexact {
    /// An SSE approximation with 12 good bits.
    Reciprocal,
    /// An x87 transcendental function.
    Transcendental,
    /// An x87 remainder, whose partial results the processor chooses.
    Remainder,
    /// A memory image with x87 pointers and reserved fields in it.
    Image,
    /// The upper half of a 32-bit destination if the source is zero (BSF, BSR).
    ZeroSource,
}

/// The forms under test, each with where it may stand.
#[derive(Debug)]
pub struct Corpus {
    /// The size of the code.
    pub bits: Bits,
    /// Forms that run: cases are made for each in turn.
    pub focus: Vec<(Code, Policy)>,
    /// Forms that may stand anywhere.
    pub anywhere: Vec<Code>,
    /// Forms left out, with the reason.
    pub excluded: Vec<(Code, &'static str)>,
}

impl Corpus {
    /// Sorts every form of such code that `supports` accepts.
    pub fn of(bits: Bits, supports: impl Fn(Code) -> bool) -> Self {
        let mut corpus =
            Self { bits, focus: Vec::new(), anywhere: Vec::new(), excluded: Vec::new() };
        for code in Code::values() {
            let op_code = code.op_code();
            let exists = match bits {
                Bits::Long => op_code.mode64(),
                Bits::Short => op_code.mode32(),
            };
            if !op_code.is_instruction() || !exists || !supports(code) {
                continue;
            }
            match policy(code) {
                Policy::Excluded(reason) => corpus.excluded.push((code, reason)),
                _ if !decodable(code, bits) => {
                    corpus.excluded.push((code, "the decoder knows its bytes by another name"));
                }
                policy => {
                    corpus.focus.push((code, policy));
                    if policy == Policy::Anywhere {
                        corpus.anywhere.push(code);
                    }
                }
            }
        }
        corpus
    }
}

/// True if some encoding of `code` is decoded as `code`.
fn decodable(code: Code, bits: Bits) -> bool {
    let mut rng = Rng::new(0, code as u64);
    let mut plan = operands::Plan::new(bits, &mut rng);
    (0..200).any(|_| {
        operands::build(code, &mut plan, &mut rng)
            .is_some_and(|built| decodes_as_built(&Step::plain(built), bits))
    })
}

/// True for branches whose target is part of the instruction.
fn is_near(code: Code) -> bool {
    let branch = |kind: &OpCodeOperandKind| {
        matches!(
            kind,
            OpCodeOperandKind::br64_1
                | OpCodeOperandKind::br64_4
                | OpCodeOperandKind::br32_1
                | OpCodeOperandKind::br32_4
        )
    };
    code.op_code().op_kinds().iter().any(branch)
}

/// Where `code` may stand.
pub fn policy(code: Code) -> Policy {
    use OpCodeOperandKind as Kind;
    if let Some(reason) = exclusion(code).or_else(|| vendor::exclusion(code)) {
        return Policy::Excluded(reason);
    }
    let kinds = code.op_code().op_kinds();
    match code.mnemonic() {
        Mnemonic::Rcpps | Mnemonic::Rcpss | Mnemonic::Rsqrtps | Mnemonic::Rsqrtss => {
            Policy::Last(Inexact::Reciprocal)
        }
        Mnemonic::Fsin
        | Mnemonic::Fcos
        | Mnemonic::Fsincos
        | Mnemonic::Fptan
        | Mnemonic::Fpatan
        | Mnemonic::F2xm1
        | Mnemonic::Fyl2x
        | Mnemonic::Fyl2xp1 => Policy::Last(Inexact::Transcendental),
        Mnemonic::Fprem | Mnemonic::Fprem1 => Policy::Last(Inexact::Remainder),
        Mnemonic::Fnstenv | Mnemonic::Fnsave | Mnemonic::Fxsave | Mnemonic::Fxsave64 => {
            Policy::Last(Inexact::Image)
        }
        Mnemonic::Bsf | Mnemonic::Bsr
            if matches!(code, Code::Bsf_r32_rm32 | Code::Bsr_r32_rm32) =>
        {
            Policy::Last(Inexact::ZeroSource)
        }
        Mnemonic::Popf
        | Mnemonic::Popfd
        | Mnemonic::Popfq
        | Mnemonic::Iret
        | Mnemonic::Iretd
        | Mnemonic::Iretq
        | Mnemonic::Ret
        | Mnemonic::Retf
        | Mnemonic::Lss
        | Mnemonic::Les
        | Mnemonic::Lds
        | Mnemonic::Lar
        | Mnemonic::Lsl
        | Mnemonic::Verr
        | Mnemonic::Verw
        | Mnemonic::Ldmxcsr
        | Mnemonic::Fxrstor
        | Mnemonic::Fxrstor64
        | Mnemonic::Fldenv
        | Mnemonic::Frstor
        | Mnemonic::Maskmovq
        | Mnemonic::Maskmovdqu
        | Mnemonic::Fldcw => Policy::First,
        Mnemonic::Jmp | Mnemonic::Call if !is_near(code) => Policy::First,
        Mnemonic::Mov if kinds[0] == Kind::seg_reg => Policy::First,
        Mnemonic::Pop if matches!(kinds, [Kind::es | Kind::ss | Kind::ds]) => Policy::First,
        _ if matches!(code, Code::Shld_rm16_r16_CL | Code::Shrd_rm16_r16_CL) => Policy::First,
        _ if always_faults(code) => Policy::First,
        _ => Policy::Anywhere,
    }
}

/// True for forms that never complete in user mode; the exception is what is compared.
pub fn always_faults(code: Code) -> bool {
    let op_code = code.op_code();
    op_code.is_privileged()
        || op_code.must_be_cpl0()
        || op_code.is_input_output()
        || matches!(
            code.mnemonic(),
            Mnemonic::Int
                | Mnemonic::Int1
                | Mnemonic::Int3
                | Mnemonic::Ud0
                | Mnemonic::Ud1
                | Mnemonic::Ud2
                | Mnemonic::Hlt
                | Mnemonic::Cli
                | Mnemonic::Sti
                | Mnemonic::Clac
                | Mnemonic::Stac
                | Mnemonic::Swapgs
                | Mnemonic::Sysret
                | Mnemonic::Sysretq
                | Mnemonic::Sysexit
                | Mnemonic::Sysexitq
                | Mnemonic::Insb
                | Mnemonic::Insw
                | Mnemonic::Insd
                | Mnemonic::Outsb
                | Mnemonic::Outsw
                | Mnemonic::Outsd
        )
}

fn exclusion(code: Code) -> Option<&'static str> {
    use OpCodeOperandKind as Kind;
    let kinds = code.op_code().op_kinds();
    let narrow = matches!(code, Code::Retnw | Code::Retnw_imm16 | Code::Call_rm16 | Code::Jmp_rm16);
    if narrow || kinds.iter().any(|kind| matches!(kind, Kind::br16_1 | Kind::br16_2)) {
        return Some("16-bit near branches differ between Intel and AMD");
    }
    if code.op_code().fwait() {
        return Some("WAIT is an instruction of its own in front of it");
    }
    match code.mnemonic() {
        Mnemonic::Syscall | Mnemonic::Sysenter => Some("enters the host's kernel"),
        Mnemonic::Cpuid
        | Mnemonic::Xgetbv
        | Mnemonic::Rdtsc
        | Mnemonic::Rdtscp
        | Mnemonic::Rdpid
        | Mnemonic::Rdpmc
        | Mnemonic::Rdrand
        | Mnemonic::Rdseed => Some("tells about the machine it runs on"),
        Mnemonic::Sgdt | Mnemonic::Sidt | Mnemonic::Sldt | Mnemonic::Str | Mnemonic::Smsw => {
            Some("the host emulates it, or not, under CR4.UMIP")
        }
        Mnemonic::Rdfsbase | Mnemonic::Wrfsbase | Mnemonic::Rdgsbase | Mnemonic::Wrgsbase => {
            Some("the base of FS is the host's thread pointer; CR4.FSGSBASE is the host's choice")
        }
        Mnemonic::Lfs | Mnemonic::Lgs => Some("changes the base of a segment the host uses"),
        Mnemonic::Pop if matches!(kinds, [Kind::fs | Kind::gs]) => {
            Some("changes the base of a segment the host uses")
        }
        Mnemonic::Monitor | Mnemonic::Mwait => Some("whether it is there is the host's choice"),
        Mnemonic::Invpcid => Some("whether it is there is the host's choice"),
        Mnemonic::Tzcnt | Mnemonic::Lzcnt => {
            Some("what its prefix means depends on features beyond the baseline")
        }
        _ => match code {
            Code::Bswap_r16 => Some("the result is undefined"),
            Code::Reservednop_rm16_r16_0F1A
            | Code::Reservednop_rm32_r32_0F1A
            | Code::Reservednop_rm64_r64_0F1A
            | Code::Reservednop_rm16_r16_0F1B
            | Code::Reservednop_rm32_r32_0F1B
            | Code::Reservednop_rm64_r64_0F1B => {
                Some("a memory-protection extension on some hosts")
            }
            _ => None,
        },
    }
}
