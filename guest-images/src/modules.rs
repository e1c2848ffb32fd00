//! Kernel modules: finding them in an unpacked package, and the order they must be loaded in.
//!
//! Debian's packages have no `modules.dep` (it is made when they are installed), so dependencies
//! are read from the modules themselves, from the `depends=` string of their `.modinfo` section.

use crate::error::GuestError;
use object::{Object, ObjectSection};
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Largest module that is unpacked, against damaged packages.
const MAX_MODULE: u64 = 64 << 20;

/// A module as it goes into the initramfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Module {
    /// Its name with underscores, `virtio_blk`.
    pub(crate) name: String,
    /// The uncompressed file.
    pub(crate) contents: Vec<u8>,
}

/// The modules of one kernel.
#[derive(Debug)]
pub(crate) struct ModuleTree {
    files: BTreeMap<String, PathBuf>,
    builtin: Vec<String>,
}

impl ModuleTree {
    /// Looks through `lib/modules/<release>`.
    pub(crate) fn open(directory: &Path) -> Result<Self, GuestError> {
        let mut files = BTreeMap::new();
        collect(&directory.join("kernel"), &mut files)?;
        let path = directory.join("modules.builtin");
        let text = fs::read_to_string(&path).map_err(GuestError::file("reading", &path))?;
        let builtin = text.lines().filter_map(|line| module_name(Path::new(line))).collect();
        Ok(Self { files, builtin })
    }

    /// The modules wanted and all they depend on, in an order in which they can be loaded.
    /// What is built into the kernel is left out.
    pub(crate) fn resolve(&self, wanted: &[&str]) -> Result<Vec<Module>, GuestError> {
        let mut loaded = Vec::new();
        for name in wanted {
            self.add(name, &mut Vec::new(), &mut loaded)?;
        }
        Ok(loaded)
    }

    fn add(
        &self,
        name: &str,
        path: &mut Vec<String>,
        loaded: &mut Vec<Module>,
    ) -> Result<(), GuestError> {
        let name = name.replace('-', "_");
        if loaded.iter().any(|module| module.name == name) || self.builtin.contains(&name) {
            return Ok(());
        }
        let broken = |reason: String| GuestError::Module { name: name.clone(), reason };
        if path.contains(&name) {
            return Err(broken("it depends on itself".to_owned()));
        }
        let file = self
            .files
            .get(&name)
            .ok_or_else(|| broken("the kernel's package does not have it".to_owned()))?;
        let contents = read(file).map_err(&broken)?;
        path.push(name.clone());
        for dependency in dependencies(&contents).map_err(&broken)? {
            self.add(&dependency, path, loaded)?;
        }
        path.pop();
        loaded.push(Module { name, contents });
        Ok(())
    }
}

fn collect(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), GuestError> {
    let unreadable = || GuestError::file("reading", directory);
    for entry in fs::read_dir(directory).map_err(unreadable())? {
        let entry = entry.map_err(unreadable())?;
        let path = entry.path();
        if entry.file_type().map_err(unreadable())?.is_dir() {
            collect(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// `virtio_rng` for `…/virtio-rng.ko.xz`.
fn module_name(path: &Path) -> Option<String> {
    let (stem, extension) = path.file_name()?.to_str()?.split_once(".ko")?;
    ["", ".xz", ".zst", ".gz"].contains(&extension).then(|| stem.replace('-', "_"))
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    let bytes = fs::read(path).map_err(|error| error.to_string())?;
    let mut contents = Vec::new();
    let reader: Box<dyn Read + '_> = match path.extension().and_then(|name| name.to_str()) {
        Some("xz") => Box::new(lzma_rust2::XzReader::new(bytes.as_slice(), false)),
        Some("gz") => Box::new(flate2::read::GzDecoder::new(bytes.as_slice())),
        Some("zst") => Box::new(
            ruzstd::decoding::StreamingDecoder::new(bytes.as_slice())
                .map_err(|error| error.to_string())?,
        ),
        _ => Box::new(bytes.as_slice()),
    };
    reader.take(MAX_MODULE).read_to_end(&mut contents).map_err(|error| error.to_string())?;
    Ok(contents)
}

/// The names in the `depends=` string.
fn dependencies(contents: &[u8]) -> Result<Vec<String>, String> {
    let file = object::File::parse(contents).map_err(|error| error.to_string())?;
    let section = file.section_by_name(".modinfo").ok_or("it has no .modinfo section")?;
    let information = section.data().map_err(|error| error.to_string())?;
    let depends = information
        .split(|byte| *byte == 0)
        .find_map(|line| line.strip_prefix(b"depends="))
        .ok_or("it does not say what it depends on")?;
    let names = std::str::from_utf8(depends).map_err(|error| error.to_string())?;
    Ok(names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

/// An ELF file with nothing but a `.modinfo` section.
#[cfg(test)]
pub(crate) fn test_module(depends: &str) -> Vec<u8> {
    let mut file = object::write::Object::new(
        object::BinaryFormat::Elf,
        object::Architecture::X86_64,
        object::Endianness::Little,
    );
    let kind = object::SectionKind::ReadOnlyData;
    let section = file.add_section(Vec::new(), b".modinfo".to_vec(), kind);
    let text = format!("license=GPL\0depends={depends}\0name=x\0");
    file.append_section_data(section, text.as_bytes(), 1);
    file.write().expect("an empty object file")
}

#[cfg(test)]
mod tests {
    use super::test_module as module;
    use super::*;
    use std::io::Write;

    fn tree(files: &[(&str, Vec<u8>)], builtin: &str) -> (tempfile::TempDir, ModuleTree) {
        let directory = tempfile::tempdir().unwrap();
        let kernel = directory.path().join("kernel/drivers");
        fs::create_dir_all(&kernel).unwrap();
        for (name, contents) in files {
            fs::write(kernel.join(name), contents).unwrap();
        }
        fs::write(directory.path().join("modules.builtin"), builtin).unwrap();
        let tree = ModuleTree::open(directory.path()).unwrap();
        (directory, tree)
    }

    fn names(modules: &[Module]) -> Vec<&str> {
        modules.iter().map(|module| module.name.as_str()).collect()
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let (_directory, tree) = tree(
            &[
                ("virtio.ko", module("")),
                ("virtio_ring.ko", module("virtio")),
                ("virtio_pci.ko", module("virtio_ring,virtio")),
                ("virtio-rng.ko", module("virtio,virtio_ring,rng-core")),
                ("unused.ko", module("")),
            ],
            "kernel/drivers/char/hw_random/rng-core.ko\n",
        );
        let modules = tree.resolve(&["virtio_pci", "virtio-rng"]).unwrap();
        assert_eq!(names(&modules), ["virtio", "virtio_ring", "virtio_pci", "virtio_rng"]);
    }

    #[test]
    fn a_compressed_module_goes_in_uncompressed() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&module("")).unwrap();
        let (_directory, tree) = tree(&[("a.ko.gz", gzip.finish().unwrap())], "");
        assert_eq!(tree.resolve(&["a"]).unwrap()[0].contents, module(""));
    }

    #[test]
    fn a_missing_a_circular_and_a_broken_module_are_errors() {
        let (_directory, tree) = tree(
            &[
                ("a.ko", module("b")),
                ("b.ko", module("a")),
                ("c.ko", module("absent")),
                ("d.ko", b"not ELF".to_vec()),
            ],
            "",
        );
        let reason = |name: &str| tree.resolve(&[name]).unwrap_err().to_string();
        assert_eq!(reason("a"), "kernel module a: it depends on itself");
        assert_eq!(reason("c"), "kernel module absent: the kernel's package does not have it");
        assert!(reason("d").starts_with("kernel module d: "));
    }
}
