//! Disks gone bad: a typed error, or something that was read within its bounds.

use crate::image::{ext, fat, menu, partitioned};
use vmft_fuzzing::{Random, cases, damage, peak_of};

/// Cases of a quick run.
const CASES: u64 = 60;
/// How many disks there are in a case.
const EACH: usize = 5;
/// So much may be held beside the disk: what is read of it, a copy, and the tables of its file systems.
const BESIDE: usize = 64 << 20;

const CONFIG: &str = "set default=\"1>a\"\nif [ -s $prefix/grubenv ]; then load_env; fi\n\
    submenu 'x' { true }\nmenuentry 'k' --id k { search --fs-uuid --set=root u\nlinux /k root=$root a\n\
    initrd /i }\nsubmenu 'more' --id more { menuentry 'a' --id a { linux /k; initrd /i /i } }\nblscfg\n";
const ENTRY: &str = "title a\nversion 1\nlinux /k\ninitrd /i\noptions a b\n";

/// Disks of all kinds, with checksums and without.
fn good() -> Vec<Vec<u8>> {
    let files = [
        ("/boot/grub/grub.cfg", CONFIG),
        ("/boot/grub/grubenv", "saved_entry=a\n"),
        ("/boot/loader/entries/a.conf", ENTRY),
        ("/k", "->boot/k"),
        ("/boot/k", "a kernel"),
        ("/i", "an initramfs"),
        ("/vmlinuz", "->/boot/k"),
    ];
    let plain = "^metadata_csum,^metadata_csum_seed,^64bit";
    let bare =
        "^metadata_csum,^metadata_csum_seed,^extents,^64bit,^has_journal,^dir_index,^flex_bg";
    let esp = fat(&[("/loader/entries/a.conf", ENTRY), ("/k", "kernel"), ("/i", "initramfs")]);
    vec![
        partitioned("gpt", &[("U", &esp), ("L", &ext(1, plain, &files))]),
        partitioned("dos", &[("E", &[]), ("83", &ext(1, bare, &files))]),
        ext(1, plain, &files),
        ext(1, "extent", &files),
        esp,
    ]
}

/// Spoils some of what is there: on a disk that is mostly zeros, anywhere else would be nowhere.
fn spoil(random: &mut Random, disk: &mut [u8], places: &[usize]) {
    for _ in 0..=random.below(12) {
        let at = *random.pick(places);
        let len = random.index(9).min(disk.len() - at);
        let mut bytes = disk[at..at + len].to_vec();
        damage(random, &mut bytes, &[]);
        let len = bytes.len().min(disk.len() - at);
        disk[at..at + len].copy_from_slice(&bytes[..len]);
    }
}

#[test]
fn disks_gone_bad_are_refused_or_read_within_their_bounds() {
    let disks = good();
    let places: Vec<Vec<usize>> =
        disks.iter().map(|disk| (0..disk.len()).filter(|at| disk[*at] != 0).collect()).collect();
    let mut booted = 0u64;
    cases(CASES, |mut random| {
        for _ in 0..EACH {
            let which = random.index(disks.len());
            let mut disk = disks[which].clone();
            spoil(&mut random, &mut disk, &places[which]);
            let (read, peak) = peak_of(|| {
                let menu = menu(&disk)?;
                for entry in menu.entries() {
                    let _ = menu.read(entry);
                }
                menu.entry(None).and_then(|entry| menu.read(entry))
            });
            assert!(peak <= 2 * disk.len() + BESIDE, "{peak} bytes");
            booted += u64::from(read.is_ok());
        }
    });
    println!("{booted} could still be booted");
}

#[test]
fn configurations_gone_bad_make_menus_within_their_bounds() {
    cases(CASES, |mut random| {
        let mut text = [CONFIG, CONFIG].concat().into_bytes();
        damage(&mut random, &mut text, &[b"source $prefix/grub.cfg\n".to_vec(), vec![b'{'; 4000]]);
        let text = String::from_utf8_lossy(&text).into_owned();
        let disk = fat(&[("/boot/grub/grub.cfg", &text), ("/k", "kernel")]);
        let (_, peak) = peak_of(|| menu(&disk).map(drop));
        assert!(peak <= 2 * disk.len() + BESIDE, "{peak} bytes");
    });
}
