//! The demo's last words.

use super::ledger::{Gaps, Ledger};
use super::network::ClientReport;
use serde::Serialize;
use std::time::Duration;
use vmft_backup::status::{FailoverReport, SideStatus};
use vmft_guest_images::disk::DiskCheck;

/// What was found after the guest had ended.
#[derive(Debug)]
pub struct Verdicts {
    /// Lines the guest was to print.
    pub lines_wanted: u32,
    /// Of the records, if the guest wrote any.
    pub records: Option<RecordVerdicts>,
    /// Console bytes that came from both sides, and were merged by their offsets.
    pub bytes_repeated_to_readers: u64,
    /// Console bytes that came from neither.
    pub bytes_missing: u64,
    /// What the client on the network saw, if there was one.
    pub(super) client: Option<ClientReport>,
}

/// What was found on the disk.
#[derive(Debug)]
pub struct RecordVerdicts {
    /// Records, whole and in order.
    pub on_disk: u32,
    /// The file system check.
    pub disk: DiskCheck,
}

/// The records' part of the report.
#[derive(Debug, Serialize)]
struct RecordReport {
    records_seen: usize,
    records_missing: u32,
    records_repeated: u32,
    records_on_disk: u32,
    disk_clean: bool,
    #[serde(skip)]
    disk_report: String,
    #[serde(skip)]
    good: bool,
}

impl RecordReport {
    fn new(ledger: &Ledger, wanted: u32, verdicts: RecordVerdicts) -> Self {
        let gaps = ledger.record_gaps(wanted);
        let RecordVerdicts { on_disk, disk } = verdicts;
        Self {
            records_seen: ledger.synced_count(),
            records_missing: gaps.missing,
            records_repeated: gaps.repeated,
            records_on_disk: on_disk,
            good: gaps == Gaps::default() && on_disk == wanted && disk.clean,
            disk_clean: disk.clean,
            disk_report: disk.report,
        }
    }
}

/// The report.
#[derive(Debug, Serialize)]
pub struct Report {
    lines_seen: usize,
    lines_missing: u32,
    lines_repeated: u32,
    #[serde(flatten)]
    records: Option<RecordReport>,
    console_bytes_missing: u64,
    console_bytes_merged: u64,
    failover: Option<FailoverReport>,
    kill_to_first_new_output_ms: Option<f64>,
    client: Option<ClientReport>,
    log_mbit_s: f64,
    log_bytes: u64,
    output_delay_us: f64,
    seconds: f64,
    /// Nothing missing, nothing repeated, disk clean.
    pub good: bool,
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
        let lines = ledger.line_gaps(wanted);
        let records = verdicts.records.map(|verdicts| RecordReport::new(ledger, wanted, verdicts));
        let channel = primary.channel.clone().unwrap_or_default();
        let good = lines == Gaps::default()
            && records.as_ref().is_none_or(|records| records.good)
            && verdicts.client.is_none_or(|client| client.is_good())
            && ledger.is_done()
            && verdicts.bytes_missing == 0;
        Self {
            lines_seen: ledger.printed_count(),
            lines_missing: lines.missing,
            lines_repeated: lines.repeated,
            records,
            console_bytes_missing: verdicts.bytes_missing,
            console_bytes_merged: verdicts.bytes_repeated_to_readers,
            failover: survivor.and_then(|status| status.failover),
            kill_to_first_new_output_ms: first_output.map(|time| time.as_secs_f64() * 1e3),
            client: verdicts.client,
            log_mbit_s: channel.log_mbit_s,
            log_bytes: channel.log_bytes,
            output_delay_us: primary.output_delay_us,
            seconds: elapsed.as_secs_f64(),
            good,
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
        if let Some(records) = &self.records {
            println!(
                "  records   {:6}   {:6}    {:6}   ({} on the disk)",
                records.records_seen,
                records.records_missing,
                records.records_repeated,
                records.records_on_disk
            );
            let clean = if records.disk_clean { "clean" } else { "NOT CLEAN" };
            println!("  file system           {clean}");
        }
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
                "  replay                {:.1} ms (to point {})",
                failover.replay_ms, failover.point
            );
        }
        println!("  kill to first output  {}", ms(self.kill_to_first_new_output_ms));
        if let Some(client) = &self.client {
            println!(
                "  client                {} answers over one connection, {} after the kill",
                client.answers, client.answers_after_kill
            );
            println!(
                "  client's longest gap  {:.1} ms (median of an answer {:.2} ms)",
                client.longest_gap_ms, client.median_ms
            );
        }
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
            if let Some(records) = self.records.as_ref().filter(|records| !records.disk_clean) {
                println!("{}", records.disk_report);
            }
        }
    }
}
