//! Exceptions: what they leave, what they push, and what delivering them leads to.

use super::*;
use crate::soft::tests::initial_state;
use iced_x86::code_asm::*;

#[test]
fn a_page_fault_leaves_the_instruction_to_be_executed_again() {
    let mut machine = Machine::new(|a| {
        a.mov(rbx, SMALL + 0x5000).unwrap();
        a.mov(rax, 7u64).unwrap();
        a.push(rax).unwrap();
        a.add(qword_ptr(rbx), rax).unwrap();
        a.add(qword_ptr(rbx), rax).unwrap();
        a.hlt().unwrap();
    });
    write_words(machine.ram(), SMALL_PT + 8 * 5, &[0]);
    let (vector, words) = machine.run_into_handler();
    // Not present, write, supervisor.
    assert_eq!((vector, words[0]), (14, 2));
    assert_eq!(machine.point(), 3 + 1);
    let mut state = machine.state();
    state.rip = words[1];
    state.general[4] = words[4];
    state.halted = false;
    write_words(machine.ram(), SMALL_PT + 8 * 5, &[(SMALL_FRAMES + 0x5000) | 3]);
    machine.engine.restore(&state, ExecutionPoint::new(3)).unwrap();
    assert_eq!(machine.run(), Exit::Halted { interruptible: false });
    assert_eq!(machine.point(), 6);
    assert_eq!(read_word(machine.ram(), SMALL_FRAMES + 0x5000), 14);
}

/// The error code of the page fault of a one-instruction program, with the entry of page 5.
fn fault_code(user: bool, entry: u64, program: impl FnOnce(&mut CodeAssembler)) -> Option<u64> {
    let mut machine = if user { Machine::user(program) } else { Machine::new(program) };
    write_words(machine.ram(), SMALL_PT + 8 * 5, &[entry]);
    let mut state = machine.state();
    state.general[3] = SMALL + 0x5000;
    machine.engine.restore(&state, ExecutionPoint::START).unwrap();
    match machine.run() {
        Exit::Halted { .. } => {}
        other => panic!("unexpected exit {other:?}"),
    }
    let state = machine.state();
    (state.rip == HANDLERS + 14 * 16 + 1).then(|| {
        assert_eq!(state.cr2, SMALL + 0x5000);
        read_word(machine.ram(), state.general[4])
    })
}

#[test]
fn page_faults_say_why() {
    let frame = SMALL_FRAMES + 0x5000;
    let load = |a: &mut CodeAssembler| {
        a.mov(al, byte_ptr(rbx)).unwrap();
        a.ud2().unwrap();
    };
    let store = |a: &mut CodeAssembler| {
        a.mov(byte_ptr(rbx), al).unwrap();
        a.ud2().unwrap();
    };
    let fetch = |a: &mut CodeAssembler| a.jmp(rbx).unwrap();
    const NX: u64 = 1 << 63;
    assert_eq!(fault_code(false, 0, load), Some(0));
    assert_eq!(fault_code(true, 0, load), Some(4));
    assert_eq!(fault_code(true, 0, store), Some(6));
    assert_eq!(fault_code(true, frame | 3, load), Some(5));
    assert_eq!(fault_code(true, frame | 5, store), Some(7));
    assert_eq!(fault_code(true, frame | 5, load), None);
    assert_eq!(fault_code(false, frame | 1, store), Some(3), "CR0.WP is set");
    assert_eq!(fault_code(true, frame | 7 | NX, load), None);
    assert_eq!(fault_code(true, frame | 7 | NX, fetch), Some(0x15));
    assert_eq!(fault_code(false, frame | 3 | NX, fetch), Some(0x11));
    assert_eq!(fault_code(false, 0, fetch), Some(0x10));
    assert_eq!(fault_code(false, frame | 3 | (1 << 45), load), Some(9), "reserved bit");
    assert_eq!(fault_code(true, frame | 7 | (1 << 45), store), Some(15), "reserved bit");
}

#[test]
fn non_canonical_addresses_are_general_protection_or_stack_faults() {
    for (program, vector) in [
        ((|a| a.mov(al, byte_ptr(rbx)).unwrap()) as fn(&mut CodeAssembler), 13),
        (|a| a.mov(al, byte_ptr(rbp)).unwrap(), 12),
        (|a| a.imul_3(rax, qword_ptr(rbp), 3).unwrap(), 12),
        (|a| a.jmp(rbx).unwrap(), 13),
        (|a| a.call(rbx).unwrap(), 13),
    ] {
        let mut machine = Machine::new(program);
        let mut state = machine.state();
        state.general[3] = 1 << 47;
        state.general[5] = 1 << 63;
        machine.engine.restore(&state, ExecutionPoint::START).unwrap();
        let (seen, words) = machine.run_into_handler();
        assert_eq!((seen, words[0], words[1]), (vector, 0, CODE));
    }
    for program in [
        (|a| a.push(rax).unwrap()) as fn(&mut CodeAssembler),
        |a| a.ret().unwrap(),
        |a| a.popfq().unwrap(),
    ] {
        let mut machine = Machine::user(program);
        let mut state = machine.state();
        state.general[4] = 1 << 63;
        machine.engine.restore(&state, ExecutionPoint::START).unwrap();
        assert_eq!(machine.run_into_handler().0, 12);
    }
}

#[test]
fn a_store_across_pages_faults_whole() {
    let mut machine = Machine::new(|a| {
        a.mov(rbx, SMALL + 0x4FFC).unwrap();
        a.mov(rax, u64::MAX).unwrap();
        a.mov(qword_ptr(rbx), rax).unwrap();
    });
    write_words(machine.ram(), SMALL_PT + 8 * 5, &[0]);
    let (vector, words) = machine.run_into_handler();
    assert_eq!((vector, words[0]), (14, 2));
    assert_eq!(machine.state().cr2, SMALL + 0x5000);
    assert_eq!(read_word(machine.ram(), SMALL_FRAMES + 0x4FF8), 0, "nothing was written");
}

#[test]
fn a_user_exception_switches_to_the_stack_of_the_task() {
    let mut machine = Machine::user(|a| {
        a.nop().unwrap();
        a.cli().unwrap();
    });
    let (vector, words) = machine.run_into_handler();
    assert_eq!(vector, 13);
    assert_eq!(machine.state().general[4], KERNEL_STACK - 48);
    assert_eq!(words[1], CODE + 1);
    assert_eq!(words[2], u64::from(USER_CODE | 3));
    assert_eq!(words[4], STACK);
    assert_eq!(words[5], u64::from(USER_DATA | 3));
    assert_eq!(machine.state().segments.ss.selector, 0);
}

#[test]
fn an_exception_while_delivering_one_is_a_double_fault_on_its_own_stack() {
    let mut machine = Machine::new(|a| {
        a.mov(rsp, SMALL + 0x5800).unwrap();
        a.mov(rax, qword_ptr(SMALL + 0x5000)).unwrap();
    });
    write_words(machine.ram(), SMALL_PT + 8 * 5, &[0]);
    let (vector, words) = machine.run_into_handler();
    assert_eq!((vector, words[0], words[1]), (8, 0, CODE + 10));
    assert_eq!(machine.state().general[4], IST_STACK - 48);
}

#[test]
fn a_third_fault_shuts_down() {
    let mut state = initial_state(false);
    state.idtr.limit = 0;
    let mut machine = Machine::with_bytes(&[0x90, 0x0F, 0x0B], &state);
    assert_eq!(machine.run(), Exit::Shutdown);
    assert_eq!(machine.run(), Exit::Shutdown);
    assert_eq!(machine.point(), 1);
}

#[test]
fn a_fault_that_meets_itself_for_ever_shuts_down() {
    // The handler of #UD is undefined itself, on a stack that is always the same.
    let mut machine = Machine::new(|a| a.ud2().unwrap());
    let low = (CODE & 0xFFFF) | (8 << 16) | (1 << 32) | (0x8E << 40) | ((CODE >> 16) << 48);
    write_words(machine.ram(), IDT + 6 * 16, &[low, 0]);
    match machine.run() {
        Exit::Caught(at) => assert_eq!((at.rip, &at.bytes[..2]), (CODE, &[0x0F, 0x0B][..])),
        other => panic!("unexpected exit {other:?}"),
    }
    assert_eq!((machine.run(), machine.point()), (Exit::Shutdown, 0));
}

#[test]
fn division_faults_are_faults() {
    let mut machine = Machine::new(|a| {
        a.xor(edx, edx).unwrap();
        a.xor(ecx, ecx).unwrap();
        a.div(rcx).unwrap();
    });
    let (vector, words) = machine.run_into_handler();
    assert_eq!((vector, words[0]), (0, CODE + 4));
}

#[test]
fn what_cpuid_does_not_offer_is_undefined() {
    for bytes in [
        &[0x0F, 0xC7, 0xF0][..],   // RDRAND
        &[0xC5, 0xFC, 0x58, 0xC1], // VADDPS
        &[0x0F, 0x01, 0xD0],       // XGETBV
        &[0x0F, 0x01, 0xC8],       // MONITOR
        &[0x0F, 0x34],             // SYSENTER
        &[0xF0, 0x90, 0x90],       // LOCK NOP
        &[0x0F, 0x38, 0xF0, 0x03], // MOVBE
        &[0x06],                   // PUSH ES
        &[0x0F, 0x01, 0xCA],       // CLAC
    ] {
        let mut machine = Machine::with_bytes(bytes, &initial_state(false));
        let (vector, words) = machine.run_into_handler();
        assert_eq!((vector, words[0]), (6, CODE), "{bytes:02x?}");
    }
}

#[test]
fn an_instruction_longer_than_fifteen_bytes_is_refused() {
    let mut bytes = vec![0x66; 15];
    bytes.push(0x90);
    let mut machine = Machine::with_bytes(&bytes, &initial_state(false));
    assert_eq!(machine.run_into_handler().0, 13);
}

#[test]
fn prefixes_of_instructions_the_model_lacks_are_ignored() {
    let mut machine = Machine::new(|a| {
        a.mov(ecx, 0x10).unwrap();
        a.db(&[0xF3, 0x0F, 0xBD, 0xC1]).unwrap(); // LZCNT, which is BSR here
        a.hlt().unwrap();
    });
    machine.run();
    assert_eq!(machine.state().general[0], 4);
}
