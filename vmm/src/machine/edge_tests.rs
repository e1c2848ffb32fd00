//! Guests that find a fault of this program, and guests caught in their own.

use super::*;
use crate::board::{BoardConfig, Bytes, UnixSeconds};
use crate::boot::synthetic::{Part, TEXT, elf};
use crate::engine::EngineKind;
use crate::inputs::Boundary;
use crate::inputs::InputError;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;
use vmft_cpu::ExitRecord;
use vmft_cpu::memory::MIN_MEMORY;
use vmft_cpu::soft::SoftEngine;
use vmft_cpu::{CpuCount, Cpus};
use vmft_log::entry::StateDigest;
use vmft_log::point::CodeAddress;

/// A machine whose kernel is this code, at [`TEXT`].
pub(super) fn machine(code: &[u8]) -> Machine {
    let mut contents = code.to_vec();
    contents.resize(4096, 0xF4);
    let text = Part { kind: 1, address: TEXT, contents, memory: 4096 };
    let source = BootSource { kernel: elf(&[text], TEXT).into(), ..BootSource::default() };
    let board = BoardConfig {
        memory: Bytes(MIN_MEMORY),
        clock_base: UnixSeconds(1_700_000_000),
        disks: Vec::new(),
        entropy: false,
        net: None,
        cpus: CpuCount::ONE,
    };
    Machine::new(MachineConfig { board, engine: EngineKind::Soft }, source).expect("a machine")
}

/// Runs to a point, a step at a time, and stops there, or where the guest waits.
#[derive(Debug)]
pub(super) struct RunTo {
    pub(super) step: u64,
    pub(super) end: u64,
    /// Panics there itself.
    pub(super) fails: bool,
}

impl Inputs for RunTo {
    fn next(&mut self, boundary: &Boundary) -> Result<Step, InputError> {
        assert!(!self.fails, "the inputs are not the machine");
        if boundary.point.get() >= self.end || boundary.is_idle() {
            return Ok(Step::Stop(StopReason::Operator));
        }
        let bound = boundary.point.after(self.step);
        Ok(Step::RunTo(bound.min(ExecutionPoint::new(self.end))))
    }

    fn request(&mut self, _: DeviceRequest) -> Result<(), InputError> {
        Ok(())
    }

    fn stood_still(&mut self, _: Duration) {}

    fn digest(&mut self, _: ExecutionPoint, _: StateDigest) -> Result<(), InputError> {
        Ok(())
    }

    fn branch_before(&self, _: ExecutionPoint) -> Option<CodeAddress> {
        None
    }

    fn is_base(&self) -> bool {
        true
    }

    fn checkpoint(&mut self, _: Option<Delta>) -> Result<(), InputError> {
        Ok(())
    }

    fn watches_exits(&self) -> bool {
        false
    }

    fn exits(&mut self, _: ExecutionPoint, _: &[ExitRecord]) -> Result<(), InputError> {
        Ok(())
    }
}

#[derive(Debug)]
pub(super) struct Nowhere;

impl OutputGate for Nowhere {
    fn emit(&self, _: Output) {}
}

fn run(machine: &mut Machine, end: u64) -> Result<RunEnd, MachineError> {
    machine.run(&mut RunTo { step: 7, end, fails: false }, &Nowhere)
}

/// An engine with a fault: it goes to pieces at a point.
#[derive(Debug)]
struct Faulty {
    soft: SoftEngine,
    at: ExecutionPoint,
}

impl Engine for Faulty {
    fn run(&mut self, bound: ExecutionPoint, want: bool, bus: &mut dyn Bus) -> Exit {
        let exit = self.soft.run(bound.min(self.at), want, bus);
        assert!(self.soft.point() < self.at, "no such thing as instruction {}", self.at);
        exit
    }
    fn point(&self) -> ExecutionPoint {
        self.soft.point()
    }
    fn inject(&mut self, vector: vmft_cpu::Vector) {
        self.soft.inject(vector);
    }
    fn save(&mut self) -> vmft_cpu::CpuState {
        self.soft.save()
    }
    fn restore(
        &mut self,
        state: &vmft_cpu::CpuState,
        point: ExecutionPoint,
    ) -> Result<(), InvalidState> {
        self.soft.restore(state, point)
    }
    fn save_cpus(&mut self) -> Cpus {
        self.soft.save_cpus()
    }
    fn rest(&mut self, bus: &mut dyn Bus) -> bool {
        self.soft.rest(bus)
    }
    fn collect_written(&mut self) {
        self.soft.collect_written();
    }
    fn exit_stream(&mut self) -> Option<&mut dyn vmft_cpu::ExitStream> {
        self.soft.exit_stream()
    }
    fn branch_points(&mut self) -> Option<&mut dyn vmft_cpu::BranchPoints> {
        self.soft.branch_points()
    }
    fn kicker(&self) -> Option<vmft_cpu::Kicker> {
        self.soft.kicker()
    }
    fn compiler(&self) -> Option<std::sync::Arc<vmft_cpu::soft::CompilerGauge>> {
        self.soft.compiler()
    }
    fn restore_cpus(&mut self, cpus: &Cpus, point: ExecutionPoint) -> Result<(), InvalidState> {
        self.soft.restore_cpus(cpus, point)
    }
    fn renew_write_tracking(&mut self) {
        self.soft.renew_write_tracking();
    }
    fn flush_caches(&mut self) {
        self.soft.flush_caches();
    }
    fn code_here(&mut self, most: usize) -> Option<(u64, Vec<u8>)> {
        self.soft.code_here(most)
    }
    fn is_halted(&self) -> bool {
        self.soft.is_halted()
    }
    fn is_off(&self) -> bool {
        self.soft.is_off()
    }
    fn ram(&self) -> &GuestRam {
        self.soft.ram()
    }
}

/// `INC EAX` and `JMP` back to it.
const COUNT: [u8; 4] = [0xFF, 0xC0, 0xEB, 0xFC];

/// The machine of [`COUNT`] on an engine that fails at the hundredth instruction.
fn faulty() -> Machine {
    let healthy = machine(&COUNT);
    let ram = GuestRam::new(MIN_MEMORY).expect("allowed size");
    let engine = Faulty { soft: SoftEngine::new(ram), at: ExecutionPoint::new(100) };
    let Machine { config, source, .. } = healthy;
    Machine::on_engine(config, source, Box::new(engine)).expect("a machine")
}

#[test]
fn a_fault_of_the_program_stops_the_guest_with_a_report() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut machine = faulty();
    machine.report_faults_in(directory.path().to_owned());
    let error = run(&mut machine, 1000).expect_err("a fault");
    assert!(error.is_of_the_guest());
    let text = error.to_string();
    let MachineError::Broken(report) = error else { panic!("{error}") };
    assert_eq!(report.point, ExecutionPoint::new(100));
    assert_eq!((report.rip, &report.bytes[..4]), (TEXT, &COUNT[..]));
    assert_eq!(report.message, "no such thing as instruction 100");
    assert_eq!(report.state.as_ref().map(|state| state.general[0]), Some(50));
    let Kept::File(path) = &report.kept else { panic!("{report}") };
    assert!(text.contains(&path.display().to_string()) && text.contains("vmft record"), "{text}");
    let mode = std::fs::metadata(path).expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let kept = std::fs::read_to_string(path).expect("text");
    for part in ["no such thing", "point: 100", "ff, c0, eb, fc", "general: [\n        0x32,"] {
        assert!(kept.contains(part), "{part} in {kept}");
    }
}

#[test]
fn what_the_compiler_does_wrong_stops_a_guest_that_checks_it() {
    let directory = tempfile::tempdir().expect("a directory");
    let healthy = machine(&COUNT);
    let ram = GuestRam::new(MIN_MEMORY).expect("allowed size");
    // INC becomes DEC.
    let engine = SoftEngine::with_fault(ram, |i| {
        if i.code() == iced_x86::Code::Inc_rm32 {
            i.set_code(iced_x86::Code::Dec_rm32);
        }
    });
    let Machine { config, source, .. } = healthy;
    let mut machine = Machine::on_engine(config, source, Box::new(engine)).expect("a machine");
    machine.report_faults_in(directory.path().to_owned());
    let error = run(&mut machine, 1000).expect_err("a fault");
    assert!(error.is_of_the_guest());
    let MachineError::Broken(report) = error else { panic!("{error}") };
    let found = report.miscompiled.as_ref().expect("it is the compiler's");
    let before = found.before.general[0];
    assert_eq!((found.address, &found.bytes[..]), (TEXT, &COUNT[..]));
    assert_eq!(found.interpreted.general[0], before + 1);
    assert_eq!(found.compiled.general[0], u64::from((before as u32).wrapping_sub(1)));
    assert_eq!(report.state.as_ref(), Some(&found.before));
    assert!(report.message.contains("RAX is"), "{report}");
    let Kept::File(path) = &report.kept else { panic!("{report}") };
    let kept = std::fs::read_to_string(path).expect("text");
    for part in ["RAX is", "registers:", "the interpreter's:", "compiled code's:"] {
        assert!(kept.contains(part), "{part} in {kept}");
    }
}

#[test]
fn a_report_that_cannot_be_written_is_in_the_messages() {
    let mut machine = faulty();
    machine.report_faults_in("/nowhere".into());
    let error = run(&mut machine, 1000).expect_err("a fault");
    let MachineError::Broken(report) = &error else { panic!("{error}") };
    assert!(matches!(&report.kept, Kept::Messages(why) if why.contains("/nowhere")), "{error}");
}

#[test]
#[should_panic(expected = "a broken machine is not run again")]
fn a_broken_machine_is_not_run_again() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut machine = faulty();
    machine.report_faults_in(directory.path().to_owned());
    run(&mut machine, 1000).expect_err("a fault");
    let _ = run(&mut machine, 1000);
}

#[test]
#[should_panic(expected = "the inputs are not the machine")]
fn what_panics_outside_the_machine_is_not_caught() {
    let mut inputs = RunTo { step: 7, end: 100, fails: true };
    let _ = machine(&COUNT).run(&mut inputs, &Nowhere);
}

/// Loads an IDT of one page, all of whose gates lead to the `UD2` behind this, on an interrupt stack
/// so that none overflows; and falls into it.
fn caught() -> Vec<u8> {
    use iced_x86::code_asm::*;
    let mut a = CodeAssembler::new(64).expect("64 bits");
    let base = TEXT;
    let mut assemble = || -> Result<(), iced_x86::IcedError> {
        let mut gate = a.create_label();
        a.mov(rsp, base + 0x800)?;
        // Every gate: 64-bit interrupt gate, to `base + 0x100`, in the present code segment.
        a.mov(rdi, base + 0x1000)?;
        a.mov(ecx, 256)?;
        a.mov(ax, cs)?;
        a.movzx(eax, ax)?;
        a.shl(eax, 16)?;
        a.or(eax, ((base + 0x100) & 0xFFFF) as u32 as i32)?;
        a.set_label(&mut gate)?;
        a.mov(dword_ptr(rdi), eax)?;
        a.mov(dword_ptr(rdi + 4), ((base + 0x100) & 0xFFFF_0000) as u32 as i32 | 0x8E00)?;
        a.mov(dword_ptr(rdi + 8), (base >> 32) as u32 as i32)?;
        a.mov(dword_ptr(rdi + 12), 0)?;
        a.add(rdi, 16)?;
        a.dec(ecx)?;
        a.jnz(gate)?;
        a.mov(word_ptr(rsp), 0xFFF)?;
        a.lea(rax, qword_ptr(rdi - 0x1000))?;
        a.mov(qword_ptr(rsp + 2), rax)?;
        a.lidt(ptr(rsp))?;
        a.mov(rsp, base + 0x40_0000)?;
        a.ud2()
    };
    assemble().expect("it assembles");
    let mut code = a.assemble(base).expect("it assembles");
    code.resize(0x100, 0xF4);
    code.extend([0x0F, 0x0B]);
    code
}

#[test]
fn a_guest_caught_in_its_own_fault_handlers_starts_again_and_can_be_stopped() {
    let digest = |step| {
        let mut machine = machine(&caught());
        let mut inputs = RunTo { step, end: 8000, fails: false };
        let end = machine.run(&mut inputs, &Nowhere).expect("no fault");
        assert_eq!(end, RunEnd::Stopped(StopReason::Operator));
        assert_eq!(machine.point(), ExecutionPoint::new(8000));
        machine.full_digest()
    };
    assert_eq!(digest(7), digest(1000));
}

#[test]
fn a_panic_of_a_parser_is_an_error_with_its_place() {
    let found: Result<(), String> = super::contained(|| panic!("an odd superblock"));
    let error = found.expect_err("it panicked");
    assert!(error.contains("an odd superblock"), "{error}");
    assert_eq!(super::contained(|| 7), Ok(7));
}
