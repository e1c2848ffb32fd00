//! A 32-bit program as the only program of Debian's kernel: system calls of both kinds, a signal,
//! thread-local storage, far jumps to 64-bit code and back.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::process::Command;
use vmft_guest_images::cache::Cache;
use vmft_guest_images::cpio::Archive;
use vmft_guest_images::{NoProgress, cmdline, default_guest};

/// Where the file is loaded, whole: headers, code, texts.
const BASE: u32 = 0x0804_8000;
const HEADERS: u32 = 52 + 32;
/// Where the program keeps its variables: behind the file.
const VARIABLES: u32 = BASE + 0x4000;

const EXIT: i32 = 1;
const WRITE: i32 = 4;
const GET_PID: i32 = 20;
const KILL: i32 = 37;
const REBOOT: i32 = 88;
const RT_SIGACTION: i32 = 174;
const SET_THREAD_AREA: i32 = 243;
const SIGUSR1: i32 = 10;
const SA_SIGINFO: i32 = 4;
const AT_SYSINFO: i32 = 32;

/// Code at [`BASE`] behind the headers.
struct Program {
    a: CodeAssembler,
}

impl Program {
    /// Leaves EAX, EBX, ECX and EDX ready to write a text.
    fn load_write(&mut self, text: &str) -> Result<(), IcedError> {
        self.address_of(ecx, |a| a.db(text.as_bytes()))?;
        self.a.mov(eax, WRITE)?;
        self.a.mov(ebx, 1)?;
        self.a.mov(edx, text.len() as i32)
    }

    /// Puts something here that is not run, and its address into a register.
    fn address_of(
        &mut self,
        register: AsmRegister32,
        what: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Result<(), IcedError> {
        let mut behind = self.a.create_label();
        self.a.call(behind)?;
        what(&mut self.a)?;
        self.a.set_label(&mut behind)?;
        self.a.pop(register)
    }

    fn say(&mut self, text: &str) -> Result<(), IcedError> {
        self.load_write(text)?;
        self.a.int(0x80)
    }

    /// Says the text, unless the flags say "not equal".
    fn say_if_equal(&mut self, text: &str) -> Result<(), IcedError> {
        let mut over = self.a.create_label();
        self.a.jne(over)?;
        self.say(text)?;
        self.a.set_label(&mut over)?;
        self.a.nop()
    }

    /// Finds the kernel's page of code in the auxiliary vector, and calls the system through it.
    fn call_by_vdso(&mut self) -> Result<(), IcedError> {
        let a = &mut self.a;
        a.mov(esi, esp)?;
        // Arguments (their number, themselves, 0), then the environment up to its 0.
        a.lodsd()?;
        a.lea(esi, dword_ptr(esi + eax * 4 + 4))?;
        let mut environment = a.create_label();
        a.set_label(&mut environment)?;
        a.lodsd()?;
        a.test(eax, eax)?;
        a.jnz(environment)?;
        let mut entry = a.create_label();
        a.set_label(&mut entry)?;
        a.lodsd()?;
        a.mov(edi, eax)?;
        a.lodsd()?;
        a.cmp(edi, AT_SYSINFO)?;
        a.jne(entry)?;
        a.mov(edi, eax)?;
        self.load_write("by SYSCALL\n")?;
        self.a.call(edi)
    }

    fn thread_area(&mut self) -> Result<(), IcedError> {
        let a = &mut self.a;
        let descriptor = VARIABLES as i32;
        // Any entry, base, limit in pages: a flat segment of four bytes' use.
        for (n, word) in [-1, (VARIABLES + 0x100) as i32, 0xF_FFFF, 0x51].into_iter().enumerate() {
            a.mov(dword_ptr(descriptor + 4 * n as i32), word)?;
        }
        a.mov(dword_ptr((VARIABLES + 0x104) as i32), 0x1234_5678)?;
        a.mov(ebx, descriptor)?;
        a.mov(eax, SET_THREAD_AREA)?;
        a.int(0x80)?;
        a.mov(eax, dword_ptr(descriptor))?;
        a.lea(eax, dword_ptr(eax * 8 + 3))?;
        a.mov(gs, eax)?;
        a.xor(ebx, ebx)?;
        a.cmp(dword_ptr(ebx + 4).gs(), 0x1234_5678)?;
        self.say_if_equal("GS is mine\n")
    }

    fn signal(&mut self) -> Result<(), IcedError> {
        let action = (VARIABLES + 0x200) as i32;
        let (mut handler, mut over) = (self.a.create_label(), self.a.create_label());
        self.address_of(eax, |a| a.jmp(handler))?;
        let a = &mut self.a;
        a.mov(dword_ptr(action), eax)?;
        a.mov(dword_ptr(action + 4), SA_SIGINFO)?;
        a.mov(ebx, SIGUSR1)?;
        a.mov(ecx, action)?;
        a.xor(edx, edx)?;
        a.mov(esi, 8)?;
        a.mov(eax, RT_SIGACTION)?;
        a.int(0x80)?;
        a.mov(eax, GET_PID)?;
        a.int(0x80)?;
        a.mov(ebx, eax)?;
        a.mov(ecx, SIGUSR1)?;
        a.mov(edi, 77)?;
        a.mov(eax, KILL)?;
        a.int(0x80)?;
        a.jmp(over)?;
        a.set_label(&mut handler)?;
        a.cmp(dword_ptr(esp + 4), SIGUSR1)?;
        a.mov(edi, 5)?;
        self.say_if_equal("in the handler\n")?;
        self.a.ret()?;
        self.a.set_label(&mut over)?;
        self.a.cmp(edi, 77)?;
        self.say_if_equal("back from the signal\n")
    }

    /// To 64-bit code, where a REX prefix counts, and back.
    fn far_jump(&mut self) -> Result<(), IcedError> {
        let mut back = self.a.create_label();
        self.address_of(ecx, |a| a.jmp(back))?;
        // MOV EDX, 1; SHL RDX, 40; SHR RDX, 39; SUB ESP, 16; RETF
        self.address_of(eax, |a| {
            a.db(&[0xBA, 1, 0, 0, 0, 0x48, 0xC1, 0xE2, 40, 0x48, 0xC1, 0xEA, 39])?;
            a.db(&[0x83, 0xEC, 16, 0xCB])
        })?;
        let a = &mut self.a;
        a.push(0x33)?;
        a.push(eax)?;
        a.push(0x23)?;
        a.push(ecx)?;
        a.add(esp, 8)?;
        a.retf()?;
        a.set_label(&mut back)?;
        a.add(esp, 8)?;
        a.cmp(edx, 2)?;
        self.say_if_equal("to 64-bit code and back\n")
    }

    fn end(&mut self) -> Result<(), IcedError> {
        let a = &mut self.a;
        // As the first program it turns the machine off; elsewhere it ends.
        a.mov(eax, REBOOT)?;
        a.mov(ebx, 0xFEE1_DEADu32)?;
        a.mov(ecx, 672_274_793)?;
        a.mov(edx, 0x4321_FEDCu32)?;
        a.int(0x80)?;
        a.mov(eax, EXIT)?;
        a.xor(ebx, ebx)?;
        a.int(0x80)?;
        a.ud2()
    }
}

fn program() -> Result<Vec<u8>, IcedError> {
    let mut program = Program { a: CodeAssembler::new(32)? };
    program.call_by_vdso()?;
    program.say("by INT 0x80\n")?;
    program.thread_area()?;
    program.signal()?;
    program.far_jump()?;
    program.end()?;
    program.a.assemble((BASE + HEADERS).into())
}

/// A file of one segment that may be read, written and executed.
fn elf(code: &[u8]) -> Vec<u8> {
    const MACHINE_386: u16 = 3;
    const EXECUTABLE: u16 = 2;
    let mut file = vec![0x7F, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |file: &mut Vec<u8>, value: u16| file.extend(value.to_le_bytes());
    let word = |file: &mut Vec<u8>, value: u32| file.extend(value.to_le_bytes());
    half(&mut file, EXECUTABLE);
    half(&mut file, MACHINE_386);
    // Version, entry, program headers, section headers, flags.
    for value in [1, BASE + HEADERS, 52, 0, 0] {
        word(&mut file, value);
    }
    // Sizes and numbers of headers.
    for value in [52, 32, 1, 40, 0, 0] {
        half(&mut file, value);
    }
    let len = HEADERS + code.len() as u32;
    // Load, offset, address twice, bytes in the file and in memory, rights, alignment.
    for value in [1, 0, BASE, BASE, len, 0x8000, 7, 0x1000] {
        word(&mut file, value);
    }
    file.extend(code);
    file
}

#[test]
fn a_32_bit_program_runs_in_the_guest() {
    let guest = default_guest(&Cache::from_environment().unwrap(), &mut NoProgress).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let mut archive = Archive::default();
    archive.directory("dev");
    archive.character_device("dev/console", 5, 1);
    archive.file("init", 0o755, &elf(&program().unwrap()));
    std::fs::write(directory.join("initramfs"), archive.finish()).unwrap();
    let words = format!("{} quiet", cmdline::DEFAULT);
    let output = Command::new(env!("CARGO_BIN_EXE_vmft"))
        .args(["run", "--initramfs", "initramfs", "--memory", "size=96M", "--cmdline", &words])
        .args(["--serial", "file=console", "--kernel"])
        .arg(&guest.kernel)
        .current_dir(directory)
        .output()
        .unwrap();
    println!("{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}", output.status);
    let console = std::fs::read(directory.join("console")).unwrap();
    let console = String::from_utf8_lossy(&console).replace('\r', "");
    let said = "by SYSCALL\nby INT 0x80\nGS is mine\nin the handler\nback from the signal\n\
                to 64-bit code and back\n";
    assert!(console.contains(said), "{console}");
}
