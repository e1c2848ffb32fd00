//! The options that say which engine executes the guest, and how.

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use vmft_backup::epoch::Protection;
use vmft_cpu::soft::{self, CompilerMode};
use vmft_kvm::PointKind;
use vmft_vmm::engine::EngineKind;

/// What executes the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EngineChoice {
    /// The best that this host can do for the guest, found by running the doctor's probes
    Auto,
    /// An interpreter in user space: everywhere, any kernel, exact
    Soft,
    /// The host's KVM
    Kvm,
}

impl EngineChoice {
    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Soft => "soft",
            Self::Kvm => "kvm",
        }
    }
}

/// What names a place in the guest's run on KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PointsChoice {
    /// The number of the guest's exits; what arrives waits for the next
    Exit,
    /// The number of instructions, stepped one by one: slow
    Step,
    /// Exits, and between them the branches that the host's performance counter counts: only where it
    /// passes the doctor's test
    Pmu,
}

impl PointsChoice {
    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exit => "exit",
            Self::Step => "step",
            Self::Pmu => "pmu",
        }
    }
}

/// Whether the soft engine compiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CompilerChoice {
    /// What is executed often runs as code for the host's CPU
    On,
    /// Everything is interpreted
    Off,
    /// As on, and what the code does is compared with what the interpreter does, each time: a
    /// difference stops the guest with a report. For finding faults of vmft; very slow
    Check,
}

impl From<CompilerChoice> for CompilerMode {
    fn from(choice: CompilerChoice) -> Self {
        match choice {
            CompilerChoice::On => Self::On,
            CompilerChoice::Off => Self::Off,
            CompilerChoice::Check => Self::Check,
        }
    }
}

/// How --engine soft executes the guest, which shows nowhere but in its speed.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct CompilerOptions {
    /// Whether --engine soft compiles what it executes often. The guest runs the same either way, and so
    /// does the other side. Default: on, where the host lets memory be executed
    #[arg(long, value_enum, help_heading = "Machine")]
    pub soft_compiler: Option<CompilerChoice>,
}

impl CompilerOptions {
    /// Has it for the engines made from here on.
    ///
    /// # Errors
    /// If code is to be checked where there is none.
    pub fn apply(self) -> Result<()> {
        let mode = self.soft_compiler.map_or(CompilerMode::On, Into::into);
        if mode == CompilerMode::Check
            && let Some(why) = soft::compiler_obstacle()
        {
            bail!("--soft-compiler check: there is nothing to check on this host: {why}");
        }
        soft::set_compiler(mode);
        Ok(())
    }

    /// The same on another command line.
    fn arguments(self) -> impl Iterator<Item = &'static str> {
        let words =
            self.soft_compiler.map(|choice| ["--soft-compiler", CompilerMode::from(choice).name()]);
        words.into_iter().flatten()
    }
}

/// Which engine, and what it counts.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct EngineOptions {
    /// What executes the guest. Default: soft, which can be protected with any kernel, on any host
    #[arg(long, value_enum, help_heading = "Machine")]
    pub engine: Option<EngineChoice>,
    /// What names a place in the guest's run on --engine kvm. Default: exit where the guest is
    /// recorded or followed; else none, and the guest runs freely
    #[arg(long, value_enum, requires = "engine", help_heading = "Machine")]
    pub points: Option<PointsChoice>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "a text here would replace the command's own")]
    pub compiler: CompilerOptions,
}

/// Whether somebody replays what a machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunKind {
    /// Nobody does: nobody follows, or a backup is kept by the machine's state.
    Free,
    /// It is recorded, or a backup replays it.
    Replayed,
}

impl From<Protection> for RunKind {
    fn from(protection: Protection) -> Self {
        match protection {
            Protection::Lockstep => Self::Replayed,
            Protection::Checkpoint(_) => Self::Free,
        }
    }
}

impl EngineOptions {
    /// The engine, if one is named: not with `auto`, for which this host has to be examined
    /// ([`crate::host_choice`]).
    pub fn wanted(&self, run_kind: RunKind) -> Result<Option<EngineKind>> {
        let points = match (self.points, run_kind) {
            (Some(PointsChoice::Pmu), _) => PointKind::Pmu,
            (Some(PointsChoice::Step), _) => PointKind::Step,
            (Some(PointsChoice::Exit), _) | (None, RunKind::Replayed) => PointKind::Exit,
            (None, RunKind::Free) => PointKind::Free,
        };
        Ok(match self.engine {
            Some(EngineChoice::Soft) if self.points.is_some() => {
                bail!("--points is for --engine kvm; soft always counts instructions")
            }
            Some(EngineChoice::Auto) if self.points.is_some() => {
                bail!("--points is for --engine kvm; auto takes the points that suit the host")
            }
            Some(EngineChoice::Soft) => Some(EngineKind::Soft),
            Some(EngineChoice::Kvm) => Some(EngineKind::Kvm { points }),
            Some(EngineChoice::Auto) | None => None,
        })
    }

    /// The same on another command line.
    pub fn arguments(&self) -> Vec<&'static str> {
        let engine = self.engine.map(|engine| ["--engine", engine.name()]);
        let points = self.points.map(|points| ["--points", points.name()]);
        let words = engine.into_iter().chain(points).flatten();
        words.chain(self.compiler.arguments()).collect()
    }
}

/// What to do where the kvm engine does not serve.
pub const ENGINE_REMEDY: &str =
    "`vmft doctor` says what this host's KVM can do; --engine soft runs everywhere";
