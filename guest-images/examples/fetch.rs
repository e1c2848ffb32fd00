//! Fetches the default guest and prints where it is; a disk image is made if a path is given.

use std::path::Path;
use vmft_guest_images::disk::{DiskSize, make_disk};
use vmft_guest_images::packages::{E2FSPROGS, ensure_packages};
use vmft_guest_images::{Cache, Progress, default_guest};

struct Lines;

impl Progress for Lines {
    fn step(&mut self, what: &str) {
        eprintln!("{what}");
    }

    fn note(&mut self, what: &str) {
        eprintln!("note: {what}");
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let guest = default_guest(&Cache::from_environment()?, &mut Lines)?;
    println!("{}\n{}", guest.kernel.display(), guest.initramfs.display());
    if let Some(path) = std::env::args_os().nth(1) {
        ensure_packages(&[E2FSPROGS], &mut Lines)?;
        make_disk(Path::new(&path), DiskSize::DEMO, "vmft-demo")?;
    }
    Ok(())
}
