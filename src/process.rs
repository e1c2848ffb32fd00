//! This process, as the host sees it.

use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};
use std::ops::Range;

/// From now on this process leaves no core dump, and others of its user cannot read its memory: a guest's
/// is in it. The programs it starts are as they would be.
///
/// # Errors
/// If the host does not take that.
pub fn forbid_core_dumps() -> nix::Result<()> {
    nix::sys::prctl::set_dumpable(false)
}

/// The option by which a process is told to end with the one that has started it.
pub const END_WITH: &str = "end-with";

/// From now on this process is killed when process `parent` ends, which has started it. False if that has
/// ended already.
///
/// # Errors
/// If the host does not take that.
pub fn end_with(parent: u32) -> nix::Result<bool> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    Ok(i32::try_from(parent).is_ok_and(|parent| getppid() == Pid::from_raw(parent)))
}

/// Resident memory of this process outside the ranges of guest memory, in bytes; `None` where the
/// host does not tell.
pub fn overhead_bytes(guest_memory: &[Range<usize>]) -> Option<u64> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").ok()?;
    Some(resident_outside(&smaps, guest_memory))
}

/// Sums `Rss` over the mappings of `smaps` (proc(5)) that begin outside all `ranges`.
fn resident_outside(smaps: &str, ranges: &[Range<usize>]) -> u64 {
    let mut counts = false;
    let mut kilobytes = 0;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, _)) = first.split_once('-') {
            let start = usize::from_str_radix(start, 16).unwrap_or(0);
            counts = !ranges.iter().any(|range| range.contains(&start));
        } else if first == "Rss:" && counts {
            kilobytes += words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    kilobytes * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_not_counted() {
        let smaps = "1000-3000 rw-p 0 00:00 0 [heap]\nSize: 8 kB\nRss: 4 kB\n\
                     10000-90000 rw-p 0 00:00 0\nSize: 512 kB\nRss: 300 kB\n\
                     a0000-b0000 r--p 0 00:00 0 /lib/x\nRss: 16 kB\n";
        let guest = std::slice::from_ref(&(0x10000..0x90000));
        assert_eq!(resident_outside(smaps, guest), 20 * 1024);
        assert_eq!(resident_outside(smaps, &[]), 320 * 1024);
    }
}
