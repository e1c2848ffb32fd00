//! The demo's last words.

use super::ledger::{Gaps, Ledger};
use serde::Serialize;
use std::time::Duration;
use vmft_backup::status::{FailoverReport, SideStatus};
use vmft_guest_images::disk::DiskCheck;

/// What was found after the guest had ended.
#[derive(Debug)]
pub struct Verdicts {
    /// Lines the guest was to print.
    pub lines_wanted: u32,
    /// Records found on the disk, whole and in order.
    pub records_on_disk: u32,
    /// The file system check.
    pub disk: DiskCheck,
    /// Console bytes that came from both sides, and were merged by their offsets.
    pub bytes_repeated_to_readers: u64,
    /// Console bytes that came from neither.
    pub bytes_missing: u64,
}

/// The report.
#[derive(Debug, Serialize)]
pub struct Report {
    lines_seen: usize,
    lines_missing: u32,
    lines_repeated: u32,
    records_seen: usize,
    records_missing: u32,
    records_repeated: u32,
    records_on_disk: u32,
    console_bytes_missing: u64,
    console_bytes_merged: u64,
    disk_clean: bool,
    failover: Option<FailoverReport>,
    kill_to_first_new_output_ms: Option<f64>,
    log_mbit_s: f64,
    log_bytes: u64,
    output_delay_us: f64,
    seconds: f64,
    /// Nothing missing, nothing repeated, disk clean.
    pub good: bool,
    #[serde(skip)]
    disk_report: String,
}

impl Report {
    /// Puts everything together.
    pub fn new(
        ledger: &Ledger,
        verdicts: Verdicts,
        primary: &SideStatus,
        survivor: Option<SideStatus>,
        first_output: Option<Duration>,
        elapsed: Duration,
    ) -> Self {
        let wanted = verdicts.lines_wanted;
        let (lines, records) = (ledger.line_gaps(wanted), ledger.record_gaps(wanted));
        let on_disk = verdicts.records_on_disk == wanted;
        let channel = primary.channel.clone().unwrap_or_default();
        let good = lines == Gaps::default()
            && records == Gaps::default()
            && ledger.is_done()
            && on_disk
            && verdicts.bytes_missing == 0
            && verdicts.disk.clean;
        Self {
            lines_seen: ledger.printed_count(),
            lines_missing: lines.missing,
            lines_repeated: lines.repeated,
            records_seen: ledger.synced_count(),
            records_missing: records.missing,
            records_repeated: records.repeated,
            records_on_disk: verdicts.records_on_disk,
            console_bytes_missing: verdicts.bytes_missing,
            console_bytes_merged: verdicts.bytes_repeated_to_readers,
            disk_clean: verdicts.disk.clean,
            failover: survivor.and_then(|status| status.failover),
            kill_to_first_new_output_ms: first_output.map(|time| time.as_secs_f64() * 1e3),
            log_mbit_s: channel.log_mbit_s,
            log_bytes: channel.log_bytes,
            output_delay_us: primary.output_delay_us,
            seconds: elapsed.as_secs_f64(),
            good,
            disk_report: verdicts.disk.report,
        }
    }

    /// Prints it for a person.
    pub fn print(&self) {
        let ms = |time: Option<f64>| time.map_or("not seen".to_owned(), |ms| format!("{ms:.1} ms"));
        println!();
        println!("              seen  missing  repeated");
        println!(
            "  lines     {:6}   {:6}    {:6}",
            self.lines_seen, self.lines_missing, self.lines_repeated
        );
        println!(
            "  records   {:6}   {:6}    {:6}   ({} on the disk)",
            self.records_seen, self.records_missing, self.records_repeated, self.records_on_disk
        );
        let clean = if self.disk_clean { "clean" } else { "NOT CLEAN" };
        println!("  file system           {clean}");
        if let Some(failover) = &self.failover {
            println!(
                "  detection             {:.1} ms ({})",
                failover.detection_ms, failover.suspicion
            );
            println!(
                "  test-and-set          {:.1} ms (generation {})",
                failover.arbiter_ms, failover.generation
            );
            println!(
                "  replay                {:.1} ms (to instruction {})",
                failover.replay_ms, failover.point
            );
        }
        println!("  kill to first output  {}", ms(self.kill_to_first_new_output_ms));
        println!(
            "  log                   {:.3} Mbit/s, {} KiB in all",
            self.log_mbit_s,
            self.log_bytes / 1024
        );
        println!("  output delay          {:.0} µs median", self.output_delay_us);
        println!("  whole demo            {:.1} s", self.seconds);
        if self.good {
            println!("The guest survived: nothing is missing, nothing is repeated.");
        } else {
            println!("The guest did NOT survive unharmed.");
            if !self.disk_clean {
                println!("{}", self.disk_report);
            }
        }
    }
}
