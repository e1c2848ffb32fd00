//! What two sides compare before one may replay the other.
//!
//! A backup takes the machine from its primary, engine included; it says of itself only what it
//! cannot change: its program, its disks, its host's CPU and KVM. Unless its operator names an engine, it
//! leaves that open ([`ANY`]). A primary leaves its host's CPU open where its engine computes the
//! same on every host.

use crate::epoch::Protection;
use std::fs::File;
use std::io::{self, Read};
use vmft_cpu::soft;
use vmft_logging_channel::fingerprint::{ANY, Fingerprint, Mismatch};
use vmft_logging_channel::handshake::Nonce;
use vmft_vmm::board::{BoardConfig, DiskConfig};
use vmft_vmm::devices::virtio::net::addresses::MacAddress;
use vmft_vmm::doctor::kvm_of_this_host;
use vmft_vmm::engine::EngineKind;
use vmft_vmm::machine::STATE_VERSION;

const VERSION: &str = "vmft version";
const STATE: &str = "state version";
const ENGINE: &str = "engine";
/// How the guest is protected.
pub const PROTECTION: &str = "protection";
const HOST_CPU: &str = "host cpu";
/// The revision of the host's microcode, which may change what its CPU computes: it counts where a run is replayed.
pub const MICROCODE: &str = "host microcode";
const NETWORK: &str = "network";
const MAC: &str = "network address";
const SOFT_CPU: &str = "cpu model of soft";
const KVM_CPU: &str = "cpu model of kvm";

/// What identifies a CPU in `/proc/cpuinfo`, as far as it may change what the CPU computes.
const CPU_FACTS: [&str; 4] = ["vendor_id", "cpu family", "model", "stepping"];

/// The part that a program has of itself, whatever machine it runs.
fn program() -> Fingerprint {
    Fingerprint::new()
        .with(VERSION, env!("CARGO_PKG_VERSION"))
        .with(STATE, STATE_VERSION)
        .with(SOFT_CPU, soft::cpu_model_digest())
        .with(KVM_CPU, vmft_kvm::cpu_model_digest())
}

/// What `/proc/cpuinfo` says of the first CPU; a host whose CPUs differ is not known to Linux.
fn cpu_facts<const N: usize>(names: [&str; N]) -> [String; N] {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    names.map(|fact| {
        text.lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| name.trim() == fact)
            .map_or("unknown", |(_, value)| value.trim())
            .to_owned()
    })
}

/// The host's CPU and the KVM that runs guests on it, in words.
fn host_cpu() -> String {
    let [vendor, family, model, stepping] = cpu_facts(CPU_FACTS);
    format!("{vendor} {family}/{model}/{stepping}, KVM {}", kvm_of_this_host())
}

fn microcode() -> String {
    let [microcode] = cpu_facts(["microcode"]);
    microcode
}

fn engine(fingerprint: Fingerprint, engine: EngineKind) -> Fingerprint {
    let fingerprint = fingerprint.with(ENGINE, engine);
    match engine {
        EngineKind::Soft => fingerprint.with(HOST_CPU, ANY).with(MICROCODE, ANY),
        EngineKind::Kvm { .. } => {
            fingerprint.with(HOST_CPU, host_cpu()).with(MICROCODE, microcode())
        }
    }
}

fn disks(fingerprint: Fingerprint, disks: &[DiskConfig]) -> Fingerprint {
    let count = fingerprint.with("disks", disks.len());
    disks.iter().enumerate().fold(count, |fingerprint, (index, disk)| {
        let mode = if disk.read_only { "read-only" } else { "writable" };
        fingerprint.with(format!("disk {index}"), format!("{} bytes, {mode}", disk.capacity.0))
    })
}

/// Whether there is a network, and with which address, if that is known.
fn network(fingerprint: Fingerprint, network: Option<Option<MacAddress>>) -> Fingerprint {
    let fingerprint = fingerprint.with(NETWORK, if network.is_some() { "one" } else { "none" });
    match network {
        Some(Some(mac)) => fingerprint.with(MAC, mac),
        Some(None) => fingerprint.with(MAC, ANY),
        None => fingerprint.with(MAC, "none"),
    }
}

/// The fingerprint of a machine on this host, with this engine and this board's disks and network.
/// All else comes with the checkpoint.
pub fn fingerprint(kind: EngineKind, board: &BoardConfig) -> Fingerprint {
    let fingerprint = disks(engine(program(), kind), &board.disks);
    network(fingerprint, board.net.map(|net| Some(net.mac)))
}

/// What a side that is to get its machine from another says of itself.
#[derive(Debug, Clone, Copy)]
pub struct Joining<'a> {
    /// The one engine it wants, if not any.
    pub engine: Option<EngineKind>,
    /// Its disks.
    pub disks: &'a [DiskConfig],
    /// Whether it has a network, and the one address it wants there, if not any.
    pub network: Option<Option<MacAddress>>,
}

/// The fingerprint of a side that is to get its machine from another: of this host, with its disks
/// and network, and with any engine unless one is wanted.
pub fn joining_fingerprint(joining: Joining<'_>) -> Fingerprint {
    let program = program().with(HOST_CPU, host_cpu()).with(MICROCODE, microcode());
    let program = match joining.engine {
        Some(engine) => program.with(ENGINE, engine),
        None => program.with(ENGINE, ANY),
    };
    network(disks(program, joining.disks), joining.network)
}

/// A side of a pair that protects its guest like this.
#[must_use]
pub fn protecting(fingerprint: Fingerprint, protection: Protection) -> Fingerprint {
    let fingerprint = fingerprint.with(PROTECTION, protection);
    match protection {
        Protection::Lockstep => fingerprint,
        Protection::Checkpoint(_) => fingerprint.with(MICROCODE, ANY),
    }
}

/// The log of a machine with this engine was written by a program, and on a host, that executes as
/// this one does.
///
/// # Errors
/// The field in which it differs.
pub fn check_version(log: &Fingerprint, kind: EngineKind) -> Result<(), Mismatch> {
    let ours = engine(program(), kind);
    let theirs = [VERSION, STATE, ENGINE, HOST_CPU, MICROCODE, SOFT_CPU, KVM_CPU];
    log.only(&theirs).mismatch(&ours).map_or(Ok(()), Err)
}

/// A number nobody has used before.
///
/// # Errors
/// If the host has no random bytes.
pub fn nonce() -> io::Result<Nonce> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(Nonce(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmft_cpu::CpuCount;
    use vmft_kvm::PointKind;
    use vmft_vmm::board::{Bytes, NetConfig, UnixSeconds};

    fn board(net: Option<NetConfig>) -> BoardConfig {
        let (memory, clock_base) = (Bytes(64 << 20), UnixSeconds(0));
        BoardConfig { memory, clock_base, disks: vec![], entropy: true, net, cpus: CpuCount::ONE }
    }

    fn joining(engine: Option<EngineKind>) -> Fingerprint {
        joining_fingerprint(Joining { engine, disks: &[], network: None })
    }

    #[test]
    fn a_backup_that_names_no_engine_follows_any_and_one_that_does_only_that() {
        let kvm = |points| EngineKind::Kvm { points };
        let primary = fingerprint(kvm(PointKind::Exit), &board(None));
        assert_eq!(primary.mismatch(&joining(None)), None);
        let same = joining(Some(kvm(PointKind::Exit)));
        assert_eq!(primary.mismatch(&same), None);
        for (other, text) in [
            (EngineKind::Soft, "\"soft\""),
            (kvm(PointKind::Step), "\"kvm, points at single steps\""),
        ] {
            let mismatch = primary.mismatch(&joining(Some(other)));
            let told = mismatch.expect("another engine").to_string();
            let wanted = format!(
                "engine is \"kvm, points at exits\" on the primary and {text} on the backup"
            );
            assert_eq!(told, wanted);
        }
    }

    #[test]
    fn a_network_on_one_side_only_or_with_another_address_is_refused() {
        let [mac, other] = [7, 8].map(|last| MacAddress([2, 0, 0, 0, 0, last]));
        let net = NetConfig { mac, offloads: true };
        let with = fingerprint(EngineKind::Soft, &board(Some(net)));
        let without = fingerprint(EngineKind::Soft, &board(None));
        let side = |network| joining_fingerprint(Joining { engine: None, disks: &[], network });
        for network in [Some(None), Some(Some(mac))] {
            assert_eq!(with.mismatch(&side(network)), None);
            assert_eq!(without.mismatch(&side(network)).expect("none").field, NETWORK);
        }
        assert_eq!(with.mismatch(&side(None)).expect("one").field, NETWORK);
        assert_eq!(without.mismatch(&side(None)), None);
        assert_eq!(with.mismatch(&side(Some(Some(other)))).expect("another").field, MAC);
    }

    #[test]
    fn the_hosts_cpu_counts_only_where_the_guest_runs_on_it() {
        let elsewhere = |engine| {
            let cpu = "GenuineElsewhere 6/1/1";
            joining(engine).with(HOST_CPU, cpu)
        };
        let soft = fingerprint(EngineKind::Soft, &board(None));
        assert_eq!(soft.mismatch(&elsewhere(None)), None);
        let kvm = fingerprint(EngineKind::Kvm { points: PointKind::Exit }, &board(None));
        assert_eq!(kvm.mismatch(&elsewhere(None)).expect("another CPU").field, HOST_CPU);
    }

    #[test]
    fn a_host_with_another_kvm_is_told_with_both_sides() {
        let kvm = fingerprint(EngineKind::Kvm { points: PointKind::Exit }, &board(None));
        let ours = host_cpu();
        assert!(ours.contains("KVM "), "{ours}");
        let theirs = ours.replace("KVM ", "KVM other_");
        let joining = joining(None).with(HOST_CPU, &theirs);
        let told = kvm.mismatch(&joining).expect("another host").to_string();
        let wanted = format!("host cpu is {ours:?} on the primary and {theirs:?} on the backup");
        assert_eq!(told, wanted);
    }

    #[test]
    fn microcode_counts_where_a_run_is_replayed_and_nowhere_else() {
        let other = || joining(None).with(MICROCODE, "0x0");
        let kvm = |points| fingerprint(EngineKind::Kvm { points }, &board(None));
        let replayed = protecting(kvm(PointKind::Exit), Protection::Lockstep);
        let joining = protecting(other(), Protection::Lockstep);
        assert_eq!(replayed.mismatch(&joining).expect("another microcode").field, MICROCODE);
        let by_state = Protection::Checkpoint(crate::epoch::Interval::default());
        let free = protecting(kvm(PointKind::Free), by_state);
        assert_eq!(free.mismatch(&protecting(other(), by_state)), None);
    }

    #[test]
    fn a_log_of_another_engine_is_not_this_ones() {
        let log = fingerprint(EngineKind::Soft, &board(None));
        assert_eq!(check_version(&log, EngineKind::Soft), Ok(()));
        let kvm = EngineKind::Kvm { points: PointKind::Step };
        assert_eq!(check_version(&log, kvm).expect_err("another engine").field, ENGINE);
    }
}
