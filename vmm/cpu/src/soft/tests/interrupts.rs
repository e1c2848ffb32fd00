//! Interrupts, their shadows, halting, single steps, and the ways between privilege levels.

use super::*;
use crate::Vector;
use iced_x86::code_asm::*;

impl Machine {
    fn run_wanting(&mut self, bound: u64) -> Exit {
        self.engine.run(ExecutionPoint::new(bound), true, &mut self.bus)
    }
}

#[test]
fn sti_takes_effect_one_instruction_later() {
    let mut machine = Machine::new(|a| {
        a.nop().unwrap();
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    assert_eq!(machine.run_wanting(100), Exit::InterruptWindow);
    assert_eq!(machine.point(), 3);
    machine.engine.inject(Vector(0x20));
    assert_eq!(machine.point(), 3, "delivery retires nothing");
    let (vector, words) = machine.run_into_handler();
    assert_eq!((vector, words[0]), (0x20, CODE + 3));
    assert_eq!(words[2] & 0x200, 0x200, "the interrupted program had interrupts on");
    assert_eq!(machine.state().rflags & 0x200, 0);
}

#[test]
fn the_shadow_of_sti_survives_a_bound_and_a_save() {
    let mut machine = Machine::new(|a| {
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    assert_eq!(machine.run_to(1), Exit::Bound);
    let state = machine.state();
    assert!(state.interrupt_shadow);
    machine.engine.restore(&state, ExecutionPoint::new(1)).unwrap();
    assert_eq!(machine.run_wanting(1), Exit::Bound);
    assert_eq!(machine.run_wanting(100), Exit::InterruptWindow);
    assert_eq!(machine.point(), 2);
    assert!(!machine.state().interrupt_shadow);
}

#[test]
fn sti_hlt_waits_and_an_interrupt_wakes() {
    let mut machine = Machine::new(|a| {
        a.sti().unwrap();
        a.hlt().unwrap();
        a.nop().unwrap();
    });
    assert_eq!(machine.run(), Exit::Halted { interruptible: true });
    assert_eq!(machine.point(), 2);
    assert_eq!(machine.run(), Exit::Halted { interruptible: true });
    assert_eq!(machine.run_wanting(100), Exit::Halted { interruptible: true });
    assert!(machine.state().halted);
    machine.engine.inject(Vector(0x21));
    let (vector, words) = machine.run_into_handler();
    assert_eq!((vector, words[0]), (0x21, CODE + 2));
}

#[test]
#[should_panic(expected = "injected where none can be taken")]
fn an_interrupt_cannot_be_injected_while_they_are_off() {
    let mut machine = Machine::new(|a| a.nop().unwrap());
    machine.engine.inject(Vector(0x20));
}

#[test]
fn a_load_of_ss_shields_the_next_instruction() {
    let mut machine = Machine::new(|a| {
        a.sti().unwrap();
        a.mov(eax, u32::from(KERNEL_DATA)).unwrap();
        a.mov(ss, eax).unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    assert_eq!(machine.run_to(3), Exit::Bound);
    assert_eq!(machine.run_wanting(100), Exit::InterruptWindow);
    assert_eq!(machine.point(), 4);
}

#[test]
fn the_trap_flag_traps_after_each_instruction() {
    let mut machine = Machine::new(|a| {
        a.pushfq().unwrap();
        a.or(qword_ptr(rsp), 0x100).unwrap();
        a.popfq().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    let (vector, words) = machine.run_into_handler();
    let state = machine.state();
    // POPF itself does not trap; the instruction behind it does.
    assert_eq!(vector, 1);
    assert_eq!(state.debug[6] & (1 << 14), 1 << 14);
    assert_eq!(words[0], CODE + 1 + 8 + 1 + 1);
    assert_eq!(state.rflags & 0x100, 0);
    assert_eq!(words[2] & 0x100, 0x100);
}

#[test]
fn software_interrupts_need_the_gates_privilege() {
    let mut machine = Machine::user(|a| a.int(0x80).unwrap());
    let (vector, words) = machine.run_into_handler();
    assert_eq!((vector, words[0]), (0x80, CODE + 2));
    assert_eq!(machine.point(), 2);
    let mut machine = Machine::user(|a| a.int(0x81).unwrap());
    let (vector, words) = machine.run_into_handler();
    assert_eq!((vector, words[0], words[1]), (13, 0x81 * 8 + 2, CODE));
    assert_eq!(machine.point(), 1, "the INT did not retire");
    let mut machine = Machine::user(|a| a.int3().unwrap());
    let (vector, words) = machine.run_into_handler();
    assert_eq!((vector, words[0]), (3, CODE + 1));
}

#[test]
fn syscall_and_sysret_go_there_and_back() {
    let mut machine = Machine::user(|a| {
        let mut kernel = a.create_label();
        a.mov(rcx, 5u64).unwrap();
        a.syscall().unwrap();
        a.mov(rax, 1u64).unwrap();
        a.cli().unwrap();
        a.set_label(&mut kernel).unwrap();
        a.swapgs().unwrap();
        a.mov(rbx, r11).unwrap();
        a.pushfq().unwrap();
        a.pop(rdx).unwrap();
        a.swapgs().unwrap();
        a.sysretq().unwrap();
    });
    let mut state = machine.state();
    state.rflags = 0x3202;
    state.rflags &= !0x3000;
    state.msrs.lstar = CODE + 10 + 2 + 10 + 1;
    state.msrs.star = (u64::from(KERNEL_CODE) << 32) | (0x18 << 48);
    state.msrs.sfmask = 0x200;
    machine.engine.restore(&state, ExecutionPoint::START).unwrap();
    let (vector, words) = machine.run_into_handler();
    let after = machine.state();
    assert_eq!((vector, words[1]), (13, CODE + 22), "back at level 3, CLI faults");
    assert_eq!(words[2], u64::from(USER_CODE | 3));
    assert_eq!(words[5], u64::from(USER_DATA | 3));
    assert_eq!(after.general[0], 1);
    assert_eq!(after.general[3] & 0x200, 0x200);
    assert_eq!(after.general[2] & 0x200, 0, "SFMASK turned interrupts off");
}

#[test]
fn iretq_returns_to_a_program_of_either_size() {
    for selector in [USER_CODE | 3, USER_CODE_32 | 3] {
        let mut machine = Machine::new(|a| {
            let mut program = a.create_label();
            a.push(u32::from(USER_DATA | 3) as i32).unwrap();
            a.push(0x10_0000).unwrap();
            a.push(0x202).unwrap();
            a.push(u32::from(selector) as i32).unwrap();
            a.lea(rax, qword_ptr(program)).unwrap();
            a.push(rax).unwrap();
            a.iretq().unwrap();
            a.set_label(&mut program).unwrap();
            a.hlt().unwrap();
        });
        let (vector, words) = machine.run_into_handler();
        assert_eq!((vector, words[0], words[2]), (13, 0, u64::from(selector)));
        assert_eq!(words[4], 0x10_0000);
    }
}

#[test]
fn port_accesses_of_a_program_need_iopl_or_the_permission_map() {
    let program = |a: &mut CodeAssembler| {
        a.mov(al, 0x55).unwrap();
        a.out(0x40, al).unwrap();
        a.ud2().unwrap();
    };
    let mut machine = Machine::user(program);
    assert_eq!(machine.run_into_handler().0, 13);
    assert!(machine.bus.seen.is_empty());
    let mut machine = Machine::user(program);
    let mut state = machine.state();
    state.segments.tr.limit = 0x67 + 32;
    machine.engine.restore(&state, ExecutionPoint::START).unwrap();
    machine.ram().memory().write_slice(&[0xFF; 8], GuestAddress(TSS + 0x68)).unwrap();
    assert_eq!(machine.run(), Exit::BusAccess);
    assert_eq!(machine.bus.seen, [Seen::PortWrite(1, 0x40, 0x55)]);
    assert_eq!(machine.run_into_handler().0, 6);
}

#[test]
fn a_bus_access_is_made_once_at_its_point_and_ends_the_run() {
    let mut machine = Machine::new(|a| {
        a.nop().unwrap();
        a.in_(eax, 0x71).unwrap();
        a.nop().unwrap();
        a.rdtsc().unwrap();
        a.mov(rbx, DEVICE + 0x10).unwrap();
        a.mov(rcx, qword_ptr(rbx)).unwrap();
        a.xchg(dword_ptr(rbx + 4), edx).unwrap();
        a.hlt().unwrap();
    });
    let device = DEVICE_FRAME & 0x3FFF_FFFF;
    let mut state = machine.state();
    state.general[6] = device;
    machine.engine.restore(&state, ExecutionPoint::START).unwrap();
    assert_eq!(machine.run(), Exit::BusAccess);
    assert_eq!((machine.point(), machine.state().general[0]), (2, 0x8765_4321));
    assert_eq!(machine.run(), Exit::BusAccess);
    assert_eq!(machine.point(), 6);
    assert_eq!(machine.state().general[0], 30);
    assert_eq!(machine.state().general[1], 0x5A5A_5A5A_5A5A_5A5A);
    assert_eq!(machine.run(), Exit::BusAccess);
    assert_eq!(machine.state().general[2], 0x5A5A_5A5A);
    let base = 0xC000_0010;
    assert_eq!(
        machine.bus.seen,
        [
            Seen::PortRead(1, 0x71),
            Seen::TimeStamp(3),
            Seen::MemoryRead(5, base, 8),
            Seen::MemoryRead(6, base + 4, 4),
            Seen::MemoryWrite(6, base + 4, vec![0; 4]),
        ]
    );
}

#[test]
fn the_time_stamp_counter_can_be_set() {
    let mut machine = Machine::new(|a| {
        a.mov(ecx, 0x10).unwrap();
        a.mov(edx, 1).unwrap();
        a.xor(eax, eax).unwrap();
        a.wrmsr().unwrap();
        a.rdtsc().unwrap();
        a.hlt().unwrap();
    });
    machine.run();
    assert_eq!(machine.state().general[0], 10);
    assert_eq!(machine.state().general[2], 1);
}
