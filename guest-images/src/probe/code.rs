//! The probe guest's program.
//!
//! It stays at privilege level 0, in the boot loader's page tables, and uses what every engine has:
//! integer instructions of the 386 and long mode. In particular no RDTSC, no RDRAND, no CPUID, no
//! SSE, no INT3, no string instructions.
//!
//! | register | what |
//! |---|---|
//! | R12 | timer ticks taken |
//! | R13 | lines printed |
//! | R14 | the work area |
//! | R15 | the computation's accumulator |

use super::{BASE, ProbeGuest};
use std::num::NonZeroU32;

std::arch::global_asm!(
    ".pushsection .rodata.vmft_line_probe, \"a\"",
    ".globl vmft_line_probe_begin",
    "vmft_line_probe_begin:",
    ".Lline_probe:",
    "cli",
    "lea rsp, [rip + .Lline_probe + 0x10000]",
    // An interrupt table at 0x8000: 32 exceptions, of which none is expected, and the timer.
    "lea rdi, [rip + .Lline_probe + 0x8000]",
    "mov ebx, 32",
    ".Lline_probe_gates:",
    "lea rax, [rip + .Lline_probe_fault]",
    "call .Lline_probe_gate",
    "dec ebx",
    "jnz .Lline_probe_gates",
    "lea rax, [rip + .Lline_probe_timer]",
    "call .Lline_probe_gate",
    "lea rax, [rip + .Lline_probe + 0x8000]",
    "sub rsp, 16",
    "mov word ptr [rsp], 0x20f",
    "mov [rsp + 2], rax",
    "lidt [rsp]",
    "add rsp, 16",
    // The 8259s: vectors 0x20 and 0x28; only the timer may interrupt.
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
    "mov al, 0xfe",
    "out 0x21, al",
    "mov al, 0xff",
    "out 0xa1, al",
    // The 8254: counter 0, mode 2, 11932 cycles: 100 Hz.
    "mov al, 0x34",
    "out 0x43, al",
    "mov al, 0x9c",
    "out 0x40, al",
    "mov al, 0x2e",
    "out 0x40, al",
    // The serial port: 8 bits, no parity.
    "mov dx, 0x3fb",
    "mov al, 3",
    "out dx, al",
    "xor r12d, r12d",
    "xor r13d, r13d",
    "xor r15d, r15d",
    "lea r14, [rip + .Lline_probe + 0x20000]",
    "sti",
    // A line: compute over 64 KiB, print, wait for ticks.
    ".Lline_probe_line:",
    "mov ecx, [rip + .Lline_probe_rounds]",
    ".Lline_probe_compute:",
    "imul r15, r15, 0x5bd1e995",
    "add r15, rcx",
    "mov rbx, r15",
    "shr rbx, 20",
    "and ebx, 0xfff8",
    "add [r14 + rbx], r15",
    "dec ecx",
    "jnz .Lline_probe_compute",
    // Held: nothing is printed until the serial port has a byte.
    "cmp r13d, [rip + .Lline_probe_hold]",
    "je .Lline_probe_held",
    "cmp r13d, [rip + .Lline_probe_hold + 4]",
    "jne .Lline_probe_go_on",
    ".Lline_probe_held:",
    "mov dx, 0x3fd",
    "in al, dx",
    "test al, 1",
    "jz .Lline_probe_printed_line",
    "mov dx, 0x3f8",
    "in al, dx",
    ".Lline_probe_go_on:",
    "inc r13d",
    "lea rsi, [rip + .Lline_probe_text_line]",
    "call .Lline_probe_print",
    "mov eax, r13d",
    "mov ebx, 100000",
    ".Lline_probe_digit:",
    "xor edx, edx",
    "div ebx",
    "push rdx",
    "add al, 0x30",
    "call .Lline_probe_put",
    "mov eax, ebx",
    "xor edx, edx",
    "mov ecx, 10",
    "div ecx",
    "mov ebx, eax",
    "pop rax",
    "test ebx, ebx",
    "jnz .Lline_probe_digit",
    "lea rsi, [rip + .Lline_probe_text_end]",
    "call .Lline_probe_print",
    ".Lline_probe_printed_line:",
    "cmp r13d, [rip + .Lline_probe_lines]",
    "jae .Lline_probe_done",
    "mov ebx, r12d",
    "add ebx, [rip + .Lline_probe_ticks]",
    ".Lline_probe_wait:",
    "cli",
    "cmp r12d, ebx",
    "jae .Lline_probe_waited",
    "sti",
    "hlt",
    "jmp .Lline_probe_wait",
    ".Lline_probe_waited:",
    "sti",
    "jmp .Lline_probe_line",
    // Switched off: halted with interrupts masked.
    ".Lline_probe_done:",
    "lea rsi, [rip + .Lline_probe_text_done]",
    "call .Lline_probe_print",
    ".Lline_probe_off:",
    "cli",
    "hlt",
    "jmp .Lline_probe_off",
    ".Lline_probe_fault:",
    "lea rsi, [rip + .Lline_probe_text_fault]",
    "call .Lline_probe_print",
    "jmp .Lline_probe_off",
    // Where a tick lands becomes part of memory, and so of every digest.
    ".Lline_probe_timer:",
    "push rax",
    "inc r12d",
    "mov rax, [rsp + 8]",
    "add [r14], rax",
    "mov al, 0x20",
    "out 0x20, al",
    "pop rax",
    "iretq",
    // Writes the interrupt gate at RDI to RAX, and moves on to the next.
    ".Lline_probe_gate:",
    "mov [rdi], ax",
    "mov word ptr [rdi + 2], 0x10",
    "mov word ptr [rdi + 4], 0x8e00",
    "shr rax, 16",
    "mov [rdi + 6], ax",
    "shr rax, 16",
    "mov [rdi + 8], eax",
    "mov dword ptr [rdi + 12], 0",
    "add rdi, 16",
    "ret",
    // Prints the text at RSI, up to its zero.
    ".Lline_probe_print:",
    "mov al, [rsi]",
    "test al, al",
    "jz .Lline_probe_printed",
    "call .Lline_probe_put",
    "inc rsi",
    "jmp .Lline_probe_print",
    ".Lline_probe_printed:",
    "ret",
    // Prints AL once the serial port takes it.
    ".Lline_probe_put:",
    "push rdx",
    "push rax",
    "mov dx, 0x3fd",
    ".Lline_probe_full:",
    "in al, dx",
    "test al, 0x20",
    "jz .Lline_probe_full",
    "pop rax",
    "mov dx, 0x3f8",
    "out dx, al",
    "pop rdx",
    "ret",
    ".Lline_probe_text_line:",
    ".asciz \"vmft-line \"",
    ".Lline_probe_text_end:",
    ".asciz \"\\r\\n\"",
    ".Lline_probe_text_done:",
    ".asciz \"vmft-done\\r\\n\"",
    ".Lline_probe_text_fault:",
    ".asciz \"vmft-fault\\r\\n\"",
    ".balign 4",
    // What is to be done; filled in when the image is made.
    ".globl vmft_line_probe_parameters",
    "vmft_line_probe_parameters:",
    ".Lline_probe_lines:",
    ".long 0",
    ".Lline_probe_ticks:",
    ".long 0",
    ".Lline_probe_rounds:",
    ".long 0",
    ".Lline_probe_hold:",
    ".long 0, 0",
    ".globl vmft_line_probe_end",
    "vmft_line_probe_end:",
    ".popsection",
);

unsafe extern "C" {
    static vmft_line_probe_begin: u8;
    static vmft_line_probe_parameters: u8;
    static vmft_line_probe_end: u8;
}

/// The program, to be loaded and entered at [`BASE`], with what `guest` asks for filled in.
pub(super) fn program(guest: &ProbeGuest) -> Vec<u8> {
    const { assert!(BASE.is_multiple_of(0x1000)) };
    let begin = &raw const vmft_line_probe_begin;
    let (parameters, end) = (&raw const vmft_line_probe_parameters, &raw const vmft_line_probe_end);
    // SAFETY: the symbols delimit the bytes assembled above, in one read-only section, in this
    // order; they live as long as the program.
    let (code, at) = unsafe {
        let len = end.offset_from_unsigned(begin);
        (std::slice::from_raw_parts(begin, len), parameters.offset_from_unsigned(begin))
    };
    let mut code = code.to_vec();
    let [first, second] = guest.hold.map(|line| line.map_or(u32::MAX, NonZeroU32::get));
    let values = [guest.lines.get(), guest.ticks, guest.rounds.get(), first, second];
    for (place, value) in code[at..].chunks_exact_mut(4).zip(values) {
        place.copy_from_slice(&value.to_le_bytes());
    }
    code
}
