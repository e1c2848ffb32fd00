//! The dirty log: exactly the pages the guest wrote.

use crate::doctor::facts::{DirtyLog, Level, Outcome};
use kvm_bindings::kvm_regs;
use vmft_kvm::trust::lab::{END, END_PORT, Lab, LabError, Program, Stop};
use vmft_kvm::trust::layout::{DATA, PAGE};

/// Pages to write, in order.
const PAGES: [u32; 3] = [1, 5, 30];
/// `mov [rsi], al`, `mov [rdi], al`, `mov [r8], al`
const WRITES: [u8; 7] = [0x88, 0x06, 0x88, 0x07, 0x41, 0x88, 0x00];

/// Writes chosen pages and compares.
pub fn dirty_log(lab: &mut Lab) -> Outcome<DirtyLog> {
    Outcome::of(compare(lab))
}

fn compare(lab: &mut Lab) -> Result<Outcome<DirtyLog>, LabError> {
    // What earlier probes wrote.
    lab.dirty_pages()?;
    if let Some(odd) = write(lab, PAGES)? {
        return Ok(Outcome::Odd(odd.to_string()));
    }
    let reported = lab.dirty_pages()?;
    let again = lab.dirty_pages()?;
    if let Some(odd) = write(lab, [PAGES[0]; 3])? {
        return Ok(Outcome::Odd(odd.to_string()));
    }
    let rewritten = lab.dirty_pages()?;
    Ok(Outcome::Measured(DirtyLog { written: PAGES.to_vec(), reported, again, rewritten }))
}

/// Writes three pages; how it ended, if not as it should.
fn write(lab: &mut Lab, pages: [u32; 3]) -> Result<Option<Stop>, LabError> {
    let code = [&WRITES[..], &END].concat();
    let [rsi, rdi, r8] = pages.map(|page| DATA + u64::from(page) * PAGE);
    let registers = kvm_regs { rsi, rdi, r8, ..Default::default() };
    lab.load(&Program { registers, ..Program::new(Level::Kernel, &code) })?;
    let stop = lab.run();
    Ok((stop != Stop::Out(END_PORT)).then_some(stop))
}
