//! `vmft status`, `vmft stop`, `vmft set` and the like: asking a running side.

use crate::api_client;
use crate::check::{Level, Limits, check};
use crate::protection_options::{EpochIntervalOption, LagOption, TimeOption};
use crate::remedy::one_line;
use crate::terminal::say;
use crate::watch::{IntervalOption, watch};
use anyhow::{Result, bail};
use clap::{ArgGroup, Args};
use std::fmt::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use vmft_backup::bounds::BoundChange;
use vmft_backup::status::{CompilerStatus, EpochReport, SideStatus};

/// Options of `vmft status`.
#[derive(Debug, Args)]
pub struct StatusOptions {
    /// The side's --api-socket; with --watch, several may be given
    #[arg(long, value_name = "PATH", required = true)]
    api_socket: Vec<PathBuf>,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Live in the terminal, with what was in the last minutes; q ends it, ? shows the keys
    #[arg(long, conflicts_with_all = ["json", "check"])]
    watch: bool,
    /// With --watch: how often the sides are asked, 100ms to 60s
    #[arg(long, value_name = "TIME", default_value = "500ms", requires = "watch")]
    interval: IntervalOption,
    /// One line, and an exit code as monitoring plugins have: 0 OK, 1 warning, 2 critical, 3 unknown
    #[arg(long, conflicts_with = "json")]
    check: bool,
    /// With --check: a backup that is further behind is a warning
    #[arg(long, value_name = "TIME", default_value = "1s", requires = "check")]
    max_lag: TimeOption,
    /// With --check: a live side without a backup is a warning, and critical after so long
    #[arg(long, value_name = "TIME", default_value = "60s", requires = "check")]
    max_unprotected: TimeOption,
}

impl StatusOptions {
    /// The one socket.
    fn socket(&self) -> Result<&Path> {
        match &self.api_socket[..] {
            [socket] => Ok(socket),
            _ => bail!("several sides are shown with --watch; without it, name one --api-socket"),
        }
    }
}

/// Options of `vmft stop`.
#[derive(Debug, Args)]
pub struct StopOptions {
    /// The side's --api-socket
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
}

/// Options of `vmft snapshot`.
#[derive(Debug, Args)]
pub struct SnapshotOptions {
    /// The side's --api-socket
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
    /// The directory to write; it must not exist. A path on the side's host
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Options of `vmft switch`.
#[derive(Debug, Args)]
pub struct SwitchOptions {
    /// The --api-socket of the side that runs the guest
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
}

/// Options of `vmft pause`.
#[derive(Debug, Args)]
pub struct PauseOptions {
    /// The --api-socket of the side that runs the guest
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
}

/// Options of `vmft resume`.
#[derive(Debug, Args)]
pub struct ResumeOptions {
    /// The --api-socket of the side that runs the guest
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
}

/// Options of `vmft set`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("bound").required(true).multiple(false)))]
pub struct SetOptions {
    /// The side's --api-socket
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
    /// How far a backup that replays may be behind, as the option of `vmft primary`
    #[arg(long, group = "bound", value_name = "TIME[,then=slow|unprotect|stop]")]
    max_lag: Option<LagOption>,
    /// How far apart the checkpoints of --protect checkpoint are: 2ms to 1s
    #[arg(long, group = "bound", value_name = "TIME")]
    interval: Option<EpochIntervalOption>,
}

/// Changes how far a backup may be behind.
pub fn set(options: &SetOptions) -> Result<ExitCode> {
    let ms = |time: Duration| u64::try_from(time.as_millis()).expect("at most a minute");
    let lag = options.max_lag.map(|LagOption(bound)| BoundChange::MaxLag {
        ms: ms(bound.limit()),
        then: bound.policy(),
    });
    let interval = options
        .interval
        .map(|EpochIntervalOption(interval)| BoundChange::Interval { ms: ms(interval.get()) });
    let change = lag.or(interval).expect("the command line has one of them");
    api_client::change_bound(&options.api_socket, change)?;
    Ok(ExitCode::SUCCESS)
}

/// Has the guest stand still.
pub fn pause(options: &PauseOptions) -> Result<ExitCode> {
    api_client::pause(&options.api_socket)?;
    Ok(ExitCode::SUCCESS)
}

/// Has it go on, and what its disks have failed at tried again.
pub fn resume(options: &ResumeOptions) -> Result<ExitCode> {
    api_client::resume(&options.api_socket)?;
    Ok(ExitCode::SUCCESS)
}

/// Hands the guest over to a backup.
pub fn switch(options: &SwitchOptions) -> Result<ExitCode> {
    api_client::switch(&options.api_socket)?;
    Ok(ExitCode::SUCCESS)
}

/// Shows a side's status.
pub fn status(options: &StatusOptions) -> Result<ExitCode> {
    if options.watch {
        return watch(&options.api_socket, options.interval.0);
    }
    if options.check {
        return check_side(options);
    }
    let status = api_client::status(options.socket()?)?;
    if options.json {
        say(&serde_json::to_string_pretty(&status)?)?;
    } else {
        say(describe(&status)?.trim_end())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Says in one line how a side is.
fn check_side(options: &StatusOptions) -> Result<ExitCode> {
    let limits = Limits { max_lag: options.max_lag.0, max_unprotected: options.max_unprotected.0 };
    let (level, text) = match options.socket().and_then(api_client::status) {
        Ok(status) => check(&status, limits),
        Err(error) => {
            (Level::Unknown, format!("VMFT UNKNOWN - {}", one_line(&format!("{error:#}"))))
        }
    };
    say(&text)?;
    Ok(ExitCode::from(level as u8))
}

/// Stops a guest.
pub fn stop(options: &StopOptions) -> Result<ExitCode> {
    api_client::shutdown(&options.api_socket)?;
    Ok(ExitCode::SUCCESS)
}

/// Takes a snapshot.
pub fn snapshot(options: &SnapshotOptions) -> Result<ExitCode> {
    api_client::snapshot(&options.api_socket, &options.directory)?;
    Ok(ExitCode::SUCCESS)
}

/// The epochs of checkpoint mode; a backup knows only how many it has applied.
fn describe_epochs(text: &mut String, epochs: &EpochReport, bound: Option<u64>) -> fmt::Result {
    write!(text, "epochs               {}", epochs.epochs)?;
    if let Some(bound) = bound {
        write!(text, ", {bound} ms apart")?;
    }
    if let Some(interval) = epochs.interval_ms {
        write!(
            text,
            "; the last after {interval:.1} ms: {} KiB written, {} KiB sent, pause {:.2} ms (worst \
             {:.2} ms), sending {:.2} ms",
            epochs.last_dirty_bytes >> 10,
            epochs.last_sent_bytes >> 10,
            epochs.pause_ms,
            epochs.worst_pause_ms,
            epochs.sending_ms,
        )?;
        if epochs.rounds > 1 {
            write!(text, ", in {} rounds", epochs.rounds)?;
        }
        if epochs.slowed_ms > 0.0 {
            write!(text, "; slowed by {:.1} ms in all", epochs.slowed_ms)?;
        }
    }
    writeln!(text)
}

/// What the compiler does, and how much of the guest it has executed.
fn describe_compiler(CompilerStatus { mode, retired, compiled }: &CompilerStatus) -> String {
    if *compiled == 0 {
        return mode.name().to_owned();
    }
    let share = *compiled as f64 * 100.0 / (*retired).max(1) as f64;
    format!("{}; {share:.1} % of {retired} instructions were compiled", mode.name())
}

/// The status for people, a line a fact.
fn describe(status: &SideStatus) -> Result<String, fmt::Error> {
    let mut text = String::new();
    let role = serde_json::to_value(status.role).ok();
    let role = role.as_ref().and_then(|role| role.as_str()).unwrap_or("unknown");
    writeln!(text, "role                 {role}")?;
    writeln!(text, "generation           {}", status.generation)?;
    writeln!(text, "point                {} instructions", status.point)?;
    if let Some(ms) = status.unprotected_ms {
        writeln!(text, "unprotected for      {:.1} s", ms as f64 / 1e3)?;
    }
    if status.events_lost > 0 {
        writeln!(text, "events lost          {}", status.events_lost)?;
    }
    let idle = if status.guest_idle { ", idle" } else { "" };
    writeln!(text, "guest time           {:.3} s{idle}", status.guest_time_ms as f64 / 1e3)?;
    if let Some(compiler) = &status.compiler {
        writeln!(text, "compiler             {}", describe_compiler(compiler))?;
    }
    writeln!(
        text,
        "outputs waiting      {}, {} bytes not out",
        status.outputs_waiting, status.outputs_waiting_bytes
    )?;
    for disk in &status.disk_troubles {
        writeln!(
            text,
            "disk {:<16}{}, for {:.1} s, {} requests; {}",
            disk.disk,
            disk.text(),
            disk.for_ms as f64 / 1e3,
            disk.requests,
            disk.remedy()
        )?;
    }
    for copy in &status.disk_copies {
        writeln!(text, "copy of disk {:<8}{}", copy.disk, copy.text())?;
    }
    if let Some(why) = &status.guest_waits_for {
        writeln!(text, "guest stopped        until {why}")?;
    } else if let Some(trouble) = &status.console_trouble {
        writeln!(text, "console              {trouble}")?;
    }
    writeln!(
        text,
        "output delay         median {:.0} µs, worst {:.0} µs",
        status.output_delay_us, status.output_delay_worst_us
    )?;
    if let Some(channel) = &status.channel {
        write!(text, "execution lag        {:.1} ms", channel.execution_lag_ms)?;
        if let Some(bound) = status.lag_bound_ms {
            write!(text, ", to be at most {bound} ms")?;
        }
        writeln!(text)?;
        writeln!(
            text,
            "log                  {:.3} Mbit/s, {} entries, {} bytes, {} buffered",
            channel.log_mbit_s, channel.log_entries, channel.log_bytes, channel.buffered_bytes
        )?;
        writeln!(
            text,
            "acknowledgement      median {:.0} µs, worst {:.0} µs",
            channel.acknowledgement_us, channel.acknowledgement_worst_us
        )?;
    }
    if let Some(network) = &status.network {
        writeln!(
            text,
            "network              {} packets sent, {} received, {} lost",
            network.sent, network.received, network.lost
        )?;
    }
    if let Some(epochs) = &status.epochs {
        describe_epochs(&mut text, epochs, status.interval_bound_ms)?;
    }
    if let Some(failover) = &status.failover {
        writeln!(
            text,
            "failover             generation {}: {}; detection {:.1} ms, arbiter {:.1} ms, \
             replay {:.1} ms, first output {}",
            failover.generation,
            failover.suspicion,
            failover.detection_ms,
            failover.arbiter_ms,
            failover.replay_ms,
            failover
                .first_output_ms
                .map_or_else(|| "none yet".to_owned(), |time| format!("after {time:.1} ms")),
        )?;
    }
    if status.replay_skips > 0 {
        writeln!(
            text,
            "replay spared        {} points, by {} checkpoints in the log",
            status.points_skipped, status.replay_skips
        )?;
    }
    if let Some(divergence) = &status.divergence {
        writeln!(
            text,
            "divergences          {}, {} mended; the last: {}",
            status.divergences, status.divergences_mended, divergence.text
        )?;
    }
    if let Some(bytes) = status.overhead_bytes {
        writeln!(text, "memory overhead      {} MiB", bytes >> 20)?;
    }
    if let Some(reason) = &status.reason {
        writeln!(text, "reason               {reason}")?;
    }
    Ok(text)
}
