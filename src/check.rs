//! `vmft status --check`: one line and an exit code, as monitoring plugins have them.

use std::fmt;
use std::time::Duration;
use vmft_backup::status::{DiskState, Role, SideStatus};

/// How bad it is; the number is the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// All is well.
    Ok = 0,
    /// Somebody should look.
    Warning = 1,
    /// Somebody must look.
    Critical = 2,
    /// Nobody knows.
    Unknown = 3,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "OK",
            Self::Warning => "WARNING",
            Self::Critical => "CRITICAL",
            Self::Unknown => "UNKNOWN",
        })
    }
}

/// What is too much.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// A backup that is further behind is a warning.
    pub max_lag: Duration,
    /// A live side that has been without a backup for longer is critical; before, it is a warning.
    pub max_unprotected: Duration,
}

/// What is to be said of a side.
pub fn check(status: &SideStatus, limits: Limits) -> (Level, String) {
    let mut found: Vec<(Level, String)> = Vec::new();
    let mut find = |level, text: String| found.push((level, text));
    let unprotected = status.unprotected_ms.map(Duration::from_millis);
    let state = match status.role {
        Role::Primary => format!("protected by {} in generation", status.followers),
        Role::Backup => "follows in generation".to_owned(),
        Role::Joining => "waits for a live side that wants a backup, of generation".to_owned(),
        Role::Starting => "starts in generation".to_owned(),
        Role::Unprotected => "runs without a pair, generation".to_owned(),
        Role::WaitingForBackup | Role::Alone => "live without a backup in generation".to_owned(),
        Role::Deciding => "has lost its peer, and waits for the arbiter, in generation".to_owned(),
        Role::Halted => "halted in generation".to_owned(),
        Role::Stopped => "stopped in generation".to_owned(),
    };
    match (status.role, unprotected) {
        (Role::Halted | Role::Stopped, _) => {
            let why = status.reason.as_ref().map_or_else(String::new, ToString::to_string);
            find(Level::Critical, why);
        }
        (Role::Deciding | Role::Alone | Role::WaitingForBackup, time) => {
            let time = time.unwrap_or_default();
            let is_long = time > limits.max_unprotected;
            let level = if is_long { Level::Critical } else { Level::Warning };
            find(level, format!("unprotected for {} s", time.as_secs()));
        }
        _ => {}
    }
    let lag = status.channel.as_ref().map(|channel| channel.execution_lag_ms);
    if let Some(lag) = lag.filter(|lag| *lag > limits.max_lag.as_secs_f64() * 1e3) {
        find(Level::Warning, format!("the backup is {lag:.0} ms behind"));
    }
    let troubles = &status.disk_troubles;
    let is_stopped = troubles.iter().any(|disk| disk.state == DiskState::Stopped);
    if let Some(why) = &status.guest_waits_for {
        // Others end by themselves.
        let level = if is_stopped { Level::Critical } else { Level::Warning };
        find(level, format!("the guest is stopped until {why}"));
    }
    for disk in troubles.iter().filter(|disk| disk.state != DiskState::Stopped) {
        let seconds = disk.for_ms / 1000;
        find(Level::Warning, format!("{}, for {seconds} s", disk.text()));
    }
    if let Some(trouble) = &status.console_trouble {
        find(Level::Warning, format!("console: {trouble}"));
    }
    if status.divergences > status.divergences_mended {
        find(Level::Warning, "a divergence is not mended".to_owned());
    }
    if status.events_lost > 0 {
        find(Level::Warning, format!("{} events are not in the event log", status.events_lost));
    }
    let level = found.iter().map(|(level, _)| *level).max().unwrap_or(Level::Ok);
    let mut text = format!("VMFT {level} - {state} {}", status.generation);
    for (_, what) in found.iter().filter(|(_, what)| !what.is_empty()) {
        text.push_str("; ");
        text.push_str(what);
    }
    // Behind the bar: label=value;warning;critical.
    text.push_str(" |");
    if let Some(lag) = lag {
        text.push_str(&format!(" lag={:.4}s;{}", lag / 1e3, limits.max_lag.as_secs_f64()));
    }
    if let Some(time) = unprotected {
        let limit = limits.max_unprotected.as_secs_f64();
        text.push_str(&format!(" unprotected={}s;0;{limit}", time.as_secs_f64()));
    }
    text.push_str(&format!(" generation={}", status.generation));
    // A bar of foreign text would begin figures.
    let (said, figures) = text.rsplit_once(" |").expect("just written");
    (level, format!("{} |{figures}", said.replace('|', "/")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmft_backup::status::{ChannelStatus, DiskTroubleStatus};

    const LIMITS: Limits =
        Limits { max_lag: Duration::from_millis(200), max_unprotected: Duration::from_secs(60) };

    fn of(role: Role, unprotected_ms: Option<u64>, lag_ms: f64) -> (Level, String) {
        let channel = Some(ChannelStatus { execution_lag_ms: lag_ms, ..ChannelStatus::default() });
        let status =
            SideStatus { role, generation: 4, unprotected_ms, channel, ..SideStatus::default() };
        check(&status, LIMITS)
    }

    #[test]
    fn what_a_side_does_is_a_level_and_one_line_with_figures() {
        let (level, text) = of(Role::Primary, None, 1.5);
        assert_eq!(level, Level::Ok);
        assert_eq!(text, "VMFT OK - protected by 0 in generation 4 | lag=0.0015s;0.2 generation=4");
        assert_eq!(of(Role::Primary, None, 200.5).0, Level::Warning);
        assert_eq!(of(Role::Alone, Some(59_000), 0.0).0, Level::Warning);
        let (level, text) = of(Role::Alone, Some(61_000), 0.0);
        assert_eq!(level, Level::Critical);
        assert!(text.contains("unprotected for 61 s") && text.contains("unprotected=61s;0;60"));
        assert_eq!(of(Role::Halted, None, 0.0).0, Level::Critical);
        for role in [Role::Backup, Role::Joining, Role::Unprotected] {
            assert_eq!(of(role, None, 0.0).0, Level::Ok, "{role:?}");
        }
        assert_eq!([Level::Ok as u8, Level::Unknown as u8], [0, 3]);
    }

    #[test]
    fn a_guest_that_a_disk_stops_is_critical_and_a_disk_that_hangs_a_warning() {
        let trouble = |state, error: Option<&str>| DiskTroubleStatus {
            disk: 0,
            path: "/a.img".into(),
            state,
            what: "writing 512 bytes at byte 0".to_owned(),
            error: error.map(Into::into),
            is_full: true,
            requests: 1,
            for_ms: 61_000,
        };
        let of = |disk: DiskTroubleStatus, waits: Option<&str>| {
            let status = SideStatus {
                role: Role::Unprotected,
                disk_troubles: vec![disk],
                guest_waits_for: waits.map(str::to_owned),
                ..SideStatus::default()
            };
            check(&status, LIMITS)
        };
        let stopped = trouble(DiskState::Stopped, Some("no room"));
        let (level, text) = of(stopped, Some("it is resumed"));
        assert_eq!(level, Level::Critical);
        assert_eq!(text.matches("stopped until it is resumed").count(), 1, "{text}");
        let (level, text) = of(trouble(DiskState::Hangs, None), None);
        assert_eq!(level, Level::Warning);
        assert!(text.contains("/a.img") && text.contains("for 61 s"), "{text}");
        assert_eq!(of(trouble(DiskState::Unreachable, Some("EIO")), None).0, Level::Warning);
    }

    #[test]
    fn the_worst_decides_and_foreign_text_makes_no_figures() {
        let status = SideStatus {
            role: Role::Halted,
            reason: Some("a | b=1\nc".into()),
            console_trouble: Some("x".to_owned()),
            ..SideStatus::default()
        };
        let (level, text) = check(&status, LIMITS);
        assert_eq!(level, Level::Critical);
        assert_eq!(text.matches('|').count(), 1, "{text}");
        assert!(!text.contains('\n') && text.contains("console: x"), "{text}");
    }
}
