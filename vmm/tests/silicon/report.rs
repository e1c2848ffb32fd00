//! A failure as a person wants to read it, and small: the shortest snippet and the plainest
//! inputs that still differ.

use crate::case::{Case, Inputs, Outcome, Ready};
use crate::compare::{Difference, NAMES};
use crate::definedness;
use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use std::fmt::Write;

/// A case and how it differs.
#[derive(Debug)]
pub struct Failure {
    /// The case, shrunk.
    pub case: Case,
    /// It made concrete.
    pub ready: Ready,
    /// What the host CPU did.
    pub host: Option<Outcome>,
    /// Everything that differs.
    pub differences: Vec<Difference>,
}

/// Makes `failure` smaller as long as `retry` still fails, with at most `attempts` retries.
pub fn shrink(
    failure: Failure,
    mut attempts: u32,
    mut retry: impl FnMut(&Case) -> Option<Failure>,
) -> Failure {
    let mut best = failure;
    loop {
        let mut smaller = None;
        for candidate in candidates(&best.case) {
            if attempts == 0 {
                return best;
            }
            attempts -= 1;
            smaller = retry(&candidate).filter(|failure| is_alike(failure, &best));
            if smaller.is_some() {
                break;
            }
        }
        match smaller {
            Some(failure) => best = failure,
            None => return best,
        }
    }
}

/// True if the two differ in the same thing, so that one does not shrink into another failure.
fn is_alike(one: &Failure, other: &Failure) -> bool {
    fn kind(failure: &Failure) -> Option<&str> {
        let words = failure.differences.first()?.what.split(|c: char| !c.is_alphabetic());
        words.into_iter().find(|word| !word.is_empty())
    }
    kind(one) == kind(other)
}

/// Cases a little simpler than `case`, the most promising first.
fn candidates(case: &Case) -> Vec<Case> {
    let steps = case.steps.len();
    let mut all: Vec<Case> = (0..steps).rev().filter_map(|n| without(case, n)).collect();
    if case.stride != 0 {
        all.push(Case { stride: 0, ..case.clone() });
    }
    for n in 0..steps {
        if case.steps[n].redundant.is_some() {
            let mut plain = case.clone();
            plain.steps[n].redundant = None;
            all.push(plain);
        }
    }
    for (n, _) in case.patches.iter().enumerate() {
        let mut fewer = case.clone();
        fewer.patches.remove(n);
        all.push(fewer);
    }
    let mut inputs = |change: &dyn Fn(&mut Inputs)| {
        let mut plain = case.clone();
        change(&mut plain.inputs);
        let same = format!("{:?}", plain.inputs) == format!("{:?}", case.inputs);
        if !same {
            all.push(plain);
        }
    };
    inputs(&|inputs| inputs.rflags = 0x202);
    inputs(&|inputs| inputs.floating.mxcsr = 0x1F80);
    inputs(&|inputs| {
        // With everything masked nothing can be pending.
        inputs.floating.control = 0x37F;
        inputs.floating.status &= !0x80FF;
    });
    inputs(&|inputs| inputs.floating.status = 0);
    inputs(&|inputs| inputs.floating.xmm = [0; 16]);
    inputs(&|inputs| inputs.floating.stack = [[0; 10]; 8]);
    for n in 0..16 {
        inputs(&|inputs| inputs.general[n] = 0);
        inputs(&|inputs| inputs.floating.xmm[n] = 0);
    }
    all
}

/// The case without step `n`, if that leaves one that reads nothing undefined.
fn without(case: &Case, n: usize) -> Option<Case> {
    if case.steps.len() == 1 {
        return None;
    }
    let mut fewer = case.clone();
    fewer.steps.remove(n);
    if fewer.focus_step > n || fewer.focus_step == fewer.steps.len() {
        fewer.focus_step -= 1;
    }
    let moved = |target: &mut usize| {
        if *target > n {
            *target -= 1;
        }
    };
    fewer.steps.iter_mut().filter_map(|step| step.target.as_mut()).for_each(moved);
    fewer.links.iter_mut().map(|link| &mut link.step).for_each(moved);
    let forward = |(at, step): (usize, &crate::case::Step)| step.target.is_none_or(|to| to > at);
    let links_forward = fewer.links.iter().all(|link| link.step > 0);
    let sound = fewer.steps.iter().enumerate().all(forward) && links_forward;
    (sound && definedness::is_sound(&fewer)).then_some(fewer)
}

/// The failure as text.
pub fn describe(failure: &Failure, seed: u64) -> String {
    let Failure { case, ready, host, differences } = failure;
    let mut text = String::new();
    render(&mut text, case, ready, seed).expect("a string takes everything");
    if let Some(host) = host {
        let _ = writeln!(text, "  host stopped: {:?} at {:#x}", host.stop, host.rip);
    }
    for Difference { what, host, engine } in differences {
        let _ = writeln!(text, "  {what:<8} host   {host}\n           engine {engine}");
    }
    text
}

fn render(text: &mut String, case: &Case, ready: &Ready, seed: u64) -> std::fmt::Result {
    let index = case.index;
    writeln!(text, "case {index} made for {:?}, shrunk; to run it alone:", case.focus)?;
    writeln!(
        text,
        "  VMFT_SILICON_SEED={seed} VMFT_SILICON_CASE={index} cargo test -p vmft-vmm --test silicon"
    )?;
    let mut formatter = IntelFormatter::new();
    let mut decoder =
        Decoder::with_ip(case.bits.number(), &ready.code, case.origin, DecoderOptions::NONE);
    for &start in &ready.starts[..case.steps.len()] {
        let instruction = decoder.decode();
        let at = (start - case.origin) as usize;
        let bytes = &ready.code[at..at + instruction.len()];
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut assembly = String::new();
        formatter.format(&instruction, &mut assembly);
        writeln!(text, "  {start:x}  {hex:<24} {assembly}  ({:?})", instruction.code())?;
    }
    write!(text, "  with RFLAGS={:#x}", ready.inputs.rflags)?;
    for (name, value) in NAMES.iter().zip(ready.inputs.general) {
        if value != 0 {
            write!(text, " {name}={value:#x}")?;
        }
    }
    let floating = &ready.inputs.floating;
    write!(text, "\n  MXCSR={:#x}", floating.mxcsr)?;
    for (n, value) in floating.xmm.iter().enumerate() {
        if *value != 0 {
            write!(text, " XMM{n}={value:#034x}")?;
        }
    }
    let [control, status, in_use] = [floating.control, floating.status, u16::from(floating.in_use)];
    write!(text, "\n  FCW={control:#x} FSW={status:#x} in use={in_use:#04x}")?;
    for (n, register) in floating.stack.iter().enumerate() {
        if *register != [0; 10] {
            let hex: String = register.iter().rev().map(|byte| format!("{byte:02x}")).collect();
            write!(text, " ST{n}={hex}")?;
        }
    }
    writeln!(text)?;
    for patch in &case.patches {
        writeln!(text, "  [{:#x}] = {:02x?}", patch.address, patch.bytes)?;
    }
    if case.stride != 0 {
        writeln!(text, "  the engine ran {} instructions at a time", case.stride)?;
    }
    Ok(())
}
