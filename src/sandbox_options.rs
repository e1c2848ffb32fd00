//! The sandbox of a side: what of its command line it may use.

use crate::arbiter_option::ArbiterPlace;
use crate::machine_options::{MachineOptions, SideOptions};
use crate::options::{DiskOption, DiskPlace};
use crate::pair_options::PairOptions;
use crate::remedy::Remedy;
use crate::service;
use anyhow::Result;
use clap::{Args, ValueEnum};
use std::path::Path;
use vmft_backup::tell;
use vmft_logging_channel::transport::{PeerAddress, Place};
use vmft_sandbox::{Entered, Files, Sandbox, Task, Use};
use vmft_vmm::world::console::ConsoleTarget;

/// Whether a side confines itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SandboxChoice {
    /// Each thread makes the system calls of its task, and reaches the files of the command line
    On,
    /// The side may do whatever its user may
    Off,
}

/// What a side may do on its host.
#[derive(Debug, Clone, Args)]
pub struct SandboxOptions {
    /// Confine this side to what it needs: the files named on its command line, the system calls of each
    /// thread's task, few privileges. off is for debuggers
    #[arg(long, value_enum, default_value = "on", help_heading = "This side")]
    pub sandbox: SandboxChoice,
    /// Become this user at the start; only root can. It must be able to use the files, and /dev/kvm where
    /// that is the engine
    #[arg(long, value_name = "NAME", help_heading = "This side")]
    pub user: Option<String>,
}

impl SandboxOptions {
    /// Confines this process to `files`, before it has another thread. Whoever manages it as a service is
    /// found before that.
    ///
    /// # Errors
    /// The kernel refuses it, or this user cannot become another.
    pub fn enter(&self, files: Files) -> Result<()> {
        let untold = service::open();
        let entered = self.enter_sandbox(files);
        if let Some(why) = untold {
            tell!("{why}");
        }
        entered
    }

    fn enter_sandbox(&self, files: Files) -> Result<()> {
        if self.sandbox == SandboxChoice::Off {
            anyhow::ensure!(self.user.is_none(), "--user is a part of the sandbox, which is off");
            return Ok(());
        }
        let sandbox = Sandbox { files, user: self.user.clone() };
        let Entered { files_confined } = sandbox
            .enter()
            .remedy(|| "--user takes a user's name and needs root; --sandbox=off does without")?;
        if !files_confined {
            tell!(
                "this host's kernel has no Landlock, so the sandbox does not confine the files that this \
                 side can reach"
            );
        }
        Ok(())
    }
}

/// The start is over: from here on this thread runs the guest.
///
/// # Errors
/// The kernel refuses it.
pub fn end_start() -> Result<()> {
    Ok(vmft_sandbox::confine(Task::Guest)?)
}

/// Files that an option names.
pub trait NamesFiles {
    /// Adds them, with what is done with each.
    fn name_files(&self, files: &mut Files);
}

/// All files of several options.
pub fn files_of(options: &[&dyn NamesFiles]) -> Files {
    let mut files = Files::default();
    for option in options {
        option.name_files(&mut files);
    }
    files
}

/// A file by itself.
#[derive(Debug)]
pub struct Named<'a>(pub &'a Path, pub Use);

impl NamesFiles for Named<'_> {
    fn name_files(&self, files: &mut Files) {
        files.add(self.0, self.1);
    }
}

impl NamesFiles for Vec<DiskOption> {
    fn name_files(&self, files: &mut Files) {
        for disk in self {
            match &disk.place {
                // Its record is beside it, and it may have to be made.
                DiskPlace::Image(path) if disk.mirror.is_some() => files.add(path, Use::Directory),
                DiskPlace::Image(path) => {
                    files.add(path, if disk.read_only { Use::Read } else { Use::Write });
                }
                DiskPlace::Export(export) => export.address.name_files(files),
                DiskPlace::Seed(seed) => {
                    seed.paths().for_each(|path| files.add(path, Use::Read));
                }
            }
        }
    }
}

impl NamesFiles for ConsoleTarget {
    fn name_files(&self, files: &mut Files) {
        // A file is opened outside.
        if let Self::Socket(path) = self {
            files.add(path, Use::Socket);
        }
    }
}

impl NamesFiles for SideOptions {
    fn name_files(&self, files: &mut Files) {
        self.serial.0.name_files(files);
        if let Some(path) = &self.api_socket {
            files.add(path, Use::Socket);
        }
    }
}

impl NamesFiles for MachineOptions {
    fn name_files(&self, files: &mut Files) {
        self.disks().name_files(files);
        if let Some(path) = &self.restore {
            files.add(path, Use::Read);
        }
    }
}

impl NamesFiles for PeerAddress {
    fn name_files(&self, files: &mut Files) {
        if let Place::Unix(path) = &self.place {
            files.add(path, Use::Socket);
        }
        if let Some(directory) = &self.tls_dir {
            files.add(directory, Use::Read);
        }
    }
}

/// A pair's arbiter: the one named, or the one that lies beside the first disk.
#[derive(Debug)]
pub struct ArbiterOf<'a>(pub &'a PairOptions, pub &'a [DiskOption]);

impl NamesFiles for ArbiterOf<'_> {
    fn name_files(&self, files: &mut Files) {
        // Where there is none, its absence is refused by whoever wants it.
        match self.0.arbiter_place(self.1) {
            Ok(ArbiterPlace::Directory(directory)) => files.add(&directory, Use::Directory),
            Ok(ArbiterPlace::Export(export)) => export.address.name_files(files),
            Ok(ArbiterPlace::Etcd(etcd)) => {
                etcd.members.iter().for_each(|member| member.name_files(files));
            }
            Err(_) => {}
        }
    }
}
