//! Recognises kernel files: the bzImage container with its setup header, and plain ELF.
//!
//! Offsets are those of `Documentation/arch/x86/boot.rst`, "The Real-Mode Kernel Header".

use super::BootError;
use super::unpack;
use std::borrow::Cow;

/// Where the setup header begins, in the file and in the zero page.
pub(super) const HEADER_START: usize = 0x1F1;
/// Longest header the zero page has room for.
const HEADER_MAX: usize = 0x290 - HEADER_START;
/// `setup_sects`: 512-byte sectors of real-mode code after the first; 0 means 4.
const SETUP_SECTORS: usize = 0x1F1;
/// `boot_flag`: 0xAA55.
const BOOT_FLAG: usize = 0x1FE;
/// Second byte of the jump at 0x200: the header's length beyond 0x202.
const JUMP_OFFSET: usize = 0x201;
/// `header`: the magic `HdrS`.
const MAGIC: usize = 0x202;
/// `version` of the boot protocol.
const VERSION: usize = 0x206;
/// `initrd_addr_max`: the last address an initramfs may take up.
const INITRD_ADDR_MAX: usize = 0x22C;
/// `xloadflags`: bit 0 says there is a 64-bit entry.
const XLOADFLAGS: usize = 0x236;
/// `cmdline_size`: the longest command line, without the final zero.
const CMDLINE_SIZE: usize = 0x238;
/// `payload_offset`, counted from the protected-mode code.
const PAYLOAD_OFFSET: usize = 0x248;
/// `payload_length` in bytes.
const PAYLOAD_LENGTH: usize = 0x24C;

/// The first protocol with `xloadflags`; older kernels cannot say that they are 64-bit.
const VERSION_WITH_64_BIT_ENTRY: u16 = 0x20C;
/// The last byte of 2 GiB, what kernels since 2.2 take unless their header says otherwise.
const DEFAULT_INITRD_ADDR_MAX: u32 = 0x7FFF_FFFF;
/// x86's `COMMAND_LINE_SIZE` less the final zero.
const DEFAULT_CMDLINE_SIZE: u32 = 2047;

/// The setup header, as bytes from [`HEADER_START`] on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SetupHeader(Vec<u8>);

impl SetupHeader {
    /// The header a `vmlinux` without one is started with.
    fn synthesised() -> Self {
        let mut header = Self(vec![0; 0x26C - HEADER_START]);
        header.set(BOOT_FLAG, &0xAA55u16.to_le_bytes());
        header.set(MAGIC, b"HdrS");
        header.set(VERSION, &0x20Fu16.to_le_bytes());
        header.set(0x211, &[1]); // loadflags: LOADED_HIGH
        header.set(INITRD_ADDR_MAX, &DEFAULT_INITRD_ADDR_MAX.to_le_bytes());
        header.set(XLOADFLAGS, &1u16.to_le_bytes());
        header.set(CMDLINE_SIZE, &DEFAULT_CMDLINE_SIZE.to_le_bytes());
        header
    }

    fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.0[offset - HEADER_START..][..bytes.len()].copy_from_slice(bytes);
    }

    /// The bytes, to be copied into the zero page at [`HEADER_START`].
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// First address above what an initramfs may take up.
    pub(super) fn initramfs_limit(&self) -> u64 {
        match long(&self.0, INITRD_ADDR_MAX - HEADER_START) {
            Some(max) if max != 0 => u64::from(max) + 1,
            _ => u64::from(DEFAULT_INITRD_ADDR_MAX) + 1,
        }
    }

    /// Longest command line in bytes, without the final zero.
    pub(super) fn cmdline_limit(&self) -> usize {
        let size = match long(&self.0, CMDLINE_SIZE - HEADER_START) {
            Some(size) if size != 0 => size,
            _ => DEFAULT_CMDLINE_SIZE,
        };
        // Bounded by the room the layout keeps for it, whatever a header says.
        usize::try_from(size).unwrap_or(usize::MAX).min(0xFFFF)
    }
}

/// A kernel file, opened.
#[derive(Debug)]
pub(super) struct Image<'a> {
    /// Its setup header, or one made up.
    pub(super) header: SetupHeader,
    /// The ELF image, unpacked.
    pub(super) vmlinux: Cow<'a, [u8]>,
}

/// Opens a kernel file; a payload that would unpack to more than `limit` bytes is refused.
pub(super) fn open(file: &[u8], limit: u64) -> Result<Image<'_>, BootError> {
    if file.starts_with(b"\x7FELF") {
        return Ok(Image { header: SetupHeader::synthesised(), vmlinux: Cow::Borrowed(file) });
    }
    if word(file, BOOT_FLAG) != Some(0xAA55) || file.get(MAGIC..MAGIC + 4) != Some(b"HdrS") {
        return Err(BootError::NotAKernel { looks_like: guess(file) });
    }
    let len = file.len() as u64;
    let short = |part, needed| BootError::Truncated { part, needed, len };
    let header_error = || short("the setup header", 0x268);
    let version = word(file, VERSION).ok_or_else(header_error)?;
    if version < VERSION_WITH_64_BIT_ENTRY {
        return Err(BootError::NotAKernel {
            looks_like: "a kernel older than 64-bit entry (Linux 3.8)",
        });
    }
    if word(file, XLOADFLAGS).ok_or_else(header_error)? & 1 == 0 {
        return Err(BootError::NotAKernel { looks_like: "a 32-bit Linux kernel" });
    }
    let sectors = match file[SETUP_SECTORS] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let offset = long(file, PAYLOAD_OFFSET).ok_or_else(header_error)?;
    let length = long(file, PAYLOAD_LENGTH).ok_or_else(header_error)?;
    let start = (sectors + 1) * 512 + u64::from(offset);
    let end = start + u64::from(length);
    let payload = slice(file, start, end).ok_or_else(|| short("the payload", end))?;
    let header = slice_header(file).ok_or_else(header_error)?;
    Ok(Image { header, vmlinux: unpack::unpack(payload, limit)? })
}

/// The header, its length taken from the jump over it.
fn slice_header(file: &[u8]) -> Option<SetupHeader> {
    let end = MAGIC + usize::from(*file.get(JUMP_OFFSET)?);
    let end = end.clamp(PAYLOAD_LENGTH + 4, HEADER_START + HEADER_MAX);
    file.get(HEADER_START..end).map(|bytes| SetupHeader(bytes.to_vec()))
}

fn slice(bytes: &[u8], start: u64, end: u64) -> Option<&[u8]> {
    bytes.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
}

fn word(bytes: &[u8], offset: usize) -> Option<u16> {
    let field = bytes.get(offset..offset + 2)?;
    Some(u16::from_le_bytes(field.try_into().expect("two bytes")))
}

fn long(bytes: &[u8], offset: usize) -> Option<u32> {
    let field = bytes.get(offset..offset + 4)?;
    Some(u32::from_le_bytes(field.try_into().expect("four bytes")))
}

/// What a file that is no kernel seems to be, for the error message.
fn guess(file: &[u8]) -> &'static str {
    const BEGINNINGS: &[(&[u8], &str)] = &[
        (b"07070", "a cpio archive (an initramfs?)"),
        (b"\x1F\x8B", "a gzip file (a compressed initramfs?)"),
        (b"\xFD7zXZ", "an xz file"),
        (b"\x28\xB5\x2F\xFD", "a zstd file (a compressed initramfs?)"),
        (b"\x02\x21\x4C\x18", "an lz4 file (a bare kernel payload?)"),
        (b"BZh", "a bzip2 file"),
        (b"!<arch>", "a Debian package or ar archive (unpack it first)"),
        (b"\xED\xAB\xEE\xDB", "an RPM package (unpack it first)"),
        (b"QFI\xFB", "a qcow2 disk image"),
        (b"#!", "a script"),
        (b"hsqs", "a squashfs image"),
        (b"\x27\x05\x19\x56", "a U-Boot image"),
    ];
    if file.is_empty() {
        return "an empty file";
    }
    if let Some((_, what)) = BEGINNINGS.iter().find(|(magic, _)| file.starts_with(magic)) {
        return what;
    }
    if file.get(0x38..0x3C) == Some(b"ARMd") {
        return "a kernel for ARM";
    }
    if file.get(0x438..0x43A) == Some(b"\x53\xEF") {
        return "an ext4 file system (a disk image?)";
    }
    if file.starts_with(b"MZ") {
        return "a Windows or EFI program";
    }
    if word(file, BOOT_FLAG) == Some(0xAA55) {
        return "a boot sector or disk image";
    }
    if file.iter().all(|byte| *byte == 0) {
        return "a file of zeros";
    }
    if file.iter().take(512).all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace()) {
        return "a text file";
    }
    "unknown data"
}
