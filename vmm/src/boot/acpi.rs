//! ACPI's tables (ACPI 6.4, §5.2): by which a kernel finds how to switch the machine off, and its CPUs where
//! there are several.
//!
//! They have the little of ACPI's fixed hardware that goes with being an ACPI machine. The
//! namespace has the PCI bus with its lines, because a kernel that believes in ACPI looks for it
//! there, and the way to switch off.
//!
//! With several CPUs the MADT names the local APICs. There is no I/O APIC, so that a kernel leaves
//! the interrupt controllers as they are ("virtual wire mode"): devices interrupt the CPU that
//! boots. One CPU has no local APIC; without a MADT a kernel takes it that there are the 8259s
//! alone.
//!
//! The timer of power management is named with several CPUs only, where a kernel has no better
//! clock. With one it would measure its time stamp counter against it, whose rate it is told, and
//! be wrong by what it rounds.
//!
//! ```text
//! 0xE0000 RSDP ─▶ XSDT ─▶ FADT ─▶ DSDT, FACS
//!                      └▶ MADT, with several CPUs
//! ```

use crate::board::{PCI_WINDOWS, POWER_MANAGEMENT_PORT, interrupt_of_slot};
use crate::devices::pci::SLOTS;
use crate::devices::power_management::{CONTROL_OFFSET, OFF, TIMER_OFFSET};
use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, Name, Package, PackageBuilder,
    ResourceTemplate, Scope, ZERO,
};
use acpi_tables::facs::FACS;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use vm_memory::GuestAddress;
use vmft_cpu::CpuCount;
use vmft_cpu::memory::GuestRam;

/// Where the tables begin: in the memory that the memory map reserves, where kernels look for them.
pub(super) const TABLES: GuestAddress = GuestAddress(0xE_0000);
/// Where every local APIC is.
const LOCAL_APIC: u32 = 0xFEE0_0000;
/// The line of ACPI's own interrupt, which never comes: one that no device has.
const SCI_LINE: u16 = 12;

/// FADT flags: `WBINVD` works, neither a power nor a sleep button is fixed hardware, and the timer,
/// where there is one, has 32 bits.
const FADT_FLAGS: u32 = 1 << 0 | 1 << 4 | 1 << 5 | 1 << 8;
/// FADT boot flags: there are ISA devices.
const FADT_BOOT_FLAGS: u16 = 1;
/// MADT flags: there are two 8259s as well.
const MADT_PC_COMPATIBLE: u32 = 1;
/// The kinds of a MADT's entries that are used.
const MADT_LOCAL_APIC: u8 = 0;
const MADT_LOCAL_NMI: u8 = 4;
/// A MADT's CPU can be used.
const MADT_ENABLED: u32 = 1;
/// Length of the tables that have one length.
const HEADER_LENGTH: usize = 36;
const FADT_LENGTH: usize = 244;
/// Who has made the tables.
const OEM: [u8; 6] = *b"VMFT  ";

/// A table: its header, and `body` behind it.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = Sdt::new(signature, HEADER_LENGTH as u32, revision, OEM, *b"VMFTPC  ", 1);
    table.append_slice(body);
    table.as_slice().to_vec()
}

/// What a thing is in ACPI's own language, or in memory.
fn bytes_of(thing: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    thing.to_aml_bytes(&mut bytes);
    bytes
}

/// Which line the first pin of each slot pulls.
fn routing() -> PackageBuilder {
    let mut slots = PackageBuilder::new();
    for slot in 1..SLOTS {
        // Any function of the slot.
        let address = u32::from(slot) << 16 | 0xFFFF;
        let (pin, source, line) = (ZERO, ZERO, interrupt_of_slot(slot).number());
        slots.add_element(&Package::new(vec![&address, &pin, &source, &line]));
    }
    slots
}

/// The namespace: the PCI bus with its windows and lines, and the sleep type that is off.
fn dsdt() -> Vec<u8> {
    let (first, last) = (PCI_WINDOWS.start, PCI_WINDOWS.end - 1);
    let buses = AddressSpace::new_bus_number(0u16, 0u16);
    let not_cached = AddressSpaceCacheable::NotCacheable;
    let windows = AddressSpace::new_memory(not_cached, true, first, last, None);
    let host_bridge = Name::new("_HID".into(), &EISAName::new("PNP0A03"));
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&buses, &windows]));
    let routing = Name::new("_PRT".into(), &routing());
    let bridge = Device::new("PCI0".into(), vec![&host_bridge, &resources, &routing]);
    let system_bus = Scope::new("\\_SB_".into(), vec![&bridge]);
    let off = Name::new("_S5_".into(), &Package::new(vec![&OFF, &OFF, &ZERO, &ZERO]));
    table(*b"DSDT", 2, &[bytes_of(&system_bus), bytes_of(&off)].concat())
}

/// What firmware and kernel share; nothing here.
fn facs() -> Vec<u8> {
    let mut facs = FACS::new();
    facs.version = 2;
    bytes_of(&facs)
}

fn fadt(facs: u64, dsdt: u64, has_timer: bool) -> Vec<u8> {
    /// How registers are accessed.
    const WORDS: u8 = 2;
    const LONGS: u8 = 3;
    let mut body = [0; FADT_LENGTH - HEADER_LENGTH];
    let mut put = |offset: usize, bytes: &[u8]| {
        body[offset - HEADER_LENGTH..][..bytes.len()].copy_from_slice(bytes);
    };
    let low = |address: u64| u32::try_from(address).expect("below 1 MiB").to_le_bytes();
    put(36, &low(facs));
    put(40, &low(dsdt));
    put(46, &SCI_LINE.to_le_bytes());
    put(56, &u32::from(POWER_MANAGEMENT_PORT).to_le_bytes());
    put(64, &u32::from(POWER_MANAGEMENT_PORT + CONTROL_OFFSET).to_le_bytes());
    // Bytes of the event and of the control block.
    put(88, &[4, 2]);
    // No CPU state but C1: the latencies of C2 and C3 are beyond what counts as having them.
    put(96, &101u16.to_le_bytes());
    put(98, &1001u16.to_le_bytes());
    put(109, &FADT_BOOT_FLAGS.to_le_bytes());
    put(112, &FADT_FLAGS.to_le_bytes());
    put(140, &dsdt.to_le_bytes());
    let port = |port: u16, bits: u8, width: u8| {
        let mut address = [0; 12];
        // In the port space.
        address[..4].copy_from_slice(&[1, bits, 0, width]);
        address[4..6].copy_from_slice(&port.to_le_bytes());
        address
    };
    put(148, &port(POWER_MANAGEMENT_PORT, 32, WORDS));
    put(172, &port(POWER_MANAGEMENT_PORT + CONTROL_OFFSET, 16, WORDS));
    if has_timer {
        put(76, &u32::from(POWER_MANAGEMENT_PORT + TIMER_OFFSET).to_le_bytes());
        put(91, &[4]);
        put(208, &port(POWER_MANAGEMENT_PORT + TIMER_OFFSET, 32, LONGS));
    }
    table(*b"FACP", 3, &body)
}

fn madt(cpus: CpuCount) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(LOCAL_APIC.to_le_bytes());
    body.extend(MADT_PC_COMPATIBLE.to_le_bytes());
    for number in cpus.numbers() {
        body.extend([MADT_LOCAL_APIC, 8, number, number]);
        body.extend(MADT_ENABLED.to_le_bytes());
    }
    // On all CPUs the second local line is that of NMIs.
    body.extend([MADT_LOCAL_NMI, 6, 0xFF, 0, 0, 1]);
    table(*b"APIC", 1, &body)
}

/// All tables for so many CPUs, as they lie in memory from [`TABLES`] on.
fn tables(cpus: CpuCount) -> Vec<u8> {
    /// Every table begins at a multiple of this, which the FACS needs.
    const ALIGN: usize = 64;
    let mut all = vec![0; Rsdp::len()];
    let mut place = |table: &[u8]| {
        let at = all.len().next_multiple_of(ALIGN);
        all.resize(at, 0);
        all.extend(table);
        TABLES.0 + at as u64
    };
    let (facs, dsdt) = (place(&facs()), place(&dsdt()));
    let several = cpus.is_several();
    let mut entries = place(&fadt(facs, dsdt, several)).to_le_bytes().to_vec();
    if several {
        entries.extend(place(&madt(cpus)).to_le_bytes());
    }
    let xsdt = place(&table(*b"XSDT", 1, &entries));
    all[..Rsdp::len()].copy_from_slice(&bytes_of(&Rsdp::new(OEM, xsdt)));
    all
}

/// Writes the tables of a guest with so many CPUs.
pub(crate) fn publish(ram: &GuestRam, cpus: CpuCount) {
    super::write(ram, TABLES, &tables(cpus));
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;
    use vmft_cpu::memory::MIN_MEMORY;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn number(bytes: &[u8]) -> usize {
        bytes.iter().rev().fold(0, |word, byte| word << 8 | usize::from(*byte))
    }

    fn cpus(count: u8) -> CpuCount {
        CpuCount::try_from(count).expect("a number of CPUs")
    }

    /// The table at an address of the guest's, whose length and sum are right.
    fn at(all: &[u8], address: usize) -> &[u8] {
        let start = &all[address - TABLES.0 as usize..];
        let bytes = &start[..number(&start[4..8])];
        assert_eq!(sum(bytes), 0, "{:?}", &bytes[..4]);
        bytes
    }

    /// The tables that the root names, which is right itself.
    fn named(all: &[u8]) -> Vec<&[u8]> {
        assert_eq!(&all[..8], b"RSD PTR ");
        assert_eq!((sum(&all[..20]), sum(&all[..36])), (0, 0));
        let xsdt = at(all, number(&all[24..32]));
        assert_eq!(&xsdt[..4], b"XSDT");
        xsdt[36..].chunks(8).map(|entry| at(all, number(entry))).collect()
    }

    #[test]
    fn every_table_is_found_from_the_root_and_has_a_good_sum() {
        for count in 1..=4 {
            let all = tables(cpus(count));
            let fadt = named(&all)[0];
            assert_eq!((&fadt[..4], fadt.len()), (&b"FACP"[..], FADT_LENGTH));
            assert_eq!(number(&fadt[40..44]), number(&fadt[140..148]), "one DSDT");
            let dsdt = at(&all, number(&fadt[40..44]));
            assert_eq!(&dsdt[..4], b"DSDT");
            assert!(dsdt.windows(5).any(|bytes| bytes == b"\x08_S5_"));
            // Slot 1 pulls line 11.
            let entry = [0x0C, 0xFF, 0xFF, 1, 0, 0, 0, 0x0A, 11];
            assert!(dsdt.windows(entry.len()).any(|bytes| bytes == entry));
            let facs = number(&fadt[36..40]);
            assert!(facs.is_multiple_of(64));
            assert_eq!(&all[facs - TABLES.0 as usize..][..4], b"FACS");
            let registers = usize::from(POWER_MANAGEMENT_PORT);
            let events = (number(&fadt[56..60]), number(&fadt[152..160]), fadt[88]);
            assert_eq!(events, (registers, registers, 4));
            let control = (number(&fadt[64..68]), number(&fadt[176..184]), fadt[89]);
            assert_eq!(control, (registers + 4, registers + 4, 2));
        }
    }

    #[test]
    fn one_cpu_has_neither_local_apic_nor_a_timer_beside_its_time_stamp_counter() {
        for count in 1..=4 {
            let all = tables(cpus(count));
            let (named, several) = (named(&all), count > 1);
            let names: Vec<&[u8]> = named.iter().map(|table| &table[..4]).collect();
            assert_eq!(names, [&b"FACP"[..], b"APIC"][..1 + usize::from(several)]);
            let fadt = named[0];
            let timer = (number(&fadt[76..80]), fadt[91], number(&fadt[208..220]));
            if several {
                let port = usize::from(POWER_MANAGEMENT_PORT) + 8;
                assert_eq!((timer.0, timer.1, number(&fadt[212..220])), (port, 4, port));
            } else {
                assert_eq!(timer, (0, 0, 0));
            }
        }
    }

    #[test]
    fn each_cpu_has_a_local_apic_of_its_own_number() {
        for count in 2..=4 {
            let all = tables(cpus(count));
            let madt = named(&all)[1];
            assert_eq!((&madt[..4], number(&madt[36..40])), (&b"APIC"[..], 0xFEE0_0000));
            let mut rest = &madt[44..];
            let mut found = Vec::new();
            while let [kind, length, ..] = rest {
                let (entry, after) = rest.split_at(usize::from(*length));
                if *kind == 0 {
                    assert_eq!((entry[2], number(&entry[4..8])), (entry[3], 1));
                    found.push(entry[3]);
                }
                rest = after;
            }
            assert!(rest.is_empty());
            assert_eq!(found, (0..count).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_tables_are_where_kernels_look_for_them() {
        for count in [1, 2] {
            let ram = GuestRam::new(MIN_MEMORY).expect("memory");
            publish(&ram, cpus(count));
            assert_eq!(ram.memory().read_obj::<[u8; 8]>(TABLES).expect("memory"), *b"RSD PTR ");
            let mut found = vec![0; tables(cpus(count)).len()];
            ram.memory().read_slice(&mut found, TABLES).expect("memory");
            assert_eq!(found, tables(cpus(count)));
        }
    }
}
