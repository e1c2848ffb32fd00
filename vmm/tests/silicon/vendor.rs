//! What processors of different vendors do differently, each as its manual says or where manuals are
//! silent. The engine does as Intel's do, and where only 32-bit code can tell, as AMD's; on another
//! vendor's host that is not compared.

use crate::case::{Outcome, Stop};
use iced_x86::{Code, CpuidFeature, Instruction, Mnemonic, OpKind};
use std::sync::LazyLock;

/// True on a processor by Intel.
pub fn is_intel() -> bool {
    static INTEL: LazyLock<bool> = LazyLock::new(|| {
        let leaf = std::arch::x86_64::__cpuid(0);
        [leaf.ebx, leaf.edx, leaf.ecx] == [*b"Genu", *b"ineI", *b"ntel"].map(u32::from_le_bytes)
    });
    *INTEL
}

/// Why a form is not tested on this host.
pub fn exclusion(code: Code) -> Option<&'static str> {
    if is_intel() {
        return match code {
            Code::Pushd_ES
            | Code::Pushd_CS
            | Code::Pushd_SS
            | Code::Pushd_DS
            | Code::Pushd_FS
            | Code::Pushd_GS => Some("Intel's write the lower half only (SDM volume 2, PUSH)"),
            Code::Sysretd => Some("Intel's know it in 64-bit code only (SDM volume 2, SYSRET)"),
            _ => None,
        };
    }
    match code {
        Code::Reservednop_rm16_r16_0F0D
        | Code::Reservednop_rm32_r32_0F0D
        | Code::Reservednop_rm64_r64_0F0D => {
            Some("a prefetch on AMD's, which has no register form (APM volume 3)")
        }
        Code::Call_m1664 | Code::Jmp_m1664 | Code::Lss_r64_m1664 => {
            Some("AMD's ignore REX.W in front of a far pointer (APM volume 3)")
        }
        Code::Retfw_imm16 | Code::Retfd_imm16 | Code::Retfq_imm16 => {
            Some("AMD's read what is behind the arguments before they look at the selector")
        }
        Code::Movsxd_r16_rm16 => Some("AMD's read 32 bits, whatever the operand size"),
        Code::Pause => Some("with REX.B it is XCHG on AMD's"),
        Code::Int1 => Some("where its frame points is the host's choice"),
        Code::Dpps_xmm_xmmm128_imm8 | Code::Dppd_xmm_xmmm128_imm8 => {
            Some("which of two NaNs it keeps depends on the order in which products are added")
        }
        _ => None,
    }
}

/// True if the host found that memory refuses an x87 store before it raised an unmasked exception
/// of the value: Intel's do it the other way round, and store nothing.
pub fn refused_before_exception(at: Option<&Instruction>, host: &Outcome) -> bool {
    const ALL_MASKED: u16 = 0x3F;
    let stores = at.is_some_and(|instruction| {
        matches!(
            instruction.mnemonic(),
            Mnemonic::Fst
                | Mnemonic::Fstp
                | Mnemonic::Fist
                | Mnemonic::Fistp
                | Mnemonic::Fisttp
                | Mnemonic::Fbstp
        )
    });
    let unmasked = host.floating.control & ALL_MASKED != ALL_MASKED;
    !is_intel() && stores && unmasked && is_memory_fault(host.stop)
}

/// True if a repeated comparison was left in the middle by a fault: Intel's keep the old flags until
/// the end, AMD's have those of the last comparison.
pub fn left_comparing(at: Option<&Instruction>, host: &Outcome) -> bool {
    let repeats = at.is_some_and(|instruction| {
        instruction.is_string_instruction()
            && (instruction.has_rep_prefix() || instruction.has_repne_prefix())
    });
    !is_intel() && repeats && is_memory_fault(host.stop)
}

/// True if both places that a comparison of strings reads are refused, and the host began with the
/// other one: AMD's do with the source (family 19h, model 11h), Intel's check both addresses before
/// they read.
pub fn refused_the_other_operand(
    at: Option<&Instruction>,
    host: &Outcome,
    engine: &Outcome,
) -> bool {
    let compares = at.is_some_and(|instruction| {
        matches!(
            instruction.mnemonic(),
            Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq
        ) && instruction.is_string_instruction()
    });
    let is_refused = |outcome: &Outcome| is_memory_fault(outcome.stop);
    !is_intel() && compares && is_refused(host) && is_refused(engine)
}

/// True if a far return found its frame in two places that are both refused, one behind the end of the
/// stack segment: AMD's read the last word of a frame first, Intel's the first.
pub fn refused_another_word(at: Option<&Instruction>, host: &Outcome, engine: &Outcome) -> bool {
    let returns = at.is_some_and(|instruction| {
        matches!(
            instruction.mnemonic(),
            Mnemonic::Retf | Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq
        )
    });
    let is_refused = |outcome: &Outcome| is_memory_fault(outcome.stop);
    !is_intel() && returns && is_refused(host) && is_refused(engine)
}

/// True if an operand lies in part behind the end of a segment of 4 GiB, which the engine refused, and the host
/// found its pages missing: on Intel's it goes on at the beginning (SDM volume 3, 6.3, leaves that open), on
/// AMD's it is behind the limit.
pub fn reached_around_the_end(host: &Outcome, engine: &Outcome) -> bool {
    const PAGE: u64 = 0x1000;
    const END: u64 = 1 << 32;
    let is_near = |address: u64| address < PAGE || (END - PAGE..END).contains(&address);
    let is_behind = matches!(engine.stop, Stop::Exception { vector: 12 | 13, error: 0, .. });
    let is_missing = matches!(
        host.stop,
        Stop::Exception { vector: 14, address, .. } if is_near(address)
    );
    is_intel() && is_behind && is_missing
}

/// True if BOUND found that an index is below the lower bound, and the upper one cannot be read: Intel's do not
/// look at that any more.
pub fn bound_by_one(at: Option<&Instruction>, host: &Outcome, engine: &Outcome) -> bool {
    let is_bound = at.is_some_and(|instruction| instruction.mnemonic() == Mnemonic::Bound);
    let is_out = matches!(host.stop, Stop::Exception { vector: 5, .. });
    is_intel() && is_bound && is_out && is_memory_fault(engine.stop)
}

/// True if the engine refused an operand of the SHA extensions that is not aligned, as Intel's do
/// (SDM volume 2, exceptions of type 4). AMD's (family 19h, model 11h) read it.
pub fn read_unaligned(at: Option<&Instruction>, engine: &Outcome) -> bool {
    let is_sha = at.is_some_and(|instruction| {
        let is_memory = |operand| instruction.op_kind(operand) == OpKind::Memory;
        instruction.cpuid_features().contains(&CpuidFeature::SHA)
            && (0..instruction.op_count()).any(is_memory)
    });
    !is_intel() && is_sha && is_memory_fault(engine.stop)
}

fn is_memory_fault(stop: Stop) -> bool {
    matches!(stop, Stop::Exception { vector: 12..=14, .. })
}
