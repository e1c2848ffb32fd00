//! Saved boards gone bad: one is refused when it is restored, or it is a board like any other. It is saved as
//! it was restored, and nothing that is done to it afterwards breaks it.

use crate::driver::{Driver, ENTROPY, EVENT_INDEX, FIRST_DISK, INDIRECT, NETWORK, SECOND_DISK};
use crate::fuzz::{Numbers, step};
use crate::machine::{Machine, config};
use vmft_fuzzing::{Random, cases, change, damage};
use vmft_vmm::board::{Board, BoardState};

/// Cases of a quick run.
const CASES: u64 = 800;
/// Steps of a board before it is saved, at most; and after it was restored.
const BEFORE: u64 = 300;
const AFTER: u64 = 60;
/// How many bad boards are made of each good one.
const EACH: usize = 12;

/// A board in use, and its memory.
fn used(numbers: &mut Numbers) -> Machine {
    let mut machine = Machine::new();
    for slot in [FIRST_DISK, SECOND_DISK, ENTROPY] {
        Driver::start(&mut machine, slot, EVENT_INDEX | INDIRECT);
    }
    Driver::start_two(&mut machine, NETWORK, numbers.next());
    for left in (0..numbers.below(BEFORE)).rev() {
        step(&mut machine, numbers);
        // What is answered was taken before. Only the last step's may wait.
        if left > 0 {
            machine.effects();
        }
        if machine.board.reset_requested() {
            machine.board.reset();
        }
    }
    machine
}

/// What comes of a saved board: by its values, which still are a board's, or by its bytes.
fn gone_bad(random: &mut Random, state: &BoardState) -> Option<BoardState> {
    if random.chance(75) {
        let mut value = serde_json::to_value(state).unwrap();
        change(random, &mut value);
        return serde_json::from_value(value).ok();
    }
    let mut bytes = postcard::to_stdvec(state).unwrap();
    damage(random, &mut bytes, &[]);
    postcard::from_bytes(&bytes).ok()
}

/// True if it was taken for a board.
fn taken(numbers: &mut Numbers, machine: &mut Machine, state: &BoardState) -> bool {
    let Ok(board) = Board::restore(&config(), &machine.ram, state) else { return false };
    assert_eq!(board.save(), *state, "what was restored is not what was saved");
    machine.board = board;
    for _ in 0..AFTER {
        step(machine, numbers);
        machine.effects();
        machine.board.outstanding();
        machine.board.take_faults();
        if machine.board.reset_requested() {
            machine.board.reset();
        }
    }
    true
}

#[test]
fn a_saved_board_gone_bad_is_refused_or_is_a_board() {
    let (mut decoded, mut restored) = (0u64, 0u64);
    cases(CASES, |random| {
        let mut numbers = Numbers(random);
        let mut machine = used(&mut numbers);
        let state = machine.board.save();
        for _ in 0..EACH {
            let Some(bad) = gone_bad(&mut numbers, &state) else { continue };
            decoded += 1;
            restored += u64::from(taken(&mut numbers, &mut machine, &bad));
        }
    });
    println!("{decoded} decoded, {restored} restored");
}
