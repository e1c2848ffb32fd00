//! Caches that are full: by code that comes and goes they never are, and by code that stays they may
//! be without anyone noticing.

use super::*;
use iced_x86::code_asm::*;

/// Where there is room for much code.
const MUCH_CODE: u64 = 0x100_0000;

/// A machine about to execute `code`, at [`MUCH_CODE`].
fn machine_at_much_code(code: &[u8], user: bool, limits: CacheLimits) -> Machine {
    let mut state = initial_state(user);
    state.rip = MUCH_CODE;
    let machine = Machine::with_limits(&[], &state, limits);
    machine.ram().memory().write_slice(code, GuestAddress(MUCH_CODE)).expect("in memory");
    machine
}

#[test]
fn half_a_million_small_blocks_are_executed_one_after_the_other() {
    const JUMPS: usize = 1 << 19;
    for (limits, user) in [(CacheLimits::default(), true), (CacheLimits::tiny(3).times(32), false)]
    {
        // JMP to the next instruction, INT3 at the end.
        let mut code = [0xEB, 0x00].repeat(JUMPS);
        code.push(0xCC);
        let mut machine = machine_at_much_code(&code, user, limits);
        assert_eq!(machine.run_into_handler().0, 3);
        assert_eq!(machine.point(), JUMPS as u64 + 2);
        machine.engine.cache.sound(&machine.engine.cpu);
    }
}

#[test]
fn loops_longer_than_the_cache_go_round() {
    // Blocks of many shapes, some across pages: a call and a return to each of many places.
    let mut machine = Machine::with_limits(
        &assemble(|a| {
            let mut again = a.create_label();
            a.mov(ecx, 3).unwrap();
            a.set_label(&mut again).unwrap();
            for place in 0..2000 {
                a.call(MUCH_CODE + place * 61).unwrap();
            }
            a.dec(ecx).unwrap();
            a.jnz(again).unwrap();
            a.hlt().unwrap();
        }),
        &initial_state(false),
        CacheLimits::tiny(8).times(64),
    );
    for place in 0..2000 {
        // ADD RAX, imm32; BSWAP R8; RET
        let mut code = vec![0x48, 0x05];
        code.extend((place as u32).to_le_bytes());
        code.extend([0x49, 0x0F, 0xC8, 0xC3]);
        let at = GuestAddress(MUCH_CODE + place * 61);
        machine.ram().memory().write_slice(&code, at).expect("in memory");
    }
    assert_eq!(machine.run(), Exit::Halted { interruptible: false });
    assert_eq!(machine.state().general[0], 3 * (0..2000).sum::<u64>());
    assert_eq!(machine.point(), 1 + 3 * (2000 * 4 + 2) + 1);
    machine.engine.cache.sound(&machine.engine.cpu);
}

/// Writes a function again and again, by the guest itself or from outside, and calls it.
fn churn(rounds: u64, by_device: bool, offset: u64) -> Vec<super::super::block::soundness::Held> {
    let mut machine = Machine::new(|a| {
        let mut again = a.create_label();
        a.mov(rbx, SMALL + offset).unwrap();
        a.mov(rsi, SMALL_FRAMES + offset).unwrap();
        a.set_label(&mut again).unwrap();
        // ADD R15, imm32; BSWAP R8; RET: the last byte of the number changes.
        a.call(rbx).unwrap();
        if by_device {
            a.out(0x80, al).unwrap();
        } else {
            a.inc(byte_ptr(rsi + 3)).unwrap();
        }
        a.jmp(again).unwrap();
    });
    let code = [0x49, 0x81, 0xC7, 0, 0, 0, 0, 0x49, 0x0F, 0xC8, 0xC3];
    let at = SMALL_FRAMES + offset;
    machine.ram().memory().write_slice(&code, GuestAddress(at)).expect("in memory");
    let mut sum = 0;
    let mut held = Vec::new();
    for round in 0..rounds {
        if by_device {
            while machine.run() != Exit::BusAccess {}
            let number = (round + 1) as u8;
            machine.ram().memory().write_obj(number, GuestAddress(at + 3)).expect("in memory");
        } else {
            machine.run_to(2 + 6 * (round + 1));
        }
        sum += u64::from(round as u8);
        assert_eq!(machine.state().general[15], sum);
        held.push(machine.engine.cache.sound(&machine.engine.cpu));
    }
    held
}

#[test]
fn code_that_comes_and_goes_gives_back_what_it_held() {
    // Within a page, and with the number, the second or the third instruction across two pages.
    for offset in [0x800, 0x1000 - 2, 0x1000 - 5, 0x1000 - 8, 0x1000 - 10] {
        for by_device in [false, true] {
            let held = churn(600, by_device, offset);
            let early = held[..50].iter().max().expect("there are some");
            let late = held[550..].iter().max().expect("there are some");
            assert_eq!(early, late, "at {offset:#x}");
            assert!(late.slots < 16, "{late:?}");
        }
    }
}

#[test]
fn pages_whose_code_is_gone_are_not_remembered() {
    // A function is written to each of 400 pages in turn, called, and overwritten with zeros.
    let mut machine = Machine::new(|a| {
        let mut again = a.create_label();
        a.mov(rbx, MUCH_CODE).unwrap();
        a.mov(ecx, 400).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(dword_ptr(rbx), 0xC3C8_0F49u32 as i32).unwrap();
        a.call(rbx).unwrap();
        a.mov(dword_ptr(rbx), 0).unwrap();
        a.add(rbx, 0x1000).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(machine.run(), Exit::Halted { interruptible: false });
    let held = machine.engine.cache.sound(&machine.engine.cpu);
    assert_eq!(held.pages, 1, "{held:?}");
    assert!(held.slots < 16, "{held:?}");
}
