//! Points at branches, with counters that the guest is stepped for: the engine's own code on the host's KVM,
//! where no host counter is needed. What it should come to, `soft` says, which counts instructions.

use crate::agreement::{busy_program, essence};
use crate::guest::{CODE, DATA, Guest, TestBus, assemble, has_kvm, initial_state, prepared_ram};
use iced_x86::code_asm::*;
use iced_x86::{Decoder, DecoderOptions, FlowControl};
use std::collections::BTreeMap;
use vm_memory::{Bytes, GuestAddress};
use vmft_cpu::state::CpuState;
use vmft_cpu::{BranchPoints, Engine, Exit, ExitRecord, Vector};
use vmft_kvm::KvmEngine;
use vmft_kvm::{BranchCounter, CounterLost, LandingStats};
use vmft_log::point::{Branches, CodeAddress, ExecutionPoint};

/// Counts what the engine steps, and is as wrong as it is told to be.
#[derive(Debug, Clone, Copy, Default)]
struct Stepped {
    count: u64,
    armed: Option<u64>,
    /// Branches every overflow comes late by.
    late: u64,
    margin: u64,
    /// Counts two for this branch.
    twice: Option<u64>,
    /// Is taken away at this branch.
    gone_at: Option<u64>,
}

impl Stepped {
    fn late_by(late: u64, margin: u64) -> Self {
        Self { late, margin, ..Self::default() }
    }
}

impl BranchCounter for Stepped {
    fn count(&mut self) -> Result<Branches, CounterLost> {
        if self.gone_at.is_some_and(|gone| self.count >= gone) {
            return Err(CounterLost("taken".to_owned()));
        }
        Ok(Branches(self.count))
    }

    fn arm(&mut self, after: Branches) -> Result<(), CounterLost> {
        self.armed = Some(self.count + after.0 + self.late);
        Ok(())
    }

    fn disarm(&mut self) -> Result<(), CounterLost> {
        self.armed = None;
        Ok(())
    }

    fn margin(&self) -> Branches {
        Branches(self.margin)
    }

    fn needs_steps(&self) -> bool {
        true
    }

    fn stepped(&mut self, branched: bool) -> bool {
        self.count += u64::from(branched);
        if branched && self.twice == Some(self.count) {
            self.count += 1;
        }
        self.armed.is_some_and(|armed| self.count >= armed)
    }
}

/// Runs on through kicks.
fn run_to(guest: &mut Guest, bound: ExecutionPoint, want: bool) -> Exit {
    loop {
        let exit = guest.engine.run(bound, want, &mut guest.bus);
        if exit != Exit::Kicked {
            return exit;
        }
    }
}

/// The state at the first boundary of every number, from `soft`.
fn places(code: &[u8]) -> BTreeMap<ExecutionPoint, CpuState> {
    let mut guest = Guest::soft(code);
    let mut places = BTreeMap::new();
    let (mut base, mut branches) = (ExecutionPoint::START, 0);
    loop {
        let state = guest.engine.save();
        let mut bytes = [0; 15];
        guest.engine.ram().memory().read_slice(&mut bytes, GuestAddress(state.rip)).unwrap();
        let instruction = Decoder::with_ip(64, &bytes, state.rip, DecoderOptions::NONE).decode();
        let exit = guest.run_to(guest.point() + 1, false);
        match exit {
            Exit::BusAccess | Exit::Halted { .. } => {
                base = base.next_exit(Branches(branches)).unwrap();
                branches = 0;
                places.insert(base, guest.engine.save());
                if exit != Exit::BusAccess {
                    return places;
                }
            }
            Exit::Bound if instruction.flow_control() == FlowControl::ConditionalBranch => {
                branches += 1;
                places.insert(base.plus_branches(Branches(branches)).unwrap(), guest.engine.save());
            }
            Exit::Bound => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn every_number_is_the_same_place_as_on_soft_however_late_the_counter_is() {
    if !has_kvm() {
        return;
    }
    let code = busy_program();
    let places = places(&code);
    assert!(places.len() > 500, "{}", places.len());
    let numbers: Vec<_> = places.keys().copied().collect();
    for (late, stride) in [(0, 7), (30, 61), (64, 101)] {
        let mut guest = Guest::counting(Stepped::late_by(late, 64), &code);
        for number in numbers.iter().step_by(stride) {
            // Exits on the way come back by themselves.
            while guest.engine.point() < *number {
                let exit = run_to(&mut guest, *number, false);
                assert!(matches!(exit, Exit::Bound | Exit::BusAccess | Exit::Halted { .. }));
                let place = places.get(&guest.engine.point()).expect("a number that exists");
                assert_eq!(essence(&guest.engine.save()), essence(place), "{number}, {late} late");
            }
            assert_eq!(guest.engine.point(), *number);
        }
    }
}

#[test]
fn a_counter_that_is_too_late_leaves_the_guest_at_a_later_number_and_says_so() {
    if !has_kvm() {
        return;
    }
    // Two thousand branches without an exit.
    let code = assemble(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 2000).unwrap();
        a.set_label(&mut again).unwrap();
        a.add(rax, rcx).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    for (late, expected) in [(0, 1500), (8, 1500), (9, 1501), (10, 1502), (300, 1792)] {
        let mut guest = Guest::counting(Stepped::late_by(late, 8), &code);
        assert_eq!(run_to(&mut guest, ExecutionPoint::new(1500), false), Exit::Bound);
        assert_eq!(guest.engine.point(), ExecutionPoint::new(expected), "{late} late");
        assert_eq!(guest.general(1), 2000 - expected, "{late} late");
    }
}

#[test]
fn a_lost_counter_ends_the_run() {
    if !has_kvm() {
        return;
    }
    let counter = Stepped { gone_at: Some(100), ..Stepped::default() };
    let mut guest = Guest::counting(counter, &busy_program());
    let exit = loop {
        match run_to(&mut guest, ExecutionPoint::NEVER, false) {
            Exit::BusAccess => {}
            other => break other,
        }
    };
    let Exit::Fatal(fault) = exit else { panic!("{exit:?}") };
    assert!(fault.what.contains("counter of branches is lost"), "{fault}");
}

/// Interrupts on and off, their shadows, strings, faults, and loops in between.
fn interruptible_program() -> Vec<u8> {
    assemble(|a| {
        let (mut outer, mut inner) = (a.create_label(), a.create_label());
        a.mov(r12d, 6).unwrap();
        a.set_label(&mut outer).unwrap();
        a.cli().unwrap();
        a.mov(r13d, 20).unwrap();
        a.set_label(&mut inner).unwrap();
        a.add(rbx, r13).unwrap();
        a.dec(r13d).unwrap();
        a.jnz(inner).unwrap();
        a.mov(rdi, DATA + 0x4000).unwrap();
        a.mov(ecx, 5).unwrap();
        a.rep().stosb().unwrap();
        a.sti().unwrap();
        a.inc(rbp).unwrap();
        a.pushfq().unwrap();
        a.pop(r14).unwrap();
        a.add(r15, r14).unwrap();
        a.int(0x55).unwrap();
        a.mov(eax, 0x10).unwrap();
        a.mov(ss, eax).unwrap();
        a.inc(rbp).unwrap();
        a.xor(edx, edx).unwrap();
        a.xor(ecx, ecx).unwrap();
        a.out(0x80, al).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(outer).unwrap();
        a.cli().unwrap();
        a.hlt().unwrap();
    })
}

/// Where an interrupt that arrives at `number` is taken, and what the guest comes to.
fn interrupted(counter: Stepped, number: ExecutionPoint, code: &[u8]) -> (CpuState, Vec<u64>) {
    let mut guest = Guest::counting(counter, code);
    while guest.engine.point() < number {
        run_to(&mut guest, number, false);
    }
    assert_eq!(guest.engine.point(), number);
    let taken = loop {
        match run_to(&mut guest, ExecutionPoint::NEVER, true) {
            Exit::InterruptWindow => break guest.engine.save(),
            Exit::BusAccess => {}
            other => panic!("{other:?} before the interrupt was taken"),
        }
    };
    assert_ne!(taken.rflags & 0x200, 0);
    assert!(!taken.interrupt_shadow);
    guest.engine.inject(Vector(0x40));
    while !matches!(run_to(&mut guest, ExecutionPoint::NEVER, false), Exit::Halted { .. }) {}
    let end = guest.engine.save();
    let words = (0..0x60).map(|word| guest.word(DATA + 8 * word)).collect();
    assert_eq!(guest.word(DATA + 8 * 0x40), 1, "the interrupt was taken once");
    assert_eq!(end.general[15] & 0x100, 0, "no trap flag in an image of RFLAGS");
    (taken, words)
}

#[test]
fn an_interrupt_is_taken_at_the_same_boundary_whatever_the_counter_does() {
    if !has_kvm() {
        return;
    }
    let code = interruptible_program();
    let places = places(&code);
    let numbers: Vec<_> = places.keys().copied().take(100).collect();
    for number in numbers.iter().step_by(3) {
        let (taken, words) = interrupted(Stepped::late_by(0, 64), *number, &code);
        let (other, others_words) = interrupted(Stepped::late_by(50, 64), *number, &code);
        assert_eq!(essence(&taken), essence(&other), "at {number}");
        assert_eq!(words, others_words, "at {number}");
        let place = &places[number];
        let at_once = place.rflags & 0x200 != 0 && !place.interrupt_shadow;
        assert_eq!(at_once, taken.rip == place.rip, "at {number}");
    }
}

#[test]
fn a_kicked_guest_can_be_stopped_at_the_nearest_number() {
    if !has_kvm() {
        return;
    }
    let code = busy_program();
    let places = places(&code);
    let mut guest = Guest::counting(Stepped::late_by(3, 16), &code);
    let kicker = guest.engine.kicker().unwrap();
    let mut stopped = 0;
    loop {
        kicker.kick();
        match guest.engine.run(ExecutionPoint::NEVER, false, &mut guest.bus) {
            Exit::Kicked => {}
            Exit::BusAccess => continue,
            Exit::Halted { .. } => break,
            other => panic!("{other:?}"),
        }
        let nearest = guest.branches().nearest_point().expect("a point ahead");
        assert!(nearest > guest.engine.point());
        if run_to(&mut guest, nearest, false) == Exit::Bound {
            stopped += 1;
            let state = guest.engine.save();
            // An exit may have come first; its number is behind.
            let place = places.get(&guest.engine.point()).expect("a number that exists");
            assert_eq!(essence(&state), essence(place));
        }
    }
    assert!(stopped > 100, "{stopped}");
}

/// The exits of a run, up to its end.
fn exits(counter: Stepped, code: &[u8]) -> Vec<ExitRecord> {
    let mut guest = Guest::counting(counter, code);
    guest.exits().watch_exits(true);
    while !matches!(run_to(&mut guest, ExecutionPoint::NEVER, false), Exit::Halted { .. }) {}
    let mut exits = Vec::new();
    guest.exits().take_exits(&mut exits);
    exits
}

#[test]
fn a_miscount_shows_at_the_next_exit() {
    if !has_kvm() {
        return;
    }
    let code = busy_program();
    let good = exits(Stepped::default(), &code);
    assert_eq!(good, exits(Stepped::late_by(9, 9), &code));
    // Forty and one branches a turn, two exits a turn.
    let bad = exits(Stepped { twice: Some(100), ..Stepped::default() }, &code);
    let first = good.iter().zip(&bad).position(|(good, bad)| good != bad);
    assert_eq!(first, Some(4));
    assert_eq!(bad[4], ExitRecord { branches: Branches(good[4].branches.0 + 1), ..good[4] });
}

#[test]
fn a_guest_restored_at_a_number_goes_on_identically() {
    if !has_kvm() {
        return;
    }
    let code = busy_program();
    let mut first = Guest::counting(Stepped::late_by(2, 16), &code);
    let middle = ExecutionPoint::START.plus_branches(Branches(25)).unwrap();
    assert_eq!(run_to(&mut first, middle, false), Exit::Bound);
    // The checkpoint is taken here, on both sides.
    first.engine.flush_caches();
    let state = first.engine.save();
    let mut second = Guest::counting(Stepped::late_by(0, 16), &code);
    second.engine.restore(&state, middle).unwrap();
    for guest in [&mut first, &mut second] {
        guest.exits().watch_exits(true);
        while !matches!(run_to(guest, ExecutionPoint::NEVER, false), Exit::Halted { .. }) {}
    }
    assert_eq!(first.engine.point(), second.engine.point());
    assert_eq!(first.engine.save(), second.engine.save());
    let (mut there, mut here) = (Vec::new(), Vec::new());
    first.exits().take_exits(&mut there);
    second.exits().take_exits(&mut here);
    assert_eq!(there, here);
    assert_eq!(here.len(), 25);
    assert!(here[0].registers[16] > CODE);
}

/// The branches that places lie behind, as far as a guest that stopped at each of them tells.
fn branches_before(code: &[u8], numbers: &[ExecutionPoint]) -> Vec<Option<CodeAddress>> {
    let mut guest = Guest::counting(Stepped::late_by(0, 64), code);
    let stop = |number: &ExecutionPoint| {
        while guest.engine.point() < *number {
            run_to(&mut guest, *number, false);
        }
        guest.branches().branch_before()
    };
    numbers.iter().map(stop).collect()
}

/// Runs to each number that has a hint, one guest for all of them; the state there, and what it took.
fn led_to(
    counter: Stepped,
    code: &[u8],
    hints: &[(ExecutionPoint, Option<CodeAddress>)],
) -> (Vec<(ExecutionPoint, CpuState)>, LandingStats) {
    let mut engine = KvmEngine::open_counting(prepared_ram(code), Box::new(counter))
        .expect("/dev/kvm opens (VMFT_NO_KVM=1 says that there is none)");
    engine.restore(&initial_state(), ExecutionPoint::START).unwrap();
    let mut bus = TestBus::default();
    let mut reached = Vec::new();
    for (number, hint) in hints {
        while engine.point() < *number {
            hint.iter().for_each(|branch| engine.expect_branch(*number, *branch));
            let exit = engine.run(*number, false, &mut bus);
            assert!(
                matches!(exit, Exit::Bound | Exit::BusAccess | Exit::Halted { .. }),
                "{exit:?}"
            );
        }
        reached.push((engine.point(), engine.save()));
    }
    (reached, engine.landing_stats().expect("branches are counted"))
}

#[test]
fn a_hint_leads_to_the_same_place_of_every_number() {
    if !has_kvm() {
        return;
    }
    let code = busy_program();
    let places = places(&code);
    let numbers: Vec<_> = places.keys().copied().collect();
    let branches = branches_before(&code, &numbers);
    let known = branches.iter().flatten().count();
    assert!(known > numbers.len() / 2, "{known} hints for {} numbers", numbers.len());
    for (late, stride) in [(0, 7), (30, 61), (64, 101)] {
        let hints = numbers.iter().copied().zip(branches.iter().copied());
        let hints: Vec<_> = hints.step_by(stride).collect();
        let (reached, stats) = led_to(Stepped::late_by(late, 64), &code, &hints);
        for ((number, _), (at, state)) in hints.iter().zip(&reached) {
            assert_eq!((number, essence(state)), (at, essence(&places[number])), "{late} late");
        }
        assert_eq!(stats.overshot, 0, "{late} late");
        assert!(stats.breakpoint_hits > 0, "{late} late: {stats:?}");
    }
}

#[test]
fn a_wrong_hint_makes_no_other_place_of_a_number() {
    if !has_kvm() {
        return;
    }
    let code = busy_program();
    let places = places(&code);
    let numbers: Vec<_> = places.keys().copied().collect();
    let branches = branches_before(&code, &numbers);
    let address = |address| CodeAddress::try_from(address).unwrap();
    // The branches of the program, the first instruction, and nothing at all.
    let mut wrong: Vec<_> = branches.iter().flatten().copied().collect();
    wrong.sort_unstable();
    wrong.dedup();
    assert!(wrong.len() > 1, "{wrong:?}");
    wrong.extend([address(CODE), address(DATA), address(1 << 40), address(u64::MAX)]);
    for hint in wrong {
        let is_branch = branches.contains(&Some(hint));
        for number in numbers.iter().step_by(97) {
            let hints = [(*number, Some(hint))];
            let (reached, stats) = led_to(Stepped::late_by(3, 16), &code, &hints);
            let (at, state) = &reached[0];
            // Another number may be told; its place is the one it has.
            assert_eq!(essence(state), essence(&places[at]), "{number}, {hint}");
            assert!(is_branch || at == number, "{number}, {hint}");
            // Past it, the next thing that happens may be an exit.
            let is_exit = at.get().is_multiple_of(ExecutionPoint::EXIT_STRIDE);
            assert!(at == number || is_exit || stats.overshot > 0, "{number}, {hint}");
        }
    }
}

#[test]
fn only_a_place_between_two_exits_lies_behind_a_branch() {
    if !has_kvm() {
        return;
    }
    let code = busy_program();
    let numbers: Vec<_> = places(&code).keys().copied().collect();
    for (number, branch) in numbers.iter().zip(branches_before(&code, &numbers)) {
        let is_exit = number.get().is_multiple_of(ExecutionPoint::EXIT_STRIDE);
        assert!(!is_exit || branch.is_none(), "{number}: {branch:?}");
    }
    assert!(Guest::soft(&code).engine.branch_points().is_none());
}

#[test]
fn whoever_gave_a_hint_that_led_past_the_place_is_not_believed_again() {
    if !has_kvm() {
        return;
    }
    let code = busy_program();
    let places = places(&code);
    let numbers: Vec<_> = places.keys().copied().collect();
    let branches = branches_before(&code, &numbers);
    // The branch of the outer loop is behind the exits, so the first number is long past there.
    let outer = branches.iter().flatten().copied().max();
    let later = numbers.iter().zip(&branches).rfind(|(_, branch)| branch.is_some()).unwrap();
    let right = (*later.0, *later.1);
    let counter = Stepped::late_by(0, 16);
    let (_, believed) = led_to(counter, &code, &[right]);
    assert!(believed.breakpoint_hits > 0, "{believed:?}");
    let (reached, stats) = led_to(counter, &code, &[(numbers[0], outer), right]);
    assert!(reached[0].0 > numbers[0]);
    assert_eq!(essence(&reached[1].1), essence(&places[&right.0]));
    assert_eq!((reached[1].0, stats.breakpoint_hits), (right.0, 0));
}
