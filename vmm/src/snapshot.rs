//! Snapshots: a machine in a directory.
//!
//! | file | what |
//! |---|---|
//! | `config.json` | versions, what the machine is made of, where it is, a checksum; for people too |
//! | `state.json` | CPU, devices, guest time |
//! | `memory` | guest memory, sparse; ranges one after the other |
//! | `kernel`, `initramfs` | what a reset boots from |
//!
//! A snapshot names the engine it was taken on. Restored onto the other one, its points go on from the
//! same number and count something else; guest time goes on.
//!
//! A snapshot is written beside its place and renamed into it, so it is there whole or not at all.

use crate::engine::EngineKind;
use crate::machine::{BootSource, DiskBoot, Machine, MachineConfig, MachineState, StateError};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use vm_memory::{Bytes, GuestAddress};
use vmft_cpu::memory::{GuestRam, MemoryError, PAGE_SIZE, PageNumber};
use vmft_log::foreign::ForeignText;
use vmft_log::point::ExecutionPoint;
use vmft_sandbox::outside_of_landlock;
use xxhash_rust::xxh3::Xxh3;

/// Version of the directory's layout; another version is refused.
const SNAPSHOT_VERSION: u32 = 9;

#[derive(Debug, Serialize, Deserialize)]
struct SnapshotConfig {
    snapshot_version: u32,
    vmft_version: String,
    machine: MachineConfig,
    cmdline: String,
    has_initramfs: bool,
    /// A reset boots what the disks have then.
    boots_from_disk: Option<DiskBoot>,
    /// Of what a reset boots from, in hexadecimal.
    boot_digest: ForeignText,
    point: ExecutionPoint,
    /// Of the whole machine, in hexadecimal.
    digest: ForeignText,
}

/// Why a snapshot cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file of it.
    #[error("snapshot file {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// There is something at that place already.
    #[error("{} exists; snapshots are not overwritten", path.display())]
    Exists {
        /// Where.
        path: PathBuf,
    },
    /// Written by another version.
    #[error("snapshot {} has version {found}, this program reads {SNAPSHOT_VERSION}", path.display())]
    Version {
        /// The directory.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// A file is not what it should be.
    #[error("snapshot file {} is damaged: {what}", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// In which way.
        what: String,
    },
    /// The state does not make a machine.
    #[error("snapshot {} cannot be restored", path.display())]
    State {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: StateError,
    },
    /// Its memory cannot be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> SnapshotError + '_ {
    |source| SnapshotError::Io { path: path.to_owned(), source }
}

fn damaged(path: &Path, what: impl ToString) -> SnapshotError {
    SnapshotError::Damaged { path: path.to_owned(), what: what.to_string() }
}

/// The hash of what a reset boots from.
fn boot_digest(source: &BootSource) -> String {
    let mut hasher = Xxh3::new();
    for part in [&source.kernel[..], source.initramfs.as_deref().unwrap_or_default()] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.update(source.cmdline.as_bytes());
    if let Some(disk) = &source.disk {
        hasher.update(&serde_json::to_vec(disk).expect("plain values always encode"));
    }
    format!("{:016x}", hasher.digest())
}

/// The hash of memory, of which this is the hash, and state.
fn digest(memory: u64, state_json: &[u8]) -> String {
    let mut hasher = Xxh3::new();
    hasher.update(&memory.to_le_bytes());
    hasher.update(state_json);
    format!("{:016x}", hasher.digest())
}

/// A new file that is its owner's alone: what a guest has in memory is nobody else's to read.
fn private_file(path: &Path) -> io::Result<File> {
    let path = path.to_owned();
    outside_of_landlock(move || File::options().write(true).create_new(true).mode(0o600).open(path))
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<(), SnapshotError> {
    let write = || -> io::Result<()> {
        let file = private_file(path)?;
        file.write_all_at(bytes, 0)?;
        file.sync_all()
    };
    write().map_err(io_error(path))
}

/// Writes `machine` to a new directory. The machine goes on as if nothing had been done.
///
/// # Errors
/// See [`SnapshotError`]; nothing is left at `directory`.
pub fn save(machine: &mut Machine, directory: &Path) -> Result<(), SnapshotError> {
    if directory.exists() {
        return Err(SnapshotError::Exists { path: directory.to_owned() });
    }
    let mut partial = directory.as_os_str().to_owned();
    partial.push(format!(".partial-{}", std::process::id()));
    let partial = PathBuf::from(partial);
    if let Some(parent) = partial.parent() {
        let made = parent.to_owned();
        outside_of_landlock(|| fs::create_dir_all(made)).map_err(io_error(parent))?;
    }
    let made = partial.clone();
    let make = || DirBuilder::new().mode(0o700).create(made);
    outside_of_landlock(make).map_err(io_error(&partial))?;
    let (from, to) = (partial.clone(), directory.to_owned());
    let result = write_all(machine, &partial)
        .and_then(|()| outside_of_landlock(|| fs::rename(from, to)).map_err(io_error(directory)));
    if result.is_err() {
        let _ = outside_of_landlock(|| fs::remove_dir_all(partial));
    }
    result
}

fn write_all(machine: &mut Machine, directory: &Path) -> Result<(), SnapshotError> {
    let (state, source) = machine.state().without_completed_writes().into_parts();
    let pages = machine.used_pages();
    let state_json = serde_json::to_vec(&state).expect("plain values always encode");
    let config = SnapshotConfig {
        snapshot_version: SNAPSHOT_VERSION,
        vmft_version: env!("CARGO_PKG_VERSION").to_owned(),
        machine: state.config().clone(),
        cmdline: source.cmdline.clone(),
        has_initramfs: source.initramfs.is_some(),
        boots_from_disk: source.disk.clone(),
        boot_digest: boot_digest(&source).into(),
        point: state.point(),
        digest: digest(machine.known_memory(), &state_json).into(),
    };
    let json = |value| serde_json::to_vec_pretty(value);
    let config = json(&config).expect("plain values always encode");
    write_file(&directory.join("config.json"), &config)?;
    write_file(&directory.join("state.json"), &state_json)?;
    write_file(&directory.join("kernel"), &source.kernel)?;
    if let Some(initramfs) = &source.initramfs {
        write_file(&directory.join("initramfs"), initramfs)?;
    }
    let path = directory.join("memory");
    write_memory(machine.ram(), &pages, &path).map_err(io_error(&path))
}

/// Most pages written at a time.
const RUN_PAGES: usize = 256;

fn write_memory(ram: &GuestRam, pages: &[PageNumber], path: &Path) -> io::Result<()> {
    let file = private_file(path)?;
    file.set_len(ram.size())?;
    let mut bytes = vec![0; RUN_PAGES * PAGE_SIZE as usize];
    let neighbours = |first: &PageNumber, second: &PageNumber| first.0 + 1 == second.0;
    for run in pages.chunk_by(neighbours).flat_map(|run| run.chunks(RUN_PAGES)) {
        let GuestAddress(address) = run[0].address();
        let bytes = &mut bytes[..run.len() * PAGE_SIZE as usize];
        ram.memory().read_slice(bytes, run[0].address()).map_err(io::Error::other)?;
        let offset = ram.file_offset(address).expect("the pages are memory");
        file.write_all_at(bytes, offset)?;
    }
    file.sync_all()
}

/// Reads the machine that [`save`] wrote: onto the engine it ran on, or onto `engine`.
///
/// # Errors
/// See [`SnapshotError`].
pub fn restore(directory: &Path, engine: Option<EngineKind>) -> Result<Machine, SnapshotError> {
    let path = directory.join("config.json");
    let bytes = fs::read(&path).map_err(io_error(&path))?;
    let config: serde_json::Value =
        serde_json::from_slice(&bytes).map_err(|error| damaged(&path, error))?;
    let found = config["snapshot_version"].as_u64().and_then(|version| u32::try_from(version).ok());
    match found {
        Some(SNAPSHOT_VERSION) => {}
        Some(found) => {
            return Err(SnapshotError::Version { path: directory.to_owned(), found });
        }
        None => return Err(damaged(&path, "no version")),
    }
    let config: SnapshotConfig =
        serde_json::from_value(config).map_err(|error| damaged(&path, error))?;

    let read = |name: &str| {
        let path = directory.join(name);
        fs::read(&path).map_err(io_error(&path))
    };
    let source = BootSource {
        kernel: read("kernel")?.into(),
        initramfs: config.has_initramfs.then(|| read("initramfs")).transpose()?.map(Into::into),
        cmdline: config.cmdline,
        disk: config.boots_from_disk,
    };
    let found = boot_digest(&source);
    if config.boot_digest != *found {
        let written = config.boot_digest;
        let kernel = directory.join("kernel");
        return Err(damaged(&kernel, format!("boot digest {found}, written {written}")));
    }
    let state_path = directory.join("state.json");
    let state_json = read("state.json")?;
    let state: MachineState =
        serde_json::from_slice(&state_json).map_err(|error| damaged(&state_path, error))?;
    if *state.config() != config.machine {
        return Err(damaged(&state_path, "it is not the machine of config.json"));
    }

    let memory_path = directory.join("memory");
    let mut memory = File::open(&memory_path).map_err(io_error(&memory_path))?;
    let size = memory.metadata().map_err(io_error(&memory_path))?.len();
    if size != config.machine.memory() {
        return Err(damaged(&memory_path, format!("{size} bytes long")));
    }
    let ram = GuestRam::load(size, &mut memory)?;
    let refused = |source| SnapshotError::State { path: directory.to_owned(), source };
    let state = state.with_source(source);
    let state = match engine {
        Some(engine) => state.on_engine(engine).map_err(refused)?,
        None => state,
    };
    let (machine, known_memory) = Machine::restore_known(state, ram).map_err(refused)?;
    let digest = digest(known_memory, &state_json);
    if config.digest != *digest {
        return Err(damaged(&memory_path, format!("digest {digest}, written {}", config.digest)));
    }
    Ok(machine)
}
