//! Checkpoint mode, at twenty epochs a second.

use crate::figure::{Figure, Goal, median};
use crate::lab::{Guest, Lab};
use crate::measure::{Effort, calibrate, timed};
use anyhow::{Context, Result};
use vmft_backup::status::EpochReport;

const PROTECT: [&str; 2] = ["--protect", "checkpoint,interval=50ms"];

fn report(guest: &Guest) -> Result<EpochReport> {
    guest.status()?.epochs.context("a primary in checkpoint mode counts its epochs")
}

/// A kernel-heavy load (a loop that forks and executes), in terms of an unprotected guest; and what
/// was sent for the pages it wrote.
pub fn epochs(lab: &mut Lab, effort: &Effort) -> Result<Vec<Figure>> {
    let (mut alone, _) = lab.alone()?;
    alone.wait_prompt_answers()?;
    let mut pair = lab.pair_with(&PROTECT)?;
    let count = calibrate(&mut alone, "f", effort.round)?;
    let command = format!("f {count}");
    pair.command(&command)?;
    let (mut ratios, mut cpu_ratios, mut sent) = (Vec::new(), Vec::new(), Vec::new());
    let (mut rates, mut pauses, mut pages) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..effort.rounds {
        let (alone_time, alone_cpu) = timed(&mut alone, &command)?;
        let before = report(&pair)?;
        let (pair_time, pair_cpu) = timed(&mut pair, &command)?;
        let after = report(&pair)?;
        ratios.push(alone_time / pair_time);
        cpu_ratios.push(alone_cpu / pair_cpu);
        let epochs = (after.epochs - before.epochs) as f64;
        let dirty = (after.dirty_bytes - before.dirty_bytes) as f64;
        sent.push((after.sent_bytes - before.sent_bytes) as f64 / dirty);
        rates.push(epochs / pair_time);
        pauses.push(after.pause_ms);
        pages.push(dirty / 4096.0 / epochs);
    }
    let note = format!(
        "medians: {:.1} epochs a second, {:.0} pages written in one, a rest of {:.2} ms; {:.2} by CPU time",
        median(&rates),
        median(&pages),
        median(&pauses),
        median(&cpu_ratios)
    );
    let (ratio, bytes) = (Goal::AtLeast(0.8), Goal::AtMost(0.5));
    Ok(vec![
        Figure::new("checkpoint-fork", "ratio", ratio, ratios, note),
        Figure::new(
            "checkpoint-bytes",
            "ratio",
            bytes,
            sent,
            "the machine's state included".to_owned(),
        ),
    ])
}
