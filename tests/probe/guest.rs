//! The probe guest: a kernel of a few hundred bytes.
//!
//! It sets up the interrupt controllers, the timer at 100 Hz and the serial port. Then it computes
//! over 64 KiB of memory, seeded by the time stamp counter, and waits for an interrupt, in turns.
//! Each tick prints a letter; what is typed is echoed. After [`TICKS`] ticks it prints a full stop
//! and switches itself off.

use std::sync::Arc;
use vmft_cpu::CpuCount;
use vmft_vmm::board::{BoardConfig, Bytes, UnixSeconds};
use vmft_vmm::engine::EngineKind;
use vmft_vmm::machine::{BootSource, Machine, MachineConfig};

/// Timer ticks until it ends.
pub const TICKS: usize = 60;
/// Where its memory for computing lies: it begins here, and has 64 KiB.
pub const WORK_AREA: u64 = BASE + 0x2_0000;
/// Where it is loaded and entered.
const BASE: u64 = 0x10_0000;
/// Bytes of memory it takes for itself.
const MEMORY_SIZE: u64 = 0x4_0000;

std::arch::global_asm!(
    ".pushsection .rodata.vmft_probe, \"a\"",
    ".globl vmft_probe_begin",
    "vmft_probe_begin:",
    ".Lprobe:",
    "cli",
    "lea rsp, [rip + .Lprobe + 0x10000]",
    "lea rdi, [rip + .Lprobe + 0x8200]",
    "lea rax, [rip + .Lprobe_timer]",
    "call .Lprobe_gate",
    "lea rdi, [rip + .Lprobe + 0x8240]",
    "lea rax, [rip + .Lprobe_serial]",
    "call .Lprobe_gate",
    "lea rax, [rip + .Lprobe + 0x8000]",
    "sub rsp, 16",
    "mov word ptr [rsp], 0xfff",
    "mov [rsp + 2], rax",
    "lidt [rsp]",
    // The 8259s: vectors 0x20 and 0x28; the timer and the serial port may interrupt.
    "mov al, 0x11",
    "out 0x20, al",
    "out 0xa0, al",
    "mov al, 0x20",
    "out 0x21, al",
    "mov al, 0x28",
    "out 0xa1, al",
    "mov al, 4",
    "out 0x21, al",
    "mov al, 2",
    "out 0xa1, al",
    "mov al, 1",
    "out 0x21, al",
    "out 0xa1, al",
    "mov al, 0xee",
    "out 0x21, al",
    "mov al, 0xff",
    "out 0xa1, al",
    // The 8254: counter 0, mode 2, 11932 cycles.
    "mov al, 0x34",
    "out 0x43, al",
    "mov al, 0x9c",
    "out 0x40, al",
    "mov al, 0x2e",
    "out 0x40, al",
    // The serial port: lines on, an interrupt for what is received.
    "mov dx, 0x3fc",
    "mov al, 0x0b",
    "out dx, al",
    "mov dx, 0x3f9",
    "mov al, 1",
    "out dx, al",
    "xor r12d, r12d",
    "xor r13d, r13d",
    "xor r15d, r15d",
    "lea r14, [rip + .Lprobe + 0x20000]",
    "sti",
    ".Lprobe_round:",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "xor r15, rax",
    "mov ecx, 400000",
    ".Lprobe_compute:",
    "imul r15, r15, 0x5bd1e995",
    "add r15, rcx",
    "mov rbx, r15",
    "shr rbx, 20",
    "and ebx, 0xfff8",
    "add [r14 + rbx], r15",
    "dec ecx",
    "jnz .Lprobe_compute",
    "hlt",
    "cmp r12d, {ticks}",
    "jb .Lprobe_round",
    "cli",
    "mov dx, 0x3f8",
    "mov al, 0x2e",
    "out dx, al",
    "hlt",
    ".Lprobe_gate:",
    "mov [rdi], ax",
    "mov word ptr [rdi + 2], 0x10",
    "mov word ptr [rdi + 4], 0x8e00",
    "shr rax, 16",
    "mov [rdi + 6], ax",
    "shr rax, 16",
    "mov [rdi + 8], eax",
    "mov dword ptr [rdi + 12], 0",
    "ret",
    ".Lprobe_timer:",
    "push rax",
    "push rdx",
    "inc r12d",
    "mov eax, r12d",
    "and al, 15",
    "add al, 0x61",
    "mov dx, 0x3f8",
    "out dx, al",
    "mov al, 0x20",
    "out 0x20, al",
    "pop rdx",
    "pop rax",
    "iretq",
    ".Lprobe_serial:",
    "push rax",
    "push rdx",
    ".Lprobe_received:",
    "mov dx, 0x3fd",
    "in al, dx",
    "test al, 1",
    "jz .Lprobe_read",
    "mov dx, 0x3f8",
    "in al, dx",
    "out dx, al",
    "movzx eax, al",
    "imul r13, r13, 31",
    "add r13, rax",
    "jmp .Lprobe_received",
    ".Lprobe_read:",
    "mov al, 0x20",
    "out 0x20, al",
    "pop rdx",
    "pop rax",
    "iretq",
    ".globl vmft_probe_end",
    "vmft_probe_end:",
    ".popsection",
    ticks = const TICKS,
);

unsafe extern "C" {
    static vmft_probe_begin: u8;
    static vmft_probe_end: u8;
}

fn code() -> &'static [u8] {
    let (begin, end) = (&raw const vmft_probe_begin, &raw const vmft_probe_end);
    // SAFETY: both symbols delimit the bytes assembled above, in one read-only section, in this
    // order; they live as long as the program.
    unsafe { std::slice::from_raw_parts(begin, end.offset_from_unsigned(begin)) }
}

/// The kernel as an ELF file with one segment.
fn kernel() -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let code = code();
    let mut file = vec![0x7F, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    file.extend(2u16.to_le_bytes()); // executable
    file.extend(62u16.to_le_bytes()); // x86-64
    file.extend(1u32.to_le_bytes());
    for word in [BASE, 64, 0] {
        file.extend(word.to_le_bytes()); // entry, program headers, section headers
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    for word in [1u32, 7] {
        file.extend(word.to_le_bytes()); // loaded; readable, writable, executable
    }
    for word in [HEADERS, BASE, BASE, code.len() as u64, MEMORY_SIZE, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file
}

/// A machine about to execute the probe guest's first instruction.
pub fn machine() -> Machine {
    let config = MachineConfig {
        board: BoardConfig {
            memory: Bytes(64 << 20),
            clock_base: UnixSeconds(1_288_000_000),
            disks: Vec::new(),
            entropy: false,
            net: None,
            cpus: CpuCount::ONE,
        },
        engine: EngineKind::Soft,
    };
    let source = BootSource {
        kernel: Arc::from(kernel()),
        initramfs: None,
        cmdline: "probe".to_owned(),
        disk: None,
    };
    Machine::new(config, source).unwrap()
}
