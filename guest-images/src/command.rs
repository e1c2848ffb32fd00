//! Runs other programs, in the C locale, and turns their failures into errors.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};

/// Why a program did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It could not be started.
    #[error("starting {program}")]
    Start {
        /// Its name.
        program: String,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// It said that it failed.
    #[error("{program} ended with {status}: {message}")]
    Failed {
        /// Its name.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// What it printed about it, on one line.
        message: String,
    },
}

/// How a program ended that is allowed to fail.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

/// Directories searched besides `PATH`: where Debian keeps programs for the administrator.
const SYSTEM_DIRECTORIES: [&str; 2] = ["/usr/sbin", "/sbin"];

/// The program's file, if it is installed.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin"));
    std::env::split_paths(&path)
        .chain(SYSTEM_DIRECTORIES.map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|file| file.is_file())
}

/// A command that finds `program` where [`find`] does and speaks plain English.
pub(crate) fn command(program: &str) -> Command {
    let file = find(program).unwrap_or_else(|| PathBuf::from(program));
    let mut command = Command::new(file);
    command.env("LC_ALL", "C").stdin(Stdio::null());
    command
}

/// Runs it to its end, whatever that is.
pub(crate) fn run(mut command: Command) -> Result<Outcome, CommandError> {
    let output = command
        .output()
        .map_err(|source| CommandError::Start { program: name(&command), source })?;
    Ok(Outcome {
        status: output.status,
        stdout: output.stdout,
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Runs it and returns what it printed, or the failure it reported.
pub(crate) fn succeed(command: Command) -> Result<Vec<u8>, CommandError> {
    let program = name(&command);
    let outcome = run(command)?;
    if outcome.status.success() {
        return Ok(outcome.stdout);
    }
    Err(CommandError::Failed { program, status: outcome.status, message: complaint(&outcome) })
}

/// The last line of what it complained, on one line.
pub(crate) fn complaint(outcome: &Outcome) -> String {
    let errors: Vec<&str> = outcome
        .stderr
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with("W:"))
        .collect();
    match errors.last() {
        Some(line) => (*line).to_owned(),
        None => "it did not say why".to_owned(),
    }
}

fn name(command: &Command) -> String {
    let program = PathBuf::from(command.get_program());
    program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned()
}
