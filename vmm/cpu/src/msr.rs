//! Numbers of the model-specific registers that the CPU model has, where every other one faults;
//! and of those that a host's CPU may have for a kernel to defend itself with (SDM volume 4,
//! chapter 2; APM volume 2, appendix A).

/// `IA32_TSC`, the time-stamp counter.
pub const TSC: u32 = 0x10;
/// `IA32_APIC_BASE`.
pub const APIC_BASE: u32 = 0x1B;
/// `IA32_TSC_ADJUST`.
pub const TSC_ADJUST: u32 = 0x3B;
/// `IA32_SPEC_CTRL`: speculation of indirect branches and stores.
pub const SPEC_CTRL: u32 = 0x48;
/// `IA32_BIOS_SIGN_ID`, the microcode's revision.
pub const MICROCODE_REVISION: u32 = 0x8B;
/// `IA32_ARCH_CAPABILITIES`: the flaws that a CPU does not have.
pub const ARCH_CAPABILITIES: u32 = 0x10A;
/// `IA32_TSX_CTRL`.
pub const TSX_CTRL: u32 = 0x122;
/// `IA32_SYSENTER_CS`.
pub const SYSENTER_CS: u32 = 0x174;
/// `IA32_SYSENTER_ESP`.
pub const SYSENTER_ESP: u32 = 0x175;
/// `IA32_SYSENTER_EIP`.
pub const SYSENTER_EIP: u32 = 0x176;
/// `IA32_MISC_ENABLE`.
pub const MISC_ENABLE: u32 = 0x1A0;
/// `IA32_PAT`.
pub const PAT: u32 = 0x277;
/// `IA32_EFER`.
pub const EFER: u32 = 0xC000_0080;
/// `IA32_STAR`.
pub const STAR: u32 = 0xC000_0081;
/// `IA32_LSTAR`.
pub const LSTAR: u32 = 0xC000_0082;
/// `IA32_CSTAR`.
pub const CSTAR: u32 = 0xC000_0083;
/// `IA32_FMASK`.
pub const SFMASK: u32 = 0xC000_0084;
/// `IA32_FS_BASE`.
pub const FS_BASE: u32 = 0xC000_0100;
/// `IA32_GS_BASE`.
pub const GS_BASE: u32 = 0xC000_0101;
/// `IA32_KERNEL_GS_BASE`.
pub const KERNEL_GS_BASE: u32 = 0xC000_0102;
/// `IA32_TSC_AUX`, which `RDTSCP` reads.
pub const TSC_AUX: u32 = 0xC000_0103;
/// `VIRT_SPEC_CTRL` of AMD: speculation of stores, as a hypervisor offers it.
pub const VIRT_SPEC_CTRL: u32 = 0xC001_011F;
/// `DE_CFG` of AMD: the kernel reads whether `LFENCE` serialises.
pub const DE_CFG: u32 = 0xC001_1029;
