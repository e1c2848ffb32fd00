//! What a round trip costs, as the median of some hundred.

use crate::doctor::facts::{Costs, Level, Nanoseconds, Outcome};
use std::time::Duration;
use vmft_kvm::trust::clock;
use vmft_kvm::trust::lab::{Lab, LabError, Program, Stop};
use vmft_kvm::trust::watchdog::Limit;

/// Round trips that are measured.
const ROUNDS: usize = 300;
/// Round trips before, for caches and page tables.
const WARM_UP: usize = 20;
/// Longer than that many take on the slowest KVM known, several times over.
const LIMIT: Duration = Duration::from_secs(1);
/// `out 0x80, al`, `jmp` back to it
const OUT_LOOP: [u8; 4] = [0xE6, 0x80, 0xEB, 0xFC];
/// `nop`, `jmp` back to it
const NOP_LOOP: [u8; 3] = [0x90, 0xEB, 0xFD];

/// Measures all of them.
pub fn run(lab: &mut Lab) -> Costs {
    let is_out = |stop: &Stop| *stop == Stop::Out(0x80);
    let is_trap = |stop: &Stop| matches!(stop, Stop::Trap { .. });
    let out = Program::new(Level::Kernel, &OUT_LOOP);
    let nop = Program::new(Level::Kernel, &NOP_LOOP);
    Costs {
        port_exit_kernel: Outcome::of(median(lab, &out, Lab::run_under, is_out)),
        port_exit_user: Outcome::of(median(
            lab,
            &Program::new(Level::User, &OUT_LOOP),
            Lab::run_under,
            is_out,
        )),
        step_kernel: Outcome::of(median(lab, &nop, Lab::step_under, is_trap)),
    }
}

fn median(
    lab: &mut Lab,
    program: &Program<'_>,
    enter: fn(&mut Lab, &Limit) -> Stop,
    is_right: fn(&Stop) -> bool,
) -> Result<Outcome<Nanoseconds>, LabError> {
    lab.load(program)?;
    let limit = lab.limit(LIMIT);
    let mut times = Vec::with_capacity(ROUNDS);
    while times.len() < WARM_UP + ROUNDS {
        let before = clock::now();
        let stop = enter(lab, &limit);
        let time = before.elapsed();
        match stop {
            Stop::Interrupted => {}
            stop if is_right(&stop) => times.push(time),
            other => return Ok(Outcome::Odd(other.to_string())),
        }
    }
    let times = &mut times[WARM_UP..];
    times.sort_unstable();
    let median = u64::try_from(times[times.len() / 2].as_nanos()).unwrap_or(u64::MAX);
    Ok(Outcome::Measured(Nanoseconds(median)))
}
