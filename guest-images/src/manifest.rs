//! What a cached guest is made of, with checksums; kept beside it as `manifest.json`.

use crate::error::GuestError;
use serde::{Deserialize, Serialize};
use sha2::Digest;
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::str::FromStr;

/// Name of the manifest's file.
pub(crate) const FILE_NAME: &str = "manifest.json";
/// Version of the manifest's own format.
const FORMAT: u32 = 1;

/// A SHA-256 checksum; shown and kept as 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Sha256([u8; 32]);

impl Sha256 {
    /// The checksum of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(sha2::Sha256::digest(bytes).into())
    }

    /// The checksum of a file's contents.
    ///
    /// # Errors
    /// Whatever reading the file gives.
    pub fn of_file(path: &Path) -> io::Result<Self> {
        fs::read(path).map(|bytes| Self::of(&bytes))
    }
}

impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Text that is no checksum.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a SHA-256 checksum")]
pub struct InvalidChecksum(String);

impl FromStr for Sha256 {
    type Err = InvalidChecksum;

    fn from_str(text: &str) -> Result<Self, InvalidChecksum> {
        let invalid = || InvalidChecksum(text.to_owned());
        let digits = text.as_bytes();
        if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(invalid());
        }
        let mut bytes = [0; 32];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte =
                u8::from_str_radix(&text[index * 2..index * 2 + 2], 16).map_err(|_| invalid())?;
        }
        Ok(Self(bytes))
    }
}

impl From<Sha256> for String {
    fn from(checksum: Sha256) -> Self {
        checksum.to_string()
    }
}

impl TryFrom<String> for Sha256 {
    type Error = InvalidChecksum;

    fn try_from(text: String) -> Result<Self, InvalidChecksum> {
        text.parse()
    }
}

/// A Debian package that was used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackageRecord {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Checksum of the package file.
    pub sha256: Sha256,
}

/// What a cached guest is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this format.
    format: u32,
    /// The kernel's release, `6.1.0-49-cloud-amd64`.
    pub release: String,
    /// The packages it came from.
    pub packages: Vec<PackageRecord>,
    /// Modules in the initramfs, in load order.
    pub modules: Vec<String>,
    /// The entry's files by name, with their checksums.
    pub files: BTreeMap<String, Sha256>,
}

impl Manifest {
    /// Describes the files named, which lie in `directory`.
    pub(crate) fn describe(
        directory: &Path,
        release: String,
        packages: Vec<PackageRecord>,
        modules: Vec<String>,
        names: &[&str],
    ) -> Result<Self, GuestError> {
        let mut files = BTreeMap::new();
        for name in names {
            let path = directory.join(name);
            let checksum = Sha256::of_file(&path).map_err(GuestError::file("reading", &path))?;
            files.insert((*name).to_owned(), checksum);
        }
        Ok(Self { format: FORMAT, release, packages, modules, files })
    }

    /// Writes it beside the files it describes.
    pub(crate) fn write(&self, directory: &Path) -> Result<(), GuestError> {
        let path = directory.join(FILE_NAME);
        let mut text = serde_json::to_string_pretty(self).expect("plain values serialise");
        text.push('\n');
        fs::write(&path, text).map_err(GuestError::file("writing", &path))
    }

    /// Reads it and compares every file with it; what is wrong is said in words for the user.
    pub(crate) fn read_and_verify(directory: &Path, names: &[&str]) -> Result<Self, String> {
        let text =
            fs::read(directory.join(FILE_NAME)).map_err(|error| format!("{FILE_NAME}: {error}"))?;
        let manifest: Self =
            serde_json::from_slice(&text).map_err(|error| format!("{FILE_NAME}: {error}"))?;
        if manifest.format != FORMAT {
            return Err(format!("{FILE_NAME} has format {}", manifest.format));
        }
        for name in names {
            let promised = manifest
                .files
                .get(*name)
                .ok_or_else(|| format!("{FILE_NAME} does not have {name}"))?;
            let found = Sha256::of_file(&directory.join(name))
                .map_err(|error| format!("{name}: {error}"))?;
            if found != *promised {
                return Err(format!("{name}: its checksum differs"));
            }
        }
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_is_the_one_everybody_computes() {
        let text = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(Sha256::of(b"abc").to_string(), text);
        assert_eq!(text.parse(), Ok(Sha256::of(b"abc")));
        assert!("ba78".parse::<Sha256>().is_err());
        assert!("\u{e9}".repeat(32).parse::<Sha256>().is_err());
    }

    #[test]
    fn a_changed_missing_or_unlisted_file_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        fs::write(path.join("kernel"), "kernel").unwrap();
        let manifest =
            Manifest::describe(path, "6.1".to_owned(), Vec::new(), Vec::new(), &["kernel"])
                .unwrap();
        manifest.write(path).unwrap();
        assert_eq!(Manifest::read_and_verify(path, &["kernel"]), Ok(manifest));

        fs::write(path.join("kernel"), "kernal").unwrap();
        let damage = Manifest::read_and_verify(path, &["kernel"]).unwrap_err();
        assert_eq!(damage, "kernel: its checksum differs");
        fs::remove_file(path.join("kernel")).unwrap();
        assert!(Manifest::read_and_verify(path, &["kernel"]).unwrap_err().starts_with("kernel: "));
        let damage = Manifest::read_and_verify(path, &["other"]).unwrap_err();
        assert_eq!(damage, "manifest.json does not have other");
        fs::write(path.join(FILE_NAME), "{").unwrap();
        assert!(Manifest::read_and_verify(path, &["kernel"]).is_err());
    }
}
