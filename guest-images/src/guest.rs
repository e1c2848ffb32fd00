//! The default guest, and the host in a box: fetched and built once, then taken from the cache.
//!
//! Both are Debian's cloud kernel with an initramfs of busybox and some of its modules. What is in
//! the archives, and in what they differ, is said in `initramfs`. A third is the default guest with
//! servers of other packages, for tests of the network.

use crate::cache::{Cache, CacheLock};
use crate::debian::Debian;
use crate::error::GuestError;
use crate::initramfs;
use crate::manifest::{Manifest, PackageRecord, Sha256};
use crate::modules::{Module, ModuleTree};
use crate::programs::{self, Files};
use crate::progress::Progress;
use std::fs;
use std::path::{Path, PathBuf};

/// Debian's name for the newest kernel for virtual machines.
const KERNEL_META_PACKAGE: &str = "linux-image-cloud-amd64";
/// How the names of kernel packages begin.
const KERNEL_PREFIX: &str = "linux-image-";
/// Debian's statically linked busybox.
pub(crate) const BUSYBOX_PACKAGE: &str = "busybox-static";
/// Where busybox is, before and since `/bin` and `/usr/bin` became one.
pub(crate) const BUSYBOX_FILES: [&str; 2] = ["bin/busybox", "usr/bin/busybox"];
/// Where modules are, likewise.
const MODULE_DIRECTORIES: [&str; 2] = ["lib/modules", "usr/lib/modules"];

/// What is made of the two packages.
#[derive(Debug, Clone, Copy)]
struct Recipe {
    /// How the names of its cache entries begin.
    prefix: &'static str,
    /// Changes whenever the same packages would be put together differently.
    version: &'static str,
    /// Modules it needs; what they depend on comes by itself.
    modules: &'static [&'static str],
    /// Files of our own that go into the initramfs.
    texts: &'static [&'static str],
    /// More packages, and the programs of them that go into the initramfs.
    packages: &'static [&'static str],
    programs: &'static [&'static str],
    /// Puts the initramfs together from busybox, the modules and the programs.
    initramfs: fn(&[u8], &[Module], &Files) -> Vec<u8>,
}

const DEFAULT_GUEST: Recipe = Recipe {
    prefix: "debian-cloud",
    version: "1",
    modules: &["virtio_pci", "virtio_blk", "ext4", "virtio-rng", "virtio_net"],
    texts: &[initramfs::INIT, initramfs::PROFILE, initramfs::DHCP, initramfs::PATTERN],
    packages: &[],
    programs: &[],
    initramfs: initramfs::build,
};

const SERVER_GUEST: Recipe = Recipe {
    prefix: "debian-servers",
    version: "1",
    texts: &[
        initramfs::INIT,
        initramfs::PROFILE,
        initramfs::DHCP,
        initramfs::PATTERN,
        initramfs::SERVERS,
    ],
    packages: &[
        "dropbear-bin",
        "iperf3",
        "libc6",
        "libcrypt1",
        "libgmp10",
        "libiperf0",
        "libsctp1",
        "libssl3",
        "libtomcrypt1",
        "libtommath1",
        "zlib1g",
    ],
    programs: &["usr/bin/iperf3", "usr/sbin/dropbear"],
    initramfs: initramfs::build_with_servers,
    ..DEFAULT_GUEST
};

const STOCK_KVM_HOST: Recipe = Recipe {
    prefix: "stock-kvm-host",
    version: "1",
    modules: &["virtio_pci", "virtio_console", "ext4", "kvm_amd"],
    texts: &[],
    packages: &[],
    programs: &[],
    initramfs: initramfs::build_base,
};

const KERNEL_FILE: &str = "vmlinuz";
pub(crate) const INITRAMFS_FILE: &str = "initramfs.cpio";
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

/// A package, downloaded and unpacked.
#[derive(Debug)]
pub(crate) struct Unpacked {
    pub(crate) record: PackageRecord,
    /// The directory its files are in.
    pub(crate) root: PathBuf,
}

/// Where packages come from.
pub(crate) trait PackageSource {
    /// Whether packages can be had at all.
    fn check(&self) -> Result<(), GuestError>;

    /// The package with this prefix that the meta-package `name` stands for.
    fn dependency(
        &mut self,
        name: &str,
        prefix: &str,
        progress: &mut dyn Progress,
    ) -> Result<String, GuestError>;

    /// Downloads the newest version of `name` and unpacks it somewhere below `directory`.
    fn fetch(
        &mut self,
        name: &str,
        directory: &Path,
        progress: &mut dyn Progress,
    ) -> Result<Unpacked, GuestError>;
}

/// The default guest, from the cache if it is there and undamaged.
///
/// # Errors
/// [`GuestError`]; the cache is then as it was.
pub fn default_guest(cache: &Cache, progress: &mut dyn Progress) -> Result<Guest, GuestError> {
    cached_or_built(&DEFAULT_GUEST, cache, &mut Debian::new(cache), progress)
}

/// A Linux that offers upstream KVM on a CPU with AMD's SVM: kernel, and the beginning of an
/// initramfs: busybox, and the modules of KVM and of a virtio serial port, in load order in
/// `lib/modules/order`. It has no `/init`: whoever starts it appends an archive with one.
///
/// # Errors
/// [`GuestError`]; the cache is then as it was.
pub fn stock_kvm_host(cache: &Cache, progress: &mut dyn Progress) -> Result<Guest, GuestError> {
    cached_or_built(&STOCK_KVM_HOST, cache, &mut Debian::new(cache), progress)
}

/// The default guest, with an SSH server (dropbear) that lets root in without a password, and with
/// an iperf3 server: for tests and measurements of the network.
///
/// # Errors
/// [`GuestError`]; the cache is then as it was.
pub fn server_guest(cache: &Cache, progress: &mut dyn Progress) -> Result<Guest, GuestError> {
    cached_or_built(&SERVER_GUEST, cache, &mut Debian::new(cache), progress)
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
    build(&DEFAULT_GUEST, &lock, &mut Debian::new(cache), progress)
}

fn cached_or_built(
    recipe: &Recipe,
    cache: &Cache,
    source: &mut dyn PackageSource,
    progress: &mut dyn Progress,
) -> Result<Guest, GuestError> {
    let lock = cache.lock(progress)?;
    let entry = lock.entry(&recipe.entry_name());
    if entry.exists() {
        match Manifest::read_and_verify(&entry, &FILES) {
            Ok(manifest) => return Ok(guest(&entry, manifest)),
            Err(damage) => {
                progress.note(&format!("the cached guest is damaged ({damage}); making it again"));
            }
        }
    }
    build(recipe, &lock, source, progress)
}

impl Recipe {
    /// Named after everything that goes into it but the packages' versions.
    fn entry_name(&self) -> String {
        let mut recipe = String::new();
        let packages = [self.version, KERNEL_META_PACKAGE, BUSYBOX_PACKAGE];
        let parts = packages.iter().chain(self.modules).chain(self.texts);
        for part in parts.chain(self.packages).chain(self.programs) {
            recipe.push_str(part);
            recipe.push('\0');
        }
        format!("{}-{:.12}", self.prefix, Sha256::of(recipe.as_bytes()).to_string())
    }
}

fn guest(directory: &Path, manifest: Manifest) -> Guest {
    Guest {
        kernel: directory.join(KERNEL_FILE),
        initramfs: directory.join(INITRAMFS_FILE),
        manifest,
    }
}

fn build(
    recipe: &Recipe,
    lock: &CacheLock<'_>,
    source: &mut dyn PackageSource,
    progress: &mut dyn Progress,
) -> Result<Guest, GuestError> {
    source.check()?;
    let workspace = lock.workspace()?;
    progress.step("looking for Debian's kernel and busybox");
    let kernel_name = source.dependency(KERNEL_META_PACKAGE, KERNEL_PREFIX, progress)?;
    let kernel = source.fetch(&kernel_name, workspace.path(), progress)?;
    let busybox = source.fetch(BUSYBOX_PACKAGE, workspace.path(), progress)?;
    let fetch = |name: &&str| source.fetch(name, workspace.path(), progress);
    let more = recipe.packages.iter().map(fetch).collect::<Result<Vec<_>, _>>()?;
    progress.step("putting the initramfs together");
    let finished = workspace.path().join("entry");
    let manifest = assemble(recipe, &kernel, &busybox, &more, &finished)?;
    let installed = lock.install(&finished, &recipe.entry_name())?;
    Ok(guest(&installed, manifest))
}

/// Makes the entry's files in `directory` from the unpacked packages.
fn assemble(
    recipe: &Recipe,
    kernel: &Unpacked,
    busybox: &Unpacked,
    more: &[Unpacked],
    directory: &Path,
) -> Result<Manifest, GuestError> {
    fs::create_dir(directory).map_err(GuestError::file("making", directory))?;
    let (release, module_directory) = find_modules(kernel)?;
    let modules = ModuleTree::open(&module_directory)?.resolve(recipe.modules)?;
    let busybox_file = find_file(busybox, &BUSYBOX_FILES)?;
    let program = fs::read(&busybox_file).map_err(GuestError::file("reading", &busybox_file))?;
    let programs = programs::collect(more, recipe.programs)?;
    let initramfs = directory.join(INITRAMFS_FILE);
    fs::write(&initramfs, (recipe.initramfs)(&program, &modules, &programs))
        .map_err(GuestError::file("writing", &initramfs))?;
    let image = find_file(kernel, &[&format!("boot/vmlinuz-{release}")])?;
    let target = directory.join(KERNEL_FILE);
    fs::copy(&image, &target).map_err(GuestError::file("writing", &target))?;
    let packages = [kernel, busybox].into_iter().chain(more);
    let packages = packages.map(|package| package.record.clone()).collect();
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

pub(crate) fn find_file(package: &Unpacked, names: &[&str]) -> Result<PathBuf, GuestError> {
    let mut files = names.iter().map(|name| package.root.join(name));
    files.find(|file| file.is_file()).ok_or_else(|| missing(package, names[0]))
}

fn missing(package: &Unpacked, what: &str) -> GuestError {
    GuestError::PackageContents { package: package.record.name.clone(), what: what.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::modules::test_module;

    /// An archive with a small kernel in it, which counts what it is asked for.
    #[derive(Default)]
    struct Archive {
        fetched: Vec<String>,
        version: u32,
    }

    impl PackageSource for Archive {
        fn check(&self) -> Result<(), GuestError> {
            Ok(())
        }

        fn dependency(
            &mut self,
            name: &str,
            prefix: &str,
            _progress: &mut dyn Progress,
        ) -> Result<String, GuestError> {
            assert_eq!(name, KERNEL_META_PACKAGE);
            Ok(format!("{prefix}9-cloud"))
        }

        fn fetch(
            &mut self,
            name: &str,
            directory: &Path,
            _progress: &mut dyn Progress,
        ) -> Result<Unpacked, GuestError> {
            self.fetched.push(name.to_owned());
            let root = directory.join(name);
            let modules = root.join("usr/lib/modules/9-cloud");
            for directory in ["boot", "usr/bin", "usr/lib/modules/9-cloud/kernel"] {
                fs::create_dir_all(root.join(directory)).unwrap();
            }
            fs::write(root.join("boot/vmlinuz-9-cloud"), self.version.to_string()).unwrap();
            fs::write(root.join("usr/bin/busybox"), "busybox").unwrap();
            fs::write(modules.join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
            for (name, depends) in [
                ("virtio", ""),
                ("virtio_pci", "virtio"),
                ("virtio_blk", "virtio"),
                ("virtio-rng", "virtio"),
                ("virtio_net", "virtio"),
                ("virtio_console", "virtio"),
                ("irqbypass", ""),
                ("kvm", "irqbypass"),
                ("kvm-amd", "kvm"),
            ] {
                let file = modules.join(format!("kernel/{name}.ko"));
                fs::write(file, test_module(depends)).unwrap();
            }
            let version = self.version.to_string();
            let record = PackageRecord { name: name.to_owned(), version, sha256: Sha256::of(b"") };
            Ok(Unpacked { record, root })
        }
    }

    #[derive(Default)]
    struct Heard(Vec<String>);

    impl Progress for Heard {
        fn step(&mut self, _what: &str) {}

        fn note(&mut self, what: &str) {
            self.0.push(what.to_owned());
        }
    }

    fn cache() -> (tempfile::TempDir, Cache) {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(directory.path().join("cache"));
        (directory, cache)
    }

    #[test]
    fn a_guest_is_built_once_and_then_taken_from_the_cache() {
        let (_directory, cache) = cache();
        let mut archive = Archive::default();
        let mut heard = Heard::default();
        let built = cached_or_built(&DEFAULT_GUEST, &cache, &mut archive, &mut heard).unwrap();
        assert_eq!(archive.fetched, ["linux-image-9-cloud", "busybox-static"]);
        assert_eq!(built.manifest.release, "9-cloud");
        assert_eq!(
            built.manifest.modules,
            ["virtio", "virtio_pci", "virtio_blk", "virtio_rng", "virtio_net"],
            "ext4 is built in"
        );
        assert_eq!(fs::read(&built.kernel).unwrap(), b"0");
        assert!(fs::read(&built.initramfs).unwrap().starts_with(b"070701"));
        let again = cached_or_built(&DEFAULT_GUEST, &cache, &mut archive, &mut heard).unwrap();
        assert_eq!(again, built);
        assert_eq!(archive.fetched.len(), 2, "nothing was fetched again");
        assert!(heard.0.is_empty());
        let left: Vec<_> = fs::read_dir(cache.directory()).unwrap().collect();
        assert_eq!(left.len(), 2, "the lock and the entry: {left:?}");
    }

    #[test]
    fn a_damaged_guest_is_built_again_and_the_user_is_told() {
        let (_directory, cache) = cache();
        let mut archive = Archive::default();
        let mut heard = Heard::default();
        let built = cached_or_built(&DEFAULT_GUEST, &cache, &mut archive, &mut heard).unwrap();
        for file in [&built.kernel, &built.initramfs] {
            fs::write(file, "damage").unwrap();
            let again = cached_or_built(&DEFAULT_GUEST, &cache, &mut archive, &mut heard).unwrap();
            assert_eq!(again, built);
            assert_ne!(fs::read(file).unwrap(), b"damage");
        }
        fs::remove_file(&built.kernel).unwrap();
        cached_or_built(&DEFAULT_GUEST, &cache, &mut archive, &mut heard).unwrap();
        assert_eq!(
            heard.0[0],
            "the cached guest is damaged (vmlinuz: its checksum differs); making it again"
        );
        assert_eq!(heard.0.len(), 3);
    }

    #[test]
    fn two_at_once_fetch_once() {
        let (_directory, cache) = cache();
        let fetched = std::thread::scope(|scope| {
            let threads = [(); 2].map(|()| {
                scope.spawn(|| {
                    let mut archive = Archive::default();
                    cached_or_built(&DEFAULT_GUEST, &cache, &mut archive, &mut Heard::default())
                        .unwrap();
                    archive.fetched.len()
                })
            });
            threads.map(|thread| thread.join().unwrap()).iter().sum::<usize>()
        });
        assert_eq!(fetched, 2);
    }

    #[test]
    fn a_rebuilt_guest_replaces_the_old_one() {
        let (_directory, cache) = cache();
        let mut heard = Heard::default();
        cached_or_built(&DEFAULT_GUEST, &cache, &mut Archive::default(), &mut heard).unwrap();
        let lock = cache.lock(&mut heard).unwrap();
        let mut newer = Archive { version: 1, ..Archive::default() };
        let built = build(&DEFAULT_GUEST, &lock, &mut newer, &mut heard).unwrap();
        drop(lock);
        assert_eq!(fs::read(&built.kernel).unwrap(), b"1");
        assert_eq!(cached_or_built(&DEFAULT_GUEST, &cache, &mut newer, &mut heard).unwrap(), built);
    }

    #[test]
    fn the_host_in_a_box_lies_beside_the_default_guest_and_has_kvm() {
        let (_directory, cache) = cache();
        let mut archive = Archive::default();
        let mut heard = Heard::default();
        let guest = cached_or_built(&DEFAULT_GUEST, &cache, &mut archive, &mut heard).unwrap();
        let host = cached_or_built(&STOCK_KVM_HOST, &cache, &mut archive, &mut heard).unwrap();
        assert_ne!(host.initramfs, guest.initramfs);
        assert!(
            host.manifest.modules.ends_with(&["irqbypass", "kvm", "kvm_amd"].map(str::to_owned))
        );
        assert_eq!(
            cached_or_built(&DEFAULT_GUEST, &cache, &mut archive, &mut heard).unwrap(),
            guest
        );
    }
}
