//! One case: a snippet with everything that goes into it, and what came out of running it.

use crate::layout::{CODE, EXIT, EXIT_32, MEMORY_LEN, memory_offset};
use iced_x86::{Code, Decoder, DecoderOptions, Encoder, IcedError, Instruction, OpKind, Register};

/// Bytes in front of an instruction that change nothing about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redundant {
    /// A segment override that 64-bit mode ignores, as the first prefix.
    Segment(u8),
    /// A REX prefix none of whose bits has an effect.
    Rex(u8),
}

/// The size of code: how it is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bits {
    /// 64-bit code.
    Long,
    /// 32-bit code.
    Short,
}

impl Bits {
    /// What decoder and encoder call it.
    pub fn number(self) -> u32 {
        match self {
            Self::Long => 64,
            Self::Short => 32,
        }
    }

    /// How many general registers it has, and vector registers.
    pub fn registers(self) -> usize {
        match self {
            Self::Long => 16,
            Self::Short => 8,
        }
    }

    /// The bits of a general register that it has.
    pub fn mask(self) -> u64 {
        match self {
            Self::Long => u64::MAX,
            Self::Short => u64::from(u32::MAX),
        }
    }
}

/// One instruction of a snippet.
#[derive(Debug, Clone)]
pub struct Step {
    /// The instruction; its address and its target are filled in by [`assemble`].
    pub instruction: Instruction,
    /// A prefix the encoder would not emit.
    pub redundant: Option<Redundant>,
    /// For near branches and RIP-relative LEA: the step it points to; the number of steps is the end.
    pub target: Option<usize>,
}

impl Step {
    /// A step with nothing special about it.
    pub fn plain(instruction: Instruction) -> Self {
        Self { instruction, redundant: None, target: None }
    }
}

/// The x87 and SSE registers before or after a snippet, as `FXSAVE` has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Floating {
    /// x87 control word.
    pub control: u16,
    /// x87 status word.
    pub status: u16,
    /// One bit a physical x87 register: in use.
    pub in_use: u8,
    /// ST(0) to ST(7).
    pub stack: [[u8; 10]; 8],
    /// SSE control and status.
    pub mxcsr: u32,
    /// XMM0 to XMM15.
    pub xmm: [u128; 16],
}

/// The registers a snippet starts with.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub general: [u64; 16],
    /// Flags.
    pub rflags: u64,
    /// x87 and SSE.
    pub floating: Floating,
}

/// Bytes put into memory before the case.
#[derive(Debug, Clone)]
pub struct Patch {
    /// Where, wholly inside the data.
    pub address: u64,
    /// What.
    pub bytes: Vec<u8>,
}

/// Something that holds the address of a step.
#[derive(Debug, Clone, Copy)]
pub enum Place {
    /// A general register, by number.
    General(usize),
    /// Bytes of data: the low ones of the address.
    Memory {
        /// Where.
        at: u64,
        /// How many, at most eight.
        len: usize,
    },
}

/// Puts the address of a step, known only after assembly, where an indirect branch finds it.
#[derive(Debug, Clone, Copy)]
pub struct Link {
    /// Where it goes.
    pub place: Place,
    /// Which step; the number of steps is the end.
    pub step: usize,
}

/// A snippet and its inputs.
#[derive(Debug, Clone)]
pub struct Case {
    /// Its number under the seed.
    pub index: u64,
    /// The size of its code.
    pub bits: Bits,
    /// The form the case was made for.
    pub focus: Code,
    /// Which step is an instance of [`Self::focus`].
    pub focus_step: usize,
    /// Where the first instruction lies.
    pub origin: u64,
    /// The instructions.
    pub steps: Vec<Step>,
    /// The registers.
    pub inputs: Inputs,
    /// Changes to the common memory.
    pub patches: Vec<Patch>,
    /// Addresses of steps.
    pub links: Vec<Link>,
    /// The engine runs so many instructions at a time; 0 is all at once.
    pub stride: u64,
}

/// A case made concrete.
#[derive(Debug, Clone)]
pub struct Ready {
    /// The size of the code.
    pub bits: Bits,
    /// The code from the case's origin on, the jump to its end included.
    pub code: Vec<u8>,
    /// The address of each step, and of the final jump.
    pub starts: Vec<u64>,
    /// The registers, links filled in.
    pub inputs: Inputs,
    /// The data, patches and links filled in.
    pub memory: Vec<u8>,
}

impl Case {
    /// Assembles the snippet and lays out its memory over `template`.
    pub fn ready(&self, template: &[u8]) -> Result<Ready, IcedError> {
        let (code, starts) = assemble(&self.steps, self.origin, self.bits)?;
        let mut inputs = self.inputs.clone();
        let mut memory = template.to_vec();
        debug_assert_eq!(memory.len(), MEMORY_LEN);
        for Patch { address, bytes } in &self.patches {
            if let Some(at) = memory_offset(*address, bytes.len()) {
                memory[at..at + bytes.len()].copy_from_slice(bytes);
            }
        }
        for link in &self.links {
            let address = starts[link.step];
            match link.place {
                Place::General(register) => inputs.general[register] = address,
                Place::Memory { at, len } => {
                    if let Some(at) = memory_offset(at, len) {
                        memory[at..at + len].copy_from_slice(&address.to_le_bytes()[..len]);
                    }
                }
            }
        }
        Ok(Ready { bits: self.bits, code, starts, inputs, memory })
    }
}

/// Why a snippet stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// It reached [`EXIT`].
    End,
    /// An exception.
    Exception {
        /// Its vector.
        vector: u8,
        /// Its error code, 0 for vectors without one.
        error: u64,
        /// CR2, 0 for vectors that leave it alone.
        address: u64,
    },
}

/// What a snippet left behind.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Why it stopped.
    pub stop: Stop,
    /// The general registers.
    pub general: [u64; 16],
    /// The instruction pointer; [`EXIT`] at the end.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// The selectors of DS and ES.
    pub data_selectors: [u16; 2],
    /// x87 and SSE.
    pub floating: Floating,
    /// The data.
    pub memory: Vec<u8>,
}

/// True for branches whose target is part of the instruction.
pub fn is_near_branch(instruction: &Instruction) -> bool {
    (0..instruction.op_count())
        .any(|n| matches!(instruction.op_kind(n), OpKind::NearBranch64 | OpKind::NearBranch32))
}

fn aimed(step: &Step, at: u64) -> Instruction {
    let mut instruction = step.instruction;
    if is_near_branch(&instruction) {
        if instruction.op0_kind() == OpKind::NearBranch32 {
            instruction.set_near_branch32(at as u32);
        } else {
            instruction.set_near_branch64(at);
        }
    } else if step.target.is_some() {
        debug_assert_eq!(instruction.memory_base(), Register::RIP);
        instruction.set_memory_displacement64(at);
    }
    instruction
}

fn encode(step: &Step, ip: u64, target: u64, bits: Bits) -> Result<Vec<u8>, IcedError> {
    let mut encoder = Encoder::new(bits.number());
    let instruction = aimed(step, target);
    encoder.encode(&instruction, ip)?;
    let mut bytes = encoder.take_buffer();
    match step.redundant {
        None => {}
        Some(Redundant::Segment(prefix)) => bytes.insert(0, prefix),
        Some(Redundant::Rex(rex)) => {
            let legacy = |byte: &u8| {
                matches!(byte, 0x26 | 0x2E | 0x36 | 0x3E | 0x64..=0x67 | 0xF0 | 0xF2 | 0xF3)
            };
            let opcode = bytes.iter().position(|byte| !legacy(byte)).unwrap_or(0);
            bytes.insert(opcode, rex);
        }
    }
    Ok(bytes)
}

/// The bytes of the steps one after the other, a jump to the end behind them, and where each begins.
pub fn assemble(steps: &[Step], origin: u64, bits: Bits) -> Result<(Vec<u8>, Vec<u64>), IcedError> {
    let mut starts = Vec::with_capacity(steps.len() + 1);
    let mut ip = origin;
    for step in steps {
        starts.push(ip);
        ip += encode(step, ip, ip, bits)?.len() as u64;
    }
    starts.push(ip);
    let mut code = Vec::with_capacity((ip - origin) as usize + 5);
    for (step, &ip) in steps.iter().zip(&starts) {
        let target = step.target.map_or(ip, |target| starts[target]);
        code.extend(encode(step, ip, target, bits)?);
    }
    let (leave, end) = match bits {
        Bits::Long => (Code::Jmp_rel32_64, EXIT),
        Bits::Short => (Code::Jmp_rel32_32, EXIT_32),
    };
    let leave = Instruction::with_branch(leave, end)?;
    code.extend(encode(&Step::plain(leave), ip, end, bits)?);
    debug_assert!(origin >= CODE);
    Ok((code, starts))
}

/// True if the bytes of this step are decoded as the very instruction it was built from.
pub fn decodes_as_built(step: &Step, bits: Bits) -> bool {
    let Ok(bytes) = encode(step, CODE, CODE + 0x40, bits) else { return false };
    let built = aimed(step, CODE + 0x40);
    if bytes.len() > 15 {
        return false;
    }
    let mut decoder = Decoder::with_ip(bits.number(), &bytes, CODE, DecoderOptions::NONE);
    let decoded = decoder.decode();
    if step.redundant.is_none() {
        return decoded.code() == built.code() && decoded.len() == bytes.len();
    }
    decoded.len() == bytes.len() && same(&decoded, &built)
}

/// Equality of everything that makes an instruction do what it does; segment overrides that
/// 64-bit mode ignores are left out.
fn same(one: &Instruction, other: &Instruction) -> bool {
    one.code() == other.code()
        && one.op_count() == other.op_count()
        && (0..one.op_count()).all(|n| {
            one.op_kind(n) == other.op_kind(n)
                && match one.op_kind(n) {
                    OpKind::Register => one.op_register(n) == other.op_register(n),
                    OpKind::Memory => {
                        one.memory_base() == other.memory_base()
                            && one.memory_index() == other.memory_index()
                            && one.memory_index_scale() == other.memory_index_scale()
                            && one.memory_displacement64() == other.memory_displacement64()
                    }
                    OpKind::NearBranch64 => one.near_branch64() == other.near_branch64(),
                    _ => true,
                }
        })
        && one.has_rep_prefix() == other.has_rep_prefix()
        && one.has_repne_prefix() == other.has_repne_prefix()
        && one.has_lock_prefix() == other.has_lock_prefix()
}
