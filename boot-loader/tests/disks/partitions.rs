//! Where a kernel may be: on any partition of any table, or on the disk itself; and what its root is then.

use crate::image::{boots, expected, ext, fat, menu, partitioned, texts};
use vmft_boot_loader::BootDiskError;

/// A root as Debian leaves it, without a boot loader.
fn linked() -> Vec<u8> {
    let files = [
        ("/boot/vmlinuz-6.1", "a kernel"),
        ("/boot/initrd.img-6.1", "an initramfs"),
        ("/vmlinuz", "->boot/vmlinuz-6.1"),
        ("/initrd.img", "->/boot/../boot/initrd.img-6.1"),
    ];
    ext(1, "extent", &files)
}

/// What the kernel at `/vmlinuz` is told of its root.
fn root_of(disk: &[u8]) -> String {
    let (kernel, initramfs, options) = texts(&boots(disk, None));
    assert_eq!((kernel.as_str(), initramfs.as_str()), ("a kernel", "an initramfs"));
    options
}

#[test]
fn a_disk_without_a_table_is_its_own_root() {
    assert_eq!(root_of(&linked()), "root=/dev/vda ro");
}

#[test]
fn a_gpt_partition_is_known_by_its_guid() {
    let disk = partitioned("gpt", &[("U", &fat(&[("/a", "b")])), ("L", &linked())]);
    assert_eq!(root_of(&disk), "root=PARTUUID=aaaaaaaa-bbbb-cccc-dddd-000000000002 ro");
}

#[test]
fn an_mbr_partition_is_known_by_the_disks_signature_and_its_number() {
    let swap = vec![0; 4 << 20];
    let disk = partitioned("dos", &[("82", &swap), ("83", &linked())]);
    assert_eq!(root_of(&disk), "root=PARTUUID=1234abcd-02 ro");
}

#[test]
fn logical_partitions_are_found_in_their_chain() {
    let swap = vec![0; 4 << 20];
    let disk = partitioned("dos", &[("82", &swap), ("E", &[]), ("82", &swap), ("83", &linked())]);
    assert_eq!(root_of(&disk), "root=PARTUUID=1234abcd-06 ro");
}

#[test]
fn a_fat_disk_without_a_table_is_no_mbr() {
    let disk = fat(&[("/vmlinuz", "a kernel"), ("/initrd.img", "an initramfs")]);
    assert_eq!(root_of(&disk), "root=/dev/vda ro");
}

#[test]
fn a_disk_for_data_has_nothing_to_boot_and_one_for_booting_should_have_had() {
    let nothing = |disk: &[u8]| match menu(disk) {
        Err(BootDiskError::Nothing { is_meant_to_boot, found }) => (is_meant_to_boot, found),
        other => panic!("{other:?}"),
    };
    assert_eq!(nothing(&[0; 1 << 20]), (false, vec![]));
    assert_eq!(nothing(&[0; 512]), (false, vec![]));
    let data = ext(1, "extent", &[("/records", "1\n")]);
    assert_eq!(nothing(&data), (false, vec!["ext4".to_owned()]));
    let mut xfs = vec![0; 4 << 20];
    xfs[..4].copy_from_slice(b"XFSB");
    let plain = partitioned("gpt", &[("L", &xfs)]);
    assert_eq!(nothing(&plain), (false, vec!["xfs on partition 1".to_owned()]));
    let esp = fat(&[("/EFI/BOOT/BOOTX64.EFI", "a program")]);
    let found = vec!["FAT on partition 1".to_owned(), "xfs on partition 2".to_owned()];
    assert_eq!(nothing(&partitioned("gpt", &[("U", &esp), ("L", &xfs)])), (true, found));
    let found = vec!["xfs on partition 1".to_owned()];
    assert_eq!(nothing(&partitioned("dos", &[("83, bootable", &xfs)])), (true, found));
}

#[test]
fn the_kernel_before_the_last_can_be_chosen() {
    let files = [("/vmlinuz", "new"), ("/vmlinuz.old", "old"), ("/initrd.img.old", "its own")];
    let disk = ext(1, "extent", &files);
    assert_eq!(texts(&boots(&disk, None)), expected("new", "", "root=/dev/vda ro"));
    for wanted in ["1", "/vmlinuz.old"] {
        let old = texts(&boots(&disk, Some(wanted)));
        assert_eq!(old, expected("old", "its own", "root=/dev/vda ro"));
    }
    let error = menu(&disk).unwrap().entry(Some("2")).unwrap_err().to_string();
    assert!(
        error.contains("called 2") && error.contains("1 (the kernel at /vmlinuz.old)"),
        "{error}"
    );
}
