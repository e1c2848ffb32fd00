//! The `vmft` command line.

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use tracing_subscriber::filter::LevelFilter;
use vmft::commands;

/// Fault-tolerant virtual machines: an unmodified Linux guest runs on two hosts at once; when one
/// dies, the other goes on from the same instruction.
///
/// `vmft demo` shows it on this machine. For two hosts that share a disk image:
///
///   host A: vmft primary --disk path=/shared/guest.img --listen tcp:0.0.0.0:7000
///   host B: vmft backup --disk path=/shared/guest.img --primary tcp:A:7000
#[derive(Debug, Parser)]
#[command(name = "vmft", version, max_term_width = 100)]
struct Cli {
    /// Say more on standard error; twice for everything
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    /// Write the program's own messages to this file instead of standard error
    #[arg(long, value_name = "FILE", global = true)]
    log_file: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show a guest surviving the loss of its primary, on this machine
    Demo(commands::demo::DemoOptions),
    /// Run a guest unprotected
    Run(commands::run::RunOptions),
    /// Run a guest that a backup can follow and take over
    Primary(commands::primary::PrimaryOptions),
    /// Follow a primary, and take over when it is lost
    Backup(commands::backup::BackupOptions),
    /// Run a guest and record everything that replays it to a file
    Record(commands::record::RecordOptions),
    /// Replay a recorded guest and compare every digest
    Replay(commands::replay::ReplayOptions),
    /// Show what a running side is doing
    Status(commands::control::StatusOptions),
    /// Stop a running guest and its pair, cleanly
    Stop(commands::control::StopOptions),
    /// Write a snapshot of a running guest
    Snapshot(commands::control::SnapshotOptions),
    /// Attach to the console of one or both sides
    Console(commands::console::ConsoleOptions),
    /// Make the certificates with which the two sides know each other
    TlsInit(commands::tls_init::TlsInitOptions),
    /// Fetch or build the default guest, and say where it is
    Guest(commands::guest::GuestOptions),
}

fn set_up_log(cli: &Cli) -> Result<()> {
    let level = match cli.verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        _ => LevelFilter::DEBUG,
    };
    let log = tracing_subscriber::fmt().with_max_level(level).with_target(false);
    match &cli.log_file {
        Some(path) => {
            let file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
            log.with_ansi(false).with_writer(file).init();
        }
        None => log.with_writer(std::io::stderr).init(),
    }
    Ok(())
}

fn run(cli: Cli) -> Result<ExitCode> {
    set_up_log(&cli)?;
    match cli.command {
        Command::Demo(options) => commands::demo::demo(&options),
        Command::Run(options) => commands::run::run(&options),
        Command::Primary(options) => commands::primary::primary(&options),
        Command::Backup(options) => commands::backup::backup(&options),
        Command::Record(options) => commands::record::record(&options),
        Command::Replay(options) => commands::replay::replay(&options),
        Command::Status(options) => commands::control::status(&options),
        Command::Stop(options) => commands::control::stop(&options),
        Command::Snapshot(options) => commands::control::snapshot(&options),
        Command::Console(options) => commands::console::console(&options),
        Command::TlsInit(options) => commands::tls_init::tls_init(&options),
        Command::Guest(options) => commands::guest::guest(&options),
    }
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            // One line, whatever the chain: what went wrong, then why.
            eprintln!("vmft: {error:#}");
            ExitCode::FAILURE
        }
    }
}
