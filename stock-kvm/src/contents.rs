//! What is brought into the box: files at the paths they have outside, programs with their libraries.

use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};
use vmft_guest_images::cpio::Archive;

/// How an ELF file begins.
const ELF: &[u8] = b"\x7fELF";
/// Programs longer than this are brought in without their debug information.
const STRIP_ABOVE: usize = 4 << 20;
/// Where programs for the administrator are, should `PATH` not have them.
const SYSTEM_DIRECTORIES: [&str; 2] = ["/usr/sbin", "/sbin"];

#[derive(Debug)]
struct Entry {
    permissions: u32,
    bytes: Vec<u8>,
}

/// Files of a box, by their absolute paths in it.
#[derive(Debug, Default)]
pub struct Contents {
    files: BTreeMap<PathBuf, Entry>,
    directories: BTreeMap<PathBuf, ()>,
}

impl Contents {
    /// A file made here.
    pub fn text(&mut self, path: &str, permissions: u32, text: &[u8]) {
        let entry = Entry { permissions, bytes: text.to_vec() };
        self.files.insert(PathBuf::from(path), entry);
    }

    /// An empty directory, if nothing else makes it.
    pub fn directory(&mut self, path: &Path) {
        self.directories.insert(path.to_owned(), ());
    }

    /// What is at `path` on this host, at the same path in the box: a directory with all that is in
    /// it, a program with its libraries.
    pub fn bring(&mut self, path: &Path) -> Result<()> {
        let path = clean(path)?;
        self.bring_as(&path, &path)
    }

    /// The same, at another absolute path.
    pub fn bring_as(&mut self, path: &Path, inside: &Path) -> Result<()> {
        let shown = || path.display().to_string();
        let metadata = fs::metadata(path).with_context(shown)?;
        if metadata.is_dir() {
            self.directory(inside);
            for entry in fs::read_dir(path).with_context(shown)? {
                let name = entry.with_context(shown)?.file_name();
                self.bring_as(&path.join(&name), &inside.join(&name))?;
            }
            return Ok(());
        }
        if !metadata.is_file() || self.files.contains_key(inside) {
            return Ok(());
        }
        let permissions = metadata.permissions().mode() & 0o777;
        let mut bytes = fs::read(path).with_context(shown)?;
        let program = bytes.starts_with(ELF) && permissions & 0o100 != 0;
        if program && bytes.len() > STRIP_ABOVE {
            bytes = stripped(path).unwrap_or(bytes);
        }
        self.files.insert(inside.to_owned(), Entry { permissions, bytes });
        if program {
            for library in libraries(path)? {
                self.bring_as(&library, &library)?;
            }
        }
        Ok(())
    }

    /// Bytes of all files.
    pub fn total(&self) -> usize {
        self.files.values().map(|entry| entry.bytes.len()).sum()
    }

    /// The archive that the kernel unpacks.
    pub fn archive(&self) -> Result<Vec<u8>> {
        let mut directories = self.directories.clone();
        for path in self.files.keys().chain(self.directories.keys()) {
            for parent in path.ancestors().skip(1).filter(|parent| parent.parent().is_some()) {
                directories.insert(parent.to_owned(), ());
            }
        }
        let mut archive = Archive::default();
        // Parents come before children in the order of paths.
        for directory in directories.keys() {
            archive.directory(name(directory)?);
        }
        for (path, entry) in &self.files {
            archive.file(name(path)?, entry.permissions, &entry.bytes);
        }
        Ok(archive.finish())
    }
}

/// The path as the archive has it.
fn name(path: &Path) -> Result<&str> {
    let text = path.to_str().with_context(|| format!("{} is no text", path.display()))?;
    Ok(text.trim_start_matches('/'))
}

/// Absolute and without `.` and `..`.
pub fn clean(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path)?;
    if path.components().any(|part| part == Component::ParentDir) {
        return path.canonicalize().with_context(|| path.display().to_string());
    }
    Ok(path)
}

/// The file that a word on the command line means: a path, or a program of this host by name.
pub fn find(word: &str) -> Result<PathBuf> {
    if word.contains('/') || Path::new(word).exists() {
        return clean(Path::new(word));
    }
    find_program(word).with_context(|| format!("there is no file and no program {word}"))
}

/// A program of this host.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(SYSTEM_DIRECTORIES.map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
}

/// The program without debug information, which is most of it. Without binutils it stays.
fn stripped(path: &Path) -> Option<Vec<u8>> {
    let directory = tempfile::tempdir().ok()?;
    let target = directory.path().join("stripped");
    let mut strip = Command::new("strip");
    strip.arg("--strip-debug").arg("-o").arg(&target).arg(path).stderr(Stdio::null());
    strip.status().ok().filter(|status| status.success())?;
    fs::read(target).ok()
}

/// The libraries a program is linked with, and its loader.
fn libraries(path: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(path).env("LC_ALL", "C").output().context("ldd")?;
    // A program linked statically has none, and ldd calls that a failure.
    if !output.status.success() {
        return Ok(Vec::new());
    }
    let text = String::from_utf8(output.stdout).context("ldd")?;
    parse_libraries(&text).with_context(|| path.display().to_string())
}

fn parse_libraries(text: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        let file = line.split_once(" => ").map_or(line, |(_, file)| file);
        if file == "not found" {
            bail!("{line}");
        }
        let file = file.split(" (").next().unwrap_or(file);
        if file.starts_with('/') {
            found.push(PathBuf::from(file));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_the_loader_are_read_from_ldd() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\
                    \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            parse_libraries(text).unwrap(),
            [
                Path::new("/lib/x86_64-linux-gnu/libc.so.6"),
                Path::new("/lib64/ld-linux-x86-64.so.2")
            ]
        );
        assert_eq!(parse_libraries("\tstatically linked\n").unwrap(), Vec::<PathBuf>::new());
        assert!(parse_libraries("\tlibx.so.1 => not found\n").is_err());
    }

    #[test]
    fn a_program_comes_with_its_libraries_and_directories_come_before_files() {
        let mut contents = Contents::default();
        contents.bring(&env::current_exe().unwrap()).unwrap();
        assert!(contents.files.keys().any(|file| file.ends_with("libc.so.6")));
        let archive = contents.archive().unwrap();
        let text = String::from_utf8_lossy(&archive);
        let directory = text.find("lib64\0").unwrap();
        assert!(directory < text.find("lib64/ld-linux").unwrap());
    }

    #[test]
    fn a_directory_comes_with_all_that_is_in_it() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("a/empty")).unwrap();
        fs::write(directory.path().join("a/file"), "text").unwrap();
        let mut contents = Contents::default();
        contents.bring_as(&directory.path().join("a"), Path::new("/there")).unwrap();
        assert_eq!(contents.files[Path::new("/there/file")].bytes, b"text");
        assert!(contents.directories.contains_key(Path::new("/there/empty")));
        assert_eq!(contents.total(), 4);
    }
}
