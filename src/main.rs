//! The `vmft` command line.

use anyhow::{Context, Result};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};
use std::ffi::OsString;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use vmft::event_log::Troubles;
use vmft::remedy::{Remedy, one_line};
use vmft::{commands, examples, interrupt, process, service};
use vmft_backup::events::{self, Ending, Event};
use vmft_backup::tell;

/// Fault-tolerant virtual machines: an unmodified Linux guest runs on two hosts at once; when one
/// dies, the other goes on from the same instruction.
///
/// `vmft demo` shows it on this machine; `vmft primary --help` begins with two hosts.
#[derive(Debug, Parser)]
#[command(name = "vmft", version, max_term_width = 100)]
struct Cli {
    /// Say more on standard error; twice for everything
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    /// Write the program's own messages to this file instead of standard error
    #[arg(long, value_name = "FILE", global = true)]
    log_file: Option<PathBuf>,
    /// Leave a core dump if the program crashes: it has the guest's memory in it
    #[arg(long, global = true)]
    allow_core_dumps: bool,
    /// End with the process of this number, which has started this one
    #[arg(long = process::END_WITH, value_name = "PID", global = true, hide = true)]
    end_with: Option<u32>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show a guest surviving the loss of its primary, on this machine
    #[command(after_help = examples::DEMO)]
    Demo(commands::demo::DemoOptions),
    /// Run a guest unprotected
    #[command(after_help = examples::RUN)]
    Run(commands::run::RunOptions),
    /// Run a guest that a backup can follow and take over
    #[command(after_help = examples::PRIMARY)]
    Primary(commands::primary::PrimaryOptions),
    /// Follow a primary, and take over when it is lost
    #[command(after_help = examples::BACKUP)]
    Backup(commands::backup::BackupOptions),
    /// Wait for a live side without a backup, again and again: follow it, and take over when it is lost
    #[command(after_help = examples::STANDBY)]
    Standby(commands::backup::StandbyOptions),
    /// Bring up this host's side of a pair that one file describes: the guest begins here, or this side
    /// follows, as the arbiter's state says; the same after any crash
    #[command(after_help = examples::UP)]
    Up(commands::up::UpOptions),
    /// Show what is in force for the sides of a pair that one file describes, and where it comes from
    #[command(after_help = examples::CONFIG)]
    Config(commands::up::ConfigOptions),
    /// Run a guest and record everything that replays it to a file
    #[command(after_help = examples::RECORD)]
    Record(commands::record::RecordOptions),
    /// Replay a recorded guest and compare every digest
    #[command(after_help = examples::REPLAY)]
    Replay(commands::replay::ReplayOptions),
    /// Show what a running side is doing
    #[command(after_help = examples::STATUS)]
    Status(commands::control::StatusOptions),
    /// Show the sides of a pair on a page, live, to browsers; with --control, with buttons
    #[command(after_help = examples::DASHBOARD)]
    Dashboard(commands::dashboard::DashboardOptions),
    /// Stop a side cleanly: a live one with its guest and its pair, a backup by itself
    #[command(after_help = examples::STOP)]
    Stop(commands::control::StopOptions),
    /// Hand the guest over to its backup on purpose, with everything out: for maintenance
    #[command(after_help = examples::SWITCH)]
    Switch(commands::control::SwitchOptions),
    /// Have the guest stand still, protected as before, until `vmft resume`
    #[command(after_help = examples::PAUSE)]
    Pause(commands::control::PauseOptions),
    /// Have a paused guest go on, and try again what a disk's storage has failed at
    #[command(after_help = examples::RESUME)]
    Resume(commands::control::ResumeOptions),
    /// Change how far a backup may be behind, while the guest runs
    #[command(after_help = examples::SET)]
    Set(commands::control::SetOptions),
    /// Write a snapshot of a running guest
    #[command(after_help = examples::SNAPSHOT)]
    Snapshot(commands::control::SnapshotOptions),
    /// Tell what happened to a pair, from what its sides wrote with --event-log
    #[command(after_help = examples::EXPLAIN)]
    Explain(commands::explain::ExplainOptions),
    /// Let something go wrong on a side, to see what the pair does about it
    #[command(after_help = examples::FAULT)]
    Fault(commands::fault::FaultOptions),
    /// Attach to the console of one or both sides
    #[command(after_help = examples::CONSOLE)]
    Console(commands::console::ConsoleOptions),
    /// Serve disks to pairs whose hosts share none
    Disk(commands::disk::DiskOptions),
    /// Make raw disks of images as they are shipped
    Image(commands::image::ImageOptions),
    /// Make, renew and revoke the certificates with which the sides of a pair know each other
    #[command(after_help = examples::KEYS)]
    Keys(commands::keys::KeysOptions),
    /// The same as `vmft keys --dir DIR add primary backup`
    #[command(after_help = examples::TLS_INIT)]
    TlsInit(commands::keys::TlsInitOptions),
    /// Examine this host: what its KVM can do, and which engine would be taken
    #[command(after_help = examples::DOCTOR)]
    Doctor(commands::doctor::DoctorOptions),
    /// Print a script that completes this program's command line in a shell
    #[command(after_help = examples::COMPLETIONS)]
    Completions(commands::shell::CompletionsOptions),
    /// Write manual pages, one for each command
    #[command(after_help = examples::MAN)]
    Man(commands::shell::ManOptions),
    /// Fetch or build the default guest, and say where it is
    #[command(after_help = examples::GUEST)]
    Guest(commands::guest::GuestOptions),
}

fn set_up_log(cli: &Cli) -> Result<()> {
    let level = match cli.verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        _ => LevelFilter::DEBUG,
    };
    let log = tracing_subscriber::fmt::layer().with_target(false);
    let messages = tracing_subscriber::registry().with(level).with(Troubles);
    match &cli.log_file {
        Some(path) => {
            let file = std::fs::OpenOptions::new()
                .create(true)
                .append(true)
                .mode(0o600)
                .open(path)
                .with_context(|| format!("opening {}", path.display()))
                .remedy(|| "--log-file takes a file that this user may write")?;
            tell::to_file(file);
            messages.with(log.with_ansi(false).with_writer(tell::writer)).init();
        }
        None => messages.with(log.with_writer(tell::writer)).init(),
    }
    Ok(())
}

/// The options of every command, as a side that this process starts is given them.
fn passed_on(cli: &Cli) -> Vec<OsString> {
    let mut words: Vec<OsString> = (0..cli.verbose).map(|_| "-v".into()).collect();
    if let Some(path) = &cli.log_file {
        words.extend(["--log-file".into(), path.into()]);
    }
    if cli.allow_core_dumps {
        words.push("--allow-core-dumps".into());
    }
    words
}

fn run(cli: Cli) -> Result<ExitCode> {
    if let Some(parent) = cli.end_with
        && !process::end_with(parent).context("ending with another process")?
    {
        return Ok(ExitCode::FAILURE);
    }
    if !cli.allow_core_dumps {
        process::forbid_core_dumps()
            .context("forbidding core dumps")
            .remedy(|| "--allow-core-dumps goes on without that")?;
    }
    set_up_log(&cli)?;
    let globals = passed_on(&cli);
    match cli.command {
        Command::Demo(options) => commands::demo::demo(&options),
        Command::Run(options) => commands::run::run(&options),
        Command::Primary(options) => commands::primary::primary(&options),
        Command::Backup(options) => commands::backup::backup(&options),
        Command::Standby(options) => commands::backup::standby(&options),
        Command::Up(options) => commands::up::up(&options, globals),
        Command::Config(options) => commands::up::config(&options),
        Command::Record(options) => commands::record::record(&options),
        Command::Replay(options) => commands::replay::replay(&options),
        Command::Status(options) => commands::control::status(&options),
        Command::Dashboard(options) => commands::dashboard::dashboard(&options),
        Command::Stop(options) => commands::control::stop(&options),
        Command::Switch(options) => commands::control::switch(&options),
        Command::Pause(options) => commands::control::pause(&options),
        Command::Resume(options) => commands::control::resume(&options),
        Command::Set(options) => commands::control::set(&options),
        Command::Snapshot(options) => commands::control::snapshot(&options),
        Command::Explain(options) => commands::explain::explain(&options),
        Command::Fault(options) => commands::fault::fault(&options),
        Command::Console(options) => commands::console::console(&options),
        Command::Disk(options) => commands::disk::disk(&options),
        Command::Image(options) => commands::image::image(&options),
        Command::Keys(options) => commands::keys::keys(&options),
        Command::TlsInit(options) => commands::keys::tls_init(&options),
        Command::Doctor(options) => commands::doctor::doctor(&options),
        Command::Completions(options) => commands::shell::completions(&options, Cli::command()),
        Command::Man(options) => commands::shell::man(&options, Cli::command()),
        Command::Guest(options) => commands::guest::guest(&options),
    }
}

/// How long a process that ends waits for a reader of its last messages.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Exit code for a command line that makes no sense.
const USAGE: u8 = 2;

/// Says on standard error what went wrong, in one line.
fn complain(text: &str) {
    tell!("{}", one_line(text));
}

/// Answers a command line that is no command: help where it was asked for, one line where not.
fn refuse(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        // Help that nobody reads is not missed.
        let _ = error.print();
        return if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
    }
    let text = error.to_string();
    let what = text.split("\n\nUsage:").next().unwrap_or_default();
    let what = what.split("\n\nFor more").next().unwrap_or_default();
    let what = what.strip_prefix("error: ").unwrap_or(what);
    let command = std::env::args()
        .skip(1)
        .find(|word| Cli::command().find_subcommand(word).is_some())
        .map_or_else(String::new, |word| format!(" {word}"));
    complain(&format!("{what}; see `vmft{command} --help`"));
    ExitCode::from(USAGE)
}

fn main() -> ExitCode {
    tell::say_panics(LAST_WORDS);
    vmft_vmm::machine::abort_on_panics();
    let cli = Cli::try_parse();
    // A side that `vmft up` has started is no service of its own.
    let is_part = cli.as_ref().is_ok_and(|cli| cli.end_with.is_some());
    let code = match cli {
        Err(error) => refuse(&error),
        Ok(cli) => run(cli).unwrap_or_else(|error| {
            // What went wrong, then why.
            let text = format!("{error:#}");
            complain(&text);
            events::note(|| Event::End { how: Ending::Failed(one_line(&text).into()) });
            ExitCode::FAILURE
        }),
    };
    interrupt::finish(LAST_WORDS);
    events::finish(LAST_WORDS);
    if !is_part {
        service::tell_end();
    }
    // Whoever does not read it sees the exit code.
    tell::finish(LAST_WORDS);
    code
}
