//! The files that a side can reach: those of its command line, and what every program reads.

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, make_bitflags,
};
use std::path::{Path, PathBuf};

/// The newest of Landlock's versions that is asked for; an older kernel gives what it has.
const VERSION: ABI = ABI::V5;

/// What every side reads: how names of hosts become addresses, the libraries that do that, the host's
/// processors, random numbers, and its own state.
const READ: [&str; 18] = [
    "/dev/null",
    "/dev/random",
    "/dev/urandom",
    "/dev/zero",
    "/etc/gai.conf",
    "/etc/host.conf",
    "/etc/hosts",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/nsswitch.conf",
    "/etc/resolv.conf",
    "/etc/services",
    "/lib",
    "/lib64",
    "/proc",
    "/run/systemd/resolve",
    "/sys",
    "/usr",
];

/// Devices that a side uses by requests.
const DEVICES: [&str; 4] = ["/dev/kvm", "/dev/net/tun", "/dev/null", "/dev/tty"];

/// What a side may do with a path of its command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Read the file, or everything in the directory.
    Read,
    /// Read and write the file, or the device.
    Write,
    /// Make a socket there.
    Socket,
    /// Make, name, write and remove files and directories beside the path, and beneath it.
    Directory,
}

/// Paths, and what a side does with them.
#[derive(Debug, Clone, Default)]
pub struct Files(Vec<(PathBuf, Use)>);

impl Files {
    /// Another path.
    pub fn add(&mut self, path: &Path, used: Use) {
        self.0.push((path.to_owned(), used));
    }

    /// From now on this thread, and those that it starts, reach nothing else. False if the kernel has no
    /// Landlock (before Linux 5.13, or switched off).
    ///
    /// # Errors
    /// The kernel has Landlock and refuses this.
    pub(crate) fn restrict(&self) -> Result<bool, RulesetError> {
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(VERSION))?
            .create()?;
        for path in READ {
            rules = allow(rules, Path::new(path), AccessFs::from_read(VERSION))?;
        }
        for path in DEVICES {
            let device = make_bitflags!(AccessFs::{ReadFile | WriteFile | IoctlDev});
            rules = allow(rules, Path::new(path), device)?;
        }
        for (path, used) in &self.0 {
            let (path, access) = rule(path, *used);
            rules = allow(rules, path, access)?;
        }
        Ok(rules.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
    }
}

/// Where a use of a path has to be allowed, and what that takes.
fn rule(path: &Path, used: Use) -> (&Path, BitFlags<AccessFs>) {
    let write = make_bitflags!(AccessFs::{ReadFile | WriteFile | Truncate | IoctlDev});
    let parent = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    };
    match used {
        Use::Read => (path, make_bitflags!(AccessFs::{ReadFile | ReadDir})),
        Use::Write => (path, write),
        Use::Socket => (parent, make_bitflags!(AccessFs::{MakeSock | RemoveFile})),
        Use::Directory => {
            // Beside it would be everywhere.
            let place = if parent == Path::new("/") { path } else { parent };
            let make = make_bitflags!(AccessFs::{
                ReadDir | MakeReg | MakeDir | RemoveFile | RemoveDir | Refer
            });
            (place, write | make)
        }
    }
}

/// Adds a rule. A path that is not there cannot be used, and whoever opens it says so.
fn allow(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    let Ok(opened) = PathFd::new(path) else { return Ok(rules) };
    let access = if path.is_dir() { access } else { access & AccessFs::from_file(VERSION) };
    rules.add_rule(PathBeneath::new(opened, access))
}
