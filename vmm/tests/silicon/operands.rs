//! Operands: builds a random instance of an instruction form whose memory operands mostly hit
//! the data, given what the registers hold.

use crate::case::Bits;
use crate::layout::{CONST, DATA, GS_BASE, PAGE, TAIL};
use crate::rng::Rng;
use crate::values;
use iced_x86::{Code, Instruction, Mnemonic, OpCodeOperandKind as Kind, OpKind, Register};

/// RCX by number.
pub const RCX: usize = 1;
/// RSP by number.
pub const RSP: usize = 4;
/// RBP by number.
pub const RBP: usize = 5;
/// RSI by number.
pub const RSI: usize = 6;
/// RDI by number.
pub const RDI: usize = 7;

/// What the general registers are for in one case.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The size of the code.
    pub bits: Bits,
    /// What they hold when the case begins.
    pub general: [u64; 16],
    /// Those that point into the data.
    pointers: [bool; 16],
    /// One that holds a small number, for indexes and bit offsets; never RSP.
    index: usize,
    /// Where the memory operand last built points, with its length.
    pub operand: Option<(u64, usize)>,
}

impl Plan {
    /// Random roles and values.
    pub fn new(bits: Bits, rng: &mut Rng) -> Self {
        let mut plan = Self {
            bits,
            general: std::array::from_fn(|_| values::integer(rng)),
            pointers: [false; 16],
            index: 0,
            operand: None,
        };
        for register in [RSI, RDI, RBP] {
            plan.pointers[register] = rng.percent(60);
        }
        for _ in 0..3 {
            plan.pointers[rng.index(bits.registers())] = true;
        }
        plan.pointers[RSP] = rng.percent(97);
        for register in 0..16 {
            if plan.pointers[register] {
                plan.general[register] = pointer(rng);
            }
        }
        if plan.pointers[RSP] && rng.percent(80) {
            plan.general[RSP] &= !7;
        }
        plan.index = loop {
            let register = rng.index(bits.registers());
            if !plan.pointers[register] && register != RSP {
                break register;
            }
        };
        plan.general[plan.index] = small(rng);
        plan
    }

    /// Makes a register point into the data.
    pub fn point(&mut self, register: usize, rng: &mut Rng) {
        if !self.pointers[register] {
            self.pointers[register] = true;
            self.general[register] = pointer(rng);
        }
    }

    /// Gives a register a value that is no pointer.
    pub fn set(&mut self, register: usize, value: u64) {
        self.pointers[register] = false;
        self.general[register] = value;
    }

    fn any_pointer(&self, rng: &mut Rng) -> usize {
        let pointers: Vec<usize> = (0..16).filter(|&register| self.pointers[register]).collect();
        if pointers.is_empty() { self.any_register(rng) } else { rng.pick(&pointers) }
    }

    /// A register for an operand; a pointer only now and then, since it may be written.
    fn operand_register(&self, rng: &mut Rng) -> usize {
        let register = self.any_register(rng);
        if self.pointers[register] && rng.percent(80) { self.any_register(rng) } else { register }
    }

    fn any_register(&self, rng: &mut Rng) -> usize {
        rng.index(self.bits.registers())
    }

    /// True if an address has 32 bits.
    fn narrow(&self, percent: u64, rng: &mut Rng) -> bool {
        self.bits == Bits::Short || rng.percent(percent)
    }
}

fn pointer(rng: &mut Rng) -> u64 {
    let offset = rng.below(4 * PAGE - 0x400) + 0x200;
    let offset = if rng.percent(75) { offset & !15 } else { offset };
    DATA + offset
}

fn small(rng: &mut Rng) -> u64 {
    let magnitude = rng.below(600);
    if rng.percent(35) { magnitude.wrapping_neg() } else { magnitude }
}

/// A random instance of `code`; `None` if the draw made no encodable instruction.
/// Branch targets are left to the caller.
pub fn build(code: Code, plan: &mut Plan, rng: &mut Rng) -> Option<Instruction> {
    let mut instruction = Instruction::new();
    instruction.set_code(code);
    plan.operand = None;
    let narrow_address = plan.narrow(6, rng);
    for (n, &kind) in (0u32..).zip(code.op_code().op_kinds()) {
        build_operand(&mut instruction, n, kind, narrow_address, plan, rng)?;
    }
    add_prefixes(&mut instruction, plan, rng);
    Some(instruction)
}

fn build_operand(
    instruction: &mut Instruction,
    n: u32,
    kind: Kind,
    narrow_address: bool,
    plan: &mut Plan,
    rng: &mut Rng,
) -> Option<()> {
    if let Some(register) = register_operand(kind, instruction.code(), plan, rng) {
        instruction.set_op_kind(n, OpKind::Register);
        instruction.set_op_register(n, register);
        return Some(());
    }
    if immediate_operand(instruction, n, kind, rng) {
        return Some(());
    }
    match kind {
        Kind::mem | Kind::mem_offs => memory_operand(instruction, n, kind, plan, rng),
        Kind::r8_or_mem
        | Kind::r16_or_mem
        | Kind::r32_or_mem
        | Kind::r64_or_mem
        | Kind::mm_or_mem
        | Kind::xmm_or_mem => memory_operand(instruction, n, kind, plan, rng),
        Kind::seg_rBX_al => {
            instruction.set_op_kind(n, OpKind::Memory);
            let base = if narrow_address { Register::EBX } else { Register::RBX };
            instruction.set_memory_base(base);
            instruction.set_memory_index(Register::AL);
        }
        Kind::es_rDI => {
            let narrow = if narrow_address { OpKind::MemoryESEDI } else { OpKind::MemoryESRDI };
            instruction.set_op_kind(n, narrow);
        }
        Kind::seg_rSI => {
            let narrow = if narrow_address { OpKind::MemorySegESI } else { OpKind::MemorySegRSI };
            instruction.set_op_kind(n, narrow);
        }
        Kind::seg_rDI => {
            let narrow = if narrow_address { OpKind::MemorySegEDI } else { OpKind::MemorySegRDI };
            instruction.set_op_kind(n, narrow);
        }
        Kind::br32_1 | Kind::br32_4 => instruction.set_op_kind(n, OpKind::NearBranch32),
        Kind::br64_1 | Kind::br64_4 => instruction.set_op_kind(n, OpKind::NearBranch64),
        _ => return None,
    }
    Some(())
}

fn byte_register(rng: &mut Rng, plan: &Plan) -> Register {
    const HIGH: [Register; 4] = [Register::AH, Register::CH, Register::DH, Register::BH];
    const LOW: [Register; 16] = [
        Register::AL,
        Register::CL,
        Register::DL,
        Register::BL,
        Register::SPL,
        Register::BPL,
        Register::SIL,
        Register::DIL,
        Register::R8L,
        Register::R9L,
        Register::R10L,
        Register::R11L,
        Register::R12L,
        Register::R13L,
        Register::R14L,
        Register::R15L,
    ];
    if rng.percent(25) {
        return rng.pick(&HIGH);
    }
    let low = plan.operand_register(rng);
    // Without REX there are the low bytes of four registers.
    LOW[if plan.bits == Bits::Short { low & 3 } else { low }]
}

/// The same register in 2, 4 or 8 bytes.
fn sized(register: usize, bytes: u32) -> Register {
    let first = match bytes {
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    first + register as u32
}

fn register_operand(kind: Kind, code: Code, plan: &Plan, rng: &mut Rng) -> Option<Register> {
    // Half of the choices between register and memory.
    let mixed = |rng: &mut Rng| rng.percent(50);
    Some(match kind {
        Kind::al => Register::AL,
        Kind::ax => Register::AX,
        Kind::eax => Register::EAX,
        Kind::rax => Register::RAX,
        Kind::cl => Register::CL,
        Kind::dx => Register::DX,
        Kind::st0 => Register::ST0,
        Kind::es => Register::ES,
        Kind::cs => Register::CS,
        Kind::ss => Register::SS,
        Kind::ds => Register::DS,
        Kind::fs => Register::FS,
        Kind::gs => Register::GS,
        Kind::sti_opcode => Register::ST0 + rng.below(8) as u32,
        Kind::mm_reg | Kind::mm_rm => Register::MM0 + rng.below(8) as u32,
        Kind::mm_or_mem if mixed(rng) => Register::MM0 + rng.below(8) as u32,
        Kind::xmm_reg | Kind::xmm_rm => Register::XMM0 + plan.any_register(rng) as u32,
        Kind::xmm_or_mem if mixed(rng) => Register::XMM0 + plan.any_register(rng) as u32,
        Kind::r8_reg | Kind::r8_opcode => byte_register(rng, plan),
        Kind::r8_or_mem if mixed(rng) => byte_register(rng, plan),
        Kind::r16_reg | Kind::r16_opcode | Kind::r16_rm => sized(bit_offset(code, plan, rng), 2),
        Kind::r32_reg | Kind::r32_opcode | Kind::r32_rm => sized(bit_offset(code, plan, rng), 4),
        Kind::r64_reg | Kind::r64_opcode | Kind::r64_rm => sized(bit_offset(code, plan, rng), 8),
        Kind::r16_or_mem if mixed(rng) => sized(plan.operand_register(rng), 2),
        Kind::r32_or_mem if mixed(rng) => sized(plan.operand_register(rng), 4),
        Kind::r64_or_mem if mixed(rng) => sized(plan.operand_register(rng), 8),
        // FS and GS are the host's; loads of them are not in the corpus.
        Kind::seg_reg if code.op_code().op0_kind() == Kind::seg_reg => {
            rng.pick(&[Register::ES, Register::SS, Register::DS, Register::CS])
        }
        Kind::seg_reg => Register::ES + rng.below(6) as u32,
        Kind::cr_reg => rng.pick(&[Register::CR0, Register::CR2, Register::CR3, Register::CR4]),
        Kind::dr_reg => rng.pick(&[Register::DR0, Register::DR3, Register::DR6, Register::DR7]),
        _ => return None,
    })
}

/// A register operand; for the bit instructions mostly the one that holds a small number, since
/// it moves their memory operand.
fn bit_offset(code: Code, plan: &Plan, rng: &mut Rng) -> usize {
    let bits =
        matches!(code.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    if bits && rng.percent(70) { plan.index } else { plan.operand_register(rng) }
}

fn immediate_operand(instruction: &mut Instruction, n: u32, kind: Kind, rng: &mut Rng) -> bool {
    let value = values::integer(rng);
    match kind {
        Kind::imm8 if n > 0 && instruction.op_kind(n - 1) == OpKind::Immediate16 => {
            // The nesting level of ENTER, small more often than its 5 bits would have it.
            instruction.set_op_kind(n, OpKind::Immediate8_2nd);
            instruction.set_immediate8_2nd(if rng.percent(70) {
                value as u8 & 3
            } else {
                value as u8
            });
        }
        Kind::imm8 => {
            instruction.set_op_kind(n, OpKind::Immediate8);
            instruction.set_immediate8(if rng.percent(40) {
                value as u8 & 15
            } else {
                value as u8
            });
        }
        Kind::imm8_const_1 => {
            instruction.set_op_kind(n, OpKind::Immediate8);
            instruction.set_immediate8(1);
        }
        Kind::imm8sex16 => {
            instruction.set_op_kind(n, OpKind::Immediate8to16);
            instruction.set_immediate8to16(i16::from(value as i8));
        }
        Kind::imm8sex32 => {
            instruction.set_op_kind(n, OpKind::Immediate8to32);
            instruction.set_immediate8to32(i32::from(value as i8));
        }
        Kind::imm8sex64 => {
            instruction.set_op_kind(n, OpKind::Immediate8to64);
            instruction.set_immediate8to64(i64::from(value as i8));
        }
        Kind::imm16 => {
            instruction.set_op_kind(n, OpKind::Immediate16);
            instruction.set_immediate16(value as u16);
        }
        Kind::imm32 => {
            instruction.set_op_kind(n, OpKind::Immediate32);
            instruction.set_immediate32(value as u32);
        }
        Kind::imm32sex64 => {
            instruction.set_op_kind(n, OpKind::Immediate32to64);
            instruction.set_immediate32to64(i64::from(value as i32));
        }
        Kind::imm64 => {
            instruction.set_op_kind(n, OpKind::Immediate64);
            instruction.set_immediate64(value);
        }
        _ => return false,
    }
    true
}

/// Bytes a memory operand covers, as far as aiming it goes.
fn operand_len(instruction: &Instruction) -> usize {
    match instruction.mnemonic() {
        Mnemonic::Fxsave | Mnemonic::Fxsave64 | Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => 512,
        _ => instruction.memory_size().size().clamp(1, 512),
    }
}

/// True if the instruction wants a cache line to itself: a locked access across two lines stops
/// every processor, and hosts may punish it.
fn is_locked(instruction: &Instruction) -> bool {
    instruction.has_lock_prefix() || instruction.mnemonic() == Mnemonic::Xchg
}

/// Where to point a memory operand of `len` bytes.
fn aim(len: usize, rng: &mut Rng) -> u64 {
    let len = len as u64;
    let natural = len.next_power_of_two().min(16);
    let anywhere = DATA + 0x40 + rng.below(4 * PAGE - 0x80 - len);
    match rng.below(100) {
        0..=71 => anywhere & !(natural - 1),
        72..=86 => anywhere,
        // Across a boundary between two pages that are both there.
        87..=90 => DATA + PAGE * (1 + rng.below(3)) - 1 - rng.below(len.max(2) - 1),
        // Read-only, and across the boundary to it.
        91..=93 => CONST + (rng.below(PAGE - len) & !(natural - 1)),
        94 => CONST - 1 - rng.below(len.max(2) - 1),
        // Across the last byte there is, and the last bytes themselves.
        95 => CONST + PAGE - 1 - rng.below(len.max(2) - 1),
        96 => TAIL + PAGE - 1 - rng.below(len.max(2) - 1),
        97 => TAIL + PAGE - len,
        // Nowhere.
        98 => TAIL + PAGE + rng.below(PAGE),
        _ => DATA - 1 - rng.below(len),
    }
}

fn memory_operand(
    instruction: &mut Instruction,
    n: u32,
    kind: Kind,
    plan: &mut Plan,
    rng: &mut Rng,
) {
    instruction.set_op_kind(n, OpKind::Memory);
    let len = operand_len(instruction);
    // Any memory form may be given a LOCK prefix later.
    let lockable = instruction.code().op_code().can_use_lock_prefix();
    let mut target = aim(len, rng);
    if is_locked(instruction) || lockable && rng.percent(60) {
        let natural = (len as u64).next_power_of_two();
        target &= !(natural - 1);
    }
    plan.operand = Some((target, len));
    if rng.percent(5) {
        instruction.set_segment_prefix(Register::GS);
        target = target.wrapping_sub(GS_BASE);
    }
    if plan.bits == Bits::Short && rng.percent(8) {
        let segments = [Register::ES, Register::SS, Register::DS, Register::CS, Register::FS];
        instruction.set_segment_prefix(rng.pick(&segments));
    }
    if kind == Kind::mem_offs {
        let narrow = plan.bits == Bits::Short;
        instruction.set_memory_displ_size(if narrow { 4 } else { 8 });
        instruction.set_memory_displacement64(target & plan.bits.mask());
        return;
    }
    address(instruction, target, plan, rng);
}

/// Fills in base, index, scale and displacement so that their sum is `target`.
fn address(instruction: &mut Instruction, target: u64, plan: &mut Plan, rng: &mut Rng) {
    let relative = plan.bits == Bits::Long && rng.percent(6);
    if relative && instruction.segment_prefix() == Register::None {
        instruction.set_memory_base(Register::RIP);
        instruction.set_memory_displ_size(8);
        instruction.set_memory_displacement64(target);
        return;
    }
    let narrow = plan.narrow(8, rng);
    let register = |number: usize| if narrow { sized(number, 4) } else { sized(number, 8) };
    let value = |number: usize| plan.general[number];
    let mut sum = 0u64;
    let with_base = rng.percent(93);
    if with_base {
        let base = if rng.percent(96) { plan.any_pointer(rng) } else { plan.any_register(rng) };
        instruction.set_memory_base(register(base));
        sum = value(base);
    }
    if rng.percent(35) {
        let scale = 1 << rng.below(4);
        let index = if rng.percent(95) { plan.index } else { plan.any_register(rng) };
        if index != RSP {
            instruction.set_memory_index(register(index));
            instruction.set_memory_index_scale(scale);
            sum = sum.wrapping_add(value(index).wrapping_mul(u64::from(scale)));
        }
    }
    let displacement = target.wrapping_sub(sum) as i32;
    let reached = sum.wrapping_add(displacement as u64);
    let reached = if narrow { reached & 0xFFFF_FFFF } else { reached };
    let wanted = if narrow { target & 0xFFFF_FFFF } else { target };
    if reached != wanted || narrow && target > u64::from(u32::MAX) {
        plan.operand = None;
    }
    let short = i8::try_from(displacement).is_ok() && rng.percent(80);
    let bare = displacement == 0 && with_base && short;
    let size = match (bare, short && with_base, narrow) {
        (true, ..) => 0,
        (_, true, _) => 1,
        (_, _, true) => 4,
        (_, _, false) => 8,
    };
    instruction.set_memory_displ_size(size);
    let displacement = if narrow { u64::from(displacement as u32) } else { displacement as u64 };
    instruction.set_memory_displacement64(displacement);
}

fn add_prefixes(instruction: &mut Instruction, plan: &Plan, rng: &mut Rng) {
    let op_code = instruction.code().op_code();
    let in_memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
    if op_code.can_use_lock_prefix() && in_memory && instruction.op0_kind() == OpKind::Memory {
        let one_line = plan.operand.is_none_or(|(at, len)| at % 64 + len as u64 <= 64);
        if one_line && rng.percent(35) {
            instruction.set_has_lock_prefix(true);
        }
    }
    if !instruction.is_string_instruction() {
        return;
    }
    // F2 means something only to the instructions that compare.
    if instruction.rflags_written() != 0 && rng.percent(40) {
        instruction.set_has_repne_prefix(true);
    } else if rng.percent(60) {
        instruction.set_has_rep_prefix(true);
    }
    if rng.percent(8) {
        instruction.set_segment_prefix(Register::GS);
    }
}
