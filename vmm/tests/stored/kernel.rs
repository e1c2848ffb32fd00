//! Kernel files, plain and in every container.

use flate2::{Compression, write::GzEncoder};
use lzma_rust2::{LzmaOptions, LzmaWriter, XzOptions, XzWriter};
use std::io::Write;
use vmft_cpu::memory::{GuestRam, MIN_MEMORY};
use vmft_fuzzing::{Random, cases, damage, peak_of};
use vmft_guest_images::probe::ProbeGuest;
use vmft_vmm::boot::{examine, is_vouched_for, load, stays_at_level_zero};

/// Cases of a quick run.
const CASES: u64 = 500;
/// How many bad kernels there are in a case.
const EACH: usize = 40;
/// What a decoder may take beside what comes out: the dictionary of `.lzma` files, and the window of zstd's.
const DECODER: usize = 160 << 20;
/// Where the compressed kernel begins in these.
const PAYLOAD: usize = 5 * 512;

/// A bzImage with this payload (`Documentation/arch/x86/boot.rst`).
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; PAYLOAD];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1F1, &[4]);
    put(0x1FE, &[0x55, 0xAA]);
    put(0x200, &[0xEB, 0x6A]);
    put(0x202, b"HdrS");
    put(0x206, &0x20Fu16.to_le_bytes());
    put(0x22C, &0x7FFF_FFFFu32.to_le_bytes());
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x24C, &u32::try_from(payload.len()).unwrap().to_le_bytes());
    file.extend(payload);
    file
}

/// With the length behind it that a kernel's build writes there.
fn with_length(mut stream: Vec<u8>, unpacked: &[u8]) -> Vec<u8> {
    stream.extend(u32::try_from(unpacked.len()).unwrap().to_le_bytes());
    stream
}

/// So many of the good kernels are packed, the first.
const PACKED: usize = 5;

/// The same kernel in every form.
fn good() -> Vec<Vec<u8>> {
    let plain = ProbeGuest::default().image();
    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    gzip.write_all(&plain).unwrap();
    let mut xz = XzWriter::new(Vec::new(), XzOptions::with_preset(1)).unwrap();
    xz.write_all(&plain).unwrap();
    let options = LzmaOptions::with_preset(1);
    let mut lzma = LzmaWriter::new_use_header(Vec::new(), &options, None).unwrap();
    lzma.write_all(&plain).unwrap();
    let block = lz4_flex::block::compress(&plain);
    let mut lz4 = vec![0x02, 0x21, 0x4C, 0x18];
    lz4.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
    lz4.extend(block);
    let zstd =
        ruzstd::encoding::compress_to_vec(&plain[..], ruzstd::encoding::CompressionLevel::Fastest);
    let packed = [xz.finish().unwrap(), lzma.finish().unwrap(), lz4, zstd];
    let mut all: Vec<_> =
        packed.into_iter().map(|stream| bzimage(&with_length(stream, &plain))).collect();
    all.push(bzimage(&gzip.finish().unwrap()));
    all.push(bzimage(&plain));
    all.push(plain);
    all
}

/// Something is wrong with a kernel: anywhere, or in its headers, where most is decided.
fn alter(random: &mut Random, kernel: &mut Vec<u8>, others: &[Vec<u8>]) {
    let header = match random.below(4) {
        0 => return damage(random, kernel, others),
        1 => 0..kernel.len().min(0x120),
        2 => 0x1F1..0x260,
        _ => PAYLOAD..PAYLOAD + 64,
    };
    for _ in 0..=random.below(3) {
        let at = header.start + random.index(header.len());
        let Some(byte) = kernel.get_mut(at) else { continue };
        *byte = match random.below(3) {
            0 => *byte ^ 1 << random.below(8),
            1 => *random.pick(&[0, 1, 0x7F, 0x80, 0xFF]),
            _ => random.next() as u8,
        };
    }
}

#[test]
fn a_kernel_gone_bad_is_refused_or_loaded() {
    let good = good();
    for kernel in &good {
        let ram = GuestRam::new(MIN_MEMORY).unwrap();
        load(&ram, kernel, None, "").unwrap();
        assert!(is_vouched_for(kernel));
    }
    let (mut loaded, mut most) = (0u64, 0);
    let ram = GuestRam::new(MIN_MEMORY).unwrap();
    cases(CASES, |mut random| {
        for _ in 0..EACH {
            let mut kernel = random.pick(&good).clone();
            alter(&mut random, &mut kernel, &good);
            let initramfs = random.bytes(40);
            let initramfs = random.chance(50).then_some(&initramfs[..]);
            let (result, peak) = peak_of(|| load(&ram, &kernel, initramfs, "quiet"));
            let limit = MIN_MEMORY as usize + DECODER + 2 * kernel.len();
            assert!(peak <= limit, "{peak} bytes for a kernel of {}", kernel.len());
            most = most.max(peak);
            loaded += u64::from(result.is_ok());
            let (_, peak) = peak_of(|| (examine(&kernel).is_ok(), stays_at_level_zero(&kernel)));
            assert!(peak <= limit, "{peak} bytes to examine a kernel of {}", kernel.len());
        }
    });
    println!("{loaded} loaded; at most {most} bytes");
}

#[test]
fn a_packed_kernel_that_says_it_is_large_takes_no_memory_for_it() {
    let ram = GuestRam::new(MIN_MEMORY).unwrap();
    for mut kernel in good().into_iter().take(PACKED) {
        let length = kernel.len() - 4;
        kernel[length..].copy_from_slice(&(60u32 << 20).to_le_bytes());
        let (result, peak) = peak_of(|| load(&ram, &kernel, None, ""));
        result.unwrap_err();
        assert!(peak < 32 << 20, "{peak} bytes");
    }
}

#[test]
fn segments_that_many_headers_name_are_not_copied_again_and_again() {
    let image = ProbeGuest::default().image();
    let many = |count: u16| {
        let mut file = image.clone();
        file[32..40].copy_from_slice(&(image.len() as u64).to_le_bytes());
        file[56..58].copy_from_slice(&count.to_le_bytes());
        let header = image[64..120].to_vec();
        file.extend(std::iter::repeat_n(header, count.into()).flatten());
        file
    };
    let ram = GuestRam::new(MIN_MEMORY).unwrap();
    load(&ram, &many(1), None, "").unwrap();
    let error = load(&ram, &many(2000), None, "").unwrap_err();
    assert!(error.to_string().contains("over each other"), "{error}");
}
