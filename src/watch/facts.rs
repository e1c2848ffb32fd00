//! What one status says, in words.

use crate::check::{self, Level, Limits};
use crate::explain::text::role_name;
use std::time::Duration;
use vmft_backup::status::{DiskState, DiskTroubleStatus, Role, SideStatus};
use vmft_log::foreign::ForeignText;

/// What is too much; as `vmft status --check` has it where nobody says otherwise.
const LIMITS: Limits =
    Limits { max_lag: Duration::from_secs(1), max_unprotected: Duration::from_secs(60) };

/// Disks with which something is wrong that are looked at; a machine has no more of them.
const DISKS: usize = 16;

/// Text of whatever origin as it may be shown: cut, and nothing in it that a terminal obeys.
pub(crate) fn shown(text: &str) -> String {
    ForeignText::from(text).to_string()
}

/// Disks with which something is wrong.
pub(super) fn disks(status: &SideStatus) -> &[DiskTroubleStatus] {
    &status.disk_troubles[..status.disk_troubles.len().min(DISKS)]
}

/// How a side is, as a check would say.
pub(crate) fn level(status: &SideStatus) -> Level {
    check::check(status, LIMITS).0
}

/// What a side is.
pub(crate) fn role_and_generation(status: &SideStatus) -> String {
    format!("{}, generation {}", role_name(status.role), status.generation)
}

/// A time as people read it.
pub(super) fn seconds(ms: u64) -> String {
    match ms {
        0..60_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        60_000..3_600_000 => format!("{} min {} s", ms / 60_000, ms / 1000 % 60),
        _ => format!("{} h {} min", ms / 3_600_000, ms / 60_000 % 60),
    }
}

/// Who protects the guest of a side, or whom this side protects. It changes when that does, and not with
/// time.
pub(crate) fn protection(status: &SideStatus) -> String {
    match status.role {
        Role::Starting => "not begun yet".to_owned(),
        Role::Joining => "looks for a live side that wants a backup".to_owned(),
        Role::Unprotected => "of no pair".to_owned(),
        Role::WaitingForBackup => "waits for its backup".to_owned(),
        Role::Primary if status.followers == 1 => "protected by 1 backup".to_owned(),
        Role::Primary => format!("protected by {} backups", status.followers),
        Role::Backup => "protects its primary".to_owned(),
        Role::Deciding => "its peer is lost; the arbiter is asked".to_owned(),
        Role::Alone => "UNPROTECTED".to_owned(),
        Role::Halted | Role::Stopped => {
            status.reason.as_ref().map_or_else(|| "over".to_owned(), ToString::to_string)
        }
    }
}

/// The same, with for how long.
pub(super) fn protection_now(status: &SideStatus) -> String {
    let so_long = status.unprotected_ms.map(seconds);
    so_long.map_or_else(|| protection(status), |time| format!("{}, for {time}", protection(status)))
}

/// Where backups join a side that has none.
pub(super) fn joined_at(status: &SideStatus) -> Option<String> {
    let waits = matches!(status.role, Role::WaitingForBackup | Role::Alone);
    status.listening.as_deref().filter(|_| waits).map(|address| format!("at {}", shown(address)))
}

/// What the guest does, seen from a side.
pub(super) fn guest(status: &SideStatus) -> (Level, String) {
    let at = format!("at {:.1} s", Duration::from_millis(status.guest_time_ms).as_secs_f64());
    let text = match status.role {
        Role::Starting | Role::Joining => "not here".to_owned(),
        Role::WaitingForBackup => "rests until its backup has joined".to_owned(),
        Role::Backup => match &status.epochs {
            Some(_) => "kept here, epoch by epoch".to_owned(),
            None => "replayed here".to_owned(),
        },
        Role::Halted => "runs here no more".to_owned(),
        Role::Stopped => "is over".to_owned(),
        Role::Unprotected | Role::Primary | Role::Deciding | Role::Alone => {
            if let Some(why) = &status.guest_waits_for {
                let is_stopped =
                    status.disk_troubles.iter().any(|disk| disk.state == DiskState::Stopped);
                let level = if is_stopped { Level::Critical } else { Level::Warning };
                return (level, format!("STOPPED until {}", shown(why)));
            }
            if status.guest_slowed {
                return (Level::Warning, format!("SLOWED: its backup is behind; {at}"));
            }
            if status.guest_idle { format!("idle, {at}") } else { format!("running, {at}") }
        }
    };
    (Level::Ok, text)
}

/// What is wrong beside that.
pub(super) fn troubles(status: &SideStatus) -> Vec<(String, Level, String)> {
    let mut troubles = Vec::new();
    for disk in disks(status) {
        let is_stopped = disk.state == DiskState::Stopped;
        let level = if is_stopped { Level::Critical } else { Level::Warning };
        // What stops the guest stands there already.
        let text = match is_stopped {
            true => format!("{} requests kept for {}", disk.requests, seconds(disk.for_ms)),
            false => format!("{}, for {}", shown(&disk.text()), seconds(disk.for_ms)),
        };
        troubles.push((format!("disk {}", disk.disk), level, text));
    }
    if let Some(trouble) = &status.console_trouble {
        troubles.push(("console".to_owned(), Level::Warning, shown(trouble)));
    }
    if status.divergences > status.divergences_mended {
        let text =
            status.divergence.as_ref().map_or_else(String::new, |last| last.text.to_string());
        troubles.push(("differs".to_owned(), Level::Warning, text));
    }
    if status.events_lost > 0 {
        let text = format!("{} are not in the event log", status.events_lost);
        troubles.push(("events".to_owned(), Level::Warning, text));
    }
    troubles
}
