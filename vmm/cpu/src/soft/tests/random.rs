//! Random programs: where a run is stopped, and how its instructions are decoded, must not
//! show.
//!
//! A program is a row of slots of 32 bytes. A slot holds one random instruction, then no-ops;
//! the handlers of all exceptions go on at the next slot. Stores into the program itself are
//! among the instructions, so that later slots may hold anything.

use super::*;
use crate::memory::PageNumber;
use proptest::prelude::*;

const SLOTS: usize = 120;
pub(super) const SLOT: usize = 32;

/// Opcodes with a ModRM byte: bytes, and length of the immediate.
const WITH_MODRM: &[(&[u8], usize)] = &[
    (&[0x00], 0),
    (&[0x01], 0),
    (&[0x02], 0),
    (&[0x03], 0),
    (&[0x11], 0),
    (&[0x13], 0),
    (&[0x19], 0),
    (&[0x1B], 0),
    (&[0x21], 0),
    (&[0x29], 0),
    (&[0x31], 0),
    (&[0x33], 0),
    (&[0x38], 0),
    (&[0x39], 0),
    (&[0x3B], 0),
    (&[0x63], 0),
    (&[0x69], 4),
    (&[0x6B], 1),
    (&[0x80], 1),
    (&[0x81], 4),
    (&[0x83], 1),
    (&[0x84], 0),
    (&[0x85], 0),
    (&[0x86], 0),
    (&[0x87], 0),
    (&[0x88], 0),
    (&[0x89], 0),
    (&[0x8A], 0),
    (&[0x8B], 0),
    (&[0x8D], 0),
    (&[0x8F], 0),
    (&[0xC0], 1),
    (&[0xC1], 1),
    (&[0xC6], 1),
    (&[0xC7], 4),
    (&[0xD0], 0),
    (&[0xD1], 0),
    (&[0xD2], 0),
    (&[0xD3], 0),
    (&[0xF6], 1),
    (&[0xF7], 4),
    (&[0xFE], 0),
    (&[0xFF], 0),
    (&[0x0F, 0x40], 0),
    (&[0x0F, 0x4F], 0),
    (&[0x0F, 0x92], 0),
    (&[0x0F, 0xA3], 0),
    (&[0x0F, 0xAB], 0),
    (&[0x0F, 0xA4], 1),
    (&[0x0F, 0xAD], 0),
    (&[0x0F, 0xAF], 0),
    (&[0x0F, 0xB0], 0),
    (&[0x0F, 0xB1], 0),
    (&[0x0F, 0xB6], 0),
    (&[0x0F, 0xB7], 0),
    (&[0x0F, 0xBA], 1),
    (&[0x0F, 0xBC], 0),
    (&[0x0F, 0xBD], 0),
    (&[0x0F, 0xBE], 0),
    (&[0x0F, 0xBF], 0),
    (&[0x0F, 0xC0], 0),
    (&[0x0F, 0xC1], 0),
    (&[0x0F, 0xC7], 0),
    (&[0xF3, 0x0F, 0xB8], 0),
];

/// Whole instructions.
const WHOLE: &[&[u8]] = &[
    &[0x98],
    &[0x48, 0x98],
    &[0x99],
    &[0x48, 0x99],
    &[0x9C],
    &[0x9E],
    &[0x9F],
    &[0xF5],
    &[0xF8],
    &[0xF9],
    &[0xFC],
    &[0xFD],
    &[0x50],
    &[0x51],
    &[0x58],
    &[0x5A],
    &[0xC9],
    &[0xD7],
    &[0xEC],
    &[0xEE],
    &[0xE5, 0x70],
    &[0x6C],
    &[0xF3, 0x6E],
    &[0x0F, 0x31],
    &[0x0F, 0xA2],
    &[0xA4],
    &[0xF3, 0xA4],
    &[0xF3, 0x48, 0xA5],
    &[0xF3, 0xAB],
    &[0xF3, 0xA6],
    &[0xF2, 0xAE],
    &[0xAC],
    &[0xCC],
    &[0xCD, 0x80],
    &[0x0F, 0x0B],
    &[0x0F, 0x20, 0xD8],
    &[0x0F, 0x22, 0xD8],
    &[0xFB],
    &[0xFA],
    &[0x9D],
    &[0xC8, 0x10, 0x00, 0x03],
    &[0xE2, 0x20],
    &[0x74, 0x20],
    &[0x7F, 0x3E],
    &[0xE8, 0x20, 0x00, 0x00, 0x00],
    &[0xEB, 0x1E],
    &[0xE3, 0x40],
    &[0xB8, 0x78, 0x56, 0x34, 0x12],
    &[0x0F, 0x01, 0x3B],
    &[0x0F, 0x05],
    &[0x8C, 0xD8],
    &[0x8E, 0xD8],
    &[0x0F, 0x00, 0xE8],
];

/// One instruction, from random numbers.
pub(super) fn instruction(seed: [u8; 12]) -> Vec<u8> {
    let pick = usize::from(seed[0]) | (usize::from(seed[1]) << 8);
    if pick % 5 == 0 {
        return WHOLE[(pick / 5) % WHOLE.len()].to_vec();
    }
    if pick % 23 == 1 {
        // A store to a slot not far ahead or behind: MOV byte [RIP + d], i.
        let distance = i32::from(seed[2] as i8);
        let mut bytes = vec![0xC6, 0x05];
        bytes.extend(distance.to_le_bytes());
        bytes.push(seed[3]);
        return bytes;
    }
    let (opcode, immediate) = WITH_MODRM[(pick / 5) % WITH_MODRM.len()];
    let mut bytes = Vec::new();
    match seed[2] % 8 {
        0 => bytes.push(0x66),
        1 => bytes.push(0x65),
        2 if seed[3] & 0xC0 != 0xC0 => bytes.push(0xF0),
        3 => bytes.push(0x67),
        _ => {}
    }
    let prefixed = opcode[0] == 0xF3;
    if prefixed {
        bytes.push(0xF3);
    }
    if seed[2] & 0x10 != 0 {
        bytes.push(0x40 | (seed[4] & 0xF));
    }
    bytes.extend(&opcode[usize::from(prefixed)..]);
    // Registers: mostly not RSP. Memory: mostly [RBX + d8], [RSI + d8], [RBP + RCX*n + d8].
    let register = (seed[5] % 8) << 3;
    match seed[6] % 8 {
        0..=2 => bytes.push(0xC0 | register | (seed[7] % 8)),
        3 | 4 => bytes.extend([0x43 | register, seed[8]]),
        5 => bytes.extend([0x46 | register, seed[8]]),
        6 => bytes.extend([0x44 | register, 0x0D | (seed[7] & 0xC0), seed[8]]),
        _ => bytes.push(0x03 | register),
    }
    bytes.extend(&seed[8..8 + immediate.min(4)]);
    bytes
}

/// Handlers that go on at the next slot.
fn patch_handlers(ram: &GuestRam) {
    let resume = [
        0x50, // push rax
        0x48, 0x8B, 0x44, 0x24, 0x08, // mov rax, [rsp + 8]
        0x48, 0x83, 0xC8, 0x1F, // or rax, 31
        0x48, 0xFF, 0xC0, // inc rax
        0x48, 0x89, 0x44, 0x24, 0x08, // mov [rsp + 8], rax
        0x58, // pop rax
        0x48, 0xCF, // iretq
    ];
    let with_error = HANDLERS + 0x2000;
    let without_error = with_error + 4;
    let mut code = vec![0x48, 0x83, 0xC4, 0x08];
    code.extend(resume);
    ram.memory().write_slice(&code, GuestAddress(with_error)).expect("in memory");
    for vector in 0..256u64 {
        let handler = HANDLERS + 16 * vector;
        let target = if matches!(vector, 8 | 10..=14 | 17) { with_error } else { without_error };
        let distance = (target as i64 - handler as i64 - 5) as i32;
        let mut jump = vec![0xE9];
        jump.extend(distance.to_le_bytes());
        ram.memory().write_slice(&jump, GuestAddress(handler)).expect("in memory");
    }
}

fn machine(seeds: &[[u8; 12]], user: bool) -> Machine {
    machine_with(seeds, user, CacheLimits::default())
}

fn machine_with(seeds: &[[u8; 12]], user: bool, limits: CacheLimits) -> Machine {
    let mut code = vec![0x90; SLOTS * SLOT];
    for (slot, seed) in code.chunks_mut(SLOT).zip(seeds) {
        let bytes = instruction(*seed);
        slot[..bytes.len()].copy_from_slice(&bytes);
    }
    code.extend([0xF4]);
    prepared(&code, user, limits)
}

/// A machine with this code, whose registers and pages the instructions here make something of.
pub(super) fn prepared(code: &[u8], user: bool, limits: CacheLimits) -> Machine {
    let mut state = initial_state(user);
    state.general = [
        0x1234_5678_9ABC_DEF0,
        5,
        0x70,
        DATA,
        STACK,
        DATA + 0x800,
        SMALL + 0xFFC,
        SMALL + 0x1FF0,
        3,
        u64::MAX,
        1 << 63,
        0x7F,
        0,
        1,
        SMALL,
        CODE,
    ];
    state.segments.gs.base = SMALL + 0x3000;
    state.msrs.lstar = HANDLERS + 0x2004;
    state.msrs.star = u64::from(KERNEL_CODE) << 32;
    if user {
        state.rflags |= 0x3000;
    }
    let machine = Machine::with_limits(code, &state, limits);
    patch_handlers(machine.ram());
    // A page that is not there, and one that may not be written.
    write_words(machine.ram(), SMALL_PT + 8 * 5, &[0]);
    write_words(machine.ram(), SMALL_PT + 8 * 2, &[(SMALL_FRAMES + 0x2000) | 5]);
    machine.ram().tracker().take_written();
    machine.ram().tracker().take_stale_code();
    machine
}

/// The contents of pages of memory.
fn pages(ram: &GuestRam, numbers: &[PageNumber]) -> Vec<[u8; 4096]> {
    let read = |number: &PageNumber| {
        let mut page = [0; 4096];
        ram.memory().read_slice(&mut page, number.address()).expect("in memory");
        page
    };
    numbers.iter().map(read).collect()
}

/// Everything that may be compared: state, point, bus, pages written and what is in them.
pub(super) fn outcome(machine: &mut Machine) -> (CpuState, u64, Vec<Seen>, u64, Vec<PageNumber>) {
    let written = machine.ram().tracker().take_written();
    let hash = xxhash_rust::xxh3::xxh3_64(pages(machine.ram(), &written).as_flattened());
    (machine.state(), machine.point(), machine.bus.seen.clone(), hash, written)
}

/// Runs to `bound`, whatever bus accesses there are on the way.
pub(super) fn run_whole(machine: &mut Machine, bound: u64) {
    while let Exit::BusAccess = machine.run_to(bound) {}
}

fn seeds() -> impl Strategy<Value = Vec<[u8; 12]>> {
    proptest::collection::vec(any::<[u8; 12]>(), SLOTS)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn bounds_do_not_show(seeds in seeds(), user: bool, steps in proptest::collection::vec(0u64..40, 60)) {
        let total = steps.iter().sum::<u64>() + 100;
        let mut straight = machine(&seeds, user);
        run_whole(&mut straight, total);
        let mut stepped = machine(&seeds, user);
        let mut bound = 0;
        for step in steps {
            bound += step;
            run_whole(&mut stepped, bound);
            prop_assert!(stepped.point() <= bound);
        }
        run_whole(&mut stepped, total);
        prop_assert_eq!(outcome(&mut straight), outcome(&mut stepped));
    }

    #[test]
    fn single_steps_do_not_show(seeds in seeds(), user: bool) {
        let mut straight = machine(&seeds, user);
        run_whole(&mut straight, 600);
        let mut stepped = machine(&seeds, user);
        for bound in 0..=600 {
            run_whole(&mut stepped, bound);
        }
        prop_assert_eq!(outcome(&mut straight), outcome(&mut stepped));
    }

    #[test]
    fn forgetting_decoded_instructions_does_not_show(seeds in seeds(), user: bool) {
        let mut straight = machine(&seeds, user);
        run_whole(&mut straight, 800);
        let mut forgetful = machine(&seeds, user);
        for bound in (0..=800).step_by(7) {
            run_whole(&mut forgetful, bound);
            let engine = &mut forgetful.engine;
            engine.cache.clear(&mut engine.cpu);
        }
        run_whole(&mut forgetful, 800);
        prop_assert_eq!(outcome(&mut straight), outcome(&mut forgetful));
    }

    #[test]
    fn what_the_caches_hold_does_not_show(
        seeds in seeds(),
        user: bool,
        block in 1usize..9,
        times in 1usize..40,
        steps in proptest::collection::vec(0u64..40, 30),
    ) {
        let mut roomy = machine(&seeds, user);
        run_whole(&mut roomy, 800);
        let limits = CacheLimits::tiny(block).times(times);
        let mut narrow = machine_with(&seeds, user, limits);
        let mut bound = 0;
        for step in steps {
            bound += step;
            run_whole(&mut narrow, bound.min(800));
            narrow.engine.cache.sound(&narrow.engine.cpu);
        }
        run_whole(&mut narrow, 800);
        // Which pages are taken to be written depends on where code was when they were: more may be.
        let (roomy, narrow) = (outcome(&mut roomy), outcome(&mut narrow));
        prop_assert_eq!((roomy.0, roomy.1, roomy.2, roomy.3), (narrow.0, narrow.1, narrow.2, narrow.3));
    }

    #[test]
    fn specialised_and_general_forms_agree(seeds in seeds(), user: bool) {
        let mut specialised = machine(&seeds, user);
        run_whole(&mut specialised, 800);
        let mut general = machine(&seeds, user);
        general.engine.cache.general_only = true;
        run_whole(&mut general, 800);
        prop_assert_eq!(outcome(&mut specialised), outcome(&mut general));
    }

    #[test]
    fn a_saved_cpu_goes_on_in_a_fresh_engine(seeds in seeds(), user: bool, at in 0u64..400) {
        let mut first = machine(&seeds, user);
        run_whole(&mut first, at);
        first.engine.flush_caches();
        let state = first.state();
        let point = first.engine.point();
        let mut second = machine(&seeds, user);
        // Wherever a program's stack has wandered to.
        let written = first.ram().tracker().take_written();
        for (number, page) in written.iter().zip(pages(first.ram(), &written)) {
            second.ram().memory().write_slice(&page, number.address()).expect("in memory");
        }
        second.ram().tracker().take_written();
        second.engine.restore(&state, point).expect("a valid state");
        second.bus.seen = first.bus.seen.clone();
        run_whole(&mut first, 800);
        run_whole(&mut second, 800);
        prop_assert_eq!(outcome(&mut first), outcome(&mut second));
    }
}
