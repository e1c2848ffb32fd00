//! Guests that switch themselves off, in each of the ways that kernels have.

use super::edge_tests::{Nowhere, RunTo, machine};
use super::*;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// A guest of this code, with interrupts off at its beginning, run `step` instructions at a time:
/// how it ended, by itself, or by the operator where it waits or has come to instruction 100.
fn ending(code: fn(&mut CodeAssembler) -> Result<(), IcedError>, step: u64) -> (RunEnd, Machine) {
    let mut a = CodeAssembler::new(64).expect("64 bits");
    code(&mut a).expect("it assembles");
    let mut machine = machine(&a.assemble(crate::boot::synthetic::TEXT).expect("it assembles"));
    let mut inputs = RunTo { step, end: 100, fails: false };
    let end = machine.run(&mut inputs, &Nowhere).expect("no fault");
    (end, machine)
}

/// The point at which a guest of this code switches itself off, which is the same place however it is run.
fn off_at(code: fn(&mut CodeAssembler) -> Result<(), IcedError>) -> u64 {
    let ends = [1, 7, 1000].map(|step| {
        let (end, mut machine) = ending(code, step);
        assert_eq!(end, RunEnd::Stopped(StopReason::GuestPowerOff));
        (machine.point().get(), machine.full_digest())
    });
    assert!(ends.iter().all(|end| *end == ends[0]), "{ends:?}");
    ends[0].0
}

fn write(a: &mut CodeAssembler, port: u32, value: u32) -> Result<(), IcedError> {
    a.mov(al, value)?;
    a.out(port, al)
}

#[test]
fn a_guest_of_one_cpu_switches_itself_off_by_acpis_registers() {
    let off = off_at(|a| {
        a.mov(dx, 0x604)?;
        a.mov(ax, 5 << 10 | 1 << 13)?;
        a.out(dx, ax)?;
        a.jmp(crate::boot::synthetic::TEXT)
    });
    assert_eq!(off, 3);
}

#[test]
fn a_guest_that_waits_with_interrupts_off_is_off() {
    assert_eq!(off_at(|a| a.hlt()), 1);
}

#[test]
fn a_guest_that_waits_with_every_line_masked_is_off() {
    let off = off_at(|a| {
        write(a, 0x21, 0xFF)?;
        write(a, 0xA1, 0xFF)?;
        a.sti()?;
        a.hlt()
    });
    assert_eq!(off, 6);
    // The second controller is heard through the first one only.
    let off = off_at(|a| {
        write(a, 0x21, 0xFF)?;
        a.sti()?;
        a.hlt()
    });
    assert_eq!(off, 4);
}

#[test]
fn a_guest_that_one_line_can_wake_is_not_off() {
    let (end, machine) = ending(
        |a| {
            write(a, 0x21, 0xFE)?;
            write(a, 0xA1, 0xFF)?;
            a.sti()?;
            a.hlt()
        },
        7,
    );
    assert_eq!(end, RunEnd::Stopped(StopReason::Operator));
    assert!(machine.is_idle());
}

#[test]
fn a_guest_that_computes_with_every_line_masked_is_not_off() {
    let (end, machine) = ending(
        |a| {
            write(a, 0x21, 0xFF)?;
            write(a, 0xA1, 0xFF)?;
            a.sti()?;
            let mut here = a.create_label();
            a.set_label(&mut here)?;
            a.jmp(here)
        },
        7,
    );
    assert_eq!(end, RunEnd::Stopped(StopReason::Operator));
    assert_eq!(machine.point().get(), 100);
}
