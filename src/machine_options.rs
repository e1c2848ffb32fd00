//! The options that say what the machine is, and how they become one.

use crate::disk_boot::{BootChoice, DiskBootOptions, Outlook};
use crate::disk_images::OpenDisks;
use crate::engine_options::{ENGINE_REMEDY, EngineChoice, EngineOptions, RunKind};
use crate::event_log;
use crate::host_choice;
use crate::metrics_server::MetricsOption;
use crate::net_options::NetOption;
use crate::options::{CpusOption, DiskOption, MemoryOption, SerialOption, disks_and_seed};
use crate::pair_options::disk_configs;
use crate::protection_options::DiskTimeoutOption;
use crate::remedy::Remedy;
use crate::sandbox_options::SandboxOptions;
use crate::seed::SeedFiles;
use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use vmft_backup::arbiter::Candidate;
use vmft_backup::requests::Requests;
use vmft_backup::side::Side;
use vmft_backup::status::StatusBoard;
use vmft_backup::tell;
use vmft_boot_loader::cmdline as boot_loader;
use vmft_cpu::CpuCount;
use vmft_guest_images::{Cache, Workload, cmdline, default_guest, lockstep_guest};
use vmft_kvm::PointKind;
use vmft_vmm::board::{BoardConfig, Bytes, DiskConfig, UnixSeconds};
use vmft_vmm::boot::BootError;
use vmft_vmm::engine::EngineKind;
use vmft_vmm::inputs::{OnReboot, WallClock};
use vmft_vmm::machine::{BootSource, Machine, MachineConfig, SetupError};
use vmft_vmm::snapshot;
use vmft_vmm::world::console::{ConsoleHub, EarlyInput};
use vmft_vmm::world::net::NetPort;
use vmft_vmm::world::{DiskDesk, DiskFile, DiskPolicy, FromDisk, Mailbox, OnError};

/// What the machine is made of. Without `--kernel` and `--restore`: what boots from a disk, or the
/// default guest.
#[derive(Debug, Clone, Args)]
pub struct MachineOptions {
    /// Kernel: a bzImage or an ELF vmlinux. Default: what a disk boots, or else Debian's cloud
    /// kernel, fetched once
    #[arg(long, value_name = "FILE", help_heading = "Machine")]
    pub kernel: Option<PathBuf>,
    /// The default guest with the lockstep kernel of `vmft guest --lockstep`, which can be followed on
    /// every engine
    #[arg(long, conflicts_with = "kernel", help_heading = "Machine")]
    pub lockstep_kernel: bool,
    /// Initial file system for --kernel
    #[arg(long, value_name = "FILE", requires = "kernel", help_heading = "Machine")]
    pub initramfs: Option<PathBuf>,
    /// Words for the kernel's command line, behind those that the board needs (`vmft guest
    /// --print-cmdline`) and those of a disk's boot entry. With the default guest such as
    /// vmft.run=shell|idle
    #[arg(long, value_name = "WORDS", help_heading = "Machine")]
    pub cmdline: Option<String>,
    /// Guest CPUs, 1 to 4. More than one on --engine kvm, where the guest runs freely: unprotected, or
    /// with --protect checkpoint. Default: boot=1
    #[arg(long, value_name = "boot=N", help_heading = "Machine")]
    pub cpus: Option<CpusOption>,
    /// Guest memory, 64M to 4G
    #[arg(long, value_name = "size=SIZE", default_value = "size=256M", help_heading = "Machine")]
    pub memory: MemoryOption,
    /// A raw disk image, or a block device; may be given several times. Both sides of a pair name the same
    /// image. A file that looks like anything else is refused, unless format=raw says that it is a raw disk.
    /// A pair's is used without the host's cache, unless cache=writeback accepts what is lost with a host.
    /// on-error= and timeout= say of this disk what --on-error and --disk-timeout say of all. With mirror=on
    /// each side of a pair has a copy of its own, which size= makes where there is none; force=on begins on
    /// one that may not have everything
    #[arg(
        long,
        value_name = "path=FILE[,readonly=on|off][,cache=none|writeback][,format=raw][,mirror=on][,…]",
        help_heading = "Machine"
    )]
    pub disk: Vec<DiskOption>,
    /// What cloud-init of the guest is told at its first start: a small disk, behind all others, that is made
    /// of these files. Both sides of a pair name the same
    #[arg(
        long,
        value_name = "USER-DATA[,meta-data=FILE][,network-config=FILE][,vendor-data=FILE]",
        help_heading = "Machine"
    )]
    pub seed: Option<SeedFiles>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "a text here would replace the command's own")]
    pub disk_boot: DiskBootOptions,
    /// The guest's network: a TAP device, or a socket where `passt` (or QEMU) listens. Each side of a
    /// pair names its own
    #[arg(
        long,
        value_name = "tap=NAME|tap-fd=N|socket=PATH[,mac=MAC][,offloads=on|off]",
        help_heading = "Machine"
    )]
    pub net: Option<NetOption>,
    /// Start from a snapshot instead of booting; disks are given as when it was taken. With --engine,
    /// on that engine instead of the one it was taken on
    #[arg(long, value_name = "DIR",
          conflicts_with_all =
              ["kernel", "lockstep_kernel", "initramfs", "cmdline", "cpus", "memory"],
          help_heading = "Machine")]
    pub restore: Option<PathBuf>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "a text here would replace the command's own")]
    pub engine: EngineOptions,
}

/// What a guest's real-time clock is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ClockChoice {
    /// The host's time
    Host,
    /// Nothing once the guest has begun: it goes on from what it told
    Keep,
}

impl From<ClockChoice> for WallClock {
    fn from(choice: ClockChoice) -> Self {
        match choice {
            ClockChoice::Host => Self::Host,
            ClockChoice::Keep => Self::Keep,
        }
    }
}

/// What a guest's reset leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RebootChoice {
    /// It starts again
    Restart,
    /// The machine stops, and the pair with it
    Exit,
}

impl From<RebootChoice> for OnReboot {
    fn from(choice: RebootChoice) -> Self {
        match choice {
            RebootChoice::Restart => Self::Restart,
            RebootChoice::Exit => Self::Exit,
        }
    }
}

/// What happens when a disk's storage fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnErrorChoice {
    /// A backup takes the guest; without one that can, as stop
    Failover,
    /// The guest stands still until `vmft resume`, and hears nothing of the error
    Stop,
    /// The guest is told of the error
    Report,
}

impl From<OnErrorChoice> for OnError {
    fn from(choice: OnErrorChoice) -> Self {
        match choice {
            OnErrorChoice::Failover => Self::Failover,
            OnErrorChoice::Stop => Self::Stop,
            OnErrorChoice::Report => Self::Report,
        }
    }
}

/// How a side talks to people and programs on its host.
#[derive(Debug, Clone, Args)]
pub struct SideOptions {
    /// This side's name in its event log; else what it begins as
    #[arg(long, value_name = "NAME", help_heading = "This side")]
    pub name: Option<String>,
    /// The guest's console: tty, null, file=PATH (written at absolute offsets: both sides of a pair
    /// may name the same file), socket=PATH (for `vmft console`)
    #[arg(long, value_name = "WHERE", default_value = "tty", help_heading = "This side")]
    pub serial: SerialOption,
    /// What the guest's real-time clock tells when it begins here, is restored, or goes live after another
    /// side: the host's time, or what it told before. Its clocks of time passed never jump
    #[arg(long, value_enum, default_value = "host", help_heading = "This side")]
    pub clock: ClockChoice,
    /// What happens when the guest starts again: it does, or the machine stops. A guest that is reset five
    /// times within a minute without writing to a disk is stopped, and its last words are shown
    #[arg(long, value_enum, default_value = "restart", help_heading = "This side")]
    pub on_reboot: RebootChoice,
    /// What happens when a disk's storage fails for good (no room, an I/O error): a backup takes the guest,
    /// and without one it stands still; it stands still until `vmft resume`; or it is told of the error
    #[arg(long, value_enum, default_value = "failover", help_heading = "This side")]
    pub on_error: OnErrorChoice,
    /// A disk's request that takes longer is said to hang; with --on-error failover a backup takes the guest,
    /// if the request can do no harm later
    #[arg(long, value_name = "TIME", default_value = "30s", help_heading = "This side")]
    pub disk_timeout: DiskTimeoutOption,
    /// Unix socket for `vmft status`, `vmft stop`, `vmft snapshot` (HTTP, /api/v1/vm.*)
    #[arg(long, value_name = "PATH", help_heading = "This side")]
    pub api_socket: Option<PathBuf>,
    /// Where Prometheus reads this side's metrics (HTTP, /metrics); also on the API socket. An address that
    /// other hosts reach needs insecure=on
    #[arg(long, value_name = "127.0.0.1:PORT[,insecure=on]", help_heading = "This side")]
    pub metrics_listen: Option<MetricsOption>,
    /// Write what happens to this side to this file, for programs: a line of JSON for each change of role,
    /// join, loss, verdict and so on. `vmft explain` shows it
    #[arg(long, value_name = "FILE", help_heading = "This side")]
    pub event_log: Option<PathBuf>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "a text here would replace the command's own")]
    pub sandbox: SandboxOptions,
}

impl SideOptions {
    /// How its disks deal with storage that fails, if nothing else is said of them.
    pub fn disk_policy(&self) -> DiskPolicy {
        DiskPolicy { on_error: self.on_error.into(), timeout: self.disk_timeout.0 }
    }
}

/// The host's name, for people.
pub fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "this host".to_owned(), |name| name.trim().to_owned())
}

/// Bytes nobody else has.
fn fresh_bytes<const N: usize>() -> Result<[u8; N]> {
    use std::io::Read;
    let mut bytes = [0; N];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("reading random bytes")?;
    Ok(bytes)
}

/// The same, in hexadecimal.
pub fn fresh_id() -> Result<String> {
    let bytes: [u8; 16] = fresh_bytes()?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// This process with what it has for its guest; `early` says what becomes of what is typed before the guest
/// runs here.
pub fn make_side(
    options: &SideOptions,
    open: OpenDisks,
    network: Option<Arc<NetPort>>,
    role: &str,
    early: EarlyInput,
) -> Result<Side> {
    let who = Candidate {
        id: fresh_id()?,
        host: host_name().into(),
        pid: std::process::id(),
        role: role.into(),
    };
    if let Some(path) = &options.event_log {
        let name = options.name.as_deref().unwrap_or(role);
        event_log::open(path, name, &who)?;
    }
    Ok(Side {
        who,
        mailbox: Arc::new(Mailbox::default()),
        console: ConsoleHub::open(&options.serial.0, early)
            .remedy(|| "--serial takes tty, null, file=PATH or socket=PATH")?,
        disks: open.disks,
        mirrors: Arc::new(open.mirrors),
        disk_desk: Arc::<DiskDesk>::default(),
        network,
        wall_clock: options.clock.into(),
        on_reboot: options.on_reboot.into(),
        status: Arc::new(StatusBoard::default()),
        requests: Arc::new(Requests::default()),
        faults: Arc::default(),
        bounds: Arc::default(),
    })
}

impl MachineOptions {
    /// The disks, with the one that is made of a seed.
    pub fn disks(&self) -> Vec<DiskOption> {
        disks_and_seed(&self.disk, self.seed.as_ref())
    }

    fn start(&self) -> Result<Start> {
        let words = || self.cmdline.clone().unwrap_or_default();
        if let Some(kernel) = &self.kernel {
            if self.disk_boot.boot == Some(BootChoice::Disk) {
                bail!("--boot disk boots the kernel that is on a disk, and --kernel names another");
            }
            let mut files = BootFiles::read(kernel, self.initramfs.as_deref(), words())?;
            let is_ours = vmft_vmm::boot::is_vouched_for(&files.source.kernel);
            files.own = if is_ours { cmdline::LOCKSTEP } else { cmdline::DEFAULT };
            return Ok(Start::Files(files));
        }
        if self.lockstep_kernel {
            return self.default_guest().map(Start::Files);
        }
        Ok(match self.disk_boot.outlook(&self.disks())? {
            Outlook::None => Start::Files(self.default_guest()?),
            Outlook::Boots => Start::Disk { or: None },
            Outlook::Open => Start::Disk { or: Some(self.default_guest()?) },
        })
    }

    fn default_guest(&self) -> Result<BootFiles> {
        let cache = Cache::from_environment()?;
        let (guest, own) = if self.lockstep_kernel {
            (lockstep_guest(&cache)?, cmdline::LOCKSTEP)
        } else {
            (default_guest(&cache, &mut crate::progress::terminal())?, cmdline::DEFAULT)
        };
        let words = self.cmdline.clone().unwrap_or_else(|| Workload::Shell.cmdline());
        let files = BootFiles::read(&guest.kernel, Some(&guest.initramfs), words)?;
        Ok(BootFiles { own, ..files })
    }

    /// What is booted, now that the disks are open.
    fn boot_files(&self, start: Start, disks: &[DiskFile]) -> Result<BootFiles> {
        let or = match start {
            Start::Files(files) => return Ok(files),
            Start::Disk { or } => or,
        };
        match self.disk_boot.read(disks, self.cmdline.as_deref())? {
            Some(FromDisk { source, told }) => {
                tell!("{told}");
                let kernel = PathBuf::from("the disk's kernel");
                let initramfs = Some(PathBuf::from("the disk's initramfs"));
                Ok(BootFiles { kernel, initramfs, source, own: cmdline::DEFAULT })
            }
            None => or.context("what was to boot is no longer on the disk"),
        }
    }

    /// How many CPUs the guest is to have.
    fn cpus(&self) -> CpuCount {
        self.cpus.map_or(CpuCount::ONE, |CpusOption(cpus)| cpus)
    }

    /// Reads what the guest boots from, or fetches it: before the sandbox, in which no program can be run
    /// that does so.
    pub fn prepare(&self, run_kind: RunKind) -> Result<Prepared> {
        self.engine.compiler.apply()?;
        // Wrong options come before wrong files.
        let wanted = self.engine.wanted(run_kind)?;
        self.check_cpus(wanted, run_kind)?;
        let boot = self.restore.is_none().then(|| self.start()).transpose()?;
        Ok(Prepared { wanted, boot, run_kind })
    }

    /// The machine, ready to run, on `disks`.
    pub fn machine(&self, prepared: Prepared, disks: &[DiskFile]) -> Result<Machine> {
        let run_kind = prepared.run_kind;
        let machine = self.make(prepared, disks)?;
        if run_kind == RunKind::Replayed {
            machine.check_lockstep()?;
        }
        Ok(machine)
    }

    /// The machine's connection to the network, open.
    pub fn network(&self, machine: &Machine) -> Result<Option<Arc<NetPort>>> {
        NetOption::port_of_machine(self.net.as_ref(), machine.config().board.net.as_ref())
    }

    /// Several CPUs are refused here where no engine could have them, before anything is looked at.
    fn check_cpus(&self, wanted: Option<EngineKind>, run_kind: RunKind) -> Result<()> {
        let cpus = self.cpus();
        if cpus.is_several() && run_kind == RunKind::Replayed {
            bail!(
                "a guest of {cpus} CPUs cannot be replayed, because it is more than one stream of \
                 instructions; a pair protects it with --engine kvm --protect checkpoint"
            );
        }
        let named = self.engine.engine != Some(EngineChoice::Auto);
        match wanted.or_else(|| named.then(EngineKind::default)) {
            Some(engine) if self.restore.is_none() => Ok(engine.check_cpus(cpus)?),
            _ => Ok(()),
        }
    }

    fn make(&self, prepared: Prepared, disks: &[DiskFile]) -> Result<Machine> {
        let Prepared { wanted, boot, run_kind } = prepared;
        let configs = disk_configs(disks);
        let Some(start) = boot else {
            let directory = self.restore.as_ref().expect("a guest is booted or restored");
            let mut machine = snapshot::restore(directory, wanted)
                .remedy(|| "--restore takes a directory that `vmft snapshot` has written")?;
            check_disks(&machine.config().board.disks, &configs)?;
            NetOption::check(self.net.as_ref(), machine.config().board.net.as_ref())?;
            host_choice::check(machine.config().engine, run_kind, machine.kernel())?;
            if let Err(why) = machine.become_a_copy(&fresh_bytes()?) {
                tell!(
                    "warning: {why}, so this guest draws the random numbers that every other copy of its \
                     snapshot draws, until its kernel mixes in others (up to a minute)"
                );
            }
            return Ok(machine);
        };
        let boot = self.boot_files(start, disks)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the host's clock")?;
        let engine = host_choice::choose(&self.engine, run_kind, &boot.source.kernel)?;
        let BootFiles { kernel, initramfs, source, .. } = boot.on(engine);
        engine.check_cpus(self.cpus())?;
        let config = MachineConfig {
            board: BoardConfig {
                memory: Bytes(self.memory.size),
                clock_base: UnixSeconds(i64::try_from(now.as_secs())?),
                disks: configs,
                entropy: true,
                net: self.net.as_ref().map(NetOption::config).transpose()?,
                cpus: self.cpus(),
            },
            engine,
        };
        Machine::new(config, source).map_err(|error| {
            if let SetupError::Engine(error) = error {
                return anyhow!("{:#}; {ENGINE_REMEDY}", anyhow::Error::from(error));
            }
            let (file, remedy) = match &error {
                SetupError::Boot(BootError::InitramfsTooLarge { .. }) => {
                    (initramfs.unwrap_or_default(), " with --memory, or a smaller initramfs")
                }
                SetupError::Boot(BootError::KernelTooLarge { .. }) => {
                    (kernel, "; give it more with --memory")
                }
                SetupError::Boot(
                    BootError::CommandLineTooLong { .. } | BootError::CommandLineZero { .. },
                ) => (kernel, "; change --cmdline"),
                SetupError::Boot(_) => {
                    (kernel, "; --kernel takes a bzImage or an ELF vmlinux for x86-64")
                }
                _ => (kernel, ""),
            };
            anyhow!("{}: {:#}{remedy}", file.display(), anyhow::Error::from(error))
        })
    }
}

/// What is known of a machine before this process is confined.
#[derive(Debug)]
pub struct Prepared {
    wanted: Option<EngineKind>,
    /// `None` for one that is restored.
    boot: Option<Start>,
    run_kind: RunKind,
}

/// What a machine starts from, as far as that is known before its disks are open.
#[derive(Debug)]
enum Start {
    Files(BootFiles),
    /// What a disk boots, or else these.
    Disk {
        or: Option<BootFiles>,
    },
}

/// What a guest boots from, and where it was read.
#[derive(Debug)]
struct BootFiles {
    kernel: PathBuf,
    initramfs: Option<PathBuf>,
    source: BootSource,
    /// What the board needs on the command line: it comes first, and depends on the engine.
    own: &'static str,
}

impl BootFiles {
    fn read(kernel: &Path, initramfs: Option<&Path>, cmdline: String) -> Result<Self> {
        let read = |what: &str, path: &Path| -> Result<Arc<[u8]>> {
            let bytes = std::fs::read(path)
                .with_context(|| format!("reading {what} {}", path.display()))
                .remedy(|| format!("--{what} takes a file that this user may read"))?;
            Ok(bytes.into())
        };
        let source = BootSource {
            kernel: read("kernel", kernel)?,
            initramfs: initramfs.map(|path| read("initramfs", path)).transpose()?,
            cmdline,
            disk: None,
        };
        let (kernel, initramfs) = (kernel.into(), initramfs.map(Into::into));
        Ok(Self { kernel, initramfs, source, own: cmdline::DEFAULT })
    }

    /// As they are for a guest on this engine.
    fn on(mut self, engine: EngineKind) -> Self {
        let runs_freely = engine == EngineKind::Kvm { points: PointKind::Free };
        let own = match runs_freely {
            true => cmdline::for_the_hosts_cpu(self.own),
            false => self.own.to_owned(),
        };
        self.source.cmdline = boot_loader::before(&own, &self.source.cmdline);
        if let Some(disk) = &mut self.source.disk {
            disk.before = own;
        }
        self
    }
}

/// A machine's disks must be the ones it was saved with.
pub fn check_disks(saved: &[DiskConfig], given: &[DiskConfig]) -> Result<()> {
    if saved.len() != given.len() {
        bail!(
            "the snapshot's machine has {} disks, {} are given; name them with --disk as when it \
             was taken",
            saved.len(),
            given.len()
        );
    }
    for (index, (saved, given)) in saved.iter().zip(given).enumerate() {
        if saved != given {
            bail!(
                "disk {index} has {} bytes{}, in the snapshot it has {}{}; give the image as it was \
                 when the snapshot was taken",
                given.capacity.0,
                if given.read_only { " read-only" } else { "" },
                saved.capacity.0,
                if saved.read_only { " read-only" } else { "" },
            );
        }
    }
    Ok(())
}
