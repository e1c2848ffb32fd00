//! Every supported code, register and memory form, on this module and on the host.

use super::super::lanes::Lanes;
use super::super::{execute, supports};
use super::machine::Machine;
use super::native::{Page, is_intel};
use super::values::Random;
use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, Encoder, Instruction,
    OpCodeOperandKind as Operand, OpKind, Register,
};

/// Runs of each form of each code.
const RUNS: u64 = 300;

/// Codes of these features that the engine's core executes, not this module.
fn belongs_to_core(code: Code) -> bool {
    let name = format!("{code:?}");
    ["Prefetch", "Lfence", "Mfence", "Sfence", "Cmov"].iter().any(|prefix| name.starts_with(prefix))
}

fn is_vector(code: Code) -> bool {
    use CpuidFeature as F;
    code.op_code().mode64()
        && code.cpuid_features().iter().any(|feature| {
            matches!(
                feature,
                F::SSE | F::SSE2 | F::SSE3 | F::SSSE3 | F::SSE4_1 | F::SSE4_2 | F::MMX | F::FXSR
            ) || matches!(feature, F::FPU | F::FPU287 | F::FPU387)
        })
}

/// Results that the host does not fix, or images that random memory must not become.
fn is_checked_elsewhere(code: Code) -> bool {
    use Code as C;
    matches!(
        code,
        C::Rcpps_xmm_xmmm128
            | C::Rcpss_xmm_xmmm32
            | C::Rsqrtps_xmm_xmmm128
            | C::Rsqrtss_xmm_xmmm32
            | C::Fxsave_m512byte
            | C::Fxsave64_m512byte
            | C::Fxrstor_m512byte
            | C::Fxrstor64_m512byte
            | C::Ldmxcsr_m32
    )
}

/// `FSTCW` and its like are `WAIT` and another instruction to a decoder.
fn is_waiting_form(code: Code) -> bool {
    let name = format!("{code:?}");
    ["Fst", "Fsave", "Fclex", "Finit", "Feni", "Fdisi", "Fsetpm"]
        .iter()
        .any(|prefix| name.starts_with(prefix))
        && Code::values().any(|other| {
            format!("{other:?}").to_lowercase() == format!("fn{}", &name[1..].to_lowercase())
        })
}

/// One form of a code: operands in registers, or the memory operand at an offset from RSI.
fn form(code: Code, memory: bool, random: &mut Random) -> Option<Instruction> {
    let mut instruction = Instruction::new();
    instruction.set_code(code);
    let mut has_choice = false;
    for i in 0..code.op_code().op_count() {
        let mut register = |registers: [Register; 3]| {
            instruction.set_op_kind(i, OpKind::Register);
            instruction.set_op_register(i, registers[random.below(3) as usize]);
        };
        let kind = code.op_code().op_kind(i);
        let xmm = [Register::XMM0, Register::XMM1, Register::XMM9];
        let mm = [Register::MM0, Register::MM3, Register::MM7];
        let wide = [Register::RAX, Register::RCX, Register::RBX];
        let long = [Register::EAX, Register::ECX, Register::EBX];
        has_choice |= matches!(
            kind,
            Operand::xmm_or_mem
                | Operand::mm_or_mem
                | Operand::r8_or_mem
                | Operand::r16_or_mem
                | Operand::r32_or_mem
                | Operand::r64_or_mem
        );
        match kind {
            Operand::xmm_reg | Operand::xmm_rm => register(xmm),
            Operand::mm_reg | Operand::mm_rm => register(mm),
            Operand::r32_reg | Operand::r32_rm => register(long),
            Operand::r64_reg | Operand::r64_rm => register(wide),
            Operand::ax => register([Register::AX; 3]),
            Operand::st0 => register([Register::ST0; 3]),
            Operand::sti_opcode => register([Register::ST0, Register::ST1, Register::ST6]),
            Operand::xmm_or_mem if !memory => register(xmm),
            Operand::mm_or_mem if !memory => register(mm),
            Operand::r8_or_mem if !memory => register([Register::AL, Register::CL, Register::BL]),
            Operand::r16_or_mem if !memory => register([Register::AX, Register::CX, Register::BX]),
            Operand::r32_or_mem if !memory => register(long),
            Operand::r64_or_mem if !memory => register(wide),
            Operand::imm8 => {
                instruction.set_op_kind(i, OpKind::Immediate8);
                instruction.set_immediate8(if random.below(2) == 0 {
                    random.next() as u8
                } else {
                    random.below(36) as u8
                });
            }
            Operand::seg_rDI => instruction.set_op_kind(i, OpKind::MemorySegRDI),
            _ if memory => {
                has_choice = true;
                instruction.set_op_kind(i, OpKind::Memory);
                instruction.set_memory_base(Register::RSI);
                instruction.set_memory_displ_size(8);
                instruction.set_memory_displacement64(random.below(8) * 16);
            }
            _ => return None,
        }
    }
    (has_choice || !memory).then_some(instruction)
}

/// The instruction as it is encoded, and decoded again.
fn encoded(instruction: &Instruction) -> (Vec<u8>, Instruction) {
    let mut encoder = Encoder::new(64);
    encoder.encode(instruction, 0).expect("the form is valid");
    let bytes = encoder.take_buffer();
    let decoded = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
    assert_eq!(decoded.code(), instruction.code(), "{bytes:02x?}");
    (bytes, decoded)
}

/// The lines of state in which ours and the host's differ, each after what it was before.
fn differences(before: &Machine, ours: &Machine, host: &Machine) -> String {
    let lines = |machine: &Machine| {
        let mut lines: Vec<_> =
            machine.sse.registers.iter().map(|value| format!("xmm {value:032x}")).collect();
        lines.extend(machine.x87.registers.iter().map(|value| {
            let value: String = value.iter().rev().map(|byte| format!("{byte:02x}")).collect();
            format!("st {value}")
        }));
        let x87 = &machine.x87;
        lines.push(format!(
            "x87 control {:04x} status {:04x} tags {:04x} opcode {:03x} instruction {:x} data {:x}",
            x87.control, x87.status, x87.tags, x87.opcode, x87.instruction, x87.data
        ));
        lines.push(format!("mxcsr {:08x} flags {:04x}", machine.sse.mxcsr, machine.flags));
        lines.extend(machine.general.iter().map(|value| format!("general {value:016x}")));
        lines.extend(machine.memory.chunks_exact(16).map(|chunk| format!("memory {chunk:02x?}")));
        lines
    };
    let (before, ours, host) = (lines(before), lines(ours), lines(host));
    let mut text = format!("{}\n{}\n", before[24], before[25]);
    for (i, line) in before.iter().enumerate() {
        if i < 2 || i == 9 || (16..24).contains(&i) || ours[i] != host[i] {
            text += &format!("{i}: {line}\n");
        }
        if ours[i] != host[i] {
            text += &format!("  ours {}\n  host {}\n", ours[i], host[i]);
        }
    }
    text
}

/// True if ours and the host's differ in nothing but which of two NaNs is in a lane of a dot product. The
/// order in which products are added decides that, and no manual fixes it: we do as Intel's CPUs do.
fn is_other_nan(instruction: &Instruction, ours: &Machine, host: &Machine) -> bool {
    let with_one_nan = |machine: &Machine| {
        let mut machine = machine.clone();
        let sum = &mut machine.sse.registers[instruction.op0_register().number()];
        *sum = match instruction.code() {
            Code::Dpps_xmm_xmmm128_imm8 => u128::from_doubles(|lane| {
                let value = sum.double(lane);
                if f32::from_bits(value).is_nan() { f32::NAN.to_bits() } else { value }
            }),
            Code::Dppd_xmm_xmmm128_imm8 => u128::from_quads(|lane| {
                let value = sum.quad(lane);
                if f64::from_bits(value).is_nan() { f64::NAN.to_bits() } else { value }
            }),
            _ => *sum,
        };
        machine
    };
    !is_intel() && with_one_nan(ours) == with_one_nan(host)
}

fn check(code: Code, page: &mut Page, random: &mut Random) -> Result<(), String> {
    for memory in [false, true] {
        for _ in 0..RUNS {
            let Some(instruction) = form(code, memory, random) else { break };
            let (bytes, decoded) = encoded(&instruction);
            let before = Machine { code: bytes.clone(), ..Machine::random(random) };
            let (mut here, mut there) = (before.clone(), before.clone());
            page.fill(&bytes);
            page.run(&mut there);
            let outcome = execute(&mut here, &decoded);
            if !is_intel() {
                // Saved only with an exception that is pending.
                let (ours, host) = (&here.x87, &mut there.x87);
                (host.opcode, host.instruction, host.data) =
                    (ours.opcode, ours.instruction, ours.data);
            }
            if let Err(exception) = outcome {
                return Err(format!("{code:?} {bytes:02x?}: {exception:?} of {before:x?}"));
            }
            if here != there && !is_other_nan(&decoded, &here, &there) {
                return Err(format!(
                    "{code:?} {bytes:02x?}: {}",
                    differences(&before, &here, &there)
                ));
            }
        }
    }
    Ok(())
}

fn check_all(wanted: impl Fn(Code) -> bool) {
    let mut page = Page::new();
    let (mut checked, mut failures) = (0, Vec::new());
    for code in Code::values().filter(|&code| is_vector(code) && supports(code) && wanted(code)) {
        if !is_checked_elsewhere(code) {
            failures.extend(check(code, &mut page, &mut Random::new(code as u64)).err());
            checked += 1;
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(checked > 0);
}

fn uses_mmx(code: Code) -> bool {
    let name = format!("{code:?}");
    name.contains("_mm") || name == "Emms"
}

fn is_x87(code: Code) -> bool {
    format!("{code:?}").starts_with('F')
}

fn is_transcendental(code: Code) -> bool {
    use Code as C;
    matches!(
        code,
        C::Fsin | C::Fcos | C::Fsincos | C::Fptan | C::Fpatan | C::F2xm1 | C::Fyl2x | C::Fyl2xp1
    )
}

#[test]
fn every_sse_instruction_gives_what_the_host_gives() {
    check_all(|code| !is_x87(code) && !uses_mmx(code));
}

#[test]
fn every_mmx_instruction_gives_what_the_host_gives() {
    check_all(uses_mmx);
}

#[test]
fn every_x87_instruction_gives_what_the_host_gives() {
    check_all(|code| is_x87(code) && !is_waiting_form(code) && !is_transcendental(code));
}

#[test]
fn every_vector_instruction_is_supported() {
    let missing: Vec<_> = Code::values()
        .filter(|&code| is_vector(code) && !belongs_to_core(code) && !supports(code))
        .collect();
    assert_eq!(missing, []);
}
