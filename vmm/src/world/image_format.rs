//! What kind of file a disk image is: a disk is used as it is ("raw"), and a file that is a disk image of
//! another kind, a compressed one, or no image at all would be destroyed by the guest's first write.
//!
//! A file is known by a few bytes at a fixed place. What has none of them is raw: an empty disk, one with a
//! partition table, one with a file system. A guest may write any of these bytes to its own raw disk, so an
//! operator can say that a file is raw; nobody is asked what it looks like then.

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

/// What a file that is no raw disk image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageFormat {
    /// A disk image that keeps tables of what is where.
    Disk {
        /// What people call it.
        name: &'static str,
        /// What `qemu-img` calls it.
        qemu: &'static str,
    },
    /// A disk image that `simg2img` turns into a raw one.
    AndroidSparse,
    /// A file that something is packed in.
    Compressed {
        /// What people call it.
        name: &'static str,
        /// The program that unpacks it to its output, with `-dc`.
        program: &'static str,
    },
    /// Several files in one.
    Archive(&'static str),
    /// A file system that can only be read: a raw disk to a guest that does not write.
    Iso9660,
    /// A program or a kernel.
    Program(&'static str),
}

impl ImageFormat {
    /// True if a guest that cannot write may have the file as it is.
    pub fn may_be_read(self) -> bool {
        self == Self::Iso9660
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk { name, .. } => write!(f, "a {name} image"),
            Self::AndroidSparse => write!(f, "an Android sparse image"),
            Self::Compressed { name, .. } => write!(f, "compressed ({name})"),
            Self::Archive(name) => write!(f, "a {name} archive"),
            Self::Iso9660 => write!(f, "an ISO 9660 image"),
            Self::Program(name) => write!(f, "{name}"),
        }
    }
}

/// Where a signature is.
#[derive(Debug, Clone, Copy)]
enum Place {
    /// So many bytes from the beginning.
    Start(usize),
    /// So many bytes from the beginning of the last sector.
    LastSector(usize),
}
use Place::{LastSector, Start};

const fn disk(name: &'static str, qemu: &'static str) -> ImageFormat {
    ImageFormat::Disk { name, qemu }
}

const fn compressed(name: &'static str, program: &'static str) -> ImageFormat {
    ImageFormat::Compressed { name, program }
}

const VMDK: ImageFormat = disk("VMDK", "vmdk");
const VHD: ImageFormat = disk("VHD", "vpc");
const PARALLELS: ImageFormat = disk("Parallels", "parallels");
const LZ4: ImageFormat = compressed("lz4", "lz4");
const ZIP: ImageFormat = ImageFormat::Archive("zip");

/// What a format is known by: all of these parts.
type Signature = (ImageFormat, &'static [(Place, &'static [u8])]);

/// What the formats are known by, one a line.
const SIGNATURES: &[Signature] = &[
    (disk("qcow2", "qcow2"), &[(Start(0), b"QFI\xFB\0\0\0\x02")]),
    (disk("qcow2", "qcow2"), &[(Start(0), b"QFI\xFB\0\0\0\x03")]),
    (disk("qcow", "qcow"), &[(Start(0), b"QFI\xFB")]),
    (disk("QED", "qed"), &[(Start(0), b"QED\0")]),
    // Sparse extents of workstations and of servers, and the text that names extents.
    (VMDK, &[(Start(0), b"KDMV")]),
    (VMDK, &[(Start(0), b"COWD")]),
    (VMDK, &[(Start(0), b"\xBE\xBA\xFE\xCA\0\0\0\0")]),
    (VMDK, &[(Start(0), b"# Disk DescriptorFile")]),
    (disk("VHDX", "vhdx"), &[(Start(0), b"vhdxfile")]),
    // One that grows has a copy of its last sector in front; one of fixed size has only the last.
    (VHD, &[(Start(0), b"conectix")]),
    (VHD, &[(LastSector(0), b"conectix"), (LastSector(12), b"\0\x01\0\0")]),
    (disk("VDI", "vdi"), &[(Start(0x40), b"\x7F\x10\xDA\xBE")]),
    (PARALLELS, &[(Start(0), b"WithoutFreeSpace")]),
    (PARALLELS, &[(Start(0), b"WithouFreSpacExt")]),
    (disk("Bochs", "bochs"), &[(Start(0), b"Bochs Virtual HD Image\0")]),
    (disk("DMG", "dmg"), &[(LastSector(0), b"koly\0\0\0\x04\0\0\x02\0")]),
    (ImageFormat::AndroidSparse, &[(Start(0), b"\x3A\xFF\x26\xED\x01\0")]),
    (compressed("gzip", "gzip"), &[(Start(0), b"\x1F\x8B\x08")]),
    (compressed("xz", "xz"), &[(Start(0), b"\xFD7zXZ\0")]),
    (compressed("zstd", "zstd"), &[(Start(0), b"\x28\xB5\x2F\xFD")]),
    (compressed("bzip2", "bzip2"), &[(Start(0), b"BZh"), (Start(4), b"1AY&SY")]),
    (LZ4, &[(Start(0), b"\x04\x22\x4D\x18")]),
    (LZ4, &[(Start(0), b"\x02\x21\x4C\x18")]),
    (compressed("lzip", "lzip"), &[(Start(0), b"LZIP\x01")]),
    (compressed("lzop", "lzop"), &[(Start(0), b"\x89LZO\0\r\n\x1A\n")]),
    (ZIP, &[(Start(0), b"PK\x03\x04")]),
    (ZIP, &[(Start(0), b"PK\x05\x06")]),
    (ImageFormat::Archive("7z"), &[(Start(0), b"7z\xBC\xAF\x27\x1C")]),
    (ImageFormat::Archive("RAR"), &[(Start(0), b"Rar!\x1A\x07")]),
    (ImageFormat::Archive("tar"), &[(Start(257), b"ustar")]),
    (ImageFormat::Archive("cpio"), &[(Start(0), b"070701")]),
    (ImageFormat::Archive("Debian or ar"), &[(Start(0), b"!<arch>\n")]),
    (ImageFormat::Archive("WIM"), &[(Start(0), b"MSWIM\0\0\0")]),
    (
        ImageFormat::Program("a Linux kernel"),
        &[(Start(0x1FE), b"\x55\xAA"), (Start(0x202), b"HdrS")],
    ),
    (ImageFormat::Program("an ELF program or kernel"), &[(Start(0), b"\x7FELF")]),
    // Last: such a file may begin with anything, a partition table for instance.
    (ImageFormat::Iso9660, &[(Start(0x8001), b"CD001")]),
];

const SECTOR: usize = 512;
/// So much of a file's beginning holds every signature.
const HEAD: usize = 0x8800;

/// What is looked at of a file.
struct Sample {
    head: Vec<u8>,
    /// The last sector's worth of bytes, whatever the size.
    tail: Vec<u8>,
}

impl Sample {
    fn of(mut file: &File) -> io::Result<Self> {
        // A block device has no length but an end.
        let size = file.seek(SeekFrom::End(0))?;
        let read = |at: u64, len: usize| -> io::Result<Vec<u8>> {
            let left = usize::try_from(size - at).unwrap_or(usize::MAX);
            let mut bytes = vec![0; len.min(left)];
            file.read_exact_at(&mut bytes, at)?;
            Ok(bytes)
        };
        let tail_at = size.saturating_sub(SECTOR as u64);
        Ok(Self { head: read(0, HEAD)?, tail: read(tail_at, SECTOR)? })
    }

    fn has(&self, (place, bytes): &(Place, &[u8])) -> bool {
        let (from, at) = match *place {
            Start(at) => (&self.head, at),
            LastSector(at) => (&self.tail, at),
        };
        from.get(at..).is_some_and(|from| from.starts_with(bytes))
    }
}

/// What `file` is, if it is no raw disk image. Reads, and changes nothing.
///
/// # Errors
/// The file system's error.
pub fn recognise(file: &File) -> io::Result<Option<ImageFormat>> {
    let sample = Sample::of(file)?;
    let found = SIGNATURES.iter().find(|(_, parts)| parts.iter().all(|part| sample.has(part)));
    Ok(found.map(|(format, _)| *format))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is made of a file of `size` bytes with `parts` in it.
    fn recognised(size: u64, parts: &[(u64, &[u8])]) -> Option<String> {
        let file = tempfile::tempfile().expect("temporary file");
        file.set_len(size).expect("sparse");
        for (at, bytes) in parts {
            file.write_all_at(bytes, *at).expect("written");
        }
        recognise(&file).expect("readable").map(|format| format.to_string())
    }

    #[test]
    fn every_signature_is_found_where_it_is_alone() {
        let size = 3 << 20;
        for (format, parts) in SIGNATURES {
            let absolute = |(place, bytes): &(Place, &'static [u8])| match *place {
                Start(at) => (at as u64, *bytes),
                LastSector(at) => (size - SECTOR as u64 + at as u64, *bytes),
            };
            let parts: Vec<_> = parts.iter().map(absolute).collect();
            assert_eq!(recognised(size, &parts), Some(format.to_string()), "{parts:?}");
            for missing in 0..parts.len() {
                let mut less = parts.clone();
                less.remove(missing);
                assert_ne!(recognised(size, &less), Some(format.to_string()), "{parts:?}");
            }
        }
    }

    #[test]
    fn disks_with_partitions_or_file_systems_are_raw() {
        let mbr: &[(u64, &[u8])] = &[(0, b"\xEB\x63\x90"), (0x1BE, b"\x80"), (0x1FE, b"\x55\xAA")];
        let gpt: &[(u64, &[u8])] = &[(0x1FE, b"\x55\xAA"), (0x200, b"EFI PART")];
        let ext4: &[(u64, &[u8])] = &[(0x438, b"\x53\xEF")];
        let luks: &[(u64, &[u8])] = &[(0, b"LUKS\xBA\xBE\0\x02")];
        for parts in [&[], mbr, gpt, ext4, luks] {
            assert_eq!(recognised(1 << 20, parts), None, "{parts:?}");
        }
        assert_eq!(recognised(0, &[]), None);
        assert_eq!(recognised(3, &[(0, b"QFI")]), None);
    }

    #[test]
    fn a_file_of_any_size_is_looked_at_to_its_last_byte() {
        let vhd: &[u8] = b"conectix\0\0\0\x02\0\x01\0\0";
        for size in [512, 513, 40_000, (2 << 30) + 1] {
            assert_eq!(recognised(size, &[(size - 512, vhd)]).as_deref(), Some("a VHD image"));
        }
        assert_eq!(recognised(8, &[(0, b"QFI\xFB\0\0\0\x03")]).as_deref(), Some("a qcow2 image"));
    }
}
