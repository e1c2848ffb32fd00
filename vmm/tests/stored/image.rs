//! The first bytes of a disk image, by which its format is known.

use std::fs::File;
use std::io::{Seek, Write};
use vmft_fuzzing::{Random, cases, damage};
use vmft_vmm::world::image_format::recognise;

/// Cases of a quick run.
const CASES: u64 = 200;
/// How many bad images there are in a case.
const EACH: usize = 40;

/// What formats begin with, and what a raw disk may.
const BEGINNINGS: &[&[u8]] = &[
    b"QFI\xFB\0\0\0\x03",
    b"KDMV\x01\0\0\0",
    b"vhdxfile",
    b"conectix",
    b"<<< Oracle VM VirtualBox Disk Image >>>",
    b"\x1F\x8B\x08",
    b"\xFD7zXZ\0",
    b"\x28\xB5\x2F\xFD",
    b"BZh9",
    b"PK\x03\x04",
    b"# Disk DescriptorFile",
    b"\xEB\x63\x90",
];

fn content(random: &mut Random) -> Vec<u8> {
    let mut bytes = random.pick(BEGINNINGS).to_vec();
    let len = *random.pick(&[0, 8, 511, 512, 513, 4096, 0x8006, 0x9000]);
    bytes.resize(len.max(bytes.len()), 0);
    if len > 0x8006 && random.chance(30) {
        bytes[0x8001..0x8006].copy_from_slice(b"CD001");
    }
    if len >= 512 && random.chance(30) {
        bytes[510..512].copy_from_slice(&[0x55, 0xAA]);
    }
    damage(random, &mut bytes, &[]);
    bytes
}

#[test]
fn any_bytes_are_an_image_of_some_format_or_of_none() {
    let mut known = 0u64;
    let mut file: File = tempfile::tempfile().unwrap();
    cases(CASES, |mut random| {
        for _ in 0..EACH {
            let bytes = content(&mut random);
            file.set_len(0).unwrap();
            file.rewind().unwrap();
            file.write_all(&bytes).unwrap();
            known += u64::from(recognise(&file).unwrap().is_some());
        }
    });
    println!("{known} known");
}
