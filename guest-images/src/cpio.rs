//! Writes the `newc` cpio archives that Linux unpacks as an initramfs.
//!
//! The format is in the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`.
//! Equal contents give equal bytes: owner, times and inode numbers do not come from the host.

/// Modification time of every file: a fixed day, since 0 looks like an error in listings.
const MODIFIED: u32 = 1_700_000_000;
/// Archives end at a multiple of this, as cpio itself writes them.
const BLOCK: usize = 512;

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive being written. Parents must be added before what lies in them.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// A directory.
    pub fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[]);
    }

    /// A file with these permission bits.
    ///
    /// # Panics
    /// If the contents do not fit in 4 GiB.
    pub fn file(&mut self, path: &str, permissions: u32, contents: &[u8]) {
        self.entry(path, FILE | permissions, (0, 0), contents);
    }

    /// A symbolic link to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.entry(path, SYMLINK | 0o777, (0, 0), target.as_bytes());
    }

    /// A character device, which only root may use.
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, CHARACTER_DEVICE | 0o600, (major, minor), &[]);
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.header("TRAILER!!!", [0; 13], &[]);
        self.pad(BLOCK);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), contents: &[u8]) {
        self.entries += 1;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let len = u32::try_from(contents.len()).expect("files of an initramfs are small");
        // Inode, mode, uid, gid, links, time, length, device of the file system (two), device
        // (two), length of the name, checksum; the name's length is filled in by the caller.
        let fields =
            [self.entries, mode, 0, 0, links, MODIFIED, len, 0, 0, device.0, device.1, 0, 0];
        self.header(path, fields, contents);
    }

    fn header(&mut self, path: &str, mut fields: [u32; 13], contents: &[u8]) {
        fields[11] = u32::try_from(path.len() + 1).expect("paths are short");
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend_from_slice(contents);
        self.pad(4);
    }

    fn pad(&mut self, multiple: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(multiple), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_those_of_the_format() {
        let mut archive = Archive::default();
        archive.file("a", 0o644, b"xyz");
        let bytes = archive.finish();
        let expected = concat!(
            "070701", "00000001", "000081A4", "00000000", "00000000", "00000001", "6553F100",
            "00000003", "00000000", "00000000", "00000000", "00000000", "00000002", "00000000",
            "a\0", "xyz\0", "070701", "00000000",
        );
        assert_eq!(&bytes[..expected.len()], expected.as_bytes());
        assert_eq!(bytes.len() % BLOCK, 0);
        assert!(String::from_utf8(bytes).unwrap().contains("TRAILER!!!\0"));
    }

    #[test]
    fn every_entry_begins_on_a_multiple_of_four() {
        for len in 0..9 {
            let mut archive = Archive::default();
            archive.symlink(&"n".repeat(len + 1), "target");
            archive.file("f", 0o755, &vec![b'.'; len]);
            archive.character_device("dev", 5, 1);
            archive.directory("d");
            let text = String::from_utf8(archive.finish()).unwrap();
            let starts: Vec<usize> = text.match_indices("070701").map(|(at, _)| at).collect();
            assert_eq!(starts.len(), 5);
            assert!(starts.iter().all(|at| at % 4 == 0), "{starts:?}");
        }
    }
}
