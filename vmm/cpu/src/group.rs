//! The CPUs of a machine at rest, as they are saved, shipped and restored.
//!
//! There are two forms. What a guest does that is replayed depends on the CPU model that all engines share, and a
//! CPU of that model is a [`CpuState`]: plain values, which every engine knows and checks. A guest that runs freely on
//! KVM is a group of CPUs, perhaps of one, and may use whatever its host's CPU has: 32-bit code, bits of MXCSR, events
//! half delivered. What KVM says of such a CPU is carried as it is. Nobody who knows less than KVM looks into it, and
//! whether it can be restored, the KVM that is given it says.

use super::soft::Origin;
use super::state::CpuState;
use super::{InvalidState, Vector};
use serde::{Deserialize, Serialize};
use std::fmt;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// What a CPU does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    /// It executes instructions.
    Running,
    /// It waits in `HLT`.
    Halted,
    /// It waits for `INIT`, as after power-on.
    Unstarted,
    /// It has had `INIT` and waits for a start-up message.
    Initialised,
}

/// A structure of KVM's interface, byte for byte. Its layout is the kernel's and never changes; which structures there
/// are, and how they are kept here, is the machine state's version.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opaque {
    /// Bytes of the structure.
    size: u32,
    /// Those up to the last that is not zero.
    bytes: Vec<u8>,
}

impl Opaque {
    /// Of a structure.
    pub fn of(structure: &(impl IntoBytes + Immutable + ?Sized)) -> Self {
        let bytes = structure.as_bytes();
        let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let size = u32::try_from(bytes.len()).expect("KVM's structures are small");
        Self { size, bytes: bytes[..used].to_vec() }
    }

    /// The structure. `name`, of what.
    ///
    /// # Errors
    /// [`InvalidState`] if it is one of another size.
    pub fn read<T: FromBytes + IntoBytes>(&self, name: &str) -> Result<T, InvalidState> {
        let mut structure = T::new_zeroed();
        let into = structure.as_mut_bytes();
        if self.size as usize != into.len() || self.bytes.len() > into.len() {
            let Self { size, bytes } = self;
            let wanted = into.len();
            let found = bytes.len();
            return Err(InvalidState(format!(
                "{name} has {found} bytes of {size}, where KVM has {wanted}"
            )));
        }
        into[..self.bytes.len()].copy_from_slice(&self.bytes);
        Ok(structure)
    }
}

impl fmt::Debug for Opaque {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Opaque({} of {} bytes)", self.bytes.len(), self.size)
    }
}

/// What `CPUID` says for one value of EAX and ECX.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidLeaf {
    /// EAX.
    pub function: u32,
    /// ECX, where it counts.
    pub index: u32,
    /// EAX, EBX, ECX and EDX.
    pub registers: [u32; 4],
}

/// A CPU as KVM gives it: what a request of each name returns, in the order in which they are made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmCpu {
    /// `KVM_GET_MP_STATE`; of a CPU without a local APIC, the engine's own knowledge.
    pub activity: Activity,
    /// What `CPUID` says to the guest.
    pub cpuid: Vec<CpuidLeaf>,
    /// `KVM_GET_VCPU_EVENTS`: what is on its way into it.
    pub events: Opaque,
    /// `KVM_GET_REGS`.
    pub regs: Opaque,
    /// `KVM_GET_SREGS`.
    pub sregs: Opaque,
    /// `KVM_GET_MSRS`: numbers and values of those that the guest can change.
    pub msrs: Vec<(u32, u64)>,
    /// `KVM_GET_XSAVE`.
    pub xsave: Opaque,
    /// `KVM_GET_XCRS`, where the host's CPU has them.
    pub xcrs: Option<Opaque>,
    /// `KVM_GET_DEBUGREGS`.
    pub debug: Opaque,
    /// `KVM_GET_LAPIC`, where it has one.
    pub apic: Option<Opaque>,
    /// `IA32_TSC` when it was asked for: the counter that `RDTSC` reads goes on from there. At rest as well, so that
    /// two states of one CPU at rest differ in it.
    pub time_stamp: u64,
    /// `IA32_TSC_ADJUST`, which the engine keeps.
    pub tsc_adjust: u64,
    /// `IA32_TSC_AUX`, which the engine keeps.
    pub tsc_aux: u64,
}

/// An event that was on its way into a CPU when it was saved, for an engine that delivers it itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pending {
    /// Its vector.
    pub vector: Vector,
    /// Its error code, if it has one.
    pub error: Option<u16>,
    /// Where it comes from.
    pub from: Origin,
}

/// The CPUs of a machine at rest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cpus {
    /// One, of the model that all engines share.
    Model(Box<CpuState>),
    /// Those of a guest that runs freely on KVM, by their numbers; the first boots.
    Kvm(Vec<KvmCpu>),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_structure_comes_back_as_it_was_and_zeroes_at_its_end_cost_nothing() {
        for words in [[0u32; 64], std::array::from_fn(|at| if at < 9 { at as u32 } else { 0 })] {
            let opaque = Opaque::of(&words);
            assert!(opaque.bytes.len() <= 36, "{opaque:?}");
            assert_eq!(opaque.read::<[u32; 64]>("it"), Ok(words));
            let bytes = postcard::to_stdvec(&opaque).expect("plain values always encode");
            assert_eq!(postcard::from_bytes(&bytes), Ok(opaque));
        }
    }

    #[test]
    fn a_structure_of_another_size_is_refused() {
        let opaque = Opaque::of(&[1u32, 0]);
        let error = opaque.read::<[u32; 3]>("the registers").expect_err("it has two words");
        let wanted = "CPU state is not valid: the registers has 1 bytes of 8, where KVM has 12";
        assert_eq!(error.to_string(), wanted);
        let longer = Opaque { size: 4, bytes: vec![1; 5] };
        assert!(longer.read::<u32>("it").is_err(), "more bytes than it says");
    }

    #[test]
    fn the_encoding_of_a_cpu_is_the_golden_one() {
        let structure = |byte: u8| Opaque::of(&[byte, 0]);
        let cpu = KvmCpu {
            activity: Activity::Halted,
            cpuid: vec![CpuidLeaf { function: 7, index: 2, registers: [0, 0, 300, 1] }],
            events: structure(1),
            regs: structure(2),
            sregs: structure(3),
            msrs: vec![(0x277, 0x106)],
            xsave: structure(4),
            xcrs: Some(structure(5)),
            debug: structure(6),
            apic: None,
            time_stamp: 300,
            tsc_adjust: 7,
            tsc_aux: 8,
        };
        let bytes = postcard::to_stdvec(&Cpus::Kvm(vec![cpu])).expect("plain values always encode");
        let golden: &[u8] = &[
            1, 1, // one CPU of KVM's
            1, // halted
            1, 7, 2, 0, 0, 0xAC, 2, 1, // one leaf of CPUID
            2, 1, 1, 2, 1, 2, 2, 1, 3, // events, registers, special registers
            1, 0xF7, 4, 0x86, 2, // one model-specific register
            2, 1, 4, 1, 2, 1, 5, 2, 1,
            6, // XSAVE area, extended control registers, debug registers
            0, // no local APIC
            0xAC, 2, 7, 8,
        ];
        assert_eq!(bytes, golden);
    }
}
