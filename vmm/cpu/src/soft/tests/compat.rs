//! 32-bit and 16-bit code: segments, the ways into it and out of it, what only it has.

use super::*;
use iced_x86::code_asm::*;

const BASE: u64 = 0x8000;
/// An LDT with one segment.
const LDT: u64 = 0xD000;
const IN_LDT: u16 = 7;

/// A CPU about to execute 32-bit code at [`CODE`], at privilege level 3.
fn initial() -> CpuState {
    let mut state = initial_state(true);
    state.segments.cs = segment(USER_CODE_32 | 3, 0xCFB);
    let data = segment(USER_DATA | 3, 0xCF3);
    state.segments.ds = data;
    state.segments.es = data;
    state.segments.ss = data;
    state.general[3] = DATA;
    state
}

fn assemble_bits(bits: u32, program: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(bits).expect("a size there is");
    program(&mut assembler);
    assembler.assemble(if bits == 16 { 0 } else { CODE }).expect("the program assembles")
}

fn compat(program: impl FnOnce(&mut CodeAssembler)) -> Machine {
    Machine::with_bytes(&assemble_bits(32, program), &initial())
}

fn with(bytes: &[u8], change: impl FnOnce(&mut CpuState)) -> Machine {
    let mut state = initial();
    change(&mut state);
    Machine::with_bytes(bytes, &state)
}

/// A descriptor of base, limit (in bytes, below 1 MiB) and attributes.
fn descriptor(base: u64, limit: u64, attributes: u64) -> u64 {
    (limit & 0xFFFF)
        | (base & 0xFF_FFFF) << 16
        | (attributes & 0xFF) << 40
        | (limit >> 16) << 48
        | (attributes >> 8) << 52
        | (base >> 24) << 56
}

#[test]
fn the_same_bytes_are_other_instructions_in_code_of_another_size() {
    let mut bytes = assemble_bits(32, |a| {
        a.push(i32::from(USER_CODE_32 | 3)).unwrap();
        a.push((CODE + 0x40) as i32).unwrap();
        a.push(i32::from(USER_CODE | 3)).unwrap();
        a.push((CODE + 0x20) as i32).unwrap();
        a.jmp(CODE + 0x20).unwrap();
    });
    bytes.resize(0x20, 0xCC);
    // INC EAX, or a REX prefix; NOP; a far return: first as 32-bit code, then as 64-bit code.
    bytes.extend([0x40, 0x90, 0xCB]);
    bytes.resize(0x40, 0xCC);
    bytes.extend([0x49, 0xF4]); // DEC ECX; HLT
    let mut machine = with(&bytes, |state| state.general[..2].fill(7));
    let (vector, words) = machine.run_into_handler();
    assert_eq!((vector, words[1], words[2]), (13, CODE + 0x41, u64::from(USER_CODE_32 | 3)));
    assert_eq!(machine.state().general[..2], [8, 6]);
    assert_eq!(machine.point(), 5 + 3 + 2 + 1 + 1);
}

#[test]
fn far_transfers_go_between_code_of_both_sizes() {
    let mut machine = {
        let short = assemble_bits(32, |a| {
            a.mov(eax, 0x8000_0001u32 as i32).unwrap(); // 5
            a.add(eax, eax).unwrap(); // 7
            a.db(&[0xEA]).unwrap(); // 14: JMP 0x2B:CODE+0x40
            a.dd_i(&[(CODE + 0x40) as i32]).unwrap();
            a.dw_i(&[(USER_CODE | 3) as i16]).unwrap();
        });
        let mut bytes = short;
        bytes.resize(0x40, 0xCC);
        let mut long = CodeAssembler::new(64).unwrap();
        long.mov(r8, u64::MAX).unwrap();
        // A far return to the 32-bit code behind.
        long.push(i32::from(USER_CODE_32 | 3)).unwrap();
        long.push((CODE + 0x80) as i32).unwrap();
        long.db(&[0x48, 0xCB]).unwrap(); // RETFQ
        bytes.extend(long.assemble(CODE + 0x40).unwrap());
        bytes.resize(0x80, 0xCC);
        bytes.extend([0x47, 0xF4]); // INC EDI; HLT
        with(&bytes, |state| state.general[7] = u64::from(u32::MAX))
    };
    let (vector, words) = machine.run_into_handler();
    assert_eq!((vector, words[1], words[2]), (13, CODE + 0x81, u64::from(USER_CODE_32 | 3)));
    let state = machine.state();
    assert_eq!((state.general[0], state.general[7], state.general[8]), (2, 0, u64::MAX));
    assert_eq!(machine.point(), 3 + 4 + 1 + 1);
}

#[test]
fn addresses_wrap_at_four_gigabytes() {
    let mut machine = compat(|a| {
        a.mov(eax, dword_ptr(ebx + ecx * 4)).unwrap();
        a.mov(dword_ptr(ebx + 4), eax).unwrap();
        a.hlt().unwrap();
    });
    let mut state = machine.state();
    (state.general[3], state.general[1]) = (0xFFFF_FFFF_FFFF_FF00, (DATA + 0x100) / 4);
    write_words(machine.ram(), DATA, &[0x1234_5678]);
    machine.engine.restore(&state, ExecutionPoint::START).unwrap();
    let (vector, words) = machine.run_into_handler();
    assert_eq!((vector, words[1]), (14, CODE + 3), "what lies below 4 GiB is not mapped");
    assert_eq!(machine.state().general[0], 0x1234_5678);
    assert_eq!(machine.state().cr2, 0xFFFF_FF04);
}

#[test]
fn the_stack_is_as_wide_as_its_segment_says() {
    let program = |a: &mut CodeAssembler| {
        a.push(ebx).unwrap();
        a.pushad().unwrap();
        a.popad().unwrap();
        a.call(CODE + 0x20).unwrap();
        a.db(&[0xCC; 0x40]).unwrap();
    };
    let mut bytes = assemble_bits(32, program);
    bytes[0x20..0x22].copy_from_slice(&[0x59, 0xF4]); // POP ECX; HLT
    let mut machine = with(&bytes, |state| state.general[4] = 0xFFFF_FFFF_0000_0000 | STACK);
    let (vector, _) = machine.run_into_handler();
    assert_eq!(vector, 13);
    let state = machine.state();
    assert_eq!(state.general[1], CODE + 8);
    assert_eq!(read_word(machine.ram(), KERNEL_STACK - 16), STACK - 4, "ESP is zero-extended");
    // SP alone moves where the segment is of 16 bits.
    let mut machine = with(&bytes, |state| {
        state.segments.ss = Segment { attributes: 0x8F3, ..segment(USER_DATA | 3, 0) };
        state.general[4] = 0x1234_0000 | 0x8002;
    });
    machine.run_to(1);
    assert_eq!(machine.state().general[4], 0x1234_7FFE);
    assert_eq!(read_word(machine.ram(), 0x7FFE) as u32, DATA as u32);
}

#[test]
fn segments_have_a_base_a_limit_and_rights() {
    let ldt = |attributes: u64| descriptor(DATA + 0x100, 0xFFF, attributes);
    // Present, DPL 3, data: writable, read-only, expand-down; code: readable, execute-only.
    for (attributes, offset, write, allowed) in [
        (0x4F3, 0xFFC, true, true),
        (0x4F3, 0xFFD, true, false),
        (0x4F3, 0xFFFF_FFFF, false, false),
        (0x4F1, 0xFFC, false, true),
        (0x4F1, 0, true, false),
        (0x4F7, 0xFFF, true, false),
        (0x4F7, 0x1000, true, true),
        (0x4F7, 0xFFFF_FFFC, true, true),
        (0x4FB, 0, false, true),
        (0x4FB, 0, true, false),
    ] {
        let mut machine = compat(|a| {
            a.mov(gs, ecx).unwrap();
            if write {
                a.mov(dword_ptr(ebx).gs(), eax).unwrap();
            } else {
                a.mov(eax, dword_ptr(ebx).gs()).unwrap();
            }
            a.hlt().unwrap();
        });
        write_words(machine.ram(), LDT, &[ldt(attributes)]);
        let mut state = machine.state();
        state.segments.ldtr = Segment { selector: 0x38, base: LDT, limit: 7, attributes: 0x82 };
        (state.general[1], state.general[3]) = (IN_LDT.into(), offset);
        (state.general[0], state.rflags) = (0x77, 0x202);
        machine.engine.restore(&state, ExecutionPoint::START).unwrap();
        let (vector, words) = machine.run_into_handler();
        assert_eq!(vector, 13);
        let at = if allowed { CODE + 5 } else { CODE + 2 };
        assert_eq!((words[0], words[1]), (0, at), "{attributes:#x} at {offset:#x}, {write}");
        if allowed && write {
            let linear = (DATA + 0x100 + offset) & 0xFFFF_FFFF;
            assert_eq!(read_word(machine.ram(), linear) as u32, 0x77);
        }
    }
}

#[test]
fn a_null_segment_is_of_no_use_and_the_stack_has_a_fault_of_its_own() {
    for (segment_register, vector) in [(3, 13), (2, 12)] {
        let mut machine = compat(|a| {
            a.mov(eax, dword_ptr(ebx)).unwrap();
            a.push(eax).unwrap();
        });
        let mut state = machine.state();
        if segment_register == 3 {
            state.segments.ds = Segment::default();
        } else {
            state.segments.ss.limit = 0xFFF;
        }
        machine.engine.restore(&state, ExecutionPoint::START).unwrap();
        let (seen, words) = machine.run_into_handler();
        assert_eq!((seen, words[0]), (vector, 0));
    }
}

#[test]
fn code_segments_with_a_base_and_a_limit_are_looked_at_each_time() {
    // 16-bit code at BASE: a loop, a store, and a jump out of the segment.
    let code = assemble_bits(16, |a| {
        let mut again = a.create_label();
        a.mov(cx, 3).unwrap(); // 3
        a.set_label(&mut again).unwrap();
        a.add(ax, cx).unwrap(); // 5
        a.loop_(again).unwrap(); // 7
        a.push(ax).unwrap(); // 8
        a.db(&[0xE9, 0xF5, 0x7F]).unwrap(); // 11: JMP 0x8000
    });
    let mut machine = with(&[], |state| {
        state.segments.cs =
            Segment { selector: IN_LDT, base: BASE, limit: 0x1000, attributes: 0x0FB };
        state.rip = 0x100;
    });
    machine.ram().memory().write_slice(&code, GuestAddress(BASE + 0x100)).unwrap();
    let (vector, words) = machine.run_into_handler();
    assert_eq!((vector, words[1], words[2]), (13, 0x108, u64::from(IN_LDT)));
    let state = machine.state();
    assert_eq!((state.general[0], state.general[1]), (6, 0));
    assert_eq!(read_word(machine.ram(), STACK - 2) as u16, 6);
    assert_eq!(machine.point(), 1 + 3 * 2 + 1 + 1);
    // An instruction across the limit.
    let mut machine = with(&[], |state| {
        state.segments.cs =
            Segment { selector: IN_LDT, base: BASE, limit: 0x101, attributes: 0x4FB };
        state.rip = 0x100;
    });
    machine.ram().memory().write_slice(&[0x90, 0xB0, 0x01], GuestAddress(BASE + 0x100)).unwrap();
    let (vector, words) = machine.run_into_handler();
    assert_eq!((vector, words[1]), (13, 0x101));
}

#[test]
fn system_calls_go_there_and_back() {
    // INT 0x80, then SYSCALL through CSTAR, SYSRETL back.
    let mut bytes = assemble_bits(32, |a| {
        a.db(&[0x0F, 0x05]).unwrap(); // SYSCALL
        a.inc(eax).unwrap();
        a.int(0x80).unwrap();
    });
    bytes.resize(0x20, 0xCC);
    bytes.extend([0x0F, 0x07]); // SYSRET to 32-bit code
    let mut machine = with(&bytes, |state| {
        state.msrs.lstar = CODE + 0x10;
        state.msrs.cstar = CODE + 0x20;
        state.msrs.star = (u64::from(KERNEL_CODE) << 32) | (u64::from(USER_CODE_32 | 3) << 48);
        state.rflags = 0x202;
    });
    let (vector, words) = machine.run_into_handler();
    assert_eq!(vector, 0x80);
    assert_eq!(words[..2], [CODE + 5, u64::from(USER_CODE_32 | 3)]);
    let state = machine.state();
    assert_eq!((state.general[0], state.general[1], state.general[11]), (1, CODE + 2, 0x202));
    // SYSENTER is not there, on the vendor that the model follows.
    let (vector, _) = with(&[0x0F, 0x34], |_| ()).run_into_handler();
    assert_eq!(vector, 6);
}

#[test]
fn iretd_pops_three_words_at_the_same_level() {
    let mut machine = compat(|a| {
        a.push(0x202).unwrap();
        a.push(i32::from(USER_CODE_32 | 3)).unwrap();
        a.push((CODE + 0x20) as i32).unwrap();
        a.iretd().unwrap();
    });
    machine.ram().memory().write_slice(&[0xF4], GuestAddress(CODE + 0x20)).unwrap();
    let (vector, words) = machine.run_into_handler();
    assert_eq!((vector, words[1], words[4]), (13, CODE + 0x20, STACK));
}

#[test]
fn strings_of_32_bit_code_move_in_its_segments() {
    let mut machine = compat(|a| {
        a.mov(esi, ebx).unwrap();
        a.lea(edi, dword_ptr(ebx + 0x800)).unwrap();
        a.mov(ecx, 0x1800 / 4).unwrap();
        a.rep().movsd().unwrap();
        a.hlt().unwrap();
    });
    let words: Vec<u64> = (0..0x300).collect();
    write_words(machine.ram(), DATA, &words);
    machine.run_to(4);
    let state = machine.state();
    assert_eq!((state.general[1], state.general[6]), (0, DATA + 0x1800));
    assert_eq!(state.general[7], DATA + 0x2000);
    // Overlapping upwards: the first 0x800 bytes again and again.
    assert_eq!(read_word(machine.ram(), DATA + 0x1FF8), 0xFF);
}

#[test]
fn what_only_32_bit_code_has() {
    for (bytes, before, after) in [
        (&[0x27][..], (0x9A, 1), (0x00, 0x55)), // DAA
        (&[0x27], (0x79, 0x10), (0x7F, 0x10)),
        (&[0x2F], (0x00, 0x11), (0x9A, 0x95)),        // DAS
        (&[0x37], (0x020F, 0), (0x0305, 0x15)),       // AAA
        (&[0x3F], (0x0200, 0x10), (0x000A, 0x15)),    // AAS
        (&[0xD4, 0x0A], (0x4B, 0), (0x0705, 0x04)),   // AAM
        (&[0xD5, 0x0A], (0x0705, 0), (0x004B, 0x04)), // AAD
        (&[0xD6], (0x1200, 1), (0x12FF, 1)),          // SALC
    ] {
        let mut machine = with(bytes, |state| {
            (state.general[0], state.rflags) = (before.0, before.1 | 0x202);
        });
        machine.run_to(1);
        let state = machine.state();
        let shown = (state.general[0], state.rflags & 0x8D5);
        assert_eq!(shown, after, "{bytes:02x?} of {before:x?}");
    }
}

#[test]
fn into_and_bound_have_exceptions_of_their_own() {
    let (vector, words) = with(&[0xCE, 0xF4], |state| state.rflags |= 0x800).run_into_handler();
    assert_eq!((vector, words[0]), (13, 4 * 8 + 2), "the gate is not open to programs here");
    let (vector, words) = with(&[0xCE, 0xF4], |_| ()).run_into_handler();
    assert_eq!((vector, words[1]), (13, CODE + 1));
    for (index, vector) in [(-5i32, 13), (-6, 5), (9, 13), (10, 5)] {
        // BOUND EAX, [EBX]
        let mut machine =
            with(&[0x62, 0x03, 0xF4], |state| state.general[0] = u64::from(index as u32));
        write_words(machine.ram(), DATA, &[0x0000_0009_FFFF_FFFB]);
        let (seen, _) = machine.run_into_handler();
        assert_eq!(seen, vector, "{index}");
    }
}

#[test]
fn a_state_in_32_bit_code_is_saved_and_restored() {
    let program = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.mov(ecx, 4).unwrap();
        a.set_label(&mut again).unwrap();
        a.push(ecx).unwrap();
        a.add(dword_ptr(ebx), ecx).unwrap();
        a.pop(edx).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    };
    let (mut whole, mut sliced) = (compat(program), compat(program));
    assert_eq!(whole.run(), Exit::Halted { interruptible: false });
    for bound in 1.. {
        let (state, point) = (sliced.state(), sliced.engine.point());
        assert_eq!(state.segments.cs.attributes & 0x200, 0, "the last is 32-bit code, too");
        sliced.engine.restore(&state, point).unwrap();
        assert_eq!(sliced.state(), state);
        if let Exit::Halted { .. } = sliced.run_to(bound) {
            break;
        }
    }
    assert_eq!((sliced.state(), sliced.point()), (whole.state(), whole.point()));
    assert_eq!(read_word(sliced.ram(), DATA), 10);
    // No RIP beyond its code, and no code segment that is data.
    let mut state = initial();
    state.rip = 1 << 32;
    assert!(sliced.engine.restore(&state, ExecutionPoint::START).is_err());
    state.rip = CODE;
    state.segments.cs.attributes = 0xCF3;
    assert!(sliced.engine.restore(&state, ExecutionPoint::START).is_err());
}

#[test]
fn breakpoints_and_watchpoints_see_linear_addresses() {
    let mut machine = with(&[], |state| {
        state.segments.cs =
            Segment { selector: IN_LDT, base: BASE, limit: 0xFFFF, attributes: 0x4FB };
        state.segments.ds = Segment { base: DATA, ..segment(USER_DATA | 3, 0xCF3) };
        state.rip = 0x100;
        state.general[3] = 8;
        state.debug[0] = BASE + 0x101;
        state.debug[1] = DATA + 8;
        state.debug[7] = 0x402 | 8 | 0xD << 20;
    });
    // NOP; MOV [EBX], EAX
    machine.ram().memory().write_slice(&[0x90, 0x89, 0x03], GuestAddress(BASE + 0x100)).unwrap();
    let (vector, words) = machine.run_into_handler();
    let mut state = machine.state();
    assert_eq!((vector, words[0], state.debug[6] & 0xF), (1, 0x101, 1));
    (state.rip, state.rflags, state.general[4]) = (0x101, words[2] | 1 << 16, words[3]);
    state.segments.cs = Segment { selector: IN_LDT, base: BASE, limit: 0xFFFF, attributes: 0x4FB };
    state.segments.ss = segment(USER_DATA | 3, 0xCF3);
    state.halted = false;
    machine.engine.restore(&state, ExecutionPoint::START).unwrap();
    let (vector, words) = machine.run_into_handler();
    assert_eq!((vector, words[0], machine.state().debug[6] & 0xF), (1, 0x103, 2));
}
