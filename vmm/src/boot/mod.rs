//! Loads a Linux kernel for 64-bit entry.
//!
//! The machine monitor does what a boot loader and the kernel's own unpacking stub do on a PC:
//! it unpacks the kernel's payload, puts its segments, the initramfs and the command line where
//! the boot protocol wants them, and hands over a CPU that is already in long mode
//! ("1.12 64-bit Boot Protocol" in the kernel's `Documentation/arch/x86/boot.rst`). So no guest
//! instruction goes into real mode or decompression, and the kernel runs where it was linked.
//! Randomising its address is not done: two sides that load the same files must agree.
//!
//! ```text
//! 0x0500  GDT              0x9000  page tables (24 KiB)     0x0010_0000.. kernel segments
//! 0x7000  zero page        0x2_0000 command line            (16 MiB for Debian's kernel)
//! 0x8000  stack            0x9_FC00 end of low memory       initramfs: as high as allowed
//!                          0xE_0000 ACPI's tables
//! ```
//!
//! Reading files is not done here, nor is choosing a command line.

mod acpi;
mod elf;
mod entry;
mod image;
mod params;
mod symbols;
mod unpack;
mod xz;

use vm_memory::{Bytes, GuestAddress};
use vmft_cpu::CpuState;
use vmft_cpu::memory::{DEVICE_HOLE_START, GuestRam, PAGE_SIZE};

pub(crate) use acpi::publish as publish_acpi;
pub(crate) use symbols::Symbols;
#[cfg(test)]
pub(crate) use symbols::tests as symbol_tables;
pub use unpack::Compression;
pub use vmft_kernel_gate::{Examination, GateError};

/// Where the descriptor table lies.
const GDT: GuestAddress = GuestAddress(0x500);
/// Where `struct boot_params` lies.
const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// First address above the stack the kernel enters with; it sets up its own at once.
const STACK_TOP: GuestAddress = GuestAddress(0x9000);
/// Where the page tables begin; they end before 0xF000.
const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// Where the command line lies; it ends before [`LOW_MEMORY_END`] whatever its length.
const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// End of conventional memory: 640 KiB less the kilobyte a PC's firmware keeps.
const LOW_MEMORY_END: u64 = 0x9_FC00;
/// Where extended memory begins. Nothing of the kernel may lie below.
const HIGH_MEMORY_START: u64 = 0x10_0000;

/// Why a kernel could not be loaded. Guest memory is unchanged whenever one is returned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BootError {
    /// The file is something else.
    #[error("not a 64-bit x86 Linux kernel: it looks like {looks_like}")]
    NotAKernel {
        /// What the first bytes say it is.
        looks_like: &'static str,
    },
    /// The file ends before what its headers promise.
    #[error("the kernel image is cut short: {part} needs {needed} bytes, the file has {len}")]
    Truncated {
        /// What does not fit.
        part: &'static str,
        /// File length that would do.
        needed: u64,
        /// File length there is.
        len: u64,
    },
    /// The payload is compressed in a way that is not unpacked here.
    #[error("the kernel's payload is compressed with {compression}, which is not supported")]
    UnsupportedCompression {
        /// Name of the compression, or what was found instead of a known one.
        compression: &'static str,
    },
    /// The payload does not unpack to what it promises, or its checksum differs.
    #[error("the kernel's {compression} payload is damaged: {reason}")]
    Damaged {
        /// How it is compressed.
        compression: Compression,
        /// What the decoder found.
        reason: String,
    },
    /// The ELF headers make no sense for a kernel.
    #[error("the kernel's ELF image is not valid: {reason}")]
    InvalidElf {
        /// What is wrong with it.
        reason: String,
    },
    /// The kernel needs addresses the machine has no memory at.
    #[error(
        "the kernel needs memory up to {needed} MiB, the machine has {available} MiB below 3 GiB"
    )]
    KernelTooLarge {
        /// MiB of memory that would do, rounded up.
        needed: u64,
        /// MiB of memory there is below the device hole.
        available: u64,
    },
    /// The initramfs does not fit between the kernel and the end of the memory it may lie in.
    #[error(
        "the initramfs has {len} bytes, but only {available} are free above the kernel: give the machine more memory"
    )]
    InitramfsTooLarge {
        /// Its length in bytes.
        len: u64,
        /// Bytes there are for it.
        available: u64,
    },
    /// The command line is longer than the kernel reads.
    #[error("the kernel command line has {len} bytes, this kernel takes {limit}")]
    CommandLineTooLong {
        /// Its length in bytes.
        len: usize,
        /// The kernel's limit.
        limit: usize,
    },
    /// The command line holds a zero byte, at which the kernel would stop reading.
    #[error("the kernel command line holds a zero byte at offset {offset}")]
    CommandLineZero {
        /// Where.
        offset: usize,
    },
}

/// The largest kernel that is examined, unpacked: several times what distributions build.
const EXAMINED: u64 = 512 << 20;

/// Examines a kernel that is to be followed on an engine that cannot keep everything from its guest:
/// see [`vmft_kernel_gate`].
///
/// # Errors
/// [`GateError`] says what the kernel lacks, or has.
pub fn examine(kernel: &[u8]) -> Result<Examination, GateError> {
    let image =
        image::open(kernel, EXAMINED).map_err(|error| GateError::Image(error.to_string()))?;
    vmft_kernel_gate::examine(&image.vmlinux)
}

/// True if `kernel` says of itself that it was made to be followed; [`examine`] finds out.
pub fn is_vouched_for(kernel: &[u8]) -> bool {
    let image = image::open(kernel, EXAMINED);
    image.is_ok_and(|image| vmft_kernel_gate::is_vouched_for(&image.vmlinux))
}

/// True if `kernel` says of itself that it never leaves privilege level 0, so that it runs also where
/// KVM cannot carry user space. It says so in another ELF note.
pub fn stays_at_level_zero(kernel: &[u8]) -> bool {
    let image = image::open(kernel, EXAMINED);
    image.is_ok_and(|image| vmft_kernel_gate::stays_at_level_zero(&image.vmlinux))
}

/// Loads `kernel` (a bzImage, or an ELF `vmlinux`), and the initramfs if there is one, into
/// `ram`, and returns the CPU at the kernel's 64-bit entry. `ram` must be fresh: what the
/// kernel expects to be zero is not cleared.
///
/// # Errors
/// [`BootError`]; `ram` is then unchanged.
pub fn load(
    ram: &GuestRam,
    kernel: &[u8],
    initramfs: Option<&[u8]>,
    cmdline: &str,
) -> Result<CpuState, BootError> {
    let low_end = ram.size().min(DEVICE_HOLE_START);
    let image = image::open(kernel, low_end)?;
    check_cmdline(cmdline, image.header.cmdline_limit())?;
    let program = elf::Program::parse(&image.vmlinux)?;
    if program.end() > low_end {
        return Err(BootError::KernelTooLarge {
            needed: program.end().div_ceil(1 << 20),
            available: low_end >> 20,
        });
    }
    let initramfs = initramfs
        .map(|bytes| {
            let limit = low_end.min(image.header.initramfs_limit());
            place_initramfs(bytes.len() as u64, program.end(), limit).map(|at| (at, bytes))
        })
        .transpose()?;

    for segment in program.segments() {
        write(ram, GuestAddress(segment.address), segment.data);
    }
    let extent = initramfs.map(|(at, bytes)| {
        write(ram, at, bytes);
        (at, bytes.len() as u64)
    });
    write(ram, COMMAND_LINE, cmdline.as_bytes());
    write(ram, GuestAddress(COMMAND_LINE.0 + cmdline.len() as u64), &[0]);
    let zero_page = params::zero_page(&image.header, &ram.ranges(), extent);
    write(ram, ZERO_PAGE, &zero_page);
    Ok(entry::prepare(ram, program.entry()))
}

/// The highest page-aligned place for `len` bytes between `floor` and `limit`.
fn place_initramfs(len: u64, floor: u64, limit: u64) -> Result<GuestAddress, BootError> {
    let floor = floor.next_multiple_of(PAGE_SIZE);
    let available = (limit & !(PAGE_SIZE - 1)).saturating_sub(floor);
    if len > available {
        return Err(BootError::InitramfsTooLarge { len, available });
    }
    Ok(GuestAddress((limit - len) & !(PAGE_SIZE - 1)))
}

fn check_cmdline(cmdline: &str, limit: usize) -> Result<(), BootError> {
    if cmdline.len() > limit {
        return Err(BootError::CommandLineTooLong { len: cmdline.len(), limit });
    }
    match cmdline.bytes().position(|byte| byte == 0) {
        Some(offset) => Err(BootError::CommandLineZero { offset }),
        None => Ok(()),
    }
}

/// Writes to an address that the layout has shown to be memory.
fn write(ram: &GuestRam, at: GuestAddress, bytes: &[u8]) {
    ram.memory().write_slice(bytes, at).expect("placed inside memory");
}

#[cfg(test)]
pub(crate) mod synthetic;
#[cfg(test)]
mod tests;
