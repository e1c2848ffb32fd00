//! The measurements. Each returns the rows it makes.

use crate::figure::{Figure, Goal, median};
use crate::lab::{Guest, Lab};
use anyhow::{Context, Result};
use std::time::{Duration, Instant};

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Boots from nothing.
    pub boots: usize,
    /// Starts from the snapshot.
    pub restores: usize,
    /// Rounds of each comparison.
    pub rounds: usize,
    /// Kills.
    pub kills: usize,
    /// How long one side of a round takes, about.
    pub round: Duration,
    /// How long a rate is watched.
    pub watch: Duration,
}

impl Effort {
    /// What the promised figures ask for.
    pub const FULL: Self = Self {
        boots: 3,
        restores: 9,
        rounds: 9,
        kills: 20,
        round: Duration::from_secs(3),
        watch: Duration::from_secs(12),
    };
    /// Enough to see the order of magnitude.
    pub const QUICK: Self = Self {
        boots: 1,
        restores: 3,
        rounds: 3,
        kills: 5,
        round: Duration::from_secs(1),
        watch: Duration::from_secs(10),
    };
}

/// Speed of the engine and time to the prompt, of one kind of boot after the other.
pub fn boot(lab: &mut Lab, effort: &Effort) -> Result<Vec<Figure>> {
    let (mut times, mut speeds, mut of_cpu) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..effort.boots {
        let boot = lab.boot()?;
        let millions = boot.instructions as f64 / 1e6;
        times.push(boot.time.as_secs_f64());
        speeds.push(millions / boot.time.as_secs_f64());
        of_cpu.push(millions / boot.cpu.as_secs_f64());
    }
    let note = format!("{:.1} per second of CPU time", median(&of_cpu));
    Ok(vec![
        Figure::new("boot-speed", "M instructions/s", Goal::AtLeast(60.0), speeds, note),
        Figure::new("boot-to-prompt", "s", Goal::AtMost(40.0), times, String::new()),
    ])
}

/// Time from the start of a process to a prompt that answers.
pub fn restore(lab: &mut Lab, effort: &Effort) -> Result<Vec<Figure>> {
    let mut times = Vec::new();
    // The first finds the snapshot's pages in the host's cache, as the others do.
    drop(lab.alone()?);
    for _ in 0..effort.restores {
        let (mut guest, started) = lab.alone()?;
        guest.wait_prompt_answers()?;
        times.push(started.elapsed().as_secs_f64());
    }
    let goal = Goal::AtMost(1.0);
    Ok(vec![Figure::new("restore-to-prompt", "s", goal, times, String::new())])
}

/// Speed of the engine on a compute loop.
pub fn compute_speed(lab: &mut Lab, effort: &Effort) -> Result<Vec<Figure>> {
    let (mut guest, _) = lab.alone()?;
    guest.wait_prompt_answers()?;
    let count = calibrate(&mut guest, "c", effort.round)?;
    let (mut speeds, mut of_cpu) = (Vec::new(), Vec::new());
    for _ in 0..effort.rounds {
        let (point, cpu) = (guest.status()?.point, guest.live_cpu());
        let started = Instant::now();
        guest.command(&format!("c {count}"))?;
        let millions = (guest.status()?.point - point) as f64 / 1e6;
        speeds.push(millions / started.elapsed().as_secs_f64());
        of_cpu.push(millions / (guest.live_cpu() - cpu).as_secs_f64());
    }
    let note = format!("{:.1} per second of CPU time", median(&of_cpu));
    let goal = Goal::AtLeast(60.0);
    Ok(vec![Figure::new("compute-speed", "M instructions/s", goal, speeds, note)])
}

/// How often `function` must run to take about `wanted`.
pub fn calibrate(guest: &mut Guest, function: &str, wanted: Duration) -> Result<u32> {
    let mut count = 4;
    loop {
        let took = guest.command(&format!("{function} {count}"))?;
        if took >= wanted / 8 {
            let exact = f64::from(count) * wanted.as_secs_f64() / took.as_secs_f64();
            return Ok(exact.max(1.0) as u32);
        }
        count *= 4;
    }
}

/// Throughput of a protected guest in terms of an unprotected one. The two run in turn, so that a
/// host that is busy slows both. The note says what an unprotected guest loses to another beside
/// it: that much of a pair's loss is the host's, which is two hosts elsewhere.
pub fn ratios(lab: &mut Lab, effort: &Effort, wanted: &[&str]) -> Result<Vec<Figure>> {
    let (mut alone, _) = lab.alone()?;
    alone.wait_prompt_answers()?;
    let (mut neighbour, _) = lab.alone()?;
    neighbour.wait_prompt_answers()?;
    let mut pair = lab.pair()?;
    let mut figures = Vec::new();
    for (name, function, goal) in [
        ("protected-compute", "c", 0.95),
        ("protected-fork", "f", 0.95),
        ("protected-disk", "d", 0.80),
    ] {
        if !wanted.contains(&name) {
            continue;
        }
        let count = calibrate(&mut alone, function, effort.round)?;
        let command = format!("{function} {count}");
        pair.command(&command)?;
        let (mut ratios, mut cpu_ratios) = (Vec::new(), Vec::new());
        let (mut unprotected, mut beside_ratios) = (Vec::new(), Vec::new());
        for _ in 0..effort.rounds {
            let (alone_time, alone_cpu) = timed(&mut alone, &command)?;
            neighbour.start(&command);
            beside_ratios.push(alone_time / timed(&mut alone, &command)?.0);
            neighbour.wait_end(|_| Ok(()))?;
            let (pair_time, pair_cpu) = timed(&mut pair, &command)?;
            ratios.push(alone_time / pair_time);
            cpu_ratios.push(alone_cpu / pair_cpu);
            unprotected.push(f64::from(count) / alone_time);
        }
        let note = format!(
            "{:.2} by CPU time; {:.2} two unprotected side by side; unprotected {:.1} a second",
            median(&cpu_ratios),
            median(&beside_ratios),
            median(&unprotected)
        );
        figures.push(Figure::new(name, "ratio", Goal::AtLeast(goal), ratios, note));
    }
    Ok(figures)
}

/// Host seconds and CPU seconds of the live side that a command takes.
pub fn timed(guest: &mut Guest, command: &str) -> Result<(f64, f64)> {
    let cpu = guest.live_cpu();
    let took = guest.command(command)?;
    Ok((took.as_secs_f64(), (guest.live_cpu() - cpu).as_secs_f64()))
}

/// What a pair costs while it runs: log rate, lag, delay of outputs, memory.
pub fn steady(lab: &mut Lab, effort: &Effort) -> Result<Vec<Figure>> {
    let mut pair = lab.pair()?;
    let mut overheads = Vec::new();
    let log_bytes = |guest: &Guest| -> Result<u64> {
        Ok(guest.status()?.channel.context("a primary has a channel")?.log_bytes)
    };

    let (before, began) = (log_bytes(&pair)?, Instant::now());
    while began.elapsed() < effort.watch {
        pair.look(began + effort.watch * 2)?;
    }
    let idle = mbit_s(log_bytes(&pair)? - before, began.elapsed());
    overheads.push(pair.overhead_mib()?);

    let count = calibrate(&mut pair, "c", effort.watch)?;
    let mut lags = Vec::new();
    let before = log_bytes(&pair)?;
    let took = pair.command_watched(&format!("c {count}"), |guest| {
        let status = guest.status()?;
        lags.push(status.channel.context("a primary has a channel")?.execution_lag_ms);
        Ok(())
    })?;
    let computing = mbit_s(log_bytes(&pair)? - before, took);
    overheads.push(pair.overhead_mib()?);

    let count = calibrate(&mut pair, "d", effort.round)?;
    pair.command_watched(&format!("d {count}"), |guest| {
        overheads.push(guest.overhead_mib()?);
        Ok(())
    })?;
    let delays = output_delays(&mut pair, effort)?;
    overheads.push(pair.overhead_mib()?);

    let rate = Goal::AtMost(0.2);
    let marks = pair.status()?.outputs_marked;
    let acknowledged = pair.status()?.channel.map_or(0.0, |channel| channel.acknowledgement_us);
    Ok(vec![
        Figure::new("log-idle", "Mbit/s", rate, vec![idle], seconds(effort.watch)),
        Figure::new("log-compute", "Mbit/s", rate, vec![computing], seconds(took)),
        Figure::new("execution-lag", "ms", Goal::AtMost(20.0), lags, "while computing".into()),
        Figure::new(
            "output-delay",
            "ms",
            Goal::AtMost(0.5),
            delays,
            format!("medians of up to 1024 of {marks} marks; acknowledged in {acknowledged:.0} µs"),
        ),
        Figure::new("memory-overhead", "MiB", Goal::AtMost(200.0), overheads, String::new()),
    ])
}

fn seconds(time: Duration) -> String {
    format!("over {:.1} s", time.as_secs_f64())
}

fn mbit_s(bytes: u64, time: Duration) -> f64 {
    bytes as f64 * 8.0 / 1e6 / time.as_secs_f64()
}

/// The median delay of the last outputs, after each of several bursts of lines.
fn output_delays(pair: &mut Guest, effort: &Effort) -> Result<Vec<f64>> {
    let mut delays = Vec::new();
    for _ in 0..effort.rounds {
        pair.command("i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo line $i; done")?;
        delays.push(pair.status()?.output_delay_us / 1e3);
    }
    Ok(delays)
}

/// Time from the end of the primary to the first new output of the backup.
pub fn failover(lab: &mut Lab, effort: &Effort) -> Result<Vec<Figure>> {
    let mut times = Vec::new();
    let (mut detections, mut verdicts, mut replays) = (Vec::new(), Vec::new(), Vec::new());
    for kill in 0..effort.kills {
        let mut pair = lab.pair()?;
        pair.type_in("p\n");
        // Not in step with heartbeats, corrections or digests.
        let lead = Duration::from_millis(500 + 137 * (kill as u64) % 211);
        let began = Instant::now();
        while began.elapsed() < lead {
            pair.look(began + lead * 100)?;
        }
        times.push(pair.fail_over()?.as_secs_f64() * 1e3);
        let survivor = pair.backup().context("a pair has a backup")?.status()?;
        let report = survivor.failover.context("the backup has taken over")?;
        detections.push(report.detection_ms);
        verdicts.push(report.arbiter_ms);
        replays.push(report.replay_ms);
    }
    let note = format!(
        "medians: last sign to suspicion {:.1}, test-and-set {:.1}, replay {:.1}",
        median(&detections),
        median(&verdicts),
        median(&replays)
    );
    let goal = Goal::AtMostWorst { median: 150.0, worst: 500.0 };
    Ok(vec![Figure::new("kill-to-output", "ms", goal, times, note)])
}
