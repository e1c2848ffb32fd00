//! The way into a snippet and out of it, on the host CPU. Everything here runs only in the
//! forked child of [`crate::native`], which has one thread.
//!
//! Into it: [`enter`] loads every register from [`CONTEXT`] and leaves by IRETQ, which sets RIP,
//! RSP and RFLAGS together and serialises, so that freshly written code is what runs.
//! Out of it: the snippet jumps to the stub at [`crate::layout::EXIT`], which jumps here; or it
//! faults, and the signal handler notes the exception and resumes at the same place.

use crate::layout::{EXIT, GS_BASE, USER_CODE};
use std::arch::global_asm;
use std::mem::offset_of;

/// The registers at either end, as the assembly below lays them out.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Registers {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub general: [u64; 16],
    /// Flags.
    pub rflags: u64,
    /// Instruction pointer.
    pub rip: u64,
    /// Selectors of DS and ES.
    pub data_selectors: [u32; 2],
    /// Selector of CS (in only).
    pub code_selector: u64,
}

/// An `FXSAVE64` image.
#[repr(C, align(16))]
#[derive(Debug, Clone, Copy)]
pub struct FxImage(pub [u8; 512]);

/// What the signal handler saw.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Trap {
    /// An exception came.
    pub happened: bool,
    /// Its vector.
    pub vector: u64,
    /// Its error code, as the kernel tells.
    pub error: u64,
    /// CR2.
    pub address: u64,
    /// Where.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
}

/// No exception.
pub const NO_TRAP: Trap =
    Trap { happened: false, vector: 0, error: 0, address: 0, rip: 0, rflags: 0 };

/// All zero.
pub const NO_REGISTERS: Registers =
    Registers { general: [0; 16], rflags: 0, rip: 0, data_selectors: [0; 2], code_selector: 0 };

/// What the assembly and the signal handler share with the child's loop.
#[repr(C)]
#[derive(Debug)]
pub struct Context {
    /// To load.
    pub input: Registers,
    /// Loaded.
    pub output: Registers,
    /// To load.
    pub input_fx: FxImage,
    /// Stored.
    pub output_fx: FxImage,
    host_stack: u64,
    default_mxcsr: u32,
    /// The exception, if one came.
    pub trap: Trap,
}

/// The one context. Only the child's single thread touches it, and never across [`enter`].
pub static mut CONTEXT: Context = Context {
    input: NO_REGISTERS,
    output: NO_REGISTERS,
    input_fx: FxImage([0; 512]),
    output_fx: FxImage([0; 512]),
    host_stack: 0,
    default_mxcsr: 0x1F80,
    trap: NO_TRAP,
};

unsafe extern "C" {
    fn silicon_enter();
    fn silicon_leave();
}

global_asm!(
    ".balign 16",
    "silicon_enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [rip + {context} + {host_stack}], rsp",
    "fxrstor64 [rip + {context} + {input_fx}]",
    "mov eax, ss",
    "push rax",
    "push qword ptr [rip + {context} + {input} + 4 * 8]",
    "push qword ptr [rip + {context} + {input} + 16 * 8]",
    "push qword ptr [rip + {context} + {input} + 19 * 8]",
    "push qword ptr [rip + {context} + {input} + 17 * 8]",
    "mov eax, [rip + {context} + {input} + 18 * 8]",
    "mov ds, eax",
    "mov eax, [rip + {context} + {input} + 18 * 8 + 4]",
    "mov es, eax",
    "mov rax, [rip + {context} + {input}]",
    "mov rcx, [rip + {context} + {input} + 1 * 8]",
    "mov rdx, [rip + {context} + {input} + 2 * 8]",
    "mov rbx, [rip + {context} + {input} + 3 * 8]",
    "mov rbp, [rip + {context} + {input} + 5 * 8]",
    "mov rsi, [rip + {context} + {input} + 6 * 8]",
    "mov rdi, [rip + {context} + {input} + 7 * 8]",
    "mov r8, [rip + {context} + {input} + 8 * 8]",
    "mov r9, [rip + {context} + {input} + 9 * 8]",
    "mov r10, [rip + {context} + {input} + 10 * 8]",
    "mov r11, [rip + {context} + {input} + 11 * 8]",
    "mov r12, [rip + {context} + {input} + 12 * 8]",
    "mov r13, [rip + {context} + {input} + 13 * 8]",
    "mov r14, [rip + {context} + {input} + 14 * 8]",
    "mov r15, [rip + {context} + {input} + 15 * 8]",
    "iretq",
    ".balign 16",
    "silicon_leave:",
    "mov [rip + {context} + {output}], rax",
    "mov [rip + {context} + {output} + 1 * 8], rcx",
    "mov [rip + {context} + {output} + 2 * 8], rdx",
    "mov [rip + {context} + {output} + 3 * 8], rbx",
    "mov [rip + {context} + {output} + 4 * 8], rsp",
    "mov [rip + {context} + {output} + 5 * 8], rbp",
    "mov [rip + {context} + {output} + 6 * 8], rsi",
    "mov [rip + {context} + {output} + 7 * 8], rdi",
    "mov [rip + {context} + {output} + 8 * 8], r8",
    "mov [rip + {context} + {output} + 9 * 8], r9",
    "mov [rip + {context} + {output} + 10 * 8], r10",
    "mov [rip + {context} + {output} + 11 * 8], r11",
    "mov [rip + {context} + {output} + 12 * 8], r12",
    "mov [rip + {context} + {output} + 13 * 8], r13",
    "mov [rip + {context} + {output} + 14 * 8], r14",
    "mov [rip + {context} + {output} + 15 * 8], r15",
    "mov rsp, [rip + {context} + {host_stack}]",
    "pushfq",
    "pop qword ptr [rip + {context} + {output} + 16 * 8]",
    "push 0x202",
    "popfq",
    "fxsave64 [rip + {context} + {output_fx}]",
    "mov eax, ds",
    "mov [rip + {context} + {output} + 18 * 8], eax",
    "mov eax, es",
    "mov [rip + {context} + {output} + 18 * 8 + 4], eax",
    "xor eax, eax",
    "mov ds, eax",
    "mov es, eax",
    "fninit",
    "ldmxcsr [rip + {context} + {default_mxcsr}]",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    context = sym CONTEXT,
    input = const offset_of!(Context, input),
    output = const offset_of!(Context, output),
    input_fx = const offset_of!(Context, input_fx),
    output_fx = const offset_of!(Context, output_fx),
    host_stack = const offset_of!(Context, host_stack),
    default_mxcsr = const offset_of!(Context, default_mxcsr),
);

/// Runs the snippet that [`CONTEXT`] describes.
///
/// # Safety
/// The calling process has one thread, has called [`catch_exceptions`], and maps the layout with
/// a snippet at the context's RIP that neither enters the kernel nor changes the base of FS.
pub unsafe fn enter() {
    // SAFETY: the assembly saves and restores every register the C convention wants kept, the
    // snippet works on the layout's memory alone, and every exception it raises comes back
    // through `on_exception`.
    unsafe { silicon_enter() }
}

/// The stubs for the page at [`crate::layout::EXIT`]: `jmp [rip]` and the address it takes, and at
/// [`crate::layout::EXIT_32`] a far jump to it.
pub fn exit_stub() -> [u8; 0x47] {
    let mut stub = [0; 0x47];
    stub[..6].copy_from_slice(&[0xFF, 0x25, 0, 0, 0, 0]);
    let leave: unsafe extern "C" fn() = silicon_leave;
    stub[6..14].copy_from_slice(&(leave as usize as u64).to_le_bytes());
    stub[0x40] = 0xEA;
    stub[0x41..0x45].copy_from_slice(&(EXIT as u32).to_le_bytes());
    stub[0x45..].copy_from_slice(&USER_CODE.to_le_bytes());
    stub
}

extern "C" fn on_exception(
    _signal: libc::c_int,
    _info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    const TRAP_AND_OTHERS: i64 = 0x4_4500; // TF, DF, NT, AC
    // SAFETY: the kernel passes a `ucontext_t` to a SA_SIGINFO handler, valid until it returns.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let register = |n: libc::c_int| registers[n as usize] as u64;
    let trap = Trap {
        happened: true,
        vector: register(libc::REG_TRAPNO),
        error: register(libc::REG_ERR),
        address: register(libc::REG_CR2),
        rip: register(libc::REG_RIP),
        rflags: register(libc::REG_EFL),
    };
    // SAFETY: the process has one thread, and it is in a snippet: nothing else uses the context.
    unsafe { CONTEXT.trap = trap };
    registers[libc::REG_EFL as usize] &= !TRAP_AND_OTHERS;
    let leave: unsafe extern "C" fn() = silicon_leave;
    registers[libc::REG_RIP as usize] = leave as usize as i64;
    let selectors = &mut registers[libc::REG_CSGSFS as usize];
    *selectors = *selectors & !0xFFFF | i64::from(USER_CODE);
}

/// Installs the signal handlers, their stack, and the base of GS. For the child only.
///
/// # Safety
/// `stack` is writable for `len` bytes as long as the process lives.
pub unsafe fn catch_exceptions(stack: *mut libc::c_void, len: usize) {
    const ARCH_SET_GS: libc::c_int = 0x1001;
    let alternate = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: len };
    // SAFETY: plain system calls on initialised structures; the handler is written for
    // SA_SIGINFO and touches only the context and its own frame.
    unsafe {
        libc::sigaltstack(&raw const alternate, std::ptr::null_mut());
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
            on_exception;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut action.sa_mask);
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP] {
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
        libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, GS_BASE);
    }
}
