//! A volume without a boot loader: the links to the newest kernel that Debian keeps in its root.

use crate::menu::{Loader, MenuEntry, Named};
use crate::partitions::Partition;
use crate::volume::Volume;

/// Where kernel and initramfs are, the newest first; the title of the entry.
const PLACES: [(&str, &str, &str); 4] = [
    ("/vmlinuz", "/initrd.img", "the kernel at /vmlinuz"),
    ("/boot/vmlinuz", "/boot/initrd.img", "the kernel at /boot/vmlinuz"),
    ("/vmlinuz.old", "/initrd.img.old", "the kernel at /vmlinuz.old"),
    ("/boot/vmlinuz.old", "/boot/initrd.img.old", "the kernel at /boot/vmlinuz.old"),
];

/// The entries that a volume makes: its own root is the guest's.
pub(crate) fn entries(index: usize, volume: &Volume, disk_name: &str) -> Vec<MenuEntry> {
    let Volume { partition, files } = volume;
    let Some(root) = root(partition, files.uuid(), disk_name) else { return Vec::new() };
    let places = PLACES.iter().filter(|(kernel, ..)| files.has(kernel));
    let entry = |(number, (kernel, initramfs, title)): (usize, &(&str, &str, &str))| {
        let initramfs = files.has(initramfs).then(|| (*initramfs).to_owned());
        MenuEntry {
            loader: Loader::Links,
            number: number.to_string(),
            names: vec![(*title).to_owned(), (*kernel).to_owned()],
            title: (*title).to_owned(),
            kernel: (*kernel).to_owned(),
            initramfs: initramfs.into_iter().collect(),
            options: format!("root={root} ro"),
            from: Named { volume: index, uuid: None },
        }
    };
    places.enumerate().map(entry).collect()
}

/// What the kernel is told its root is. By the partition, which the kernel knows also without an initramfs.
fn root(partition: &Partition, uuid: Option<String>, disk_name: &str) -> Option<String> {
    match (partition.number, &partition.uuid, uuid) {
        (None, ..) => Some(format!("/dev/{disk_name}")),
        (Some(_), Some(uuid), _) => Some(format!("PARTUUID={uuid}")),
        (Some(number), None, _) => Some(format!("/dev/{disk_name}{number}")),
    }
}
