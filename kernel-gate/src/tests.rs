//! Images made here, with what must be found and what must not.

use super::*;
use object::write::{Object, StandardSection, Symbol, SymbolSection};
use object::{Architecture, BinaryFormat, Endianness, SymbolFlags, SymbolKind, SymbolScope};

const RDTSC: &[u8] = &[0x0F, 0x31];
const RET: u8 = 0xC3;

/// A relocatable file with functions one after the other, bytes between them included.
fn sections(functions: &[(&str, &[u8])]) -> Vec<u8> {
    let mut file = Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
    let text = file.section_id(StandardSection::Text);
    for (name, code) in functions {
        let value = file.append_section_data(text, code, 1);
        file.add_symbol(Symbol {
            name: name.as_bytes().to_vec(),
            value,
            size: code.len() as u64,
            kind: SymbolKind::Text,
            scope: SymbolScope::Linkage,
            weak: false,
            section: SymbolSection::Section(text),
            flags: SymbolFlags::None,
        });
    }
    file.write().unwrap()
}

/// An executable without sections: one segment of code, and our note of type `kind`.
fn segment(code: &[u8], kind: u32) -> Vec<u8> {
    let mut note: Vec<u8> = [5u32, 0, kind].iter().flat_map(|word| word.to_le_bytes()).collect();
    note.extend(b"vmft\0\0\0\0");
    let mut file = b"\x7FELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([2u16, 62].iter().flat_map(|half| half.to_le_bytes()));
    file.extend(1u32.to_le_bytes());
    file.extend([0x100_0000u64, 64, 0].iter().flat_map(|long| long.to_le_bytes()));
    file.extend(0u32.to_le_bytes());
    file.extend([64u16, 56, 2, 64, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    let mut at = 64 + 2 * 56;
    for (kind, flags, contents) in [(1u32, 5u32, code), (4, 4, &note)] {
        file.extend([kind, flags].iter().flat_map(|word| word.to_le_bytes()));
        let len = contents.len() as u64;
        let longs = [at, 0x100_0000, 0x100_0000, len, len, 4];
        file.extend(longs.iter().flat_map(|long| long.to_le_bytes()));
        at += len;
    }
    file.extend(code);
    file.extend(note);
    file
}

fn forbidden(file: &[u8]) -> Vec<String> {
    match scan::scan(file) {
        Ok(_) => Vec::new(),
        Err(GateError::Forbidden { count, first }) => vec![count.to_string(), first.to_string()],
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn every_instruction_that_differs_from_host_to_host_is_found_by_name() {
    for (name, bytes) in [
        ("RDTSC", &[0x0F, 0x31][..]),
        ("RDTSCP", &[0x0F, 0x01, 0xF9]),
        ("RDRAND", &[0x48, 0x0F, 0xC7, 0xF0]),
        ("RDSEED", &[0x0F, 0xC7, 0xF9]),
        ("RDPID", &[0xF3, 0x0F, 0xC7, 0xF8]),
        ("TPAUSE", &[0x66, 0x0F, 0xAE, 0xF1]),
        ("UMWAIT", &[0xF2, 0x0F, 0xAE, 0xF1]),
        ("XBEGIN", &[0xC7, 0xF8, 0, 0, 0, 0]),
    ] {
        let code = [bytes, &[RET]].concat();
        let found = forbidden(&sections(&[("clean", &[0x90, RET]), ("dirty", &code)]));
        assert_eq!(found, ["1".to_owned(), format!("{name} at 0x2 in dirty")]);
    }
}

#[test]
fn the_same_bytes_inside_another_instruction_are_none() {
    // mov eax, 0x310f; cmpxchg8b [rdi], which shares its opcode with RDRAND.
    let code = [0xB8, 0x0F, 0x31, 0, 0, 0x0F, 0xC7, 0x0F, RET];
    assert_eq!(forbidden(&sections(&[("f", &code)])), Vec::<String>::new());
}

#[test]
fn bytes_between_functions_do_not_hide_what_follows() {
    // Two bytes of a longer instruction that would swallow the next function's first.
    let found = forbidden(&sections(&[("table", &[0x48, 0xB8]), ("g", RDTSC)]));
    assert_eq!(found, ["1", "RDTSC at 0x2 in g"]);
}

#[test]
fn an_image_without_sections_is_read_by_its_segments() {
    assert_eq!(forbidden(&segment(&[0x90, 0x0F, 0x31, RET], 1)), ["1", "RDTSC at 0x1000001"]);
    assert_eq!(forbidden(&segment(&[0x90, RET], 1)), Vec::<String>::new());
}

#[test]
fn a_clean_kernel_gets_its_voucher_and_a_dirty_one_does_not() {
    let mut clean = segment(&[0x90, RET], VOUCHER_NONE);
    assert_eq!(examine(&clean), Err(GateError::NoNote));
    let examination = vouch(&mut clean).unwrap();
    assert_eq!(examination, Examination { bytes: 2, instructions: 2 });
    assert_eq!(clean, segment(&[0x90, RET], VOUCHER_LOCKSTEP));
    assert_eq!(examine(&clean), Ok(examination));

    let mut dirty = segment(&[0x0F, 0x31, RET], VOUCHER_NONE);
    assert!(matches!(vouch(&mut dirty), Err(GateError::Forbidden { count: 1, .. })));
    assert_eq!(dirty, segment(&[0x0F, 0x31, RET], VOUCHER_NONE));
}

#[test]
fn a_note_does_not_help_a_kernel_that_has_what_it_denies() {
    let lying = segment(&[0x0F, 0x31, RET], VOUCHER_LOCKSTEP);
    assert!(matches!(examine(&lying), Err(GateError::Forbidden { .. })));
}

#[test]
fn damaged_images_are_errors() {
    let whole = segment(&[0x90, RET], VOUCHER_LOCKSTEP);
    for len in 0..whole.len() {
        assert!(examine(&whole[..len]).is_err(), "{len} bytes");
    }
    assert!(matches!(scan::scan(&[0; 100]), Err(GateError::Image(_))));
}

#[path = "fuzz.rs"]
mod fuzz;
