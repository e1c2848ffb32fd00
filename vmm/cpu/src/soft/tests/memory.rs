//! Memory: page tables, the TLB, code that changes, string instructions, tracking of writes.

use super::*;
use crate::memory::PageNumber;
use iced_x86::code_asm::*;

#[test]
fn accessed_and_dirty_bits_are_set_by_what_was_done() {
    let mut machine = Machine::new(|a| {
        a.mov(rbx, SMALL).unwrap();
        a.mov(al, byte_ptr(rbx + 0x1000)).unwrap();
        a.mov(byte_ptr(rbx + 0x2000), al).unwrap();
        a.mov(al, byte_ptr(rbx + 0x3000)).unwrap();
        a.mov(byte_ptr(rbx + 0x3000), al).unwrap();
        a.hlt().unwrap();
    });
    machine.run();
    let entry = |page: u64| read_word(machine.ram(), SMALL_PT + 8 * page) & 0x60;
    assert_eq!([entry(0), entry(1), entry(2), entry(3)], [0, 0x20, 0x60, 0x60]);
    assert_eq!(read_word(machine.ram(), SMALL_PD) & 0x60, 0x20);
}

#[test]
fn translations_are_kept_until_they_are_flushed() {
    let mut machine = Machine::new(|a| {
        a.mov(rbx, SMALL).unwrap();
        a.mov(rsi, SMALL_PT).unwrap();
        a.mov(rcx, (SMALL_FRAMES + 0x1000) | 7).unwrap();
        a.mov(r8, qword_ptr(rbx)).unwrap();
        a.mov(qword_ptr(rsi), rcx).unwrap();
        a.mov(r9, qword_ptr(rbx)).unwrap();
        a.invlpg(byte_ptr(rbx)).unwrap();
        a.mov(r10, qword_ptr(rbx)).unwrap();
        a.hlt().unwrap();
    });
    write_words(machine.ram(), SMALL_FRAMES, &[1]);
    write_words(machine.ram(), SMALL_FRAMES + 0x1000, &[2]);
    machine.run();
    assert_eq!(machine.state().general[8..11], [1, 1, 2]);
}

#[test]
fn invlpg_drops_every_piece_of_a_large_page() {
    let mut machine = Machine::new(|a| {
        a.mov(rbx, 0x80_0000u64).unwrap();
        a.mov(r8, qword_ptr(rbx + 0x5000)).unwrap();
        a.mov(rsi, PD + 4 * 8).unwrap();
        a.mov(qword_ptr(rsi), 0xA0_0087).unwrap();
        a.invlpg(byte_ptr(rbx + 0x1000)).unwrap();
        a.mov(r9, qword_ptr(rbx + 0x5000)).unwrap();
        a.hlt().unwrap();
    });
    write_words(machine.ram(), 0x80_5000, &[1]);
    write_words(machine.ram(), 0xA0_5000, &[2]);
    machine.run();
    assert_eq!(machine.state().general[8..10], [1, 2]);
}

#[test]
fn global_pages_survive_a_load_of_cr3() {
    let mut machine = Machine::new(|a| {
        a.mov(rbx, SMALL).unwrap();
        a.mov(r8, qword_ptr(rbx)).unwrap();
        a.mov(r8, qword_ptr(rbx + 0x1000)).unwrap();
        a.mov(rsi, SMALL_PT).unwrap();
        a.mov(rcx, (SMALL_FRAMES + 0x3000) | 7).unwrap();
        a.mov(qword_ptr(rsi), rcx).unwrap();
        a.mov(qword_ptr(rsi + 8), rcx).unwrap();
        a.mov(rax, cr3).unwrap();
        a.mov(cr3, rax).unwrap();
        a.mov(r9, qword_ptr(rbx)).unwrap();
        a.mov(r10, qword_ptr(rbx + 0x1000)).unwrap();
        a.hlt().unwrap();
    });
    write_words(machine.ram(), SMALL_PT, &[SMALL_FRAMES | 0x107]);
    write_words(machine.ram(), SMALL_FRAMES, &[1]);
    write_words(machine.ram(), SMALL_FRAMES + 0x1000, &[2]);
    write_words(machine.ram(), SMALL_FRAMES + 0x3000, &[3]);
    machine.run();
    assert_eq!(machine.state().general[9..11], [1, 3]);
}

#[test]
fn a_store_into_the_next_instruction_is_seen_by_it() {
    let mut machine = Machine::new(|a| {
        let mut patched = a.create_label();
        a.lea(rbx, byte_ptr(patched)).unwrap();
        a.mov(byte_ptr(rbx + 1), 7).unwrap();
        a.set_label(&mut patched).unwrap();
        a.mov(eax, 1).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(machine.run(), Exit::Halted { interruptible: false });
    assert_eq!(machine.state().general[0], 7);
    assert_eq!(machine.point(), 4);
}

#[test]
fn code_changed_through_another_mapping_or_by_a_device_is_seen() {
    let mut machine = Machine::new(|a| {
        let mut again = a.create_label();
        // The code at SMALL is also at SMALL_FRAMES.
        a.mov(rbx, SMALL).unwrap();
        a.mov(rsi, SMALL_FRAMES).unwrap();
        a.mov(r12, 3u64).unwrap();
        a.mov(byte_ptr(rsi + 0x800), 1).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(rbx).unwrap();
        a.add(byte_ptr(rsi + 1), 1).unwrap();
        a.dec(r12).unwrap();
        a.jnz(again).unwrap();
        a.out(0x80, al).unwrap();
        a.call(rbx).unwrap();
        a.hlt().unwrap();
    });
    // mov eax, 1; add r15, rax; ret
    let code = [0xB8, 1, 0, 0, 0, 0x49, 0x01, 0xC7, 0xC3];
    machine.ram().memory().write_slice(&code, GuestAddress(SMALL_FRAMES)).unwrap();
    assert_eq!(machine.run(), Exit::BusAccess);
    assert_eq!(machine.state().general[15], 1 + 2 + 3);
    machine.ram().memory().write_obj(100u8, GuestAddress(SMALL_FRAMES + 1)).unwrap();
    machine.run();
    assert_eq!(machine.state().general[15], 106);
}

#[test]
fn a_repeated_move_of_overlapping_bytes_repeats_the_pattern() {
    let mut machine = Machine::new(|a| {
        a.mov(rsi, DATA).unwrap();
        a.lea(rdi, qword_ptr(rsi + 3)).unwrap();
        a.mov(ecx, 10).unwrap();
        a.cld().unwrap();
        a.rep().movsb().unwrap();
        a.hlt().unwrap();
    });
    machine.ram().memory().write_slice(b"abc", GuestAddress(DATA)).unwrap();
    machine.run();
    let mut bytes = [0; 13];
    machine.ram().memory().read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
    assert_eq!(&bytes, b"abcabcabcabca");
}

#[test]
fn a_long_repetition_retires_in_chunks_with_the_same_address() {
    let mut machine = Machine::new(|a| {
        a.mov(rdi, DATA + 1).unwrap();
        a.mov(ecx, 10_000).unwrap();
        a.mov(al, 0xEE).unwrap();
        a.rep().stosb().unwrap();
        a.hlt().unwrap();
    });
    let string = CODE + 10 + 5 + 2;
    assert_eq!(machine.run_to(4), Exit::Bound);
    let state = machine.state();
    assert_eq!((state.rip, state.general[1], state.general[7]), (string, 5904, DATA + 4097));
    machine.run_to(6);
    assert_eq!(machine.state().rip, string + 2);
    assert_eq!(machine.run(), Exit::Halted { interruptible: false });
    assert_eq!(machine.point(), 7);
    let mut bytes = vec![0; 10_002];
    machine.ram().memory().read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
    assert!(bytes[1..10_001].iter().all(|byte| *byte == 0xEE));
    assert_eq!((bytes[0], bytes[10_001]), (0, 0));
}

#[test]
fn a_fault_in_a_repetition_keeps_what_was_done() {
    let mut machine = Machine::new(|a| {
        a.mov(rdi, SMALL + 0x4F80).unwrap();
        a.mov(ecx, 64).unwrap();
        a.rep().stosq().unwrap();
    });
    write_words(machine.ram(), SMALL_PT + 8 * 5, &[0]);
    let (vector, words) = machine.run_into_handler();
    let state = machine.state();
    assert_eq!((vector, words[1]), (14, CODE + 15));
    assert_eq!((state.general[1], state.general[7]), (48, SMALL + 0x5000));
    assert_eq!(machine.point(), 3, "two moves and the handler's HLT");
}

#[test]
fn repeated_port_strings_move_one_element_a_step() {
    let mut machine = Machine::new(|a| {
        a.mov(rsi, DATA).unwrap();
        a.mov(dx, 0xE9).unwrap();
        a.mov(ecx, 3).unwrap();
        a.rep().outsb().unwrap();
        a.hlt().unwrap();
    });
    machine.ram().memory().write_slice(b"xyz", GuestAddress(DATA)).unwrap();
    assert_eq!(machine.run_through(), Exit::Halted { interruptible: false });
    let seen: Vec<Seen> =
        (0..).zip(b"xyz").map(|(n, byte)| Seen::PortWrite(3 + n, 0xE9, u32::from(*byte))).collect();
    assert_eq!(machine.bus.seen, seen);
    assert_eq!(machine.point(), 7);
}

#[test]
fn scans_and_comparisons_stop_where_they_should() {
    let mut machine = Machine::new(|a| {
        a.mov(rdi, DATA).unwrap();
        a.mov(al, 0).unwrap();
        a.mov(rcx, u64::MAX).unwrap();
        a.repne().scasb().unwrap();
        a.mov(r8, rcx).unwrap();
        a.mov(rsi, DATA).unwrap();
        a.mov(rdi, DATA + 0x100).unwrap();
        a.mov(ecx, 100).unwrap();
        a.repe().cmpsb().unwrap();
        a.hlt().unwrap();
    });
    machine.ram().memory().write_slice(b"hello\0", GuestAddress(DATA)).unwrap();
    machine.ram().memory().write_slice(b"help\0", GuestAddress(DATA + 0x100)).unwrap();
    machine.run();
    let state = machine.state();
    assert_eq!(state.general[8], u64::MAX - 6);
    assert_eq!(state.general[1], 96);
    assert_eq!(state.rflags & 1, 1, "l is below p");
}

#[test]
fn renewed_tracking_records_the_next_write_of_each_page() {
    let mut machine = Machine::new(|a| {
        a.mov(rbx, DATA).unwrap();
        for _ in 0..8 {
            a.mov(qword_ptr(rbx), rax).unwrap();
        }
        a.hlt().unwrap();
    });
    let written = |machine: &Machine| {
        let pages = machine.ram().tracker().take_written();
        pages.contains(&PageNumber::containing(DATA))
    };
    machine.run_to(2);
    assert!(written(&machine));
    machine.engine.renew_write_tracking();
    assert!(!written(&machine));
    machine.run_to(3);
    assert!(written(&machine));
    machine.engine.renew_write_tracking();
    machine.run_to(5);
    assert!(written(&machine));
}

#[test]
fn writes_to_page_tables_by_walks_are_recorded() {
    let mut machine = Machine::new(|a| {
        a.mov(rbx, SMALL).unwrap();
        a.hlt().unwrap();
    });
    machine.run_to(1);
    machine.ram().tracker().take_written();
    machine.engine.renew_write_tracking();
    let mut machine = Machine::new(|a| {
        a.mov(rbx, SMALL).unwrap();
        a.mov(al, byte_ptr(rbx)).unwrap();
        a.hlt().unwrap();
    });
    machine.run_to(1);
    machine.ram().tracker().take_written();
    machine.engine.renew_write_tracking();
    machine.run();
    let pages = machine.ram().tracker().take_written();
    assert!(pages.contains(&PageNumber::containing(SMALL_PT)));
    assert!(!pages.contains(&PageNumber::containing(SMALL_FRAMES)));
}

#[test]
fn misaligned_user_accesses_fault_when_alignment_is_checked() {
    let mut machine = Machine::user(|a| {
        a.mov(rbx, DATA).unwrap();
        a.mov(eax, dword_ptr(rbx + 4)).unwrap();
        a.mov(eax, dword_ptr(rbx + 2)).unwrap();
    });
    let mut state = machine.state();
    state.cr0 |= 1 << 18;
    state.rflags |= 1 << 18;
    machine.engine.restore(&state, ExecutionPoint::START).unwrap();
    let (vector, words) = machine.run_into_handler();
    assert_eq!((vector, words[0]), (17, 0));
    assert_eq!(machine.point(), 3);
}
