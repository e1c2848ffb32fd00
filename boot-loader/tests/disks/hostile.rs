//! Disks that lie.

use crate::image::{ext, fat, menu};
use vmft_boot_loader::BootDiskError;
use vmft_fuzzing::peak_of;

/// So much may be held for a disk on which nothing is found that can be booted.
const LITTLE: usize = 32 << 20;

/// The error of a disk, for which not much memory is taken.
fn refused(disk: &[u8]) -> BootDiskError {
    let (error, peak) = peak_of(|| {
        let menu = menu(disk)?;
        menu.entry(None).and_then(|entry| menu.read(entry)).map(drop)
    });
    assert!(peak < disk.len() + LITTLE, "{peak} bytes");
    error.unwrap_err()
}

/// The place of the inode whose only block holds `contents`: extents are one entry here, after their head.
fn inode_with(image: &[u8], contents: &[u8]) -> usize {
    let find =
        |bytes: &[u8], from: usize| (from..image.len()).find(|at| image[*at..].starts_with(bytes));
    let block = find(contents, 0).unwrap() / 1024;
    let mut extent = [0; 12];
    extent[4..6].copy_from_slice(&1u16.to_le_bytes());
    extent[8..].copy_from_slice(&u32::try_from(block).unwrap().to_le_bytes());
    find(&extent, 0).unwrap() - 12 - 0x28
}

/// An image without checksums, in which lies are not noticed at once.
fn lying(files: &[(&str, &str)]) -> Vec<u8> {
    ext(1, "^metadata_csum,^metadata_csum_seed,^has_journal", files)
}

#[test]
fn links_that_lead_to_each_other_or_nowhere_are_no_kernel() {
    for link in ["->/vmlinuz", "->boot/vmlinuz", "->/nothing/there", "->/boot"] {
        let disk = ext(1, "extent", &[("/vmlinuz", link), ("/boot/vmlinuz", "->/vmlinuz")]);
        let error = refused(&disk);
        assert!(matches!(error, BootDiskError::Nothing { .. }), "{link}: {error}");
    }
    let config = "menuentry a { linux /loop/x }\n";
    let disk = ext(1, "extent", &[("/boot/grub/grub.cfg", config), ("/loop", "->/loop/loop")]);
    assert!(matches!(refused(&disk), BootDiskError::Missing { path, .. } if path == "/loop/x"));
}

#[test]
fn a_link_whose_length_is_a_lie_takes_no_memory() {
    let target = format!("->/{}", "x/".repeat(100));
    let mut disk = lying(&[("/vmlinuz", &target)]);
    let at = inode_with(&disk, &target.as_bytes()[2..]);
    assert_eq!(&disk[at + 4..at + 8], &201u32.to_le_bytes());
    disk[at + 4..at + 8].copy_from_slice(&u32::MAX.to_le_bytes());
    disk[at + 0x6C..at + 0x70].copy_from_slice(&0x7FFF_FFFFu32.to_le_bytes());
    assert!(matches!(refused(&disk), BootDiskError::Nothing { .. }));
}

#[test]
fn a_kernel_whose_length_is_a_lie_is_refused_by_its_length() {
    let mut disk = lying(&[("/vmlinuz", "a kernel")]);
    let at = inode_with(&disk, b"a kernel");
    disk[at + 4..at + 8].copy_from_slice(&(1u32 << 31).to_le_bytes());
    let error = refused(&disk);
    assert!(matches!(error, BootDiskError::TooLarge { size, .. } if size == 1 << 31), "{error}");
}

#[test]
fn superblocks_that_promise_more_than_there_is_are_refused_by_name() {
    let good = lying(&[("/vmlinuz", "a kernel")]);
    for (at, value) in [(0x18, 21u32), (0x20, 1), (0x04, u32::MAX), (0x150, 1)] {
        let mut disk = good.clone();
        disk[1024 + at..1024 + at + 4].copy_from_slice(&value.to_le_bytes());
        let error = refused(&disk).to_string();
        assert!(error.contains("ext4 that cannot be read"), "{error}");
    }
}

#[test]
fn a_fat_directory_without_an_end_is_left_at_its_bound() {
    let mut disk = fat(&[("/loader/entries/a.conf", "linux /a"), ("/vmlinuz", "a kernel")]);
    let word = |at: usize| usize::from(u16::from_le_bytes([disk[at], disk[at + 1]]));
    let (sector, reserved, tables, per_table) =
        (word(11), word(14), usize::from(disk[16]), word(22));
    // `loader` is the directory whose only cluster follows; its chain leads to itself.
    let root = (reserved + tables * per_table) * sector;
    let entry = (root..).step_by(32).find(|at| disk[*at..].starts_with(b"LOADER  ")).unwrap();
    let cluster = usize::from(u16::from_le_bytes([disk[entry + 26], disk[entry + 27]]));
    let data = root + word(17) * 32 + (cluster - 2) * usize::from(disk[13]) * sector;
    let len = usize::from(disk[13]) * sector;
    for at in (data..data + len).step_by(32) {
        if disk[at] == 0 {
            // Deleted, so that the end is not seen.
            disk[at] = 0xE5;
        }
    }
    for table in 0..tables {
        let at = (reserved + table * per_table) * sector + cluster * 3 / 2;
        let pair = u16::from_le_bytes([disk[at], disk[at + 1]]);
        let pair = match cluster % 2 {
            0 => pair & 0xF000 | cluster as u16,
            _ => pair & 0x000F | (cluster as u16) << 4,
        };
        disk[at..at + 2].copy_from_slice(&pair.to_le_bytes());
    }
    // Only what is not in it has to be looked for to its end.
    let entries = (data..data + len).step_by(32);
    for at in entries {
        if disk[at..].starts_with(b"ENTRIES ") {
            disk[at..at + 8].copy_from_slice(b"OTHERS  ");
        } else if disk[at + 11] == 0x0F {
            disk[at] = 0xE5;
        }
    }
    let error = refused(&disk);
    assert!(matches!(error, BootDiskError::Endless(_)), "{error}");
}

#[test]
fn a_configuration_that_goes_in_circles_ends() {
    let nested = "submenu a {".repeat(3000) + &"if [ a ]; then ".repeat(3000);
    for config in [
        "source $prefix/grub.cfg\nsource $prefix/grub.cfg\nmenuentry a { linux /a }\n",
        &nested,
        "a=$a$a$a$a$a$a$a$ax\nsource /boot/grub/grub.cfg",
        "${ ${ \" ' \\",
        "if if if [ -o -a ! ] ; then",
    ] {
        let disk = ext(1, "extent", &[("/boot/grub/grub.cfg", config)]);
        refused(&disk);
    }
}
