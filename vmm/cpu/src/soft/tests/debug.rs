//! Breakpoints and watchpoints: where they stop, what DR6 and RF say, and what keeps them off.

use super::*;
use iced_x86::code_asm::*;

const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
const PORT: u64 = 2;
const READ_WRITE: u64 = 3;
const ONE: u64 = 0;
const EIGHT: u64 = 2;
const FOUR: u64 = 3;

const STEP: u64 = 1 << 14;
const GENERAL_DETECT: u64 = 1 << 13;
const RESUME: u64 = 1 << 16;
const TRAP: u64 = 1 << 8;
/// Where vector 1 halts.
const DEBUG_HANDLER: u64 = HANDLERS + 16;

/// A debug exception as its handler sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stop {
    /// From [`CODE`].
    at: u64,
    /// B0 to B3, BD, BS.
    status: u64,
    resume: bool,
}

fn stop(at: u64, status: u64) -> Stop {
    Stop { at, status, resume: false }
}

/// DR7 with breakpoint `number` enabled, by its global bit.
fn control(number: u64, kind: u64, length: u64) -> u64 {
    2 << (2 * number) | (kind | length << 2) << (16 + 4 * number)
}

/// True if one of the breakpoints met is on an instruction.
fn executes(state: &CpuState, status: u64) -> bool {
    (0..4).any(|n| status >> n & 1 != 0 && state.debug[7] >> (16 + 4 * n) & 3 == EXECUTE)
}

impl Machine {
    fn set(&mut self, change: impl FnOnce(&mut CpuState)) {
        let mut state = self.state();
        change(&mut state);
        let point = self.engine.point();
        self.engine.restore(&state, point).expect("a valid state");
    }

    fn watching(mut self, breakpoints: &[(u64, u64)]) -> Self {
        self.set(|state| {
            state.debug[6] = 0xFFFF_0FF0;
            state.debug[7] = 0x400;
            for (number, (address, control)) in breakpoints.iter().enumerate() {
                state.debug[number] = *address;
                state.debug[7] |= control;
            }
        });
        self
    }

    /// Goes on behind the exception, as Linux does: a breakpoint is passed with RF, DR6 is cleared.
    fn leave_handler(&mut self) -> Stop {
        let mut state = self.state();
        assert_eq!(state.rip, DEBUG_HANDLER + 1, "not in the handler of #DB");
        let words: Vec<u64> =
            (0..5).map(|n| read_word(self.ram(), state.general[4] + 8 * n)).collect();
        let status = state.debug[6] & 0xE00F;
        let seen = Stop { at: words[0].wrapping_sub(CODE), status, resume: words[2] & RESUME != 0 };
        (state.rip, state.rflags, state.general[4]) = (words[0], words[2], words[3]);
        if executes(&state, status) {
            state.rflags |= RESUME;
        }
        state.debug[6] = 0xFFFF_0FF0;
        state.halted = false;
        self.set(|now| *now = state);
        seen
    }

    /// Every debug exception until another handler, or the program itself, halts.
    fn stops(&mut self) -> Vec<Stop> {
        let mut stops = Vec::new();
        loop {
            assert_eq!(self.run_through(), Exit::Halted { interruptible: false });
            if self.state().rip != DEBUG_HANDLER + 1 {
                return stops;
            }
            stops.push(self.leave_handler());
            assert!(stops.len() < 1000, "stops without end: {:?}", &stops[..10]);
        }
    }
}

#[test]
fn a_watchpoint_traps_after_each_access_of_its_kind_that_overlaps_it() {
    let program = |a: &mut CodeAssembler| {
        a.mov(rbx, DATA).unwrap(); // 10
        a.mov(qword_ptr(rbx), rbx).unwrap(); // 13
        a.mov(al, byte_ptr(rbx + 3)).unwrap(); // 16
        a.mov(byte_ptr(rbx + 4), al).unwrap(); // 19
        a.mov(qword_ptr(rbx + 8), rbx).unwrap(); // 23
        a.mov(qword_ptr(rbx - 7), rbx).unwrap(); // 27
        a.inc(dword_ptr(rbx)).unwrap(); // 29
        a.movups(xmm0, xmmword_ptr(rbx - 8)).unwrap(); // 33
        a.hlt().unwrap();
    };
    for (kind, length, at, expected) in [
        (WRITE, ONE, DATA, &[13, 27, 29][..]),
        (WRITE, FOUR, DATA, &[13, 27, 29]),
        (WRITE, EIGHT, DATA, &[13, 19, 27, 29]),
        (READ_WRITE, ONE, DATA, &[13, 27, 29, 33]),
        (READ_WRITE, FOUR, DATA, &[13, 16, 27, 29, 33]),
        // The low bits of the address do not count.
        (READ_WRITE, FOUR, DATA + 3, &[13, 16, 27, 29, 33]),
        (WRITE, ONE, DATA + 8, &[23]),
        (WRITE, EIGHT, DATA + 0x100, &[]),
    ] {
        let mut machine = Machine::new(program).watching(&[(at, control(0, kind, length))]);
        let expected: Vec<Stop> = expected.iter().map(|&at| stop(at, 1)).collect();
        assert_eq!(machine.stops(), expected, "kind {kind}, length {length}, at {at:#x}");
        assert_eq!(machine.point(), 9 + expected.len() as u64, "each handler retires its HLT");
    }
}

#[test]
fn either_enable_bit_is_enough_and_none_is_none() {
    for (enable, expected) in [(1 << 2, 1), (2 << 2, 1), (3 << 2, 1), (0, 0), (3 << 4, 0)] {
        let mut machine = Machine::new(|a| {
            a.mov(dword_ptr(DATA as i32), eax).unwrap();
            a.hlt().unwrap();
        })
        .watching(&[(0, 0), (DATA, enable | (WRITE | FOUR << 2) << 20)]);
        assert_eq!(machine.stops().len(), expected, "enabled by {enable:#x}");
    }
}

#[test]
fn a_breakpoint_stops_in_front_of_its_instruction_once_each_time() {
    let mut machine = Machine::new(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 3).unwrap(); // 5
        a.set_label(&mut again).unwrap();
        a.nop().unwrap(); // 6
        a.add(eax, ecx).unwrap(); // 8
        a.dec(ecx).unwrap(); // 10
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    })
    .watching(&[
        (CODE + 6, control(0, EXECUTE, ONE)),
        (CODE + 7, control(1, EXECUTE, ONE)),
        (CODE + 6, control(2, EXECUTE, ONE)),
    ]);
    // Inside the instruction is not at it.
    assert_eq!(machine.stops(), [stop(6, 0b101); 3]);
    assert_eq!(machine.state().general[0], 6);
    assert_eq!(machine.state().rflags & RESUME, 0, "RF lasts for one instruction");
}

#[test]
fn rf_loaded_by_iret_passes_one_breakpoint() {
    let mut machine = Machine::new(|a| {
        let mut target = a.create_label();
        a.push(0).unwrap(); // 2
        a.mov(rax, rsp).unwrap(); // 5
        a.push(rax).unwrap(); // 6
        a.push(0x1_0002).unwrap(); // 11
        a.push(i32::from(KERNEL_CODE)).unwrap(); // 13
        a.lea(rax, qword_ptr(target)).unwrap(); // 20
        a.push(rax).unwrap(); // 21
        a.iretq().unwrap(); // 23
        a.set_label(&mut target).unwrap();
        a.nop().unwrap(); // 24
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    machine = machine
        .watching(&[(CODE + 23, control(0, EXECUTE, ONE)), (CODE + 24, control(1, EXECUTE, ONE))]);
    assert_eq!(machine.stops(), [stop(24, 2)]);
}

#[test]
fn a_breakpoint_comes_before_whatever_its_instruction_would_raise() {
    let mut machine = Machine::new(|a| {
        a.nop().unwrap();
        a.ud2().unwrap();
    })
    .watching(&[(CODE + 1, control(0, EXECUTE, ONE))]);
    assert_eq!(machine.stops(), [stop(1, 1)]);
    let state = machine.state();
    assert_eq!(state.rip, HANDLERS + 16 * 6 + 1);
    assert_ne!(read_word(machine.ram(), state.general[4] + 16) & RESUME, 0, "a fault sets RF");
}

#[test]
fn a_faulting_instruction_hits_nothing() {
    let mut machine = Machine::new(|a| {
        a.mov(rbx, DATA).unwrap();
        a.push(qword_ptr(rbx)).unwrap();
        a.hlt().unwrap();
    })
    .watching(&[(DATA, control(0, READ_WRITE, EIGHT))]);
    machine.set(|state| state.general[4] = SMALL + 0x5000);
    write_words(machine.ram(), SMALL_PT + 8 * 4, &[0]);
    // The load succeeded, the push did not, nor did the delivery of its fault on that stack.
    assert_eq!(machine.run_through(), Exit::Halted { interruptible: false });
    assert_eq!(machine.state().rip, HANDLERS + 16 * 8 + 1);
    assert_eq!(machine.state().debug[6] & 0xF, 0);
}

#[test]
fn watchpoints_and_a_single_step_are_one_exception() {
    let mut machine = Machine::new(|a| {
        a.mov(dword_ptr(rbx), eax).unwrap(); // 2
        a.nop().unwrap(); // 3
        a.ud2().unwrap();
    })
    .watching(&[
        (DATA, control(0, WRITE, FOUR)),
        (DATA, control(1, READ_WRITE, FOUR)),
        (CODE + 2, control(2, EXECUTE, ONE)),
    ]);
    machine.set(|state| (state.rflags, state.general[3]) = (state.rflags | TRAP, DATA));
    // The traps of an instruction come before the breakpoint on the next.
    assert_eq!(machine.stops(), [stop(2, STEP | 3), stop(2, 4), stop(3, STEP)]);
}

#[test]
fn a_load_of_ss_puts_off_its_watchpoint_and_hides_the_next_breakpoint() {
    let program = |a: &mut CodeAssembler| {
        a.mov(ss, word_ptr(DATA as i32)).unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    };
    let first = {
        let bytes = assemble(program);
        bytes.len() as u64 - 3
    };
    let watched = || {
        let machine = Machine::new(program);
        write_words(machine.ram(), DATA, &[u64::from(KERNEL_DATA)]);
        machine.watching(&[
            (DATA, control(0, READ_WRITE, ONE)),
            (CODE + first, control(1, EXECUTE, ONE)),
            (CODE + first + 1, control(2, EXECUTE, ONE)),
        ])
    };
    let expected = [stop(first + 1, 1), stop(first + 1, 4)];
    assert_eq!(watched().stops(), expected);
    // What waits is part of the state.
    let mut machine = watched();
    assert_eq!(machine.run_to(1), Exit::Bound);
    let state = machine.state();
    let mut other = watched();
    other.engine.restore(&state, ExecutionPoint::new(1)).unwrap();
    assert_eq!(other.state(), state);
    assert_eq!(other.stops(), expected);
}

#[test]
fn sti_hides_no_breakpoint() {
    let mut machine = Machine::new(|a| {
        a.sti().unwrap();
        a.nop().unwrap();
        a.cli().unwrap();
        a.hlt().unwrap();
    })
    .watching(&[(CODE + 1, control(0, EXECUTE, ONE))]);
    assert_eq!(machine.stops(), [stop(1, 1)]);
}

#[test]
fn a_repeated_instruction_stops_after_the_iteration_that_hits() {
    let program = |a: &mut CodeAssembler| {
        a.mov(rdi, DATA).unwrap(); // 10
        a.mov(ecx, 0x4000).unwrap(); // 15
        a.rep().stosb().unwrap(); // 17
        a.hlt().unwrap();
    };
    let mut machine = Machine::new(program).watching(&[
        (DATA + 0x1234, control(0, WRITE, ONE)),
        (CODE + 15, control(1, EXECUTE, ONE)),
        (DATA + 0x3FFF, control(2, WRITE, ONE)),
    ]);
    let between = Stop { at: 15, status: 1, resume: true };
    assert_eq!(machine.run_through(), Exit::Halted { interruptible: false });
    assert_eq!(machine.leave_handler(), stop(15, 2));
    assert_eq!(machine.run_through(), Exit::Halted { interruptible: false });
    assert_eq!(machine.state().general[1], 0x4000 - 0x1235);
    assert_eq!(machine.leave_handler(), between);
    assert_eq!(machine.stops(), [stop(17, 4)], "the rest passes the breakpoint");
    assert_eq!(machine.state().general[1], 0);
}

#[test]
fn general_detect_faults_once() {
    let mut machine = Machine::new(|a| {
        a.mov(rax, dr0).unwrap(); // 3
        a.mov(dr6, rbx).unwrap(); // 6
        a.hlt().unwrap();
    })
    .watching(&[]);
    machine.set(|state| {
        state.debug[0] = 0x1234;
        state.debug[7] |= 1 << 13;
        state.debug[6] |= 0xF;
    });
    let seen = machine.stops();
    assert_eq!(seen, [Stop { at: 0, status: GENERAL_DETECT, resume: true }]);
    let state = machine.state();
    assert_eq!((state.general[0], state.debug[7]), (0x1234, 0x400), "GD is cleared");
    // Privilege comes first.
    let mut machine = Machine::user(|a| a.mov(rax, dr0).unwrap()).watching(&[(0, 1 << 13)]);
    assert_eq!(machine.run_into_handler().0, 13);
}

#[test]
fn port_breakpoints_need_cr4_de() {
    for (extension, expected) in [(0, 0), (1 << 3, 2)] {
        let mut machine = Machine::new(|a| {
            a.in_(eax, 0x70).unwrap(); // 2: ports 0x70 to 0x73
            a.out(0x74, al).unwrap(); // 4
            a.mov(edx, 0x72).unwrap();
            a.mov(edi, DATA as u32).unwrap();
            a.insb().unwrap(); // 15
            a.mov(al, byte_ptr(0x72)).unwrap();
            a.hlt().unwrap();
        })
        .watching(&[(0x72, control(0, PORT, ONE))]);
        machine.set(|state| state.cr4 |= extension);
        let seen: Vec<Stop> = machine.stops();
        assert_eq!(seen.len(), expected, "{seen:?}");
        assert!(expected == 0 || seen == [stop(2, 1), stop(15, 1)], "{seen:?}");
    }
}

#[test]
fn a_delivery_that_hits_a_watchpoint_traps_at_the_handlers_beginning() {
    let mut machine =
        Machine::new(|a| a.ud2().unwrap()).watching(&[(STACK - 40, control(0, WRITE, EIGHT))]);
    assert_eq!(machine.run_through(), Exit::Halted { interruptible: false });
    let seen = machine.leave_handler();
    assert_eq!(seen, stop((HANDLERS + 16 * 6).wrapping_sub(CODE), 1));
    assert_eq!(machine.point(), 1, "nothing but the handler of #DB has retired");
}

#[test]
fn breakpoints_set_by_the_program_are_armed_and_disarmed_at_once() {
    let mut machine = Machine::new(|a| {
        a.mov(rax, DATA).unwrap(); // 10
        a.mov(dr2, rax).unwrap(); // 13
        a.mov(ebx, (0x400 | control(2, WRITE, FOUR)) as u32).unwrap(); // 18
        a.mov(dword_ptr(rax), ebx).unwrap(); // 20
        a.mov(dr7, rbx).unwrap(); // 23
        a.mov(dword_ptr(rax), ebx).unwrap(); // 25
        a.mov(ebx, 0x400).unwrap(); // 30
        a.mov(dr7, rbx).unwrap(); // 33
        a.mov(dword_ptr(rax), ebx).unwrap(); // 35
        a.hlt().unwrap();
    });
    assert_eq!(machine.stops(), [stop(25, 4)]);
}

#[test]
fn where_a_run_is_stopped_does_not_show_in_its_exceptions() {
    let machine = || {
        Machine::new(|a| {
            let mut again = a.create_label();
            a.mov(ecx, 5).unwrap();
            a.mov(rdi, DATA).unwrap();
            a.set_label(&mut again).unwrap();
            a.stosb().unwrap();
            a.push(rcx).unwrap();
            a.pop(rdx).unwrap();
            a.dec(ecx).unwrap();
            a.jnz(again).unwrap();
            a.hlt().unwrap();
        })
        .watching(&[
            (DATA + 2, control(0, WRITE, ONE)),
            (STACK - 8, control(1, READ_WRITE, EIGHT)),
            (CODE + 15, control(2, EXECUTE, ONE)),
        ])
    };
    let (mut whole, mut sliced) = (machine(), machine());
    let expected = whole.stops();
    assert_eq!(expected.len(), 5 * 3 + 1);
    let mut seen = Vec::new();
    for bound in 1.. {
        let state = sliced.state();
        let point = sliced.engine.point();
        sliced.engine.restore(&state, point).unwrap();
        if let Exit::Halted { .. } = sliced.run_to(bound) {
            if sliced.state().rip != DEBUG_HANDLER + 1 {
                break;
            }
            seen.push(sliced.leave_handler());
        }
    }
    assert_eq!(seen, expected);
    assert_eq!((sliced.state(), sliced.point()), (whole.state(), whole.point()));
}
