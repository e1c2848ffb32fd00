//! `vmft completions` and `vmft man`: what a shell and `man` know of the command line.

use crate::remedy::Remedy;
use anyhow::{Context, Result};
use clap::{Args, Command};
use clap_complete::Shell;
use std::fs::DirBuilder;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// Options of `vmft completions`.
#[derive(Debug, Args)]
pub struct CompletionsOptions {
    /// The shell
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

/// Options of `vmft man`.
#[derive(Debug, Args)]
pub struct ManOptions {
    /// The directory; it is made if it is not there
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Prints what a shell needs to complete `command`.
pub fn completions(options: &CompletionsOptions, mut command: Command) -> Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut command, "vmft", &mut script);
    io::stdout().write_all(&script).context("printing the completions")?;
    Ok(ExitCode::SUCCESS)
}

/// Writes a page for `command`, and for each of its subcommands.
pub fn man(options: &ManOptions, command: Command) -> Result<ExitCode> {
    let directory = &options.directory;
    DirBuilder::new()
        .recursive(true)
        .create(directory)
        .and_then(|()| clap_mangen::generate_to(command, directory))
        .with_context(|| format!("writing to {}", directory.display()))
        .remedy(|| "name a directory that this user may write")?;
    Ok(ExitCode::SUCCESS)
}
