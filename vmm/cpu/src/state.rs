//! The architectural state of the CPU as plain values, the same for every engine.

use serde::{Deserialize, Serialize};

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, after granularity.
    pub limit: u32,
    /// Descriptor bits 40–47 and 52–55 packed as in `VMCB` attributes: type (0–3), S (4),
    /// DPL (5–6), P (7), AVL (8), L (9), D/B (10), G (11).
    pub attributes: u16,
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// The segment registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are the architecture's")]
pub struct Segments {
    pub es: Segment,
    pub cs: Segment,
    pub ss: Segment,
    pub ds: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ldtr: Segment,
    pub tr: Segment,
}

/// Model-specific registers the CPU model has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are the architecture's")]
pub struct ModelSpecificRegisters {
    pub efer: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub tsc_aux: u64,
    /// Added to the bus's time stamp: `WRMSR IA32_TSC` and `IA32_TSC_ADJUST`.
    pub tsc_adjust: u64,
}

/// The x87 unit, physical registers in `FXSAVE` order (ST0 first).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct X87State {
    /// Control word.
    pub control: u16,
    /// Status word, TOP included.
    pub status: u16,
    /// Full tag word, two bits a physical register (11 is empty).
    pub tags: u16,
    /// Last opcode, 11 bits.
    pub opcode: u16,
    /// Last instruction pointer.
    pub instruction: u64,
    /// Last data pointer.
    pub data: u64,
    /// ST(0) to ST(7), 80 bits each.
    pub registers: [[u8; 10]; 8],
}

impl Default for X87State {
    /// The state after `FNINIT`.
    fn default() -> Self {
        Self {
            control: 0x37F,
            status: 0,
            tags: 0xFFFF,
            opcode: 0,
            instruction: 0,
            data: 0,
            registers: [[0; 10]; 8],
        }
    }
}

/// The SSE unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SseState {
    /// XMM0 to XMM15.
    pub registers: [u128; 16],
    /// Control and status.
    pub mxcsr: u32,
}

impl Default for SseState {
    /// The state after reset.
    fn default() -> Self {
        Self { registers: [0; 16], mxcsr: 0x1F80 }
    }
}

/// The whole CPU between two instructions.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub general: [u64; 16],
    /// Address of the next instruction.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// Segment registers.
    pub segments: Segments,
    /// Global descriptor table.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table.
    pub idtr: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8, the task priority.
    pub cr8: u64,
    /// DR0 to DR7; of 4 and 5, which are no registers, `soft` keeps in 4 the debug events that wait
    /// for the next instruction: the watchpoints hit (0–3), and a shadow cast by a load of SS (15).
    pub debug: [u64; 8],
    /// Model-specific registers.
    pub msrs: ModelSpecificRegisters,
    /// x87.
    pub x87: X87State,
    /// SSE.
    pub sse: SseState,
    /// The last instruction was `STI` or loaded SS: no interrupt at this boundary.
    pub interrupt_shadow: bool,
    /// Waiting in `HLT`.
    pub halted: bool,
}
