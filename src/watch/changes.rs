//! What has happened to a side between two statuses, where nobody tells of it.

use super::facts::{disks, level, protection, role_and_generation, seconds, shown};
use crate::check::Level;
use vmft_backup::status::{DiskTroubleStatus, FailoverReport, SideStatus};

/// Something that has happened.
#[derive(Debug)]
pub(super) struct Change {
    /// How bad it is.
    pub(super) level: Level,
    pub(super) text: String,
    /// It comes and goes: a guest on a busy host is slowed many times a minute.
    pub(super) swings: bool,
}

/// What has happened, in order.
#[derive(Debug, Default)]
struct Changes(Vec<Change>);

impl Changes {
    fn add(&mut self, level: Level, text: impl Into<String>) {
        self.0.push(Change { level, text: text.into(), swings: false });
    }
}

/// What a side says of itself that answers for the first time.
pub(super) fn first(status: &SideStatus) -> Change {
    let text = format!("{}; {}", role_and_generation(status), protection(status));
    Change { level: Level::Ok, text, swings: false }
}

/// What there is to tell of a side that answers again after `time`. It may be another process.
pub(super) fn again(before: &SideStatus, now: &SideStatus, time: &str) -> Vec<Change> {
    let mut changes = Changes::default();
    of_failover(before, now, &mut changes);
    let Change { level, text, .. } = first(now);
    changes.add(level, format!("answers again after {time}: {text}"));
    changes.0
}

/// What is new in `now`, in the order in which it may have happened.
pub(super) fn between(before: &SideStatus, now: &SideStatus) -> Vec<Change> {
    let mut changes = Changes::default();
    of_role(before, now, &mut changes);
    of_guest(before, now, &mut changes);
    of_disks(before, now, &mut changes);
    of_divergences(before, now, &mut changes);
    if now.events_lost > before.events_lost {
        let lost = now.events_lost - before.events_lost;
        changes.add(Level::Warning, format!("{lost} events are not in the event log"));
    }
    changes.0
}

fn took_over(failover: &FailoverReport, changes: &mut Changes) {
    let FailoverReport { generation, suspicion, detection_ms, arbiter_ms, replay_ms, .. } =
        failover;
    let text = format!(
        "took generation {generation}: {suspicion}; detection {detection_ms:.1} ms, arbiter \
         {arbiter_ms:.1} ms, replay {replay_ms:.1} ms"
    );
    changes.add(Level::Warning, text);
}

fn of_failover(before: &SideStatus, now: &SideStatus, changes: &mut Changes) {
    let generation = |status: &SideStatus| status.failover.as_ref().map(|won| won.generation);
    if let Some(failover) = now.failover.as_ref().filter(|_| generation(before) != generation(now))
    {
        took_over(failover, changes);
    }
}

fn of_role(before: &SideStatus, now: &SideStatus, changes: &mut Changes) {
    of_failover(before, now, changes);
    if (before.role, before.generation) != (now.role, now.generation) {
        let why = now.reason.as_ref().map_or_else(String::new, |why| format!(": {why}"));
        changes.add(level(now), format!("{}{why}", role_and_generation(now)));
    }
    let joined = |status: &SideStatus| status.join.as_ref().map(|join| join.total_ms.to_bits());
    if let Some(join) = now.join.as_ref().filter(|_| joined(before) != joined(now)) {
        let text = format!(
            "a backup has joined in {:.0} ms; the guest rested for {:.1} ms",
            join.total_ms, join.pause_ms
        );
        changes.add(Level::Ok, text);
    }
    if before.followers != now.followers {
        changes.add(level(now), protection(now));
    }
    let first_output =
        |status: &SideStatus| status.failover.as_ref().and_then(|won| won.first_output_ms);
    if let (None, Some(ms)) = (first_output(before), first_output(now)) {
        let text = format!("its first output came {ms:.1} ms after the peer's last sign");
        changes.add(Level::Ok, text);
    }
}

fn of_guest(before: &SideStatus, now: &SideStatus, changes: &mut Changes) {
    if before.guest_slowed != now.guest_slowed {
        let (level, text) = match now.guest_slowed {
            true => (Level::Warning, "the guest is slowed, because its backup is behind"),
            false => (Level::Ok, "the guest is not slowed any more"),
        };
        changes.0.push(Change { level, text: text.to_owned(), swings: true });
    }
    // How long it has been so may be in the text.
    match (&before.guest_waits_for, &now.guest_waits_for) {
        (None, Some(why)) => {
            let text = format!("the guest is stopped until {}", shown(why));
            changes.add(level(now), text);
        }
        (Some(_), None) => changes.add(Level::Ok, "the guest goes on".to_owned()),
        _ => {}
    }
    match (&before.console_trouble, &now.console_trouble) {
        (None, Some(why)) => changes.add(Level::Warning, format!("console: {}", shown(why))),
        (Some(_), None) => changes.add(Level::Ok, "the console is well again".to_owned()),
        _ => {}
    }
}

fn of_disks(before: &SideStatus, now: &SideStatus, changes: &mut Changes) {
    let has = |status: &SideStatus, disk: &DiskTroubleStatus| {
        status
            .disk_troubles
            .iter()
            .any(|other| (other.disk, other.state) == (disk.disk, disk.state))
    };
    for disk in disks(now).iter().filter(|disk| !has(before, disk)) {
        changes.add(level(now), shown(&disk.text()));
    }
    for disk in disks(before).iter().filter(|disk| !has(now, disk)) {
        if !disks(now).iter().any(|other| other.disk == disk.disk) {
            let time = seconds(disk.for_ms);
            changes.add(Level::Ok, format!("disk {} is well again, after {time}", disk.path));
        }
    }
}

fn of_divergences(before: &SideStatus, now: &SideStatus, changes: &mut Changes) {
    if let Some(divergence) =
        now.divergence.as_ref().filter(|_| now.divergences > before.divergences)
    {
        changes.add(Level::Warning, format!("diverged: {}", divergence.text));
    }
    if now.divergences_mended > before.divergences_mended {
        changes.add(Level::Ok, "mended: a backup has joined from a checkpoint".to_owned());
    }
}
