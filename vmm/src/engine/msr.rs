//! Numbers of the model-specific registers that the CPU model has, where every other one faults; and of
//! those that a host's CPU may have for a kernel to defend itself with.

pub(in crate::engine) const TSC: u32 = 0x10;
pub(in crate::engine) const APIC_BASE: u32 = 0x1B;
pub(in crate::engine) const TSC_ADJUST: u32 = 0x3B;
pub(in crate::engine) const SPEC_CTRL: u32 = 0x48;
pub(in crate::engine) const MICROCODE_REVISION: u32 = 0x8B;
pub(in crate::engine) const ARCH_CAPABILITIES: u32 = 0x10A;
pub(in crate::engine) const TSX_CTRL: u32 = 0x122;
pub(in crate::engine) const SYSENTER_CS: u32 = 0x174;
pub(in crate::engine) const SYSENTER_ESP: u32 = 0x175;
pub(in crate::engine) const SYSENTER_EIP: u32 = 0x176;
pub(in crate::engine) const MISC_ENABLE: u32 = 0x1A0;
pub(in crate::engine) const PAT: u32 = 0x277;
pub(in crate::engine) const EFER: u32 = 0xC000_0080;
pub(in crate::engine) const STAR: u32 = 0xC000_0081;
pub(in crate::engine) const LSTAR: u32 = 0xC000_0082;
pub(in crate::engine) const CSTAR: u32 = 0xC000_0083;
pub(in crate::engine) const SFMASK: u32 = 0xC000_0084;
pub(in crate::engine) const FS_BASE: u32 = 0xC000_0100;
pub(in crate::engine) const GS_BASE: u32 = 0xC000_0101;
pub(in crate::engine) const KERNEL_GS_BASE: u32 = 0xC000_0102;
pub(in crate::engine) const TSC_AUX: u32 = 0xC000_0103;
pub(in crate::engine) const VIRT_SPEC_CTRL: u32 = 0xC001_011F;
pub(in crate::engine) const DE_CFG: u32 = 0xC001_1029;
