//! Whether the guest sees the CPUID it was given.

use crate::doctor::facts::{CpuidFact, Level, Outcome};
use kvm_bindings::{CpuId, kvm_cpuid_entry2, kvm_regs};
use vmft_kvm::trust::lab::{END, END_PORT, Lab, LabError, Program, Stop};

/// One of the registers `CPUID` fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Part of one register of one leaf: (in words, leaf, register, bits that matter).
type Part = (&'static str, u32, Register, u32);

/// What is set, in a guest made for this: the marker, and zero in all others.
const PARTS: &[Part] = &[
    ("leaf 0x80000002, name", NAME_LEAF, Register::Eax, u32::MAX),
    ("leaf 1, TSC", 1, Register::Edx, 1 << 4),
    ("leaf 1, APIC", 1, Register::Edx, 1 << 9),
    ("leaf 1, RDRAND", 1, Register::Ecx, 1 << 30),
    ("leaf 1, XSAVE and AVX", 1, Register::Ecx, 1 << 26 | 1 << 28),
    ("leaf 7, all of EBX", 7, Register::Ebx, u32::MAX),
    ("leaf 0xD, components", 0xD, Register::Eax, u32::MAX),
    ("leaf 0xA, counters", 0xA, Register::Eax, u32::MAX),
    ("leaf 0x80000001, RDTSCP", 0x8000_0001, Register::Edx, 1 << 27),
    ("leaf 0x40000000, vendor", 0x4000_0000, Register::Ebx, u32::MAX),
];

const NAME_LEAF: u32 = 0x8000_0002;
/// A name no CPU has.
const MARKER: u32 = u32::from_le_bytes(*b"vmft");

/// What KVM supports, with the parts that [`obeyed`] asks for changed.
pub fn hide(supported: &CpuId) -> CpuId {
    let mut entries = supported.as_slice().to_vec();
    for (_, leaf, register, mask) in PARTS {
        let value = if *leaf == NAME_LEAF { MARKER } else { 0 };
        if !entries.iter().any(|entry| entry.function == *leaf) {
            entries.push(kvm_cpuid_entry2 { function: *leaf, ..Default::default() });
        }
        for entry in entries.iter_mut().filter(|entry| entry.function == *leaf && entry.index == 0)
        {
            let word = word_mut(entry, *register);
            *word = *word & !mask | value & mask;
        }
    }
    // KVM bounds the number of entries, and so does its wrapper; then nothing is hidden, which
    // shows in every part.
    CpuId::from_entries(&entries).unwrap_or_else(|_| supported.clone())
}

fn word_mut(entry: &mut kvm_cpuid_entry2, register: Register) -> &mut u32 {
    match register {
        Register::Eax => &mut entry.eax,
        Register::Ebx => &mut entry.ebx,
        Register::Ecx => &mut entry.ecx,
        Register::Edx => &mut entry.edx,
    }
}

/// Asks for every changed part, at both levels, in a guest that was given `set`.
pub fn obeyed(lab: &mut Lab, set: &CpuId) -> Vec<CpuidFact> {
    let mut facts = Vec::new();
    for level in [Level::Kernel, Level::User] {
        for (what, leaf, register, mask) in PARTS {
            let wanted = set
                .as_slice()
                .iter()
                .find(|entry| entry.function == *leaf && entry.index == 0)
                .map_or(0, |entry| *word_mut(&mut entry.clone(), *register) & mask);
            let seen = match Outcome::of(ask(lab, level, *leaf)) {
                Outcome::Measured(mut entry) => {
                    Outcome::Measured(*word_mut(&mut entry, *register) & mask)
                }
                Outcome::Odd(what) => Outcome::Odd(what),
            };
            facts.push(CpuidFact { what: (*what).to_owned(), level, set: wanted, seen });
        }
    }
    facts
}

fn ask(lab: &mut Lab, level: Level, leaf: u32) -> Result<Outcome<kvm_cpuid_entry2>, LabError> {
    let code = [&[0x0F, 0xA2], &END[..]].concat();
    let registers = kvm_regs { rax: u64::from(leaf), ..Default::default() };
    lab.load(&Program { registers, ..Program::new(level, &code) })?;
    Ok(match lab.run() {
        Stop::Out(END_PORT) => {
            let registers = lab.registers()?;
            Outcome::Measured(kvm_cpuid_entry2 {
                function: leaf,
                eax: registers.rax as u32,
                ebx: registers.rbx as u32,
                ecx: registers.rcx as u32,
                edx: registers.rdx as u32,
                ..Default::default()
            })
        }
        other => Outcome::Odd(other.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hiding_changes_the_listed_parts_and_nothing_else() {
        let entry = |function, index, word| kvm_cpuid_entry2 {
            function,
            index,
            eax: word,
            ebx: word,
            ecx: word,
            edx: word,
            ..Default::default()
        };
        let before = CpuId::from_entries(&[entry(1, 0, u32::MAX), entry(7, 1, 5)]).unwrap();
        let after = hide(&before);
        let find = |leaf, index| {
            after
                .as_slice()
                .iter()
                .find(|entry| entry.function == leaf && entry.index == index)
                .copied()
        };
        let one = find(1, 0).unwrap();
        assert_eq!((one.eax, one.ebx), (u32::MAX, u32::MAX));
        assert_eq!(one.edx, !(1 << 4 | 1 << 9));
        assert_eq!(one.ecx, !(1 << 30 | 1 << 26 | 1 << 28));
        assert_eq!(find(7, 1), Some(entry(7, 1, 5)));
        assert_eq!(find(NAME_LEAF, 0).unwrap().eax, MARKER);
        assert_eq!(find(0x4000_0000, 0).unwrap().ebx, 0);
    }
}
