//! The options that say what the machine is, and how they become one.

use crate::options::{CpusOption, DiskOption, MemoryOption, SerialOption};
use crate::pair_options::disk_configs;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use vmft_backup::arbiter::Candidate;
use vmft_backup::side::{Requests, Side};
use vmft_backup::status::StatusBoard;
use vmft_guest_images::{Cache, Workload, cmdline, default_guest};
use vmft_vmm::board::{BoardConfig, Bytes, DiskConfig, UnixSeconds};
use vmft_vmm::machine::{BootSource, Machine, MachineConfig};
use vmft_vmm::snapshot;
use vmft_vmm::world::console::ConsoleHub;
use vmft_vmm::world::{DiskFile, Mailbox};

/// What the machine is made of. Without `--kernel` and `--restore`: the default guest.
#[derive(Debug, Clone, Args)]
pub struct MachineOptions {
    /// Kernel: a bzImage or an ELF vmlinux. Default: Debian's cloud kernel, fetched once
    #[arg(long, value_name = "FILE", help_heading = "Machine")]
    pub kernel: Option<PathBuf>,
    /// Initial file system for --kernel
    #[arg(long, value_name = "FILE", requires = "kernel", help_heading = "Machine")]
    pub initramfs: Option<PathBuf>,
    /// Kernel command line. With the default guest: words added to its own, such as
    /// vmft.run=shell|idle
    #[arg(long, value_name = "WORDS", help_heading = "Machine")]
    pub cmdline: Option<String>,
    /// Guest CPUs; one
    #[arg(long, value_name = "boot=1", default_value = "boot=1", help_heading = "Machine")]
    pub cpus: CpusOption,
    /// Guest memory, 64M to 4G
    #[arg(long, value_name = "size=SIZE", default_value = "size=256M", help_heading = "Machine")]
    pub memory: MemoryOption,
    /// A disk image; may be given several times. Both sides of a pair name the same image
    #[arg(long, value_name = "path=FILE[,readonly=on|off]", help_heading = "Machine")]
    pub disk: Vec<DiskOption>,
    /// Start from a snapshot instead of booting; disks are given as when it was taken
    #[arg(long, value_name = "DIR", conflicts_with_all = ["kernel", "initramfs", "cmdline"],
          help_heading = "Machine")]
    pub restore: Option<PathBuf>,
}

/// How a side talks to people and programs on its host.
#[derive(Debug, Clone, Args)]
pub struct SideOptions {
    /// The guest's console: tty, null, file=PATH (written at absolute offsets: both sides of a pair
    /// may name the same file), socket=PATH (for `vmft console`)
    #[arg(long, value_name = "WHERE", default_value = "tty", help_heading = "This side")]
    pub serial: SerialOption,
    /// Unix socket for `vmft status`, `vmft stop`, `vmft snapshot` (HTTP, /api/v1/vm.*)
    #[arg(long, value_name = "PATH", help_heading = "This side")]
    pub api_socket: Option<PathBuf>,
}

/// Opens the images. A `new_machine` must find nobody else on them.
pub fn open_disks(options: &[DiskOption], new_machine: bool) -> Result<Vec<DiskFile>> {
    options
        .iter()
        .map(|disk| Ok(DiskFile::open(&disk.path, disk.read_only, new_machine)?))
        .collect()
}

/// The host's name, for people.
pub fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "this host".to_owned(), |name| name.trim().to_owned())
}

/// Bytes nobody else has, in hexadecimal.
pub fn fresh_id() -> Result<String> {
    use std::io::Read;
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("reading random bytes")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// This process with what it has for its guest.
pub fn make_side(options: &SideOptions, disks: Vec<DiskFile>, role: &str) -> Result<Side> {
    Ok(Side {
        who: Candidate {
            id: fresh_id()?,
            host: host_name(),
            pid: std::process::id(),
            role: role.to_owned(),
        },
        mailbox: Arc::new(Mailbox::default()),
        console: ConsoleHub::open(&options.serial.0)?,
        disks,
        status: Arc::new(StatusBoard::default()),
        requests: Arc::new(Requests::default()),
    })
}

impl MachineOptions {
    fn source(&self) -> Result<BootSource> {
        let read = |path: &PathBuf| -> Result<Arc<[u8]>> {
            let bytes =
                std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
            Ok(bytes.into())
        };
        if let Some(kernel) = &self.kernel {
            return Ok(BootSource {
                kernel: read(kernel)?,
                initramfs: self.initramfs.as_ref().map(read).transpose()?,
                cmdline: self.cmdline.clone().unwrap_or_else(|| "console=ttyS0".to_owned()),
            });
        }
        let guest = default_guest(&Cache::from_environment()?, &mut crate::progress::terminal())?;
        Ok(BootSource {
            kernel: read(&guest.kernel)?,
            initramfs: Some(read(&guest.initramfs)?),
            cmdline: match &self.cmdline {
                None => cmdline::with_workload(Workload::Shell),
                Some(words) => format!("{} {words}", cmdline::DEFAULT),
            },
        })
    }

    /// The machine, ready to run, on `disks`.
    pub fn machine(&self, disks: &[DiskFile]) -> Result<Machine> {
        let configs = disk_configs(disks);
        if let Some(directory) = &self.restore {
            let machine = snapshot::restore(directory)?;
            check_disks(&machine.config().board.disks, &configs)?;
            return Ok(machine);
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the host's clock")?;
        let config = MachineConfig {
            board: BoardConfig {
                memory: Bytes(self.memory.size),
                clock_base: UnixSeconds(i64::try_from(now.as_secs())?),
                disks: configs,
                entropy: true,
            },
        };
        Ok(Machine::new(config, self.source()?)?)
    }
}

/// A machine's disks must be the ones it was saved with.
pub fn check_disks(saved: &[DiskConfig], given: &[DiskConfig]) -> Result<()> {
    if saved.len() != given.len() {
        bail!(
            "the machine has {} disks, {} are given; name them with --disk in the same order",
            saved.len(),
            given.len()
        );
    }
    for (index, (saved, given)) in saved.iter().zip(given).enumerate() {
        if saved != given {
            bail!(
                "disk {index} has {} bytes{}, the machine's has {}{}",
                given.capacity.0,
                if given.read_only { " read-only" } else { "" },
                saved.capacity.0,
                if saved.read_only { " read-only" } else { "" },
            );
        }
    }
    Ok(())
}
