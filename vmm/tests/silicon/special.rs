//! Inputs that particular instructions need to do anything but fault, for the first instruction
//! of a snippet, whose registers and memory are known.

use crate::case::{Bits, Patch, Place};
use crate::layout::{CODE, CONST, DATA, GS_BASE, PAGE, USER_CODE, USER_CODE_32, USER_DATA};
use crate::operands::{Plan, RBP, RCX, RDI, RSI, RSP};
use crate::rng::Rng;
use crate::values::{self, Flavor};
use iced_x86::{Code, Instruction, MemorySize, Mnemonic, OpKind, Register};

/// What the first instruction wants of memory and of step addresses.
#[derive(Debug, Default)]
pub struct Extras {
    /// Memory to change.
    pub patches: Vec<Patch>,
    /// Step addresses to fill in; the step is chosen by the caller.
    pub links: Vec<Place>,
}

impl Extras {
    fn patch(&mut self, address: u64, bytes: &[u8]) {
        self.patches.push(Patch { address, bytes: bytes.to_vec() });
    }

    fn link(&mut self, at: u64, len: u64) {
        self.links.push(Place::Memory { at, len: len as usize });
    }
}

const RAX: usize = 0;
const RDX: usize = 2;
const RBX: usize = 3;

/// Prepares the registers before an instance of `code` is built.
pub fn prepare(code: Code, plan: &mut Plan, rng: &mut Rng) {
    match code.mnemonic() {
        Mnemonic::Div | Mnemonic::Idiv if rng.percent(70) => {
            // Quotients fit when the upper half is small.
            let low = values::integer(rng);
            plan.set(RAX, if rng.percent(50) { low } else { low & 0x7F });
            let high = match rng.below(4) {
                0 => values::integer(rng) & 0xF,
                1 => u64::MAX,
                _ => 0,
            };
            plan.set(RDX, high);
        }
        Mnemonic::Loop
        | Mnemonic::Loope
        | Mnemonic::Loopne
        | Mnemonic::Jcxz
        | Mnemonic::Jecxz
        | Mnemonic::Jrcxz => {
            plan.set(RCX, rng.pick(&[0, 1, 2, 1 << 16, 1 << 32, (1 << 32) + 1, u64::MAX]));
        }
        Mnemonic::Enter | Mnemonic::Leave if rng.percent(85) => plan.point(RBP, rng),
        Mnemonic::Xlatb if rng.percent(85) => plan.point(RBX, rng),
        Mnemonic::Maskmovq | Mnemonic::Maskmovdqu => plan.point(RDI, rng),
        Mnemonic::Wrmsr | Mnemonic::Rdmsr => plan.set(RCX, rng.below(0x1000)),
        _ if code == Code::Shld_rm16_r16_CL || code == Code::Shrd_rm16_r16_CL => {
            // Counts above the operand's size leave everything undefined.
            plan.set(RCX, (values::integer(rng) & !0x1F) | rng.below(17));
        }
        Mnemonic::Shl
        | Mnemonic::Shr
        | Mnemonic::Sar
        | Mnemonic::Rol
        | Mnemonic::Ror
        | Mnemonic::Rcl
        | Mnemonic::Rcr
            if rng.percent(30) =>
        {
            plan.set(
                RCX,
                (values::integer(rng) & !0xFF) | rng.pick(&[0, 1, 8, 16, 17, 32, 33, 64]),
            );
        }
        _ if code.is_string_instruction() => {
            for register in [RSI, RDI] {
                if rng.percent(95) {
                    plan.point(register, rng);
                }
            }
            if rng.percent(90) {
                plan.set(RCX, if rng.percent(90) { rng.below(40) } else { rng.below(6000) });
            }
        }
        _ => {}
    }
}

/// The registers a snippet's string instructions use, wherever they stand.
pub fn prepare_strings(plan: &mut Plan, rng: &mut Rng) {
    for register in [RSI, RDI] {
        plan.point(register, rng);
    }
    plan.set(RCX, rng.below(20));
}

/// What sort of values `instruction` works on.
pub fn flavor(instruction: &Instruction) -> Flavor {
    let size = instruction.memory_size();
    match size.element_type() {
        MemorySize::Float32 => Flavor::Single,
        MemorySize::Float64 => Flavor::Double,
        MemorySize::Float80 => Flavor::Extended,
        MemorySize::Bcd => Flavor::Decimal,
        _ => Flavor::Integer,
    }
}

/// Looks after an instance that has been built: memory contents, stack frames, targets.
pub fn finish(instruction: &mut Instruction, plan: &mut Plan, rng: &mut Rng) -> Extras {
    let mut extras = Extras::default();
    let at = plan.operand;
    if let Some((address, len)) = at
        && rng.percent(70)
    {
        let bytes = values::operand(rng, flavor(instruction), len.min(64));
        extras.patch(address, &bytes);
    }
    if instruction.is_string_instruction() && instruction.segment_prefix() == Register::GS {
        plan.general[RSI] = plan.general[RSI].wrapping_sub(GS_BASE);
    }
    if repeats_narrowly(instruction) {
        // When ECX is zero, Intel's processors clear the upper halves all the same.
        for register in [RCX, RSI, RDI] {
            plan.general[register] &= 0xFFFF_FFFF;
        }
    }
    if instruction.is_string_instruction() && rng.percent(50) {
        // Equal stretches, so that comparisons go on for a while.
        let same = [rng.next() as u8 & 3; 48];
        extras.patch(plan.general[RSI].min(CONST), &same);
        extras.patch(plan.general[RDI].min(CONST), &same);
        if rng.percent(50) {
            plan.set(RAX, u64::from_le_bytes([same[0]; 8]));
        }
    }
    match instruction.mnemonic() {
        Mnemonic::Cmpxchg | Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b if rng.percent(50) => {
            comparand(instruction, plan, &mut extras);
        }
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => {
            if (CODE..DATA).contains(&plan.general[RSP]) {
                // There the snippet itself would be popped, AC with it.
                plan.set(RSP, DATA + PAGE);
            }
            extras.patch(plan.general[RSP], &flags_to_load(rng).to_le_bytes());
        }
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => {
            interrupt_frame(instruction, plan, &mut extras, rng);
        }
        Mnemonic::Ret => extras.link(plan.general[RSP], near_slot(instruction)),
        Mnemonic::Retf => {
            let slot = far_slot(instruction);
            extras.link(plan.general[RSP], slot);
            let selector = u64::from(code_selector(plan.bits, rng)).to_le_bytes();
            extras.patch(plan.general[RSP].wrapping_add(slot), &selector[..slot as usize]);
            extras
                .patch(plan.general[RSP].wrapping_add(2 * slot), &plan.general[RSI].to_le_bytes());
            let stack = u64::from(USER_DATA).to_le_bytes();
            extras.patch(plan.general[RSP].wrapping_add(3 * slot), &stack[..slot as usize]);
        }
        Mnemonic::Jmp | Mnemonic::Call => branch_operand(instruction, plan, &mut extras, rng),
        Mnemonic::Int => instruction.set_immediate8(software_vector(rng)),
        Mnemonic::Lar | Mnemonic::Lsl | Mnemonic::Verr | Mnemonic::Verw => {
            selector_operand(instruction, plan, &mut extras, any_selector(rng));
        }
        Mnemonic::Mov
            if instruction.op0_kind() == OpKind::Register
                && instruction.op0_register().is_segment_register() =>
        {
            selector_operand(instruction, plan, &mut extras, loadable_selector(rng));
        }
        Mnemonic::Pop
            if instruction.op0_kind() == OpKind::Register
                && instruction.op0_register().is_segment_register() =>
        {
            extras.patch(plan.general[RSP], &loadable_selector(rng).to_le_bytes());
        }
        Mnemonic::Lss | Mnemonic::Les | Mnemonic::Lds => {
            if let Some((address, len)) = at {
                extras.patch(address + len as u64 - 2, &loadable_selector(rng).to_le_bytes());
            }
        }
        Mnemonic::Shld | Mnemonic::Shrd
            if matches!(
                instruction.code(),
                Code::Shld_rm16_r16_imm8 | Code::Shrd_rm16_r16_imm8
            ) =>
        {
            instruction.set_immediate8((rng.next() as u8 & !0x1F) | rng.below(17) as u8);
        }
        _ => floating_control(instruction, plan, &mut extras, rng),
    }
    extras
}

/// True for a repeated string instruction with 32-bit addresses.
pub fn repeats_narrowly(instruction: &Instruction) -> bool {
    let narrow = |n| {
        matches!(
            instruction.op_kind(n),
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI
        )
    };
    let repeats = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    instruction.is_string_instruction() && repeats && (0..instruction.op_count()).any(narrow)
}

/// What a 16-bit double shift by an immediate must be kept from, wherever it stands.
pub fn tame(instruction: &mut Instruction) {
    if matches!(instruction.code(), Code::Shld_rm16_r16_imm8 | Code::Shrd_rm16_r16_imm8)
        && instruction.immediate8() & 0x1F > 16
    {
        instruction.set_immediate8(instruction.immediate8() & !0x10);
    }
}

/// Control words and images to load.
fn floating_control(instruction: &Instruction, plan: &Plan, extras: &mut Extras, rng: &mut Rng) {
    let Some((address, len)) = plan.operand else { return };
    match instruction.mnemonic() {
        Mnemonic::Ldmxcsr => {
            let reserved = if rng.percent(10) { 1 << (18 + rng.below(14)) } else { 0 };
            extras.patch(address, &(values::mxcsr(rng) | reserved).to_le_bytes());
        }
        Mnemonic::Fldcw => {
            extras.patch(address, &values::x87_control(rng).to_le_bytes());
        }
        Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => {
            let mut image = values::operand(rng, Flavor::Extended, len);
            let control = values::x87_control(rng);
            image[..2].copy_from_slice(&control.to_le_bytes());
            image[2..4].copy_from_slice(&values::x87_status(rng, control).to_le_bytes());
            let reserved = if rng.percent(6) { 1 << (18 + rng.below(14)) } else { 0 };
            image[24..28].copy_from_slice(&(values::mxcsr(rng) | reserved).to_le_bytes());
            for register in image[32..160].chunks_exact_mut(16) {
                register[..10].copy_from_slice(&values::extended(rng));
            }
            extras.patch(address, &image);
        }
        Mnemonic::Fldenv | Mnemonic::Frstor => {
            let control = values::x87_control(rng);
            let status = values::x87_status(rng, control);
            // 14- and 94-byte images have 2-byte fields, the others 4-byte fields.
            let field = if matches!(len, 14 | 94) { 2 } else { 4 };
            let words = [control, status, rng.next() as u16];
            for (n, word) in (0u64..).zip(words) {
                extras.patch(address + n * field, &word.to_le_bytes());
            }
            if len > 28 {
                for n in 0..8 {
                    extras.patch(address + 7 * field + 10 * n, &values::extended(rng));
                }
            }
        }
        _ => {}
    }
}

/// Makes a compare-and-exchange find what it compares with.
fn comparand(instruction: &Instruction, plan: &Plan, extras: &mut Extras) {
    let Some((address, len)) = plan.operand else { return };
    let [low, high] = [plan.general[RAX], plan.general[RDX]];
    let bytes: Vec<u8> = match instruction.mnemonic() {
        Mnemonic::Cmpxchg16b => [low.to_le_bytes(), high.to_le_bytes()].concat(),
        Mnemonic::Cmpxchg8b => [(low as u32).to_le_bytes(), (high as u32).to_le_bytes()].concat(),
        _ => low.to_le_bytes()[..len.min(8)].to_vec(),
    };
    extras.patch(address, &bytes);
}

/// RFLAGS to load from memory: everything but AC, which would make the host's own code fault.
fn flags_to_load(rng: &mut Rng) -> u64 {
    const HARMLESS: u64 = 0x0021_7ED5;
    const TRAP: u64 = 1 << 8;
    let trap = if rng.percent(15) { TRAP } else { 0 };
    (rng.next() & HARMLESS) | trap
}

/// A code selector a far transfer may name: code of the same size, or none.
fn code_selector(bits: Bits, rng: &mut Rng) -> u16 {
    let own = match bits {
        Bits::Long => USER_CODE,
        Bits::Short => USER_CODE_32,
    };
    if rng.percent(75) {
        own
    } else if bits == Bits::Short {
        rng.pick(&[0, 3, USER_CODE_32 & !3, USER_DATA, 0x10, 0x18, 0xFFF8, 0xFFFB, 0x7])
    } else {
        rng.pick(&[0, 3, USER_CODE & !3, USER_DATA, 0x10, 0x18, 0xFFF8, 0xFFFB, 0x7])
    }
}

/// A selector to load or ask about. Never 0x78 to 0x7F, where Linux keeps the number of the
/// processor, nor the thread-local slots before it.
fn any_selector(rng: &mut Rng) -> u16 {
    loop {
        let selector = match rng.below(4) {
            0 => rng.next() as u16,
            1 => rng.below(0x68) as u16,
            _ => rng.pick(&[0, 3, USER_DATA, USER_DATA & !3, USER_CODE, 0x10, 0x18, 0x23, 0xFFF8]),
        };
        if !(0x60..0x80).contains(&(selector & !4)) {
            return selector;
        }
    }
}

/// A selector to load: never null with a privilege, which the host's kernel turns into plain null
/// whenever it is entered.
fn loadable_selector(rng: &mut Rng) -> u16 {
    match any_selector(rng) {
        1..=3 => 0,
        selector => selector,
    }
}

/// A vector for INT n: never 0x80, the host's system call. INT 3 and INT 4 are open to users,
/// the others are not.
fn software_vector(rng: &mut Rng) -> u8 {
    rng.pick(&[3, 3, 4, 0, 1, 2, 5, 6, 8, 13, 14, 31, 0x81, 0xFF])
}

fn near_slot(instruction: &Instruction) -> u64 {
    match instruction.code() {
        Code::Retnw | Code::Retnw_imm16 => 2,
        Code::Retnd | Code::Retnd_imm16 => 4,
        _ => 8,
    }
}

fn far_slot(instruction: &Instruction) -> u64 {
    match instruction.code() {
        Code::Retfw | Code::Retfw_imm16 | Code::Iretw => 2,
        Code::Retfd | Code::Retfd_imm16 | Code::Iretd => 4,
        _ => 8,
    }
}

fn interrupt_frame(instruction: &Instruction, plan: &Plan, extras: &mut Extras, rng: &mut Rng) {
    let stack = plan.general[RSP];
    let slot = far_slot(instruction);
    let data = if rng.percent(85) { USER_DATA } else { rng.pick(&[0, 0x28, USER_CODE, 0x18]) };
    let words = [
        0,
        u64::from(code_selector(plan.bits, rng)),
        flags_to_load(rng),
        plan.general[RSI],
        u64::from(data),
    ];
    for (n, word) in (0u64..).zip(words) {
        extras.patch(stack.wrapping_add(n * slot), &word.to_le_bytes()[..slot as usize]);
    }
    extras.link(stack, slot);
}

fn branch_operand(instruction: &Instruction, plan: &mut Plan, extras: &mut Extras, rng: &mut Rng) {
    match instruction.op0_kind() {
        OpKind::Register => {
            let register = instruction.op0_register().full_register();
            let number = register as usize - Register::RAX as usize;
            // A call through RSP pushes with it first.
            if number != RSP {
                extras.links.push(Place::General(number));
            }
        }
        OpKind::Memory => {
            if let Some((address, len)) = plan.operand {
                // Far pointers: an offset, then a selector.
                let near =
                    instruction.is_jmp_near_indirect() || instruction.is_call_near_indirect();
                if !near && matches!(len, 4 | 6 | 10) {
                    let offset = len as u64 - 2;
                    extras.link(address, offset);
                    extras.patch(address + offset, &code_selector(plan.bits, rng).to_le_bytes());
                } else {
                    extras.link(address, len as u64);
                }
            }
        }
        _ => {}
    }
}

fn selector_operand(
    instruction: &Instruction,
    plan: &mut Plan,
    extras: &mut Extras,
    selector: u16,
) {
    let operand = instruction.op_count() - 1;
    match instruction.op_kind(operand) {
        OpKind::Register => {
            let register = instruction.op_register(operand).full_register();
            let number = register as usize - Register::RAX as usize;
            let upper = plan.general[number] & !0xFFFF;
            plan.set(number, upper | u64::from(selector));
        }
        _ => {
            if let Some((address, _)) = plan.operand {
                extras.patch(address, &selector.to_le_bytes());
            }
        }
    }
}
