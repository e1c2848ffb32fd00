//! Which hardware event counts retired conditional branches on which CPU.
//!
//! The table is rr's (`PerfCounters.cc`), without the bits that the kernel sets by itself.

use super::facts::BranchCounter;
use crate::trust::facts::HostFacts;

/// `PERF_TYPE_RAW`.
pub const RAW: u32 = 4;

/// The event for this CPU; `None` for a CPU of which nobody knows one that is exact.
pub fn branches(host: &HostFacts) -> Option<BranchCounter> {
    let (raw, skid) = match (host.vendor.as_str(), host.family) {
        ("GenuineIntel", 6) => intel(host.model)?,
        // Zen 1 to 5, and Hygon's Zen: no bound on the skid is known.
        ("AuthenticAMD", 0x17 | 0x19 | 0x1A) | ("HygonGenuine", 0x18) => (0xD1, 10_000),
        _ => return None,
    };
    Some(BranchCounter { kind: RAW, raw, skid })
}

fn intel(model: u32) -> Option<(u64, u64)> {
    Some(match model {
        // Nehalem to Comet Lake, servers to Cascade Lake.
        0x1A | 0x1E | 0x1F | 0x2E | 0x25 | 0x2C | 0x2F | 0x2A | 0x2D | 0x3A | 0x3E | 0x3C
        | 0x3F | 0x45 | 0x46 | 0x3D | 0x47 | 0x4F | 0x56 | 0x4E | 0x5E | 0x55 | 0x8E | 0x9E
        | 0xA5 | 0xA6 => (0x01C4, 100),
        // Ice Lake, Tiger Lake, Rocket Lake.
        0x7D | 0x7E | 0x6A | 0x6C | 0x8C | 0x8D | 0xA7 => (0x11C4, 100),
        // Alder Lake to Meteor Lake, Sapphire Rapids to Granite Rapids.
        0x97 | 0x9A | 0xB7 | 0xBA | 0xBF | 0x8F | 0xCF | 0xAA | 0xAC | 0xAD | 0xAE => (0x11C4, 125),
        // Lunar Lake, Arrow Lake.
        0xBD | 0xB5 | 0xC5 | 0xC6 => (0x100_0000_11C4, 125),
        // Atoms, Silvermont to Crestmont.
        0x37 | 0x4A | 0x4C | 0x4D | 0x5A | 0x5D | 0x5C | 0x5F | 0x7A | 0x86 | 0x96 | 0x9C
        | 0xBE | 0xAF | 0xB6 => (0x7EC4, 100),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_nobody_knows_has_no_event() {
        let cpu = |vendor: &str, family, model| {
            let host =
                HostFacts { vendor: vendor.to_owned(), family, model, ..HostFacts::default() };
            branches(&host).map(|event| event.raw)
        };
        assert_eq!(cpu("GenuineIntel", 6, 0x55), Some(0x1C4));
        assert_eq!(cpu("GenuineIntel", 6, 0x8F), Some(0x11C4));
        assert_eq!(cpu("GenuineIntel", 6, 0xBD), Some(0x100_0000_11C4));
        assert_eq!(cpu("GenuineIntel", 6, 0x0F), None);
        assert_eq!(cpu("GenuineIntel", 15, 0x55), None);
        assert_eq!(cpu("AuthenticAMD", 0x19, 0x21), Some(0xD1));
        assert_eq!(cpu("AuthenticAMD", 0x15, 0x02), None);
        assert_eq!(cpu("TCGTCGTCGTCG", 0x17, 1), None);
    }
}
