//! The default guest: fetched and built once, then taken from the cache.

use crate::cache::{Cache, CacheLock};
use crate::debian::{Debian, Unpacked};
use crate::error::GuestError;
use crate::initramfs;
use crate::manifest::{Manifest, Sha256};
use crate::modules::ModuleTree;
use crate::progress::Progress;
use std::fs;
use std::path::{Path, PathBuf};

/// Debian's name for the newest kernel for virtual machines.
const KERNEL_META_PACKAGE: &str = "linux-image-cloud-amd64";
/// How the names of kernel packages begin.
const KERNEL_PREFIX: &str = "linux-image-";
/// Debian's statically linked busybox.
const BUSYBOX_PACKAGE: &str = "busybox-static";
/// Where busybox is, before and since `/bin` and `/usr/bin` became one.
const BUSYBOX_FILES: [&str; 2] = ["bin/busybox", "usr/bin/busybox"];
/// Where modules are, likewise.
const MODULE_DIRECTORIES: [&str; 2] = ["lib/modules", "usr/lib/modules"];
/// Modules the guest needs; what they depend on comes by itself.
const MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "ext4", "virtio-rng"];
/// Changes whenever the same packages would be put together differently.
const RECIPE: &str = "1";

const KERNEL_FILE: &str = "vmlinuz";
const INITRAMFS_FILE: &str = "initramfs.cpio";
const FILES: [&str; 2] = [KERNEL_FILE, INITRAMFS_FILE];

/// A guest, ready to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// The kernel, a bzImage.
    pub kernel: PathBuf,
    /// The initramfs, uncompressed cpio.
    pub initramfs: PathBuf,
    /// What it is made of.
    pub manifest: Manifest,
}

/// The default guest, from the cache if it is there and undamaged.
///
/// # Errors
/// [`GuestError`]; the cache is then as it was.
pub fn default_guest(cache: &Cache, progress: &mut dyn Progress) -> Result<Guest, GuestError> {
    let lock = cache.lock(progress)?;
    let name = entry_name();
    let entry = lock.entry(&name);
    if entry.exists() {
        match Manifest::read_and_verify(&entry, &FILES) {
            Ok(manifest) => return Ok(guest(&entry, manifest)),
            Err(damage) => {
                progress.note(&format!("the cached guest is damaged ({damage}); making it again"));
            }
        }
    }
    build(&lock, &name, progress)
}

/// The default guest, made again from the newest packages the package lists have.
///
/// # Errors
/// [`GuestError`]; the cache is then as it was.
pub fn refresh_default_guest(
    cache: &Cache,
    progress: &mut dyn Progress,
) -> Result<Guest, GuestError> {
    let lock = cache.lock(progress)?;
    build(&lock, &entry_name(), progress)
}

/// Named after everything that goes into it but the packages' versions.
fn entry_name() -> String {
    let mut recipe = String::new();
    let packages = [RECIPE, KERNEL_META_PACKAGE, BUSYBOX_PACKAGE];
    for part in packages.iter().chain(&MODULES).chain(&[initramfs::INIT, initramfs::PROFILE]) {
        recipe.push_str(part);
        recipe.push('\0');
    }
    format!("debian-cloud-{:.12}", Sha256::of(recipe.as_bytes()).to_string())
}

fn guest(directory: &Path, manifest: Manifest) -> Guest {
    Guest {
        kernel: directory.join(KERNEL_FILE),
        initramfs: directory.join(INITRAMFS_FILE),
        manifest,
    }
}

fn build(
    lock: &CacheLock<'_>,
    name: &str,
    progress: &mut dyn Progress,
) -> Result<Guest, GuestError> {
    let mut debian = Debian::find()?;
    let workspace = lock.workspace()?;
    progress.step("looking for the default guest's packages");
    let kernel_name = debian.dependency(KERNEL_META_PACKAGE, KERNEL_PREFIX, progress)?;
    let kernel = debian.fetch(&kernel_name, workspace.path(), progress)?;
    let busybox = debian.fetch(BUSYBOX_PACKAGE, workspace.path(), progress)?;
    progress.step("putting the initramfs together");
    let finished = workspace.path().join("entry");
    let manifest = assemble(&kernel, &busybox, &finished)?;
    let installed = lock.install(&finished, name)?;
    Ok(guest(&installed, manifest))
}

/// Makes the entry's files in `directory` from the unpacked packages.
fn assemble(
    kernel: &Unpacked,
    busybox: &Unpacked,
    directory: &Path,
) -> Result<Manifest, GuestError> {
    fs::create_dir(directory).map_err(GuestError::file("making", directory))?;
    let (release, module_directory) = find_modules(kernel)?;
    let modules = ModuleTree::open(&module_directory)?.resolve(&MODULES)?;
    let busybox_file = find_file(busybox, &BUSYBOX_FILES)?;
    let program = fs::read(&busybox_file).map_err(GuestError::file("reading", &busybox_file))?;
    let initramfs = directory.join(INITRAMFS_FILE);
    fs::write(&initramfs, initramfs::build(&program, &modules))
        .map_err(GuestError::file("writing", &initramfs))?;
    let image = find_file(kernel, &[&format!("boot/vmlinuz-{release}")])?;
    let target = directory.join(KERNEL_FILE);
    fs::copy(&image, &target).map_err(GuestError::file("writing", &target))?;
    let packages = vec![kernel.record.clone(), busybox.record.clone()];
    let names = modules.into_iter().map(|module| module.name).collect();
    let manifest = Manifest::describe(directory, release, packages, names, &FILES)?;
    manifest.write(directory)?;
    Ok(manifest)
}

/// The kernel's release, and the directory of its modules, which has the same name.
fn find_modules(kernel: &Unpacked) -> Result<(String, PathBuf), GuestError> {
    for directory in MODULE_DIRECTORIES.map(|directory| kernel.root.join(directory)) {
        let Ok(mut entries) = fs::read_dir(&directory) else { continue };
        if let Some(Ok(entry)) = entries.next() {
            return Ok((entry.file_name().to_string_lossy().into_owned(), entry.path()));
        }
    }
    Err(missing(kernel, "lib/modules"))
}

fn find_file(package: &Unpacked, names: &[&str]) -> Result<PathBuf, GuestError> {
    let mut files = names.iter().map(|name| package.root.join(name));
    files.find(|file| file.is_file()).ok_or_else(|| missing(package, names[0]))
}

fn missing(package: &Unpacked, what: &str) -> GuestError {
    GuestError::PackageContents { package: package.record.name.clone(), what: what.to_owned() }
}
