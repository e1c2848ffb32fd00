//! Programs of Debian packages for an initramfs: each with the libraries it is linked against, and
//! nothing else of its package.

use crate::error::GuestError;
use crate::guest::Unpacked;
use object::LittleEndian;
use object::elf::{DT_NEEDED, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader};
use std::collections::BTreeMap;
use std::fs;

/// Where Debian has shared libraries, and where they go.
const LIBRARIES: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];
/// Where the dynamic linker is, and where the programs look for it.
const LINKER: &str = "lib64/ld-linux-x86-64.so.2";

/// Files by their path in the guest.
pub(crate) type Files = BTreeMap<String, Vec<u8>>;

/// What a program or library asks for.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    libraries: Vec<String>,
    /// It is started by the dynamic linker.
    linker: bool,
}

/// The `programs`, by their paths in the packages, with everything they are linked against.
pub(crate) fn collect(packages: &[Unpacked], programs: &[&str]) -> Result<Files, GuestError> {
    let mut files = Files::new();
    let mut open: Vec<(String, Vec<u8>)> = Vec::new();
    for program in programs {
        let contents = find(packages, &[(*program).to_owned()])?;
        open.push(((*program).to_owned(), contents));
    }
    while let Some((path, contents)) = open.pop() {
        let wanted = wanted(&contents).map_err(|what| GuestError::PackageContents {
            package: path.clone(),
            what: what.to_owned(),
        })?;
        let linker = wanted.linker.then(|| LINKER.to_owned());
        let libraries = wanted.libraries.iter().map(|name| format!("{}/{name}", LIBRARIES[0]));
        for path in libraries.chain(linker) {
            let name = path.rsplit('/').next().expect("a path has a last part");
            if !files.contains_key(&path) && open.iter().all(|(other, _)| *other != path) {
                let places = LIBRARIES.map(|directory| format!("{directory}/{name}"));
                open.push((path.clone(), find(packages, &places)?));
            }
        }
        files.insert(path, contents);
    }
    Ok(files)
}

fn find(packages: &[Unpacked], places: &[String]) -> Result<Vec<u8>, GuestError> {
    let files =
        packages.iter().flat_map(|package| places.iter().map(|place| package.root.join(place)));
    for file in files {
        if let Ok(contents) = fs::read(&file) {
            return Ok(contents);
        }
    }
    let names: Vec<&str> = packages.iter().map(|package| package.record.name.as_str()).collect();
    Err(GuestError::PackageContents { package: names.join(", "), what: places[0].clone() })
}

fn wanted(contents: &[u8]) -> Result<Wanted, &'static str> {
    const NOT_ELF: &str = "ELF file in its place";
    let header = FileHeader64::<LittleEndian>::parse(contents).map_err(|_| NOT_ELF)?;
    let endian = header.endian().map_err(|_| NOT_ELF)?;
    let segments = header.program_headers(endian, contents).map_err(|_| NOT_ELF)?;
    let linker =
        segments.iter().any(|segment| matches!(segment.interpreter(endian, contents), Ok(Some(_))));
    let sections = header.sections(endian, contents).map_err(|_| NOT_ELF)?;
    let table = sections.dynamic_table(endian, contents).map_err(|_| NOT_ELF)?;
    let mut libraries = Vec::new();
    for entry in table.iter().filter(|entry| entry.tag == DT_NEEDED) {
        let name = table.string(entry).map_err(|_| NOT_ELF)?;
        libraries.push(String::from_utf8_lossy(name).into_owned());
    }
    // The dynamic linker itself is named by libraries that call it; it needs nothing.
    libraries.retain(|name| !LINKER.ends_with(name.as_str()));
    Ok(Wanted { libraries, linker })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{PackageRecord, Sha256};

    fn package(files: &[(&str, &[u8])]) -> (tempfile::TempDir, Unpacked) {
        let directory = tempfile::tempdir().unwrap();
        for (path, contents) in files {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, contents).unwrap();
        }
        let record = PackageRecord {
            name: "test".to_owned(),
            version: "1".to_owned(),
            sha256: Sha256::of(b""),
        };
        let root = directory.path().to_owned();
        (directory, Unpacked { record, root })
    }

    #[test]
    fn a_program_comes_with_the_libraries_it_is_linked_against() {
        // This very program is linked dynamically, as programs of packages are.
        let myself = fs::read(std::env::current_exe().unwrap()).unwrap();
        let needs = wanted(&myself).unwrap();
        assert!(
            needs.linker && needs.libraries.iter().any(|name| name == "libc.so.6"),
            "{needs:?}"
        );
        let library = object::write::Object::new(
            object::BinaryFormat::Elf,
            object::Architecture::X86_64,
            object::Endianness::Little,
        )
        .write()
        .unwrap();
        let libraries: Vec<String> = needs
            .libraries
            .iter()
            .map(|name| format!("usr/lib/x86_64-linux-gnu/{name}"))
            .chain(["lib/x86_64-linux-gnu/ld-linux-x86-64.so.2".to_owned()])
            .collect();
        let mut files: Vec<(&str, &[u8])> =
            libraries.iter().map(|path| (path.as_str(), library.as_slice())).collect();
        files.push(("usr/bin/program", &myself));
        let (_directory, unpacked) = package(&files);
        let collected = collect(&[unpacked], &["usr/bin/program"]).unwrap();
        assert_eq!(collected.len(), needs.libraries.len() + 2);
        assert!(collected.contains_key("lib/x86_64-linux-gnu/libc.so.6"));
        assert!(collected.contains_key(LINKER));
    }

    #[test]
    fn a_missing_program_or_library_and_a_script_are_errors() {
        let myself = fs::read(std::env::current_exe().unwrap()).unwrap();
        let (_directory, unpacked) =
            package(&[("bin/script", b"#!/bin/sh"), ("bin/alone", &myself)]);
        let packages = [unpacked];
        let what = |program| match collect(&packages, &[program]) {
            Err(GuestError::PackageContents { what, .. }) => what,
            other => panic!("{other:?}"),
        };
        assert_eq!(what("bin/absent"), "bin/absent");
        assert_eq!(what("bin/script"), "ELF file in its place");
        assert!(what("bin/alone").starts_with("lib"));
    }
}
