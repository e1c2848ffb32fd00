//! The lockstep kernel: built once from Debian's source, with a configuration and patches of ours.
//!
//! What is different in it and why is said in `linux/` and in `docs/kvm.md`. This builds it: fetches
//! the source package and unpacks it, patches, configures, compiles (some minutes), has
//! [`vmft_kernel_gate`] read the result, and puts it beside the default guest's busybox and init into
//! the cache. The build has a lock and a directory of its own, so that nobody else waits for it.
//!
//! Compiling twice gives the same bytes: times, names and paths of the build are fixed.

use crate::cache::Cache;
use crate::command::{self, command};
use crate::debian::Debian;
use crate::error::GuestError;
use crate::guest::{
    BUSYBOX_FILES, BUSYBOX_PACKAGE, Guest, INITRAMFS_FILE, PackageSource, Unpacked, find_file,
};
use crate::initramfs;
use crate::manifest::{Manifest, PackageRecord, Sha256};
use crate::packages::{HostPackage, ensure_packages};
use crate::programs::Files;
use crate::progress::Progress;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

/// Debian's source of the kernel.
const SOURCE_PACKAGE: &str = "linux-source-6.1";
/// What is set beyond the smallest configuration.
const CONFIGURATION: &str = include_str!("../linux/config");
/// The patches, in order.
const PATCHES: [(&str, &str); 6] = [
    ("0001-board.patch", include_str!("../linux/0001-board.patch")),
    ("0002-kernel-instructions.patch", include_str!("../linux/0002-kernel-instructions.patch")),
    ("0003-user-time-stamps.patch", include_str!("../linux/0003-user-time-stamps.patch")),
    ("0004-page-tables.patch", include_str!("../linux/0004-page-tables.patch")),
    ("0005-fpu.patch", include_str!("../linux/0005-fpu.patch")),
    ("0006-poll.patch", include_str!("../linux/0006-poll.patch")),
];
/// Changes whenever the same parts would be put together differently.
const VERSION: &str = "1";
const KERNEL_FILE: &str = "vmlinux";
const FILES: [&str; 2] = [KERNEL_FILE, INITRAMFS_FILE];
/// What a kernel is built with. The last has no program, so its header is looked for.
const TOOLS: [HostPackage; 8] = [
    HostPackage { name: "gcc", program: "gcc" },
    HostPackage { name: "make", program: "make" },
    HostPackage { name: "flex", program: "flex" },
    HostPackage { name: "bison", program: "bison" },
    HostPackage { name: "bc", program: "bc" },
    HostPackage { name: "patch", program: "patch" },
    HostPackage { name: "xz-utils", program: "xz" },
    HostPackage { name: "libelf-dev", program: "/usr/include/libelf.h" },
];
/// Parts of the source that no configuration of ours reads: a third of it.
const LEFT_OUT: [&str; 3] =
    ["*/drivers/gpu/drm/amd/include/asic_reg", "*/tools/testing", "*/Documentation/devicetree"];
/// How many files are compiled, about; only progress depends on it.
const FILES_COMPILED: usize = 950;
/// How often progress is said, in files.
const FILES_A_STEP: usize = 100;

/// The default guest with the lockstep kernel, from the cache, if it was built.
///
/// # Errors
/// [`GuestError::NotBuilt`] if it was not, or not whole.
pub fn lockstep_guest(cache: &Cache) -> Result<Guest, GuestError> {
    let entry = cache.directory().join(entry_name());
    match Manifest::read_and_verify(&entry, &FILES) {
        Ok(manifest) => Ok(guest(&entry, manifest)),
        Err(_) => Err(GuestError::NotBuilt),
    }
}

/// The default guest with the lockstep kernel, from the cache, or built: some minutes of compiling.
///
/// # Errors
/// [`GuestError`]; the cache is then as it was.
pub fn build_lockstep_guest(
    cache: &Cache,
    progress: &mut dyn Progress,
) -> Result<Guest, GuestError> {
    let build = cache.build_directory("build-lockstep", progress)?;
    if let Ok(guest) = lockstep_guest(cache) {
        return Ok(guest);
    }
    ensure_packages(&TOOLS, progress)?;
    let (source, busybox) = {
        let _lock = cache.lock(progress)?;
        let mut debian = Debian::new(cache);
        debian.check()?;
        let source = debian.fetch(SOURCE_PACKAGE, build.path(), progress)?;
        (source, debian.fetch(BUSYBOX_PACKAGE, build.path(), progress)?)
    };
    let tree = unpack(&source, build.path(), progress)?;
    patch(&tree, progress)?;
    configure(&tree, progress)?;
    compile(&tree, progress)?;
    let finished = build.path().join("entry");
    assemble(&tree, &busybox, &finished, source.record, progress)?;
    let installed = cache.lock(progress)?.install(&finished, &entry_name())?;
    match Manifest::read_and_verify(&installed, &FILES) {
        Ok(manifest) => Ok(guest(&installed, manifest)),
        Err(_) => Err(GuestError::NotBuilt),
    }
}

/// Named after everything that goes into it but the packages' versions.
fn entry_name() -> String {
    let mut recipe = format!("{VERSION}\0{SOURCE_PACKAGE}\0{BUSYBOX_PACKAGE}\0{CONFIGURATION}");
    let texts = PATCHES.iter().map(|(_, patch)| *patch);
    let ours = [initramfs::INIT, initramfs::PROFILE, initramfs::DHCP, initramfs::PATTERN];
    for text in texts.chain(ours) {
        recipe.push('\0');
        recipe.push_str(text);
    }
    format!("lockstep-{:.12}", Sha256::of(recipe.as_bytes()).to_string())
}

fn guest(directory: &Path, manifest: Manifest) -> Guest {
    Guest {
        kernel: directory.join(KERNEL_FILE),
        initramfs: directory.join(INITRAMFS_FILE),
        manifest,
    }
}

/// Unpacks the source; returns the directory it is in.
fn unpack(
    source: &Unpacked,
    directory: &Path,
    progress: &mut dyn Progress,
) -> Result<PathBuf, GuestError> {
    progress.step("unpacking the kernel's source");
    let archive = find_file(source, &[&format!("usr/src/{SOURCE_PACKAGE}.tar.xz")])?;
    let mut tar = command("tar");
    tar.args(LEFT_OUT.map(|pattern| format!("--exclude={pattern}")));
    tar.arg("--extract").arg("--file").arg(&archive).arg("--directory").arg(directory);
    command::succeed(tar)?;
    Ok(directory.join(SOURCE_PACKAGE))
}

fn patch(tree: &Path, progress: &mut dyn Progress) -> Result<(), GuestError> {
    progress.step("patching the kernel");
    for (name, text) in PATCHES {
        let file = tree.join(name);
        fs::write(&file, text).map_err(GuestError::file("writing", &file))?;
        let mut patch = command("patch");
        patch.current_dir(tree);
        // A patch that only nearly fits is for a person to look at.
        patch.args(["--strip=1", "--fuzz=0", "--batch", "--silent", "--input"]);
        patch.arg(&file);
        command::succeed(patch)?;
    }
    Ok(())
}

fn configure(tree: &Path, progress: &mut dyn Progress) -> Result<(), GuestError> {
    progress.step("configuring the kernel");
    command::succeed(make(tree, &["tinyconfig"]))?;
    let file = tree.join(".config");
    let smallest = fs::read_to_string(&file).map_err(GuestError::file("reading", &file))?;
    fs::write(&file, format!("{smallest}\n{CONFIGURATION}"))
        .map_err(GuestError::file("writing", &file))?;
    command::succeed(make(tree, &["olddefconfig"]))?;
    let configured = fs::read_to_string(&file).map_err(GuestError::file("reading", &file))?;
    match not_taken(CONFIGURATION, &configured) {
        Some(line) => Err(GuestError::KernelConfiguration { line: line.to_owned() }),
        None => Ok(()),
    }
}

/// The first line of `wanted` that the configuration tool did not take over.
fn not_taken<'a>(wanted: &'a str, configured: &str) -> Option<&'a str> {
    wanted.lines().find(|line| {
        let unset = line
            .strip_prefix("# CONFIG_")
            .and_then(|line| line.strip_suffix(" is not set"))
            .map(|option| format!("CONFIG_{option}="));
        match unset {
            Some(set) => configured.lines().any(|line| line.starts_with(&set)),
            None if line.starts_with("CONFIG_") => !configured.lines().any(|have| have == *line),
            None => false,
        }
    })
}

fn compile(tree: &Path, progress: &mut dyn Progress) -> Result<(), GuestError> {
    progress.step("compiling the kernel (some minutes)");
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    let mut make = make(tree, &[&format!("--jobs={jobs}"), KERNEL_FILE]);
    make.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = make.spawn().map_err(|source| {
        GuestError::Command(command::CommandError::Start { program: "make".to_owned(), source })
    })?;
    let mut errors = running.stderr.take().expect("it was piped");
    let complaints = thread::spawn(move || {
        let mut text = Vec::new();
        // What can be read of it is what can be shown.
        let _ = errors.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });
    let output = BufReader::new(running.stdout.take().expect("it was piped"));
    let compiled =
        output.split(b'\n').map_while(Result::ok).filter(|line| line.starts_with(b"  CC"));
    for (number, _) in (1..).zip(compiled) {
        if number % FILES_A_STEP == 0 {
            progress
                .step(&format!("compiling the kernel: {number} of about {FILES_COMPILED} files"));
        }
    }
    let waited = running.wait().map_err(GuestError::file("waiting for make in", tree))?;
    let complaints = complaints.join().expect("reading does not panic");
    if waited.success() {
        return Ok(());
    }
    let first = complaints.lines().find(|line| line.contains("error:") || line.contains("***"));
    Err(GuestError::Command(command::CommandError::Failed {
        program: "make".to_owned(),
        status: waited,
        message: first.unwrap_or("it did not say why").to_owned(),
    }))
}

/// Has the kernel examined, and makes the entry's files in `directory`.
fn assemble(
    tree: &Path,
    busybox: &Unpacked,
    directory: &Path,
    source: PackageRecord,
    progress: &mut dyn Progress,
) -> Result<(), GuestError> {
    fs::create_dir(directory).map_err(GuestError::file("making", directory))?;
    progress.step("reading the kernel's code");
    let built = tree.join(KERNEL_FILE);
    let mut image = fs::read(&built).map_err(GuestError::file("reading", &built))?;
    let examination = vmft_kernel_gate::vouch(&mut image).map_err(GuestError::Gate)?;
    progress.note(&format!("the lockstep kernel: {examination}, none of which may differ"));
    let release = tree.join("include/config/kernel.release");
    let release = fs::read_to_string(&release).map_err(GuestError::file("reading", &release))?;
    let program = find_file(busybox, &BUSYBOX_FILES)?;
    let program = fs::read(&program).map_err(GuestError::file("reading", &program))?;
    for (name, contents) in
        FILES.into_iter().zip([image, initramfs::build(&program, &[], &Files::new())])
    {
        let file = directory.join(name);
        fs::write(&file, contents).map_err(GuestError::file("writing", &file))?;
    }
    let packages = vec![source, busybox.record.clone()];
    let release = release.trim().to_owned();
    Manifest::describe(directory, release, packages, Vec::new(), &FILES)?.write(directory)
}

/// `make` for this tree, with what would differ from build to build fixed.
fn make(tree: &Path, arguments: &[&str]) -> Command {
    let mut make = command("make");
    make.arg("ARCH=x86_64").args(arguments);
    make.env("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970");
    make.env("KBUILD_BUILD_USER", "vmft").env("KBUILD_BUILD_HOST", "vmft");
    make.env("KBUILD_BUILD_VERSION", "1");
    // Set, though empty: no sign of a git tree around the cache.
    make.env("LOCALVERSION", "");
    // What the environment of this process holds is for others.
    for variable in ["MAKEFLAGS", "MFLAGS", "MAKELEVEL", "CC", "CFLAGS", "LDFLAGS"] {
        make.env_remove(variable);
    }
    make.current_dir(tree);
    make
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_configuration_that_is_not_taken_over_is_named() {
        let wanted = "# a comment\n\nCONFIG_A=y\n# CONFIG_B is not set\n";
        assert_eq!(not_taken(wanted, "CONFIG_A=y\n# CONFIG_B is not set\n"), None);
        assert_eq!(not_taken(wanted, "CONFIG_A=y\n"), None, "an unknown option is not set");
        assert_eq!(not_taken(wanted, "CONFIG_A=m\n"), Some("CONFIG_A=y"));
        let set = not_taken(wanted, "CONFIG_A=y\nCONFIG_B=y\n");
        assert_eq!(set, Some("# CONFIG_B is not set"));
        assert_eq!(not_taken(wanted, "CONFIG_A=y\nCONFIG_BC=y\n"), None);
    }

    #[test]
    fn a_kernel_that_was_not_built_is_said_to_be_missing() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(directory.path());
        assert!(matches!(lockstep_guest(&cache), Err(GuestError::NotBuilt)));
    }

    #[test]
    fn what_is_in_the_cache_is_taken_only_whole() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(directory.path());
        let entry = directory.path().join(entry_name());
        fs::create_dir(&entry).unwrap();
        for name in FILES {
            fs::write(entry.join(name), name).unwrap();
        }
        Manifest::describe(&entry, "6.1".to_owned(), Vec::new(), Vec::new(), &FILES)
            .unwrap()
            .write(&entry)
            .unwrap();
        assert_eq!(lockstep_guest(&cache).unwrap().kernel, entry.join(KERNEL_FILE));
        fs::write(entry.join(KERNEL_FILE), "damaged").unwrap();
        assert!(matches!(lockstep_guest(&cache), Err(GuestError::NotBuilt)));
    }

    #[test]
    fn the_patches_are_in_order_and_touch_nothing_but_the_kernel() {
        for (number, (name, text)) in (1..).zip(PATCHES) {
            assert!(name.starts_with(&format!("{number:04}-")), "{name}");
            let files = text.lines().filter_map(|line| line.strip_prefix("+++ b/"));
            for file in files {
                assert!(file.starts_with("arch/x86/") || file.starts_with("kernel/"), "{file}");
            }
        }
    }
}
