//! What has happened to a side between two statuses, where nobody tells of it.

use super::facts::{disks, level, protection, role_and_generation, seconds, shown};
use crate::check::Level;
use vmft_backup::status::{DiskTroubleStatus, FailoverReport, SideStatus};

/// Something that has happened, and how bad it is.
pub(super) type Change = (Level, String);

/// What a side says of itself that answers for the first time.
pub(super) fn first(status: &SideStatus) -> Change {
    (Level::Ok, format!("{}; {}", role_and_generation(status), protection(status)))
}

/// What is new in `now`, in the order in which it may have happened.
pub(super) fn between(before: &SideStatus, now: &SideStatus) -> Vec<Change> {
    let mut changes = Vec::new();
    of_role(before, now, &mut changes);
    of_guest(before, now, &mut changes);
    of_disks(before, now, &mut changes);
    of_divergences(before, now, &mut changes);
    if now.events_lost > before.events_lost {
        let lost = now.events_lost - before.events_lost;
        changes.push((Level::Warning, format!("{lost} events are not in the event log")));
    }
    changes
}

fn took_over(failover: &FailoverReport) -> Change {
    let FailoverReport { generation, suspicion, detection_ms, arbiter_ms, replay_ms, .. } =
        failover;
    let text = format!(
        "took generation {generation}: {suspicion}; detection {detection_ms:.1} ms, arbiter \
         {arbiter_ms:.1} ms, replay {replay_ms:.1} ms"
    );
    (Level::Warning, text)
}

fn of_role(before: &SideStatus, now: &SideStatus, changes: &mut Vec<Change>) {
    let failover_of = |status: &SideStatus| status.failover.as_ref().map(|won| won.generation);
    if let Some(failover) =
        now.failover.as_ref().filter(|_| failover_of(before) != failover_of(now))
    {
        changes.push(took_over(failover));
    }
    if (before.role, before.generation) != (now.role, now.generation) {
        let why = now.reason.as_ref().map_or_else(String::new, |why| format!(": {why}"));
        changes.push((level(now), format!("{}{why}", role_and_generation(now))));
    }
    let joined = |status: &SideStatus| status.join.as_ref().map(|join| join.total_ms.to_bits());
    if let Some(join) = now.join.as_ref().filter(|_| joined(before) != joined(now)) {
        let text = format!(
            "a backup has joined in {:.0} ms; the guest rested for {:.1} ms",
            join.total_ms, join.pause_ms
        );
        changes.push((Level::Ok, text));
    }
    if before.followers != now.followers {
        changes.push((level(now), protection(now)));
    }
    let first_output =
        |status: &SideStatus| status.failover.as_ref().and_then(|won| won.first_output_ms);
    if let (None, Some(ms)) = (first_output(before), first_output(now)) {
        let text = format!("its first output came {ms:.1} ms after the peer's last sign");
        changes.push((Level::Ok, text));
    }
}

fn of_guest(before: &SideStatus, now: &SideStatus, changes: &mut Vec<Change>) {
    if before.guest_slowed != now.guest_slowed {
        changes.push(match now.guest_slowed {
            true => {
                (Level::Warning, "the guest is slowed, because its backup is behind".to_owned())
            }
            false => (Level::Ok, "the guest is not slowed any more".to_owned()),
        });
    }
    // How long it has been so may be in the text.
    match (&before.guest_waits_for, &now.guest_waits_for) {
        (None, Some(why)) => {
            let text = format!("the guest is stopped until {}", shown(why));
            changes.push((level(now), text));
        }
        (Some(_), None) => changes.push((Level::Ok, "the guest goes on".to_owned())),
        _ => {}
    }
    match (&before.console_trouble, &now.console_trouble) {
        (None, Some(why)) => changes.push((Level::Warning, format!("console: {}", shown(why)))),
        (Some(_), None) => changes.push((Level::Ok, "the console is well again".to_owned())),
        _ => {}
    }
}

fn of_disks(before: &SideStatus, now: &SideStatus, changes: &mut Vec<Change>) {
    let has = |status: &SideStatus, disk: &DiskTroubleStatus| {
        status
            .disk_troubles
            .iter()
            .any(|other| (other.disk, other.state) == (disk.disk, disk.state))
    };
    for disk in disks(now).iter().filter(|disk| !has(before, disk)) {
        changes.push((level(now), shown(&disk.text())));
    }
    for disk in disks(before).iter().filter(|disk| !has(now, disk)) {
        if !disks(now).iter().any(|other| other.disk == disk.disk) {
            let time = seconds(disk.for_ms);
            changes.push((Level::Ok, format!("disk {} is well again, after {time}", disk.path)));
        }
    }
}

fn of_divergences(before: &SideStatus, now: &SideStatus, changes: &mut Vec<Change>) {
    if let Some(divergence) =
        now.divergence.as_ref().filter(|_| now.divergences > before.divergences)
    {
        changes.push((Level::Warning, format!("diverged: {}", divergence.text)));
    }
    if now.divergences_mended > before.divergences_mended {
        changes.push((Level::Ok, "mended: a backup has joined from a checkpoint".to_owned()));
    }
}
