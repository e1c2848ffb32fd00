//! Debug registers against silicon: a traced child runs a program natively with breakpoints and
//! watchpoints set by its tracer, the engine runs it with the same registers, and where each of
//! them stops must agree, with what DR6 says.

use crate::case::{Bits, Floating, Inputs, Ready};
use crate::guest::Guest;
use crate::layout::{CODE, CODE_LEN, DATA, DATA_LEN, MEMORY_LEN};
use crate::native::Native;
use crate::rng::Rng;
use iced_x86::code_asm::*;
use iced_x86::{Decoder, DecoderOptions};
use std::io;
use vmft_cpu::soft::CacheLimits;

/// A stop: the address, and B0 to B3.
pub type Hit = (u64, u64);

/// Where the programs' stacks begin.
const STACK: u64 = DATA + DATA_LEN;
/// Configurations of each program.
const CONFIGURATIONS: u64 = 30;
/// Processor seconds a program may take; it takes microseconds.
const CHILD_SECONDS: u64 = 2;
/// More stops than any program can cause.
const MAX_HITS: usize = 2000;

type Program = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;

/// Programs end in UD2. RBX points at the data, everything else is 0. Repeated string instructions are not
/// among them: at which iteration a processor tells of a watchpoint there is its own affair (SDM volume 3,
/// "Data Memory and I/O Breakpoint Exception Conditions"), and AMD's tell of some once more. Nor are loads of
/// SS: AMD's meet a breakpoint on the instruction behind, which Intel's manual says is not met.
const PROGRAMS: [(&str, Program); 7] = [
    ("loads and stores", |a| {
        a.mov(byte_ptr(rbx + 1), al)?;
        a.mov(word_ptr(rbx + 3), ax)?;
        a.mov(dword_ptr(rbx + 6), eax)?;
        a.mov(qword_ptr(rbx + 9), rax)?;
        a.mov(al, byte_ptr(rbx + 18))?;
        a.movzx(ecx, word_ptr(rbx + 15))?;
        a.mov(edx, dword_ptr(rbx + 22))?;
        a.mov(rdx, qword_ptr(rbx + 25))?;
        a.mov(qword_ptr(rbx + 20), 5)?;
        a.cmp(dword_ptr(rbx + 4), 3)?;
        a.cmove(rdx, qword_ptr(rbx + 8))?;
        a.sete(byte_ptr(rbx + 12))?;
        a.lea(rsi, qword_ptr(rbx + 16))?;
        a.nop()
    }),
    ("the stack", |a| {
        let mut function = a.create_label();
        let mut end = a.create_label();
        a.push(rax)?;
        a.push(qword_ptr(rbx + 8))?;
        a.pop(qword_ptr(rbx + 16))?;
        a.pop(rdx)?;
        a.call(function)?;
        a.enter(16, 1)?;
        a.leave()?;
        a.pushfq()?;
        a.popfq()?;
        a.jmp(end)?;
        a.set_label(&mut function)?;
        a.push(rbx)?;
        a.pop(rcx)?;
        a.ret()?;
        a.set_label(&mut end)?;
        a.nop()
    }),
    ("reads that write", |a| {
        a.inc(dword_ptr(rbx))?;
        a.lock().add(qword_ptr(rbx + 8), rbx)?;
        a.xchg(word_ptr(rbx + 17), ax)?;
        a.xadd(dword_ptr(rbx + 20), ecx)?;
        a.lock().cmpxchg(dword_ptr(rbx + 24), ecx)?;
        a.mov(eax, 77)?;
        a.lock().cmpxchg(qword_ptr(rbx + 16), rcx)?;
        a.bts(dword_ptr(rbx + 4), 3)?;
        a.shl(byte_ptr(rbx + 13), 1)?;
        a.neg(qword_ptr(rbx + 2))?;
        a.test(dword_ptr(rbx + 2), ecx)?;
        a.nop()
    }),
    ("a loop", |a| {
        let mut again = a.create_label();
        a.mov(ecx, 4)?;
        a.set_label(&mut again)?;
        a.add(dword_ptr(rbx + rcx * 4), ecx)?;
        a.mov(rdx, qword_ptr(rbx + rcx * 8))?;
        a.nop()?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.nop()
    }),
    ("string instructions", |a| {
        a.mov(rdi, rbx)?;
        a.lea(rsi, qword_ptr(rbx + 16))?;
        a.movsb()?;
        a.movsq()?;
        a.stosd()?;
        a.lodsw()?;
        a.scasb()?;
        a.cmpsb()?;
        a.std()?;
        a.stosb()?;
        a.cld()?;
        a.nop()
    }),
    ("vectors and floats", |a| {
        a.movups(xmm0, xmmword_ptr(rbx + 3))?;
        a.movaps(xmmword_ptr(rbx + 16), xmm0)?;
        a.movss(xmm1, dword_ptr(rbx + 8))?;
        a.movq(qword_ptr(rbx + 24), xmm1)?;
        a.addps(xmm0, xmmword_ptr(rbx))?;
        a.fld1()?;
        a.fstp(tbyte_ptr(rbx + 20))?;
        a.fld(dword_ptr(rbx + 4))?;
        a.fstp(qword_ptr(rbx + 12))?;
        a.nop()
    }),
    ("steps", |a| {
        a.pushfq()?;
        a.or(dword_ptr(rsp), 0x100)?;
        a.popfq()?;
        a.nop()?;
        a.mov(dword_ptr(rbx + 8), eax)?;
        a.mov(rax, qword_ptr(rbx + 4))?;
        a.pushfq()?;
        a.and(dword_ptr(rsp), !0x100)?;
        a.popfq()?;
        a.nop()
    }),
];

fn assemble(program: Program) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("64 bits are supported");
    program(&mut a).and_then(|()| a.ud2()).expect("a program of these instructions");
    a.assemble(CODE).expect("the program assembles")
}

/// DR0 to DR3 and DR7.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    /// DR0 to DR3.
    pub addresses: [u64; 4],
    /// DR7.
    pub control: u64,
}

/// Some breakpoints on the program's instructions, its data and its stack.
fn setting(code: &[u8], rng: &mut Rng) -> Setting {
    const EXECUTE: u64 = 0;
    const WRITE: u64 = 1;
    const READ_WRITE: u64 = 3;
    let starts: Vec<u64> = {
        let mut decoder = Decoder::with_ip(64, code, CODE, DecoderOptions::NONE);
        decoder.iter().map(|instruction| instruction.ip()).collect()
    };
    let mut setting = Setting { addresses: [0; 4], control: 0 };
    for number in 0..1 + rng.index(4) {
        let kind = rng.pick(&[EXECUTE, WRITE, READ_WRITE, READ_WRITE]);
        let (length, mask) = rng.pick(&[(0, 0), (1, 1), (3, 3), (2, 7)]);
        let (address, length) = match kind {
            EXECUTE => (rng.pick(&starts), 0),
            _ if rng.percent(75) => ((DATA + rng.below(40)) & !mask, length),
            _ => ((STACK - 48 + rng.below(48)) & !mask, length),
        };
        setting.addresses[number] = address;
        setting.control |= 1 << (2 * number) | (kind | length << 2) << (16 + 4 * number);
    }
    setting
}

fn ready(code: &[u8]) -> Ready {
    let mut general = [0; 16];
    general[3] = DATA;
    general[4] = STACK;
    let floating = Floating {
        control: 0x37F,
        status: 0,
        in_use: 0,
        stack: [[0; 10]; 8],
        mxcsr: 0x1F80,
        xmm: [0; 16],
    };
    Ready {
        bits: Bits::Long,
        code: code.to_vec(),
        starts: Vec::new(),
        inputs: Inputs { general, rflags: 0x202, floating },
        memory: vec![0; MEMORY_LEN],
    }
}

/// In the child: maps what the program needs, asks to be traced, and runs it.
fn child(code: &[u8]) -> ! {
    const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: the child has one thread and never returns to Rust; the mappings are fresh, the code
    // fits its own, and what runs there is the test's program, which ends in UD2.
    unsafe {
        for (at, len, protection) in
            [(CODE, CODE_LEN, READ_WRITE | libc::PROT_EXEC), (DATA, DATA_LEN as usize, READ_WRITE)]
        {
            let mapped = libc::mmap(at as *mut libc::c_void, len, protection, flags, -1, 0);
            if mapped == libc::MAP_FAILED {
                libc::_exit(1);
            }
        }
        (CODE as *mut u8).copy_from_nonoverlapping(code.as_ptr(), code.len());
        // Else a child that never ends would hold the test up.
        let limit = libc::rlimit { rlim_cur: CHILD_SECONDS, rlim_max: CHILD_SECONDS };
        libc::setrlimit(libc::RLIMIT_CPU, &raw const limit);
        libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
        libc::raise(libc::SIGSTOP);
        std::arch::asm!(
            "mov rsp, {stack}",
            "mov rbx, {data}",
            "xor ebp, ebp",
            "xor esi, esi",
            "xor edi, edi",
            "xor ecx, ecx",
            "xor edx, edx",
            "jmp rax",
            stack = in(reg) STACK,
            data = in(reg) DATA,
            in("rax") CODE,
            options(noreturn),
        )
    }
}

fn debug_register(number: usize) -> usize {
    std::mem::offset_of!(libc::user, u_debugreg) + 8 * number
}

struct Traced(libc::pid_t);

impl Traced {
    fn wait(&self) -> io::Result<libc::c_int> {
        let mut status = 0;
        // SAFETY: a plain system call; the child is ours.
        while unsafe { libc::waitpid(self.0, &raw mut status, 0) } < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        Ok(status)
    }

    fn poke(&self, number: usize, value: u64) -> io::Result<()> {
        // SAFETY: the child is traced by us and stopped.
        match unsafe { libc::ptrace(libc::PTRACE_POKEUSER, self.0, debug_register(number), value) }
        {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn hit(&self) -> Hit {
        // SAFETY: as above; the structure is the kernel's to fill, and any bits are valid in it.
        unsafe {
            let mut registers: libc::user_regs_struct = std::mem::zeroed();
            libc::ptrace(libc::PTRACE_GETREGS, self.0, 0, &raw mut registers);
            let status = libc::ptrace(libc::PTRACE_PEEKUSER, self.0, debug_register(6), 0);
            (registers.rip, status as u64 & 0xF)
        }
    }

    /// Lets it run to its next stop; the signal.
    fn go_on(&self) -> io::Result<libc::c_int> {
        // SAFETY: the child is traced by us and stopped.
        unsafe { libc::ptrace(libc::PTRACE_CONT, self.0, 0, 0) };
        let status = self.wait()?;
        if !libc::WIFSTOPPED(status) {
            return Err(io::Error::other(format!("the child ended with {status:#x}")));
        }
        Ok(libc::WSTOPSIG(status))
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        // SAFETY: plain system calls on a child of ours that is not yet waited for.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), 0);
        }
    }
}

/// Where the host stops; an error if it has no breakpoints for us.
fn native(code: &[u8], setting: &Setting) -> io::Result<Vec<Hit>> {
    // SAFETY: the child only maps memory and runs the program.
    let traced = match unsafe { libc::fork() } {
        -1 => return Err(io::Error::last_os_error()),
        0 => child(code),
        pid => Traced(pid),
    };
    traced.wait()?;
    for (number, address) in setting.addresses.iter().enumerate() {
        traced.poke(number, *address)?;
    }
    traced.poke(7, setting.control)?;
    let mut hits = Vec::new();
    while traced.go_on()? == libc::SIGTRAP {
        hits.push(traced.hit());
        if hits.len() > MAX_HITS {
            return Err(io::Error::other("it stops without end"));
        }
    }
    Ok(hits)
}

/// True if the host's breakpoints can be used: not every machine that is virtual has them.
fn host_has_breakpoints() -> bool {
    let code = assemble(|a| {
        a.mov(dword_ptr(rbx), eax)?;
        a.nop()
    });
    let watch = Setting { addresses: [DATA, CODE + 2, 0, 0], control: 0b101 | 0b1101 << 16 };
    match native(&code, &watch) {
        Ok(hits) if hits == [(CODE + 2, 1), (CODE + 2, 2)] => true,
        other => {
            println!("nothing to compare with: the host answered {other:x?}");
            false
        }
    }
}

#[test]
fn breakpoints_stop_where_the_processors_do() {
    if !host_has_breakpoints() {
        return;
    }
    let mut guest = Guest::new(&Native::exit_page(), CacheLimits::default());
    let mut compared = 0;
    for (number, (name, program)) in (0..).zip(PROGRAMS) {
        let code = assemble(program);
        let mut rng = Rng::new(0xB4EA_C0DE, number);
        for _ in 0..CONFIGURATIONS {
            let setting = setting(&code, &mut rng);
            let host = native(&code, &setting).expect("the host sets these breakpoints");
            let engine = guest.debug(&ready(&code), CODE, &setting, MAX_HITS);
            assert_eq!(host, engine, "{name}: {setting:x?}, {code:02x?}");
            compared += host.len();
        }
    }
    println!("{compared} stops agree");
    assert!(compared > 500, "only {compared} stops were compared");
}
