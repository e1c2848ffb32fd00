//! `vmft explain`: what the event logs of a pair tell.

use crate::explain::{Judged, Story, judge_again, read_all, svg, text};
use crate::remedy::Remedy;
use crate::terminal::say;
use anyhow::{Context, Result};
use clap::Args;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use vmft_backup::tell;

/// Options of `vmft explain`.
#[derive(Debug, Args)]
pub struct ExplainOptions {
    /// Event logs: what sides of one pair have written with --event-log
    #[arg(required = true, num_args = 1.., value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Draw it as well, into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Also what the judges of who may go live were told, and what they ordered
    #[arg(long)]
    all: bool,
}

/// Draws the story of event logs into a file.
///
/// # Errors
/// A file that cannot be read or written, or is no event log.
pub fn draw(files: &[PathBuf], svg_file: &Path) -> Result<()> {
    let lives = read_all(files)?;
    write(&Story::of(&lives), svg_file)
}

fn write(story: &Story<'_>, svg_file: &Path) -> Result<()> {
    let picture = svg::draw(story)?;
    std::fs::write(svg_file, picture)
        .with_context(|| format!("writing {}", svg_file.display()))
        .remedy(|| "--svg takes a path for a file")
}

/// Tells what happened. The exit code is 1 if a judge ordered what it would not order here.
pub fn explain(options: &ExplainOptions) -> Result<ExitCode> {
    let lives = read_all(&options.files)?;
    let story = Story::of(&lives);
    say(text::write(&story, options.all)?.trim_end())?;
    if let Some(file) = &options.svg {
        write(&story, file)?;
        tell!("drawn in {}", file.display());
    }
    let differ = lives.iter().any(|life| matches!(judge_again(life), Judged::Differ { .. }));
    Ok(if differ { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
