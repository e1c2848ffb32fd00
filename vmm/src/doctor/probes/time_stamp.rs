//! `RDTSC`: whether anybody can stand between the guest and the real counter.

use crate::doctor::facts::{Level, Outcome, TimeStamp};
use vmft_kvm::trust::lab::{CR4_TSD, END, END_PORT, Lab, LabError, Program, Stop};
use vmft_kvm::trust::layout::CODE;

/// `rdtsc`, `mov r8, rax`, `rdtsc`
const TWICE: [u8; 7] = [0x0F, 0x31, 0x49, 0x89, 0xC0, 0x0F, 0x31];

/// At CPL 0.
pub fn read(lab: &mut Lab) -> Outcome<TimeStamp> {
    Outcome::of(twice(lab, Level::Kernel, 0))
}

/// At CPL 3, with CR4.TSD set.
pub fn disabled(lab: &mut Lab) -> Outcome<TimeStamp> {
    Outcome::of(twice(lab, Level::User, CR4_TSD))
}

fn twice(lab: &mut Lab, level: Level, cr4: u64) -> Result<Outcome<TimeStamp>, LabError> {
    let code = [&TWICE[..], &END].concat();
    lab.load(&Program { cr4, ..Program::new(level, &code) })?;
    Ok(match lab.run() {
        Stop::Out(END_PORT) => {
            let registers = lab.registers()?;
            if registers.rax == registers.r8 {
                Outcome::Odd("the counter stands still".to_owned())
            } else {
                Outcome::Measured(TimeStamp::Native)
            }
        }
        Stop::Exception { frame, .. } if frame.rip == CODE => Outcome::Measured(TimeStamp::Faults),
        other @ (Stop::Exception { .. }
        | Stop::InternalError { .. }
        | Stop::TimeUp
        | Stop::Shutdown) => Outcome::Odd(other.to_string()),
        _ => Outcome::Measured(TimeStamp::Exits),
    })
}
