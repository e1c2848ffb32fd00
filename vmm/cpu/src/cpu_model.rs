//! The CPU model: what `CPUID` says, and which instructions follow from it. The same for every
//! engine, but for the time-stamp counter.
//!
//! A fixed, honest x86-64 baseline. Nothing depends on the host, so both sides of a pair show
//! the same CPU. The family is one that needs no workarounds in kernels and has none of the
//! flaws they mitigate at great cost. There is no APIC but where a guest has several CPUs, no XSAVE, no
//! random generator.

use iced_x86::{Code, CpuidFeature, EncodingKind};

/// Bits of a physical address.
pub const PHYSICAL_BITS: u32 = 40;
const LINEAR_BITS: u32 = 48;

/// What `CPUID` returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Leaf {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

impl Leaf {
    /// Leaf `number` of a CPU that has a local APIC with this number, if it has one. Nothing else tells one
    /// CPU from another: each is a socket of its own.
    pub fn with_apic(self, number: u32, apic: Option<u8>) -> Self {
        match (number, apic) {
            (1, Some(apic)) => {
                Self { ebx: self.ebx | u32::from(apic) << 24, edx: self.edx | 1 << APIC, ..self }
            }
            (EXTENDED_FEATURES, Some(_)) => Self { edx: self.edx | 1 << APIC, ..self },
            _ => self,
        }
    }
}

/// Whether the CPU shows a time-stamp counter. Where reading it cannot be made a function of the
/// execution point, it is hidden, and the guest takes its time from the board. With it goes what not
/// every CPU that runs guests has, so that a program that believed in it would fault: UMIP, AES-NI,
/// `PCLMULQDQ` and the SHA extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeStamp {
    /// It is there, and invariant.
    Shown,
    /// Neither it nor `RDTSCP` is there, nor what else depends on the host's CPU.
    Hidden,
}

impl TimeStamp {
    /// `word` with the bits `numbers` cleared if the counter is hidden.
    const fn hide(self, word: u32, numbers: &[u32]) -> u32 {
        match self {
            Self::Shown => word,
            Self::Hidden => word & !bits(numbers),
        }
    }
}

/// The leaves that say something.
const LEAVES: [std::ops::RangeInclusive<u32>; 3] =
    [0..=7, 0x4000_0000..=0x4000_0000, 0x8000_0000..=0x8000_0008];

/// Every leaf of the model with its number. None has subleaves beyond the first.
pub fn leaves(counter: TimeStamp) -> impl Iterator<Item = (u32, Leaf)> {
    LEAVES.into_iter().flatten().map(move |number| (number, leaf(number, 0, counter)))
}

/// A digest of what `CPUID` says: engines that differ in it do not replay each other's logs.
pub fn digest(counter: TimeStamp) -> String {
    let bytes: Vec<u8> = leaves(counter)
        .flat_map(|(_, Leaf { eax, ebx, ecx, edx })| [eax, ebx, ecx, edx])
        .flat_map(u32::to_le_bytes)
        .collect();
    format!("{:016x}", xxhash_rust::xxh3::xxh3_64(&bytes))
}

/// SSSE3, SSE4.1 and SSE4.2.
const LATER_SSE: bool = true;

const fn bits(numbers: &[u32]) -> u32 {
    let mut word = 0;
    let mut index = 0;
    while index < numbers.len() {
        word |= 1 << numbers[index];
        index += 1;
    }
    word
}

/// Family 15, model 5, stepping 10.
const SIGNATURE: u32 = 0x0000_0F5A;
/// CLFLUSH line of 64 bytes, in units of 8.
const LINE: u32 = 8 << 8;
const FPU: u32 = 0;
const DE: u32 = 2;
const PSE: u32 = 3;
const TSC: u32 = 4;
const MSR: u32 = 5;
const PAE: u32 = 6;
const CX8: u32 = 8;
const APIC: u32 = 9;
const PGE: u32 = 13;
const CMOV: u32 = 15;
const PAT: u32 = 16;
const PSE36: u32 = 17;
const CLFSH: u32 = 19;
const MMX: u32 = 23;
const FXSR: u32 = 24;
const SSE: u32 = 25;
const SSE2: u32 = 26;
const LEAF_1_EDX: u32 =
    bits(&[FPU, DE, PSE, TSC, MSR, PAE, CX8, PGE, CMOV, PAT, PSE36, CLFSH, MMX, FXSR, SSE, SSE2]);

const SSE3: u32 = 0;
const PCLMULQDQ: u32 = 1;
const SSSE3: u32 = 9;
const CX16: u32 = 13;
const SSE4_1: u32 = 19;
const SSE4_2: u32 = 20;
const POPCNT: u32 = 23;
const AES: u32 = 25;
const HYPERVISOR: u32 = 31;
const LEAF_1_ECX: u32 = bits(&[SSE3, PCLMULQDQ, CX16, POPCNT, AES, HYPERVISOR])
    | if LATER_SSE { bits(&[SSSE3, SSE4_1, SSE4_2]) } else { 0 };

const FSGSBASE: u32 = 0;
const SMEP: u32 = 7;
const ERMS: u32 = 9;
/// The x87 data pointer changes at unmasked exceptions only, and no segment is kept with it.
const FDP_AT_EXCEPTIONS: u32 = 6;
const NO_X87_SEGMENTS: u32 = 13;
const SHA: u32 = 29;
const LEAF_7_EBX: u32 = bits(&[FSGSBASE, SMEP, ERMS, FDP_AT_EXCEPTIONS, NO_X87_SEGMENTS, SHA]);
const UMIP: u32 = 2;
const LEAF_7_ECX: u32 = bits(&[UMIP]);
const FSRM: u32 = 4;
const LEAF_7_EDX: u32 = bits(&[FSRM]);

const LAHF: u32 = 0;
const PREFETCHW: u32 = 8;
const EXTENDED_1_ECX: u32 = bits(&[LAHF, PREFETCHW]);
const SYSCALL: u32 = 11;
const NX: u32 = 20;
const GIGABYTE_PAGES: u32 = 26;
const RDTSCP: u32 = 27;
const LONG_MODE: u32 = 29;
/// The leaf in which AMD repeats most of leaf 1.
const EXTENDED_FEATURES: u32 = 0x8000_0001;
/// What of it is repeated.
const REPEATED: u32 = bits(&[FPU, DE, PSE, TSC, MSR, PAE, CX8, PGE, CMOV, PAT, PSE36, MMX, FXSR]);
const EXTENDED_1_EDX: u32 = REPEATED | bits(&[SYSCALL, NX, GIGABYTE_PAGES, RDTSCP, LONG_MODE]);

const INVARIANT_TSC: u32 = 8;

/// The brand string, three leaves of sixteen bytes.
const BRAND: &[u8; 48] =
    b"vmft soft x86-64 CPU\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

fn word(text: &[u8], index: usize) -> u32 {
    let bytes = &text[4 * index..4 * index + 4];
    u32::from_le_bytes(bytes.try_into().expect("four bytes"))
}

/// A twelve-letter name in the order of leaf 0: EBX, EDX, ECX.
fn vendor(eax: u32, name: &[u8; 12]) -> Leaf {
    Leaf { eax, ebx: word(name, 0), edx: word(name, 1), ecx: word(name, 2) }
}

/// The answer to `CPUID` with these EAX and ECX.
pub fn leaf(number: u32, subleaf: u32, counter: TimeStamp) -> Leaf {
    match number {
        0 => vendor(7, b"AuthenticAMD"),
        1 => {
            let edx = counter.hide(LEAF_1_EDX, &[TSC]);
            let ecx = counter.hide(LEAF_1_ECX, &[PCLMULQDQ, AES]);
            Leaf { eax: SIGNATURE, ebx: LINE | (1 << 16), ecx, edx }
        }
        7 if subleaf == 0 => {
            let ebx = counter.hide(LEAF_7_EBX, &[SHA]);
            let ecx = counter.hide(LEAF_7_ECX, &[UMIP]);
            Leaf { eax: 0, ebx, ecx, edx: LEAF_7_EDX }
        }
        0x4000_0000 => {
            let name = b"vmft soft CP";
            Leaf { eax: 0x4000_0000, ebx: word(name, 0), ecx: word(name, 1), edx: word(name, 2) }
        }
        0x8000_0000 => vendor(0x8000_0008, b"AuthenticAMD"),
        0x8000_0001 => {
            let edx = counter.hide(EXTENDED_1_EDX, &[TSC, RDTSCP]);
            Leaf { eax: SIGNATURE, ebx: 0, ecx: EXTENDED_1_ECX, edx }
        }
        0x8000_0002..=0x8000_0004 => {
            let first = (number - 0x8000_0002) as usize * 4;
            let at = |index| word(BRAND, first + index);
            Leaf { eax: at(0), ebx: at(1), ecx: at(2), edx: at(3) }
        }
        // First-level caches: 64 KiB each, two ways, 64-byte lines; 1 MiB second level.
        0x8000_0005 => {
            Leaf { eax: 0xFF08_FF08, ebx: 0xFF20_FF20, ecx: 0x4002_0140, edx: 0x4002_0140 }
        }
        0x8000_0006 => Leaf { eax: 0, ebx: 0x4200_4200, ecx: 0x0400_8140, edx: 0 },
        0x8000_0007 => {
            let edx = counter.hide(bits(&[INVARIANT_TSC]), &[INVARIANT_TSC]);
            Leaf { edx, ..Leaf::default() }
        }
        0x8000_0008 => Leaf { eax: PHYSICAL_BITS | (LINEAR_BITS << 8), ..Leaf::default() },
        _ => Leaf::default(),
    }
}

/// True if the CPU model has the instruction.
pub fn offers(code: Code, counter: TimeStamp) -> bool {
    if withholds(code) {
        return false;
    }
    // Hints in the space of no-ops, for CPUs that know them.
    if matches!(code, Code::Endbr32 | Code::Endbr64 | Code::Rdsspd_r32 | Code::Rdsspq_r64) {
        return true;
    }
    code.cpuid_features().iter().all(|feature| match feature {
        CpuidFeature::INTEL8086
        | CpuidFeature::INTEL186
        | CpuidFeature::INTEL286
        | CpuidFeature::INTEL386
        | CpuidFeature::INTEL486
        | CpuidFeature::X64
        | CpuidFeature::FPU
        | CpuidFeature::FPU287
        | CpuidFeature::FPU387
        | CpuidFeature::CPUID
        | CpuidFeature::TSC
        | CpuidFeature::MSR
        | CpuidFeature::CX8
        | CpuidFeature::CMOV
        | CpuidFeature::CLFSH
        | CpuidFeature::MMX
        | CpuidFeature::FXSR
        | CpuidFeature::SSE
        | CpuidFeature::SSE2
        | CpuidFeature::SSE3
        | CpuidFeature::CMPXCHG16B
        | CpuidFeature::POPCNT
        | CpuidFeature::FSGSBASE
        | CpuidFeature::PREFETCHW
        | CpuidFeature::RDTSCP
        | CpuidFeature::RDPMC
        | CpuidFeature::SYSCALL
        | CpuidFeature::MULTIBYTENOP
        | CpuidFeature::PAUSE => true,
        CpuidFeature::SSSE3 | CpuidFeature::SSE4_1 | CpuidFeature::SSE4_2 => LATER_SSE,
        CpuidFeature::AES | CpuidFeature::PCLMULQDQ | CpuidFeature::SHA => {
            counter == TimeStamp::Shown
        }
        _ => false,
    })
}

/// True if the CPU model lacks the instruction whatever the engine has: the VEX and EVEX
/// encodings, and SSE beyond what the model has.
pub fn withholds(code: Code) -> bool {
    let later = |feature: &CpuidFeature| {
        matches!(feature, CpuidFeature::SSSE3 | CpuidFeature::SSE4_1 | CpuidFeature::SSE4_2)
    };
    // Of the first steppings of one CPU, at opcodes that are undefined ever since.
    let early = [Code::Cmpxchg486_rm8_r8, Code::Cmpxchg486_rm16_r16, Code::Cmpxchg486_rm32_r32];
    code.encoding() != EncodingKind::Legacy
        || early.contains(&code)
        || (!LATER_SSE && code.cpuid_features().iter().any(later))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_the_baseline_with_the_features_promised() {
        let one = leaf(1, 0, TimeStamp::Shown);
        assert_ne!(one.ecx & (1 << 13), 0);
        assert_eq!(one.edx & (1 << 9), 0, "there is no APIC");
        assert_eq!(one.ecx & ((1 << 26) | (1 << 27) | (1 << 28)), 0, "there is no XSAVE or AVX");
        assert_ne!(leaf(0x8000_0007, 0, TimeStamp::Shown).edx & (1 << 8), 0);
    }

    #[test]
    fn a_local_apic_shows_in_its_feature_and_number_and_nowhere_else() {
        for (number, without) in leaves(TimeStamp::Hidden) {
            assert_eq!(without.with_apic(number, None), without);
            let with = without.with_apic(number, Some(3));
            let changed = [
                with.eax ^ without.eax,
                with.ebx ^ without.ebx,
                with.ecx ^ without.ecx,
                with.edx ^ without.edx,
            ];
            let wanted = match number {
                1 => [0, 3 << 24, 0, 1 << 9],
                0x8000_0001 => [0, 0, 0, 1 << 9],
                _ => [0; 4],
            };
            assert_eq!(changed, wanted, "leaf {number:#x}");
        }
    }

    #[test]
    fn a_hidden_time_stamp_counter_and_what_not_every_host_has_are_all_that_differs() {
        let differing: Vec<u32> = leaves(TimeStamp::Shown)
            .zip(leaves(TimeStamp::Hidden))
            .filter(|(shown, hidden)| shown != hidden)
            .map(|((number, _), _)| number)
            .collect();
        assert_eq!(differing, [1, 7, 0x8000_0001, 0x8000_0007]);
        assert_eq!(leaf(7, 0, TimeStamp::Hidden).ecx & (1 << 2), 0, "there is no UMIP");
        assert_eq!(leaf(1, 0, TimeStamp::Hidden).edx & (1 << 4), 0);
        assert_ne!(digest(TimeStamp::Shown), digest(TimeStamp::Hidden));
    }

    #[test]
    fn instructions_beyond_the_model_are_not_offered() {
        assert!(!offers(Code::Rdrand_r64, TimeStamp::Shown));
        assert!(!offers(Code::VEX_Vpaddd_ymm_ymm_ymmm256, TimeStamp::Shown));
        assert!(!offers(Code::Xgetbv, TimeStamp::Shown));
        assert!(offers(Code::Popcnt_r64_rm64, TimeStamp::Shown));
        assert!(offers(Code::Movaps_xmm_xmmm128, TimeStamp::Shown));
        assert!(offers(Code::Aesenc_xmm_xmmm128, TimeStamp::Shown));
        assert!(!offers(Code::Aesenc_xmm_xmmm128, TimeStamp::Hidden));
    }
}
