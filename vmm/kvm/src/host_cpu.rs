//! The CPU that a free-running guest sees: the model that all engines share, under the name of the
//! host's own, and with what the host has for a kernel to defend itself with.
//!
//! A kernel learns from vendor, family and model which flaws its CPU has, and from the bits and
//! registers here what it can do about them, or that it need not. Under another CPU's name it would
//! leave its doors open. What is shown is carried with the guest: a host that lacks some of it
//! refuses the guest, because its kernel was told that it is there.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use vmft_cpu::cpu_model::{self, Leaf, TimeStamp};
use vmft_cpu::group::CpuidLeaf;
use vmft_cpu::{InvalidState, msr};

/// Registers that have to do with the defences, which KVM keeps where the host's CPU has them.
pub(crate) const DEFENCES: [u32; 6] = [
    msr::SPEC_CTRL,
    msr::ARCH_CAPABILITIES,
    msr::TSX_CTRL,
    // No defence, but kernels for Intel's CPUs look into it without asking whether it is there.
    msr::MISC_ENABLE,
    msr::VIRT_SPEC_CTRL,
    msr::DE_CFG,
];

/// The same as runs of numbers, with the registers that only take commands (IBPB, L1D_FLUSH).
pub(crate) const OWNED_FOR_DEFENCE: [(u32, u32); 6] = [
    (msr::SPEC_CTRL, 2),
    (msr::ARCH_CAPABILITIES, 2),
    (msr::TSX_CTRL, 1),
    (msr::MISC_ENABLE, 1),
    (msr::VIRT_SPEC_CTRL, 1),
    (msr::DE_CFG, 1),
];

/// Leaf 7, EDX: MD_CLEAR, SPEC_CTRL and IBPB, STIBP, FLUSH_L1D, ARCH_CAPABILITIES, SSBD.
const LEAF_7_EDX: u32 = 1 << 10 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 31;
/// Its subleaf 2, EDX: PSFD, IPRED_CTRL, RRSBA_CTRL, DDPD_U, BHI_CTRL, MCDT_NO.
const LEAF_7_2_EDX: u32 = 0x3F;
/// Leaf 8000_0008, EBX: IBPB, IBRS, STIBP and how they are best used, SSBD, VIRT_SSBD, SSB_NO, PSFD,
/// BTC_NO, IBPB_RET.
const EXTENDED_8_EBX: u32 = 0x000F_D000 | 0x7700_0000;
/// Leaf 8000_0021, EAX: LFENCE serialises, VERW_CLEAR, a null selector clears its base, AUTOMATIC_IBRS,
/// SBPB, IBPB_BRTYPE, SRSO_NO, SRSO_USER_KERNEL_NO; ECX: TSA_SQ_NO, TSA_L1_NO.
const EXTENDED_21_EAX: u32 = 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 0xF << 27;
const EXTENDED_21_ECX: u32 = 1 << 1 | 1 << 2;

const EXTENDED: u32 = 0x8000_0000;
const EXTENDED_8: u32 = 0x8000_0008;
const EXTENDED_21: u32 = 0x8000_0021;
const BRAND: std::ops::RangeInclusive<u32> = 0x8000_0002..=0x8000_0004;
/// "GenuineIntel" begins so.
const INTEL: u32 = u32::from_le_bytes(*b"Genu");

/// What the host's KVM can show of a leaf.
fn of_host(supported: &[kvm_cpuid_entry2], function: u32, index: u32) -> Leaf {
    let is_it = |entry: &&kvm_cpuid_entry2| {
        let has_index = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
        entry.function == function && (entry.index == index || !has_index && index == 0)
    };
    supported.iter().find(is_it).map_or_else(Leaf::default, |entry| Leaf {
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    })
}

fn entry(function: u32, index: u32, Leaf { eax, ebx, ecx, edx }: Leaf) -> CpuidLeaf {
    CpuidLeaf { function, index, registers: [eax, ebx, ecx, edx] }
}

/// What `CPUID` says to a guest whose engine can repeat it anywhere.
pub(crate) fn model(apic: Option<u8>) -> Vec<CpuidLeaf> {
    cpu_model::leaves(TimeStamp::Hidden)
        .map(|(function, leaf)| entry(function, 0, leaf.with_apic(function, apic)))
        .collect()
}

/// What `CPUID` says to a guest that runs freely on a host whose KVM can show this. `apic`: the number
/// of the CPU's local APIC, if it has one.
pub(crate) fn table(supported: &[kvm_cpuid_entry2], apic: Option<u8>) -> Vec<CpuidLeaf> {
    let host = |function, index| of_host(supported, function, index);
    let (first, of_family) = (host(0, 0), host(1, 0));
    let more_of_7 = Leaf { edx: host(7, 2).edx & LEAF_7_2_EDX, ..Leaf::default() };
    let extended_21 = host(EXTENDED_21, 0);
    let extended_21 = Leaf {
        eax: extended_21.eax & EXTENDED_21_EAX,
        ecx: extended_21.ecx & EXTENDED_21_ECX,
        ..Leaf::default()
    };
    let has = |leaf: Leaf| leaf != Leaf::default();
    let mut table: Vec<CpuidLeaf> = cpu_model::leaves(TimeStamp::Hidden)
        .map(|(function, leaf)| {
            let host = host(function, 0);
            let leaf = match function {
                0 => Leaf { eax: leaf.eax, ..first },
                1 => Leaf { eax: of_family.eax, ..leaf },
                7 => {
                    let eax = if has(more_of_7) { 2 } else { 0 };
                    Leaf { eax, edx: leaf.edx | host.edx & LEAF_7_EDX, ..leaf }
                }
                EXTENDED => {
                    let eax = if has(extended_21) { EXTENDED_21 } else { leaf.eax };
                    Leaf { eax, ..host }
                }
                0x8000_0001 => Leaf { eax: host.eax, ..leaf },
                EXTENDED_8 => Leaf { ebx: host.ebx & EXTENDED_8_EBX, ..leaf },
                function if BRAND.contains(&function) && has(host) => host,
                _ => leaf,
            };
            entry(function, 0, leaf.with_apic(function, apic))
        })
        .collect();
    if has(more_of_7) {
        table.extend([entry(7, 1, Leaf::default()), entry(7, 2, more_of_7)]);
    }
    if has(extended_21) {
        table.extend((EXTENDED_8 + 1..EXTENDED_21).map(|leaf| entry(leaf, 0, Leaf::default())));
        table.push(entry(EXTENDED_21, 0, extended_21));
    }
    table
}

/// The bits of these registers that may be fewer than the host has.
fn defences(function: u32, index: u32) -> [u32; 4] {
    match (function, index) {
        (7, 0) => [0, 0, 0, LEAF_7_EDX],
        (7, 2) => [0, 0, 0, LEAF_7_2_EDX],
        (EXTENDED_8, _) => [0, EXTENDED_8_EBX, 0, 0],
        (EXTENDED_21, _) => [EXTENDED_21_EAX, 0, EXTENDED_21_ECX, 0],
        _ => [0; 4],
    }
}

/// A guest to which `CPUID` said `shown` can go on where it would say `ours`.
///
/// # Errors
/// [`InvalidState`], with what is not here.
pub(crate) fn check(shown: &[CpuidLeaf], ours: &[CpuidLeaf]) -> Result<(), InvalidState> {
    let find = |table: &[CpuidLeaf], function, index| {
        let is_it = |leaf: &&CpuidLeaf| (leaf.function, leaf.index) == (function, index);
        table.iter().find(is_it).map_or([0; 4], |leaf| leaf.registers)
    };
    let either = shown.iter().chain(ours);
    for (function, index) in either.map(|leaf| (leaf.function, leaf.index)) {
        let (its, here) = (find(shown, function, index), find(ours, function, index));
        // Names, and how far the tables go.
        let limits: [u32; 4] = match (function, index) {
            (0x8000_0002..=0x8000_0004, _) => [u32::MAX; 4],
            (7, 0) | (EXTENDED, _) => [u32::MAX, 0, 0, 0],
            _ => [0; 4],
        };
        let defences = defences(function, index);
        for register in 0..4 {
            let fixed = !limits[register] & !defences[register];
            let differs = (its[register] ^ here[register]) & fixed;
            let lacks = its[register] & !here[register] & defences[register];
            if differs | lacks != 0 {
                return Err(InvalidState(format!(
                    "its guest was started on a CPU whose leaf {function:#x} of CPUID says {its:x?}, and this \
                     host's says {here:x?}"
                )));
            }
        }
    }
    Ok(())
}

/// True if it says so of a CPU of Intel's.
pub(crate) fn is_intels(table: &[CpuidLeaf]) -> bool {
    table.first().is_some_and(|leaf| leaf.registers[1] == INTEL)
}

/// As KVM takes it.
pub(crate) fn entries(table: &[CpuidLeaf]) -> Vec<kvm_cpuid_entry2> {
    let to_entry = |CpuidLeaf { function, index, registers }: &CpuidLeaf| kvm_cpuid_entry2 {
        function: *function,
        index: *index,
        // The only leaf whose subleaves differ.
        flags: if *function == 7 { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax: registers[0],
        ebx: registers[1],
        ecx: registers[2],
        edx: registers[3],
        ..kvm_cpuid_entry2::default()
    };
    table.iter().map(to_entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        let flags = if function == 7 { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
        kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn vendor(eax: u32, name: &[u8; 12]) -> [u32; 4] {
        let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
        [eax, word(0), word(8), word(4)]
    }

    /// A Zen 3 (EPYC 7003), as its KVM shows it.
    fn zen_3() -> Vec<kvm_cpuid_entry2> {
        vec![
            leaf(0, 0, vendor(0x10, b"AuthenticAMD")),
            leaf(1, 0, [0x00A0_0F11, 0x0001_0800, 0xFEFA_3203, 0x178B_FBFF]),
            leaf(7, 0, [0, 0x219C_97A9, 0x0040_069C, 0xAC00_0010]),
            leaf(EXTENDED, 0, vendor(0x8000_0021, b"AuthenticAMD")),
            leaf(0x8000_0001, 0, [0x00A0_0F11, 0x4000_0000, 0x75C2_37FF, 0x2FD3_FBFF]),
            leaf(0x8000_0002, 0, [0x2044_4D41, 0x4359_5045, 0x3137_3720, 0x3436_2033]),
            leaf(EXTENDED_8, 0, [0x3030, 0x111E_F657, 0x703F, 0x1_0007]),
            leaf(EXTENDED_21, 0, [0x0000_0845 | 1 << 28, 0, 0, 0]),
        ]
    }

    /// A Cascade Lake.
    fn cascade_lake() -> Vec<kvm_cpuid_entry2> {
        vec![
            leaf(0, 0, vendor(0xD, b"GenuineIntel")),
            leaf(1, 0, [0x0005_0657, 0x0001_0800, 0xFFFA_3203, 0x1F8B_FBFF]),
            leaf(7, 0, [0, 0xD19F_27EB, 0x0000_0808, 0xAC00_0400]),
            leaf(EXTENDED, 0, [0x8000_0008, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0, 0, 0x121, 0x2C10_0800]),
            leaf(EXTENDED_8, 0, [0x302E, 0x0100_D000, 0, 0]),
        ]
    }

    fn shown(table: &[CpuidLeaf], function: u32, index: u32) -> [u32; 4] {
        let is_it = |leaf: &&CpuidLeaf| (leaf.function, leaf.index) == (function, index);
        table.iter().find(is_it).map_or([0; 4], |leaf| leaf.registers)
    }

    #[test]
    fn a_guest_sees_its_hosts_vendor_family_and_defences_and_nothing_else_of_it() {
        for (host, name, signature) in
            [(zen_3(), b"AuthenticAMD", 0x00A0_0F11), (cascade_lake(), b"GenuineIntel", 0x5_0657)]
        {
            let table = table(&host, None);
            assert_eq!(shown(&table, 0, 0), vendor(7, name));
            assert_eq!(shown(&table, 1, 0)[0], signature);
            for CpuidLeaf { function, index, registers } in &table {
                let of_model = shown(&model(None), *function, *index);
                let defences = defences(*function, *index);
                for register in 1..4 {
                    if matches!(
                        (*function, register),
                        (0 | 0x8000_0000 | 0x8000_0002..=0x8000_0004, _)
                    ) {
                        continue;
                    }
                    let beyond = (registers[register] ^ of_model[register]) & !defences[register];
                    assert_eq!(beyond, 0, "leaf {function:#x}, register {register}");
                }
            }
        }
    }

    #[test]
    fn the_defences_of_known_cpus_are_the_golden_ones() {
        let zen = table(&zen_3(), None);
        assert_eq!(shown(&zen, 7, 0)[3], 0xAC00_0010);
        assert_eq!(shown(&zen, EXTENDED_8, 0)[1], 0x110E_D000);
        assert_eq!(shown(&zen, EXTENDED_21, 0), [0x1000_0044, 0, 0, 0]);
        assert_eq!(shown(&zen, EXTENDED, 0), vendor(0x8000_0021, b"AuthenticAMD"));
        assert!(!is_intels(&zen));
        let lake = table(&cascade_lake(), None);
        assert_eq!(shown(&lake, 7, 0)[3], 0xAC00_0410);
        assert_eq!(shown(&lake, EXTENDED_8, 0)[1], 0x0100_D000);
        assert_eq!(shown(&lake, EXTENDED, 0), [0x8000_0008, 0, 0, 0]);
        assert!(is_intels(&lake));
    }

    #[test]
    fn a_host_that_lacks_what_a_guest_was_told_of_refuses_it_and_one_that_has_more_does_not() {
        let full = table(&zen_3(), None);
        let mut older = zen_3();
        // An older microcode: no IBPB_BRTYPE, no SSBD.
        older.retain(|leaf| leaf.function != EXTENDED_21);
        older.iter_mut().for_each(|leaf| {
            if leaf.function == EXTENDED_8 {
                leaf.ebx &= !(1 << 24);
            }
        });
        let older = table(&older, None);
        check(&full, &full).expect("its own");
        check(&older, &full).expect("more than it was told of");
        let error = check(&full, &older).expect_err("less than it was told of").to_string();
        assert!(error.contains("leaf 0x80000008 of CPUID"), "{error}");
        let error = check(&full, &table(&cascade_lake(), None)).expect_err("another vendor");
        assert!(error.to_string().contains("leaf 0x0 of CPUID"), "{error}");
        check(&full, &table(&zen_3(), Some(1))).expect_err("a CPU with a local APIC");
    }
}
