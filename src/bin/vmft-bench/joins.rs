//! Joins, protection restored, and snapshots.

use crate::figure::{Figure, Goal, median};
use crate::lab::{Lab, Relay};
use crate::measure::Effort;
use anyhow::{Context, Result};
use std::time::Instant;
use vmft::api_client;
use vmft_backup::status::{JoinReport, Role};

/// Joins one backup after the other, each of which leaves again.
fn joins(relay: &mut Relay, count: usize) -> Result<Vec<JoinReport>> {
    let mut reports = Vec::new();
    for _ in 0..count {
        let backup = relay.add_backup()?;
        let status = relay.wait(0, |status| status.role == Role::Primary)?;
        reports.push(status.join.context("a backup has just joined")?);
        relay.leave(backup)?;
        relay.wait(0, |status| status.role == Role::Alone)?;
    }
    Ok(reports)
}

/// The guest's rest while a backup joins, under a fork loop.
pub fn pause(lab: &mut Lab, effort: &Effort) -> Result<Vec<Figure>> {
    let mut relay = lab.relay()?;
    relay.guest.start("f 100000000");
    let reports = joins(&mut relay, effort.rounds)?;
    let pauses = reports.iter().map(|report| report.pause_ms).collect();
    let of = |value: fn(&JoinReport) -> f64| median(&reports.iter().map(value).collect::<Vec<_>>());
    let note = format!(
        "medians: {:.0} rounds, {:.0} pages in the last, {:.0} ms in all",
        of(|report| f64::from(report.rounds)),
        of(|report| report.last_pages as f64),
        of(|report| report.total_ms)
    );
    Ok(vec![Figure::new("join-pause", "ms", Goal::AtMost(50.0), pauses, note)])
}

/// How fast memory that was never sent goes over the loopback: guest memory, zeroes included.
pub fn speed(lab: &mut Lab, effort: &Effort) -> Result<Vec<Figure>> {
    let mut relay = lab.relay()?;
    let reports = joins(&mut relay, effort.rounds)?;
    let speed = |report: &JoinReport| report.memory_bytes as f64 / report.total_ms / 1e3;
    let speeds = reports.iter().map(speed).collect();
    let sent = |report: &JoinReport| report.pages as f64 * 4096.0 / 1e6;
    let packed = |report: &JoinReport| report.packed_bytes as f64 / 1e6;
    let note = format!(
        "medians: {:.0} MB not zero, packed to {:.0} MB",
        median(&reports.iter().map(sent).collect::<Vec<_>>()),
        median(&reports.iter().map(packed).collect::<Vec<_>>())
    );
    Ok(vec![Figure::new("join-speed", "MB/s", Goal::AtLeast(500.0), speeds, note)])
}

/// From a kill of the live side until a standby that waited follows the survivor.
pub fn protected_again(lab: &mut Lab, effort: &Effort) -> Result<Vec<Figure>> {
    let mut times = Vec::new();
    let mut relay = lab.relay()?;
    let mut live = 0;
    let mut follower = relay.add_standby(&[0])?;
    relay.wait_followed(0)?;
    for _ in 0..effort.rounds {
        let waiting = relay.add_standby(&[live, follower])?;
        let killed = Instant::now();
        relay.kill(live)?;
        relay.wait_followed(follower)?;
        times.push(killed.elapsed().as_secs_f64());
        (live, follower) = (follower, waiting);
    }
    let goal = Goal::AtMost(3.0);
    Ok(vec![Figure::new("kill-to-protected", "s", goal, times, String::new())])
}

/// A snapshot of a running guest: how long the guest rests, and how long it takes to run again from
/// it in a new process.
pub fn snapshots(lab: &mut Lab, effort: &Effort) -> Result<Vec<Figure>> {
    let (mut saves, mut restores) = (Vec::new(), Vec::new());
    let (mut guest, _) = lab.alone()?;
    guest.wait_prompt_answers()?;
    for number in 0..effort.restores {
        let directory = guest.directory().join(format!("saved-{number}"));
        let started = Instant::now();
        api_client::snapshot(&guest.live().api(), &directory)?;
        saves.push(started.elapsed().as_secs_f64());
        std::fs::remove_dir_all(&directory)?;
    }
    drop(guest);
    for _ in 0..effort.restores {
        restores.push(lab.restore_to_running()?.as_secs_f64());
    }
    let (save, restore) = (Goal::AtMost(0.5), Goal::AtMost(0.3));
    Ok(vec![
        Figure::new("snapshot-save", "s", save, saves, "synced to the disk".to_owned()),
        Figure::new("snapshot-restore", "s", restore, restores, "the process's start".to_owned()),
    ])
}
