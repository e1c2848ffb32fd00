//! `vmft doctor`.

use crate::disk_doctor::{self, DiskReport};
use crate::engine_options::CompilerOptions;
use crate::options::DiskOption;
use crate::progress::TerminalProgress;
use crate::terminal::say;
use anyhow::Result;
use clap::Args;
use std::process::ExitCode;
use vmft_guest_images::Progress;
use vmft_vmm::doctor::findings::{Finding, Grade, summary};
use vmft_vmm::doctor::{Examination, Report};

/// Options of `vmft doctor`.
#[derive(Debug, Args)]
pub struct DoctorOptions {
    /// The report as JSON
    #[arg(long)]
    json: bool,
    /// Examine this disk instead of the host: what it can do for a machine or a pair, and what follows. May be
    /// given several times. Nothing on it is changed
    #[arg(long, value_name = "path=FILE|nbd=HOST:PORT/NAME")]
    disk: Vec<DiskOption>,
    #[command(flatten)]
    compiler: CompilerOptions,
}

/// Columns of a terminal the report is made for.
const WIDTH: usize = 120;
/// Columns of `fact`, `measured` and `expected`; the rest is for what follows.
const COLUMNS: [usize; 3] = [38, 24, 18];

/// Examines this host, or disks, and says what they can do. Whatever it finds, the report is a success.
pub fn doctor(options: &DoctorOptions) -> Result<ExitCode> {
    if !options.disk.is_empty() {
        let reports: Vec<_> = options.disk.iter().map(disk_doctor::examine).collect();
        if options.json {
            say(&serde_json::to_string_pretty(&reports)?)?;
        } else {
            for line in reports.iter().flat_map(disk_lines) {
                say(&line)?;
            }
        }
        return Ok(ExitCode::SUCCESS);
    }
    options.compiler.apply()?;
    let mut progress = crate::progress::terminal();
    let report = examine(&mut progress);
    drop(progress);
    if options.json {
        say(&serde_json::to_string_pretty(&report)?)?;
    } else {
        for line in lines(&report) {
            say(&line)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn examine(progress: &mut TerminalProgress) -> Report {
    Examination::of_this_host().examine(|what| progress.step(what))
}

/// The report for people.
fn lines(report: &Report) -> Vec<String> {
    let mut lines = row("", ["fact", "measured", "expected"], "what follows");
    for finding in &report.findings {
        lines.extend(finding_lines(finding));
    }
    lines.push(String::new());
    lines.push("--engine auto takes".to_owned());
    for decision in &report.verdict.decisions {
        lines.extend(wrapped("  ", "    ", &summary(decision)));
        for rejected in &decision.rejected {
            let not = if rejected.possible { "not by itself" } else { "not" };
            let text = format!("{not} {}: {}", rejected.choice, rejected.why);
            lines.extend(wrapped("    ", "      ", &text));
        }
    }
    lines
}

/// The report on a disk for people.
fn disk_lines(report: &DiskReport) -> Vec<String> {
    let mut lines = vec![format!("disk {}", report.disk)];
    lines.extend(row("", ["fact", "measured", "expected"], "what follows"));
    report.findings.iter().for_each(|finding| lines.extend(finding_lines(finding)));
    lines
}

fn finding_lines(finding: &Finding) -> Vec<String> {
    let mark = match finding.grade {
        Grade::Good => "ok",
        Grade::Note => "",
        Grade::Bad => "NO",
    };
    row(mark, [&finding.fact, &finding.measured, &finding.expected], &finding.follows)
}

/// One row of the table, on as many lines as its fullest column needs.
fn row(mark: &str, columns: [&str; 3], follows: &str) -> Vec<String> {
    let rest = WIDTH - 3 - COLUMNS.iter().map(|width| width + 1).sum::<usize>();
    let mut cells = Vec::new();
    for (text, width) in columns.into_iter().zip(COLUMNS) {
        cells.push((folded(text, width), width));
    }
    cells.push((folded(follows, rest), rest));
    let height = cells.iter().map(|(lines, _)| lines.len()).max().unwrap_or_default();
    let line = |at: usize| {
        let mut line = format!("{:3}", if at == 0 { mark } else { "" });
        for (lines, width) in &cells {
            let text = lines.get(at).map_or("", String::as_str);
            line.push_str(&format!("{text:width$} "));
        }
        line.trim_end().to_owned()
    };
    (0..height).map(line).collect()
}

/// `text` behind `first`, its further lines behind `others`.
fn wrapped(first: &str, others: &str, text: &str) -> Vec<String> {
    let lines = folded(text, WIDTH - others.len());
    let with_indent = |(at, line)| format!("{}{line}", if at == 0 { first } else { others });
    lines.into_iter().enumerate().map(with_indent).collect()
}

/// `text` in lines of at most `width` characters, cut at spaces where there are any.
fn folded(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let mut word = word.to_owned();
        loop {
            let last = lines.last_mut().expect("there is always a line");
            let used = last.chars().count();
            let gap = usize::from(used > 0);
            if used + gap + word.chars().count() <= width {
                if gap == 1 {
                    last.push(' ');
                }
                last.push_str(&word);
                break;
            }
            if used == 0 {
                // A word longer than the column.
                let rest = word.split_off(word.char_indices().nth(width).map_or(0, |at| at.0));
                last.push_str(&word);
                word = rest;
            }
            lines.push(String::new());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_at_spaces_and_long_words_anywhere() {
        assert_eq!(folded("a bb ccc", 4), ["a bb", "ccc"]);
        assert_eq!(folded("abcdefgh ij", 3), ["abc", "def", "gh", "ij"]);
        assert_eq!(folded("µµµµ", 3), ["µµµ", "µ"]);
        assert_eq!(folded("", 3), [""]);
    }

    #[test]
    fn the_report_fits_its_width_whatever_is_in_it() {
        let long = "an explanation that goes on and on ".repeat(9);
        let finding = Finding {
            fact: long.clone(),
            grade: Grade::Bad,
            measured: "x".repeat(200),
            expected: long.clone(),
            follows: long,
        };
        let lines = finding_lines(&finding);
        assert!(lines.iter().all(|line| line.chars().count() <= WIDTH), "{lines:#?}");
        assert_eq!(lines.iter().filter(|line| line.starts_with("NO")).count(), 1);
    }

    #[test]
    fn a_host_without_kvm_gets_a_report_for_people() {
        let nowhere = std::path::Path::new("/nonexistent/kvm");
        let report = Examination::of_device(nowhere).examine(|_| {});
        let text = lines(&report).join("\n");
        assert!(text.contains("NO /nonexistent/kvm"), "{text}");
        assert!(text.contains("probe guest, protected: soft"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
    }
}
