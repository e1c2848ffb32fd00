//! The demo's probe: numbered lines of a guest that runs on every engine.

use super::{DemoOptions, Stage, finish, kill_in_the_middle};
use crate::pair::prefixed;
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::num::NonZeroU32;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;
use vmft_guest_images::ProbeGuest;

/// Runs the probe guest on a pair, and kills the primary in the middle.
pub(super) fn play(options: &DemoOptions, workplace: &Path) -> Result<ExitCode> {
    let kill_after = options.kill_after()?;
    let lines = NonZeroU32::new(options.lines()).context("a guest without lines")?;
    // It does not end before the survivor is seen, however late this process is.
    let hold = NonZeroU32::new(options.lines() - 1).filter(|hold| hold.get() >= kill_after);
    let guest = ProbeGuest { lines, hold: [hold, None], ..ProbeGuest::default() };
    let guest = guest.with_pause(options.pause);
    let kernel = workplace.join("probe.elf");
    std::fs::write(&kernel, guest.image())
        .with_context(|| format!("writing {}", kernel.display()))?;
    let started = Instant::now();
    let arbiter = ["--arbiter".into(), prefixed("dir=", &workplace.join("arbiter"))];
    let both: Vec<OsString> = arbiter.into_iter().chain(options.protect()).collect();
    let primary = ["--kernel".into(), kernel.into(), "--memory".into(), "size=64M".into()];
    let engine = options.engine.arguments().into_iter().map(OsString::from);
    let stage = Stage::set(workplace, &both, primary.into_iter().chain(engine), None)?;
    let played =
        kill_in_the_middle(stage, |ledger| ledger.printed() >= kill_after, hold.is_some())?;
    finish(options, played, None, started.elapsed())
}
