//! What the host says of itself: CPU, microcode, kernel, and which KVM is loaded.

use super::facts::{HostFacts, KvmKind};
use std::path::Path;
use vmft_cpu::soft;

/// Reads `/proc`. What is not there stays empty.
pub fn examine() -> HostFacts {
    let mut host = parse(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default());
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    host.kernel = release.trim().to_owned();
    host.compiler_obstacle = soft::compiler_obstacle();
    host.compiler = soft::compiler_mode();
    host
}

/// The first CPU of `/proc/cpuinfo`.
fn parse(cpuinfo: &str) -> HostFacts {
    let mut host = HostFacts::default();
    for line in cpuinfo.lines().take_while(|line| !line.is_empty()) {
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        let number = || value.parse().unwrap_or_default();
        match key.trim() {
            "vendor_id" => host.vendor = value.to_owned(),
            "cpu family" => host.family = number(),
            "model" => host.model = number(),
            "stepping" => host.stepping = number(),
            "model name" => host.name = value.to_owned(),
            "microcode" => host.microcode = value.to_owned(),
            "flags" => host.flags = value.split_whitespace().map(str::to_owned).collect(),
            _ => {}
        }
    }
    host
}

/// Which module of KVM is loaded, by the directories in `modules` (`/sys/module`).
pub fn kind(modules: &Path) -> KvmKind {
    [("kvm_pvm", KvmKind::Pvm), ("kvm_intel", KvmKind::Intel), ("kvm_amd", KvmKind::Amd)]
        .into_iter()
        .find(|(module, _)| modules.join(module).is_dir())
        .map_or(KvmKind::Unknown, |(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_cpu_is_read_and_the_second_is_not() {
        let text = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 85\n\
                    model name\t: Some CPU: fast\nstepping\t: 7\nmicrocode\t: 0x1\nflags\t\t: fpu vme\n\n\
                    processor\t: 1\nmodel\t\t: 86\n";
        let host = parse(text);
        assert_eq!((host.family, host.model, host.stepping), (6, 85, 7));
        assert_eq!((host.name.as_str(), host.microcode.as_str()), ("Some CPU: fast", "0x1"));
        assert!(host.has("vme") && !host.has("smap"));
        assert_eq!(parse("garbage\n"), HostFacts::default());
    }

    #[test]
    fn the_loaded_module_says_which_kvm_it_is() {
        let modules = tempfile::tempdir().unwrap();
        assert_eq!(kind(modules.path()), KvmKind::Unknown);
        std::fs::create_dir(modules.path().join("kvm_amd")).unwrap();
        assert_eq!(kind(modules.path()), KvmKind::Amd);
        std::fs::create_dir(modules.path().join("kvm_pvm")).unwrap();
        assert_eq!(kind(modules.path()), KvmKind::Pvm);
    }
}
