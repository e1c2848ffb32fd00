//! A bare guest that runs freely: a user's program computes while the timer interrupts it a thousand times a second. What
//! it computes in is what no emulator need know: 32-bit code, or bits of MXCSR that the host's CPU alone has.
//!
//! The kernel prints a dot for every 32 interrupts; the program prints an X if it finds its registers changed.

use crate::checkpoints::LIMIT;
use crate::engines::{kvm_is_here, probe, said, take_turn};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};
use vmft::pair::{Look, PairConsole, SideProcess, Which, prefixed};
use vmft_backup::status::Role;

/// Where the probe guest's file has its program, and its program header the length of that.
const PROGRAM_OFFSET: usize = 0x100;
const FILE_SIZE: std::ops::Range<usize> = 96..104;

std::arch::global_asm!(
    ".pushsection .rodata.vmft_bare, \"a\"",
    ".balign 16",
    ".globl vmft_bare_begin",
    "vmft_bare_begin:",
    "cli",
    "lea rsp, [rip + .Lbare_stack_top]",
    // The first 1 GiB is the user's as well.
    "mov rax, cr3",
    "and rax, -4096",
    "or qword ptr [rax], 4",
    "mov rbx, [rax]",
    "and rbx, -4096",
    "or qword ptr [rbx], 4",
    "mov rsi, [rbx]",
    "and rsi, -4096",
    "mov ecx, 512",
    ".Lbare_page:",
    "or qword ptr [rsi], 4",
    "add rsi, 8",
    "dec ecx",
    "jnz .Lbare_page",
    "mov rax, cr3",
    "mov cr3, rax",
    // OSFXSR and OSXMMEXCPT.
    "mov rax, cr4",
    "or rax, 0x600",
    "mov cr4, rax",
    // Segments, and a task state segment with the stack for interrupts.
    "lea rax, [rip + .Lbare_gdt]",
    "mov [rip + .Lbare_gdtr + 2], rax",
    "lgdt [rip + .Lbare_gdtr]",
    "lea rax, [rip + .Lbare_stack_top]",
    "mov [rip + .Lbare_tss + 4], rax",
    "lea rax, [rip + .Lbare_tss]",
    "mov rdx, rax",
    "and rdx, 0xffffff",
    "shl rdx, 16",
    "mov rcx, rax",
    "shr rcx, 24",
    "shl rcx, 56",
    "or rdx, rcx",
    "movabs rcx, 0x0000890000000067",
    "or rdx, rcx",
    "mov [rip + .Lbare_gdt + 48], rdx",
    "mov eax, 0x30",
    "ltr ax",
    // Every vector leads to the timer's handler.
    "lea rdi, [rip + .Lbare_idt]",
    "lea rax, [rip + .Lbare_timer]",
    "mov ecx, 256",
    ".Lbare_gate:",
    "mov [rdi], ax",
    "mov word ptr [rdi + 2], 8",
    "mov word ptr [rdi + 4], 0x8e00",
    "mov rdx, rax",
    "shr rdx, 16",
    "mov [rdi + 6], dx",
    "add rdi, 16",
    "dec ecx",
    "jnz .Lbare_gate",
    "lea rax, [rip + .Lbare_idt]",
    "mov [rip + .Lbare_idtr + 2], rax",
    "lidt [rip + .Lbare_idtr]",
    // The 8259s: only the timer may interrupt. The 8254: counter 0, mode 2, 1 kHz.
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
    "mov al, 0x34",
    "out 0x43, al",
    "mov al, 0xa9",
    "out 0x40, al",
    "mov al, 4",
    "out 0x40, al",
    "lea rbp, [rip + .Lbare_found]",
    "lea rdi, [rip + .Lbare_user_stack_top]",
    "mov ebx, 0x12345678",
    "mov edx, 0x3f8",
    // To the user's program, with IOPL 3.
    "push 0x1b",
    "push rdi",
    "push 0x3202",
    "mov eax, [rip + .Lbare_selector]",
    "push rax",
    "lea rax, [rip + .Lbare_user_64]",
    "cmp dword ptr [rip + .Lbare_selector], 0x2b",
    "jne .Lbare_64",
    "lea rax, [rip + .Lbare_user_32]",
    ".Lbare_64:",
    "push rax",
    "iretq",
    ".Lbare_timer:",
    "push rax",
    "push rdx",
    "mov al, 0x20",
    "out 0x20, al",
    "inc dword ptr [rip + .Lbare_ticks]",
    "test dword ptr [rip + .Lbare_ticks], 31",
    "jnz .Lbare_quiet",
    "mov edx, 0x3f8",
    "mov al, 0x2e",
    "out dx, al",
    ".Lbare_quiet:",
    "pop rdx",
    "pop rax",
    "iretq",
    ".Lbare_user_64:",
    "ldmxcsr [rip + .Lbare_mxcsr]",
    ".Lbare_again_64:",
    "stmxcsr [rbp]",
    "mov eax, [rbp]",
    "cmp eax, [rip + .Lbare_mxcsr]",
    "jne .Lbare_changed_64",
    "cmp ebx, 0x12345678",
    "jne .Lbare_changed_64",
    "dec ecx",
    "jmp .Lbare_again_64",
    ".Lbare_changed_64:",
    "mov al, 0x58",
    "out dx, al",
    "jmp .Lbare_changed_64",
    ".code32",
    ".Lbare_user_32:",
    "dec ecx",
    "cmp ebx, 0x12345678",
    "je .Lbare_user_32",
    ".Lbare_changed_32:",
    "mov al, 0x58",
    "out dx, al",
    "jmp .Lbare_changed_32",
    ".code64",
    ".balign 16",
    // Kernel's code and data, user's data, 64-bit code and 32-bit code, the task state segment.
    ".Lbare_gdt:",
    ".quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cff3000000ffff",
    ".quad 0x00affb000000ffff, 0x00cffb000000ffff, 0, 0",
    ".Lbare_gdtr:",
    ".word 63",
    ".quad 0",
    ".Lbare_idtr:",
    ".word 4095",
    ".quad 0",
    ".balign 16",
    ".Lbare_found:",
    ".long 0",
    ".Lbare_ticks:",
    ".long 0",
    ".Lbare_tss:",
    ".fill 104, 1, 0",
    ".balign 16",
    ".Lbare_idt:",
    ".fill 4096, 1, 0",
    ".Lbare_stack:",
    ".fill 4096, 1, 0",
    ".Lbare_stack_top:",
    ".fill 4096, 1, 0",
    ".Lbare_user_stack_top:",
    // The last two words are what the program is told.
    ".Lbare_selector:",
    ".long 0",
    ".Lbare_mxcsr:",
    ".long 0",
    ".globl vmft_bare_end",
    "vmft_bare_end:",
    ".popsection",
);

unsafe extern "C" {
    static vmft_bare_begin: u8;
    static vmft_bare_end: u8;
}

/// What the user's program computes in.
#[derive(Debug, Clone, Copy)]
struct Program {
    selector: u32,
    mxcsr: u32,
}

const CODE_64: Program = Program { selector: 0x23, mxcsr: 0x1F80 };
const CODE_32: Program = Program { selector: 0x2B, mxcsr: 0x1F80 };
/// With the bit of misaligned SSE, which AMD's CPUs have whatever `CPUID` says.
const MISALIGNED: Program = Program { selector: 0x23, mxcsr: 0x2_1F80 };

impl Program {
    /// The kernel file: that of the probe guest, with another program.
    fn image(self) -> Vec<u8> {
        let (begin, end) = (&raw const vmft_bare_begin, &raw const vmft_bare_end);
        // SAFETY: the symbols delimit the bytes assembled above, in one read-only section, in this order.
        let program = unsafe { std::slice::from_raw_parts(begin, end.offset_from_unsigned(begin)) };
        let mut image = probe(1, 1).image();
        image.truncate(PROGRAM_OFFSET);
        image.extend(&program[..program.len() - 8]);
        image.extend(self.selector.to_le_bytes());
        image.extend(self.mxcsr.to_le_bytes());
        image[FILE_SIZE].copy_from_slice(&(program.len() as u64).to_le_bytes());
        image
    }

    fn write(self, directory: &Path) -> OsString {
        let path = directory.join("bare.elf");
        std::fs::write(&path, self.image()).unwrap();
        path.into()
    }

    /// False, with a word to the reader, where the host's CPU faults at it.
    fn runs_here(self) -> bool {
        let text = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let has =
            self.mxcsr >> 16 == 0 || text.split_whitespace().any(|word| word == "misalignsse");
        if !has {
            println!("not run: this host's CPU has no such bit in MXCSR");
        }
        kvm_is_here() && has
    }
}

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

fn guest(directory: &Path, program: Program) -> Vec<OsString> {
    let mut arguments = words(&["--engine", "kvm", "--memory", "size=64M", "--kernel"]);
    arguments.push(program.write(directory));
    arguments
}

fn start(directory: &Path, command: &str, which: Which, arguments: &[OsString]) -> SideProcess {
    let program = Path::new(env!("CARGO_BIN_EXE_vmft"));
    SideProcess::start_as(program, command, which, directory, arguments).unwrap()
}

/// Reads until the guest has lived for so many dots more.
fn lives_on(side: &SideProcess, console: &mut PairConsole, dots: usize) {
    let deadline = Instant::now() + LIMIT;
    let mut shown = 0;
    while shown < dots {
        if let Look::Bytes(bytes) = console.look(Duration::from_secs(1)) {
            assert!(
                bytes.iter().all(|byte| *byte == b'.'),
                "{:?}",
                String::from_utf8_lossy(&bytes)
            );
            shown += bytes.len();
        }
        assert!(Instant::now() < deadline, "{shown} dots; {}", side.messages());
    }
}

/// Runs the program, takes a snapshot in its middle, and goes on from there.
fn snapshot_goes_on(program: Program) {
    if !program.runs_here() {
        return;
    }
    let _turn = take_turn();
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let mut side = start(directory, "run", Which::Primary, &guest(directory, program));
    let mut console = PairConsole::default();
    console.attach(&mut side).unwrap();
    lives_on(&side, &mut console, 8);
    let snapshot: PathBuf = directory.join("snapshot");
    vmft::api_client::snapshot(&side.api(), &snapshot).unwrap();
    lives_on(&side, &mut console, 2);
    side.kill().unwrap();
    let state = std::fs::read(snapshot.join("state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_slice(&state).unwrap();
    let console_offset = state["console_offset"].as_u64().unwrap();
    let restored = tempfile::tempdir().unwrap();
    let arguments = ["--restore".into(), snapshot.into_os_string()];
    let mut side = start(restored.path(), "run", Which::Primary, &arguments);
    let mut console = PairConsole::starting_at(console_offset);
    console.attach(&mut side).unwrap();
    lives_on(&side, &mut console, 4);
    side.kill().unwrap();
}

#[test]
fn a_32_bit_program_is_interrupted_saved_and_restored() {
    snapshot_goes_on(CODE_32);
}

#[test]
fn a_program_with_its_hosts_bits_in_mxcsr_is_interrupted_saved_and_restored() {
    snapshot_goes_on(MISALIGNED);
}

/// The options of both sides of a pair, and those of its primary.
fn pair_arguments(directory: &Path, program: Program) -> (Vec<OsString>, Vec<OsString>) {
    let options = ["--protect", "checkpoint,interval=20ms", "--listen", "tcp:127.0.0.1:0"];
    let mut both = words(&options);
    both.extend(words(&["--suspect-after", "3000"]));
    both.extend(["--arbiter".into(), prefixed("dir=", &directory.join("arbiter"))]);
    let mut primary = guest(directory, program);
    primary.push("--no-wait".into());
    primary.extend(both.iter().cloned());
    (both, primary)
}

fn survives_its_primary(program: Program) {
    if !program.runs_here() {
        return;
    }
    let _turn = take_turn();
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let (both, arguments) = pair_arguments(directory, program);
    let mut primary = start(directory, "primary", Which::Primary, &arguments);
    let mut console = PairConsole::default();
    console.attach(&mut primary).unwrap();
    let listening = primary.wait_status(LIMIT, |status| status.listening.is_some()).unwrap();
    let mut arguments = words(&["--primary"]);
    arguments.push(format!("tcp:{}", listening.listening.unwrap()).into());
    arguments.extend(both);
    let mut backup = start(directory, "backup", Which::Backup, &arguments);
    console.attach(&mut backup).unwrap();
    primary.wait_status(LIMIT, |status| status.role == Role::Primary).unwrap();
    let epochs = |status: &vmft_backup::status::SideStatus| {
        status.epochs.as_ref().map_or(0, |report| report.epochs)
    };
    // Beyond a rehearsal.
    backup.wait_status(LIMIT, |status| epochs(status) > 20).unwrap();
    lives_on(&primary, &mut console, 4);
    primary.kill().unwrap();
    backup.wait_status(LIMIT, |status| status.role == Role::Alone).unwrap();
    lives_on(&backup, &mut console, 8);
    assert_eq!(console.merger().missing(), 0, "{}", backup.messages());
    backup.kill().unwrap();
}

#[test]
fn a_32_bit_program_survives_its_primary() {
    survives_its_primary(CODE_32);
}

#[test]
fn a_program_with_its_hosts_bits_in_mxcsr_survives_its_primary() {
    survives_its_primary(MISALIGNED);
}

/// Runs the program where the device, if there is one, is something else.
fn without_kvm(arguments: &[OsString]) -> Output {
    let script = "if [ -e /dev/kvm ]; then mount --bind /dev/null /dev/kvm; fi; exec \"$@\"";
    Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", script, "sh"])
        .arg(env!("CARGO_BIN_EXE_vmft"))
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn a_standby_that_cannot_open_kvm_is_no_protection() {
    if !kvm_is_here() {
        return;
    }
    let _turn = take_turn();
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let (both, arguments) = pair_arguments(directory, CODE_64);
    let mut primary = start(directory, "primary", Which::Primary, &arguments);
    let mut console = PairConsole::default();
    console.attach(&mut primary).unwrap();
    let listening = primary.wait_status(LIMIT, |status| status.listening.is_some()).unwrap();
    let mut arguments = words(&["standby", "--serial", "null"]);
    let primary_at = listening.listening.unwrap();
    arguments.extend(["--join".into(), format!("tcp:{primary_at}").into()]);
    arguments.extend(both);
    let output = without_kvm(&arguments);
    let said = said(&output);
    assert!(!output.status.success(), "it stands by: {said}");
    assert!(said.contains("/dev/kvm"), "{said}");
    lives_on(&primary, &mut console, 2);
    let status = primary.status().unwrap();
    assert_eq!((status.role, status.followers), (Role::Alone, 0), "{}", primary.messages());
    assert!(!primary.messages().contains("protected:"), "{}", primary.messages());
    primary.kill().unwrap();
}
