//! systemd-boot's entries.

use crate::image::{boots, expected, ext, fat, menu, partitioned, texts};

const OLD: &str = "title Debian GNU/Linux 12\nversion 6.1.0-18-amd64\nsort-key debian\n\
    options root=UUID=1 ro\nlinux /m/6.1.0-18/linux\ninitrd /m/6.1.0-18/initrd.img\n";
const NEW: &str = "# written by kernel-install\ntitle      Debian GNU/Linux 12\nversion    6.1.0-20-amd64\n\
    sort-key   debian\noptions    root=UUID=1 ro\noptions quiet\nlinux      /m/6.1.0-20/linux\n\
    initrd     /m/ucode\ninitrd     /m/6.1.0-20/initrd.img\n";

fn esp(config: &str) -> Vec<u8> {
    fat(&[
        ("/loader/loader.conf", config),
        ("/loader/entries/m-6.1.0-18-amd64.conf", OLD),
        ("/loader/entries/m-6.1.0-20-amd64+3-0.conf", NEW),
        ("/loader/entries/arm.conf", "architecture aa64\nlinux /m/arm\n"),
        ("/loader/entries/shell.conf", "title EFI shell\nefi /shell.efi\n"),
        ("/m/6.1.0-18/linux", "old kernel"),
        ("/m/6.1.0-18/initrd.img", "old initramfs"),
        ("/m/6.1.0-20/linux", "new kernel"),
        ("/m/6.1.0-20/initrd.img", "new initramfs"),
        ("/m/ucode", "micro"),
    ])
}

#[test]
fn the_newest_entry_boots_with_all_its_initramfs_files_at_whole_words() {
    let disk = partitioned("gpt", &[("U", &esp("timeout 3\n")), ("L", &ext(1, "extent", &[]))]);
    let new = expected("new kernel", "micro\0\0\0new initramfs", "root=UUID=1 ro quiet");
    assert_eq!(texts(&boots(&disk, None)), new);
    let titles = menu(&disk).unwrap();
    let titles: Vec<_> = titles.entries().iter().map(|entry| entry.title.as_str()).collect();
    let debian = "Debian GNU/Linux 12 (6.1.0-";
    assert_eq!(titles, [format!("{debian}20-amd64)"), format!("{debian}18-amd64)")]);
    let old = expected("old kernel", "old initramfs", "root=UUID=1 ro");
    for wanted in ["1", "m-6.1.0-18-amd64", "Debian GNU/Linux 12 (6.1.0-18-amd64)"] {
        assert_eq!(texts(&boots(&disk, Some(wanted))), old);
    }
}

#[test]
fn the_default_of_the_configuration_boots() {
    for config in ["default m-6.1.0-18*\n", "default\tm-6.1.0-18-amd64.conf"] {
        let disk = partitioned("gpt", &[("U", &esp(config))]);
        assert_eq!(texts(&boots(&disk, None)).0, "old kernel", "{config}");
    }
}

#[test]
fn an_extended_boot_partition_of_another_file_system_has_entries_as_well() {
    let files = [("/loader/entries/a.conf", "linux /a\noptions b"), ("/a", "kernel")];
    let disk =
        partitioned("gpt", &[("U", &fat(&[("/EFI/x", "y")])), ("L", &ext(1, "extent", &files))]);
    assert_eq!(texts(&boots(&disk, None)), expected("kernel", "", "b"));
}
