//! Executes one instruction on the host's CPU with a [`Machine`]'s registers and memory.
//!
//! What the manuals fix is the same on every host. Where they leave corners open (x87 pointers without
//! a pending exception, which NaN a dot product keeps) this module does as Intel CPUs do, and so
//! only Intel hosts are compared with there.

use super::super::state::{Pointers, image, parse};
use super::machine::{BASE, CODE, MEMORY, Machine};
use std::arch::asm;

/// Whether the host is an Intel CPU.
pub(super) fn is_intel() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    [leaf.ebx, leaf.edx, leaf.ecx] == [*b"Genu", *b"ineI", *b"ntel"].map(u32::from_le_bytes)
}

#[repr(C, align(64))]
struct Context {
    guest: [u8; 512],
    host: [u8; 512],
    /// RAX, RCX, RDX, RBX, RSI, RDI, RFLAGS.
    general: [u64; 7],
    memory: Memory,
}

#[repr(align(64))]
struct Memory([u8; MEMORY]);

/// A page the host may execute.
pub(super) struct Page(*mut u8);

impl Page {
    const SIZE: usize = 4096;

    pub(super) fn new() -> Self {
        // SAFETY: an anonymous private mapping, of which nothing else is assumed.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                Self::SIZE,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(page, libc::MAP_FAILED);
        Self(page.cast())
    }

    /// Writes the instruction and a return after it.
    pub(super) fn fill(&mut self, code: &[u8]) {
        const RETURN: u8 = 0xC3;
        assert!(code.len() < Self::SIZE);
        // SAFETY: the page is writable, `Self::SIZE` long, and only this object knows it.
        unsafe {
            self.0.copy_from_nonoverlapping(code.as_ptr(), code.len());
            self.0.add(code.len()).write(RETURN);
        }
    }

    /// Executes what was filled in. The instruction may use the vector and x87 registers, RAX,
    /// RBX, RCX, RDX, the flags, and memory at RSI and RDI inside the machine's memory.
    pub(super) fn run(&self, machine: &mut Machine) {
        let mut context = Context {
            guest: [0; 512],
            host: [0; 512],
            general: [0; 7],
            memory: Memory(machine.memory),
        };
        context.guest[..416].copy_from_slice(&image(&machine.x87, &machine.sse, Pointers::Wide));
        let memory = context.memory.0.as_ptr() as u64;
        let pointer = |address: u64| address.wrapping_sub(BASE).wrapping_add(memory);
        context.general[..4].copy_from_slice(&machine.general[..4]);
        context.general[4] = pointer(machine.general[6]);
        context.general[5] = pointer(machine.general[7]);
        context.general[6] = machine.flags;
        // SAFETY: the code is one instruction that keeps to the registers and the memory named
        // above, then a return; every exception is masked in the images that are loaded. The vector
        // and x87 state is saved before and restored after; RBX and R15 are saved on the stack,
        // the other registers declared.
        unsafe {
            asm!(
                "push rbx",
                "push r15",
                "mov r15, rdi",
                "fxsave64 [r15 + 512]",
                "fxrstor64 [r15]",
                "mov rax, [r15 + 1024]",
                "mov rcx, [r15 + 1032]",
                "mov rdx, [r15 + 1040]",
                "mov rbx, [r15 + 1048]",
                "mov rsi, [r15 + 1056]",
                "mov rdi, [r15 + 1064]",
                "push qword ptr [r15 + 1072]",
                "popfq",
                "call r14",
                "pushfq",
                "pop qword ptr [r15 + 1072]",
                "mov [r15 + 1024], rax",
                "mov [r15 + 1032], rcx",
                "mov [r15 + 1040], rdx",
                "mov [r15 + 1048], rbx",
                "fxsave64 [r15]",
                "fxrstor64 [r15 + 512]",
                "pop r15",
                "pop rbx",
                inout("rdi") &raw mut context => _,
                in("r14") self.0,
                out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _,
            );
        }
        (machine.x87, machine.sse) =
            parse(&context.guest, Pointers::Wide).expect("the host saved it");
        // Pointers as the machine's own addresses.
        if machine.x87.instruction == self.0 as u64 {
            machine.x87.instruction = CODE;
        }
        if (memory..memory + MEMORY as u64).contains(&machine.x87.data) {
            machine.x87.data = machine.x87.data - memory + BASE;
        }
        machine.general[..4].copy_from_slice(&context.general[..4]);
        machine.flags = context.general[6] & 0x8D5 | 2;
        machine.memory = context.memory.0;
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `new`, unmapped once.
        unsafe { libc::munmap(self.0.cast(), Self::SIZE) };
    }
}
