//! A side's status as Prometheus reads it: text, a line a value (exposition format 0.0.4).
//!
//! The names are part of the interface: `docs/operating.md` lists them.

use std::fmt::Write;
use vmft_backup::status::{DiskState, Role, SideStatus};

/// The format's media type.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All roles: each has a line, of which one is 1.
const ROLES: [Role; 10] = [
    Role::Starting,
    Role::Joining,
    Role::Unprotected,
    Role::WaitingForBackup,
    Role::Primary,
    Role::Backup,
    Role::Deciding,
    Role::Alone,
    Role::Halted,
    Role::Stopped,
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Gauge,
    Counter,
}

/// Writes metrics one after the other.
#[derive(Debug, Default)]
struct Metrics {
    text: String,
}

impl Metrics {
    /// A metric with a line for each of its `values`, which have labels that differ. Nothing for none.
    fn several(&mut self, kind: Kind, name: &str, help: &str, values: &[(String, f64)]) {
        if values.is_empty() {
            return;
        }
        let kind = match kind {
            Kind::Gauge => "gauge",
            Kind::Counter => "counter",
        };
        // Writing to a text does not fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in values {
            let _ = writeln!(self.text, "{name}{labels} {value}");
        }
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Into<Option<f64>>) {
        if let Some(value) = value.into() {
            self.several(Kind::Gauge, name, help, &[(String::new(), value)]);
        }
    }

    fn counter(&mut self, name: &str, help: &str, value: impl Into<Option<u64>>) {
        if let Some(value) = value.into() {
            self.several(Kind::Counter, name, help, &[(String::new(), value as f64)]);
        }
    }
}

fn label(name: &str, value: &str) -> String {
    format!("{{{name}=\"{value}\"}}")
}

fn flag(is_set: bool) -> f64 {
    f64::from(u8::from(is_set))
}

/// Milliseconds as seconds.
fn of_ms(ms: f64) -> f64 {
    ms / 1e3
}

/// Microseconds as seconds.
fn of_us(us: f64) -> f64 {
    us / 1e6
}

/// The status as text.
pub fn render(status: &SideStatus) -> String {
    let mut metrics = Metrics::default();
    let version = label("version", env!("CARGO_PKG_VERSION"));
    metrics.several(Kind::Gauge, "vmft_build_info", "The program.", &[(version, 1.0)]);
    let roles = ROLES.map(|role| {
        (label("role", &crate::explain::text::role_name(role)), flag(role == status.role))
    });
    metrics.several(Kind::Gauge, "vmft_role", "1 for what the side is doing.", &roles);
    metrics.gauge("vmft_generation", "The side's generation.", status.generation as f64);
    metrics.gauge("vmft_followers", "Backups that follow.", status.followers as f64);
    let unprotected = status.unprotected_ms.map(|ms| of_ms(ms as f64));
    let help = "For how long a live side has had no backup that could take its place.";
    metrics.gauge("vmft_unprotected_seconds", help, unprotected);
    guest(&mut metrics, status);
    outputs(&mut metrics, status);
    channel(&mut metrics, status);
    joins(&mut metrics, status);
    failover(&mut metrics, status);
    metrics.text
}

fn guest(metrics: &mut Metrics, status: &SideStatus) {
    metrics.counter("vmft_guest_points_total", "The guest's execution point.", status.point);
    let help = "The guest's own time.";
    metrics.gauge("vmft_guest_time_seconds", help, of_ms(status.guest_time_ms as f64));
    let help = "1 while the guest waits for an interrupt.";
    metrics.gauge("vmft_guest_idle", help, flag(status.guest_idle));
    let help = "1 while the guest is stopped: until outputs have left, or it is resumed.";
    metrics.gauge("vmft_guest_stopped", help, flag(status.guest_waits_for.is_some()));
    let help = "1 while the guest is slowed, because its backup is behind.";
    metrics.gauge("vmft_guest_slowed", help, flag(status.guest_slowed));
    let states = [
        ("stopped", DiskState::Stopped),
        ("hangs", DiskState::Hangs),
        ("unreachable", DiskState::Unreachable),
    ]
    .map(|(name, state)| {
        let count = status.disk_troubles.iter().filter(|disk| disk.state == state).count();
        (label("state", name), count as f64)
    });
    let help = "Disks with which something is wrong.";
    metrics.several(Kind::Gauge, "vmft_disk_troubles", help, &states);
    let help = "Console bytes let out.";
    metrics.counter("vmft_console_bytes_total", help, status.console_bytes);
    if let Some(network) = &status.network {
        let values =
            [("sent", network.sent), ("received", network.received), ("lost", network.lost)]
                .map(|(what, count)| (label("what", what), count as f64));
        let help = "The guest's packets.";
        metrics.several(Kind::Counter, "vmft_network_packets_total", help, &values);
    }
    let overhead = status.overhead_bytes.map(|bytes| bytes as f64);
    metrics.gauge("vmft_overhead_bytes", "Memory beyond the guest's.", overhead);
}

fn outputs(metrics: &mut Metrics, status: &SideStatus) {
    let help = "Outputs that wait for an acknowledgement.";
    metrics.gauge("vmft_outputs_waiting", help, status.outputs_waiting as f64);
    let help = "Memory taken by outputs that are not out.";
    metrics.gauge("vmft_outputs_waiting_bytes", help, status.outputs_waiting_bytes as f64);
    let help = "Marks of outputs that were released.";
    metrics.counter("vmft_output_marks_total", help, status.outputs_marked);
    let delays = [("median", status.output_delay_us), ("worst", status.output_delay_worst_us)]
        .map(|(what, us)| (label("of", what), of_us(us)));
    let help = "Time from an output's mark to its release.";
    metrics.several(Kind::Gauge, "vmft_output_delay_seconds", help, &delays);
}

fn channel(metrics: &mut Metrics, status: &SideStatus) {
    let Some(channel) = &status.channel else { return };
    metrics.counter("vmft_log_bytes_total", "Bytes of log.", channel.log_bytes);
    metrics.counter("vmft_log_entries_total", "Entries of log.", channel.log_entries);
    let help = "Bytes in the log's buffer.";
    metrics.gauge("vmft_log_buffered_bytes", help, channel.buffered_bytes as f64);
    let help = "How far the backup's guest is behind the primary's.";
    metrics.gauge("vmft_execution_lag_seconds", help, of_ms(channel.execution_lag_ms));
    let times =
        [("median", channel.acknowledgement_us), ("worst", channel.acknowledgement_worst_us)]
            .map(|(what, us)| (label("of", what), of_us(us)));
    let help = "Time from an output's mark to its acknowledgement.";
    metrics.several(Kind::Gauge, "vmft_acknowledgement_seconds", help, &times);
}

fn joins(metrics: &mut Metrics, status: &SideStatus) {
    if let Some(join) = &status.join {
        let help = "How long the guest rested for the last join.";
        metrics.gauge("vmft_join_pause_seconds", help, of_ms(join.pause_ms));
        metrics.gauge("vmft_join_seconds", "How long the last join took.", of_ms(join.total_ms));
    }
    if let Some(epochs) = &status.epochs {
        metrics.counter("vmft_epochs_total", "Epochs since the last join.", epochs.epochs);
        let help = "How long the guest rested for an epoch.";
        let pauses = [("last", epochs.pause_ms), ("worst", epochs.worst_pause_ms)]
            .map(|(what, ms)| (label("of", what), of_ms(ms)));
        metrics.several(Kind::Gauge, "vmft_epoch_pause_seconds", help, &pauses);
        let help = "What the epochs came to in the log.";
        metrics.counter("vmft_epoch_bytes_total", help, epochs.sent_bytes);
    }
    let help = "Digests that agreed, on a backup.";
    metrics.counter("vmft_digests_agreed_total", help, status.digests_agreed);
    let help = "Exits that agreed, on a backup.";
    metrics.counter("vmft_exits_agreed_total", help, status.exits_agreed);
    let help = "Times that a checkpoint in the log spared a backup its replay.";
    metrics.counter("vmft_replay_skips_total", help, status.replay_skips);
    metrics.counter("vmft_divergences_total", "Divergences.", status.divergences);
    let help = "Divergences after which a backup has joined from a checkpoint.";
    metrics.counter("vmft_divergences_mended_total", help, status.divergences_mended);
    let help = "Events that the event log did not take.";
    metrics.counter("vmft_events_lost_total", help, status.events_lost);
}

fn failover(metrics: &mut Metrics, status: &SideStatus) {
    let Some(failover) = &status.failover else { return };
    let help = "The generation of this side's last failover.";
    metrics.gauge("vmft_failover_generation", help, failover.generation as f64);
    let parts = [
        ("detection", Some(failover.detection_ms)),
        ("test-and-set", Some(failover.arbiter_ms)),
        ("replay", Some(failover.replay_ms)),
        ("total", failover.first_output_ms),
    ];
    let parts: Vec<(String, f64)> = parts
        .into_iter()
        .filter_map(|(part, ms)| Some((label("part", part), of_ms(ms?))))
        .collect();
    let help = "What the last failover took, from the last sign of the peer to the first output.";
    metrics.several(Kind::Gauge, "vmft_failover_seconds", help, &parts);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};
    use vmft_backup::status::{
        ChannelStatus, EpochReport, FailoverReport, JoinReport, NetworkStatus,
    };

    /// A reader that takes nothing but what the exposition format has: each metric once, with HELP and TYPE
    /// before its samples, names and labels of their alphabets, no sample twice, a number each.
    pub(crate) fn strict(text: &str) -> BTreeMap<String, f64> {
        let is_name = |name: &str| {
            !name.is_empty()
                && !name.starts_with(|c: char| c.is_ascii_digit())
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        };
        let (mut seen, mut samples) = (BTreeSet::new(), BTreeMap::new());
        let (mut helped, mut current) = (None, None);
        assert!(text.ends_with('\n'));
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').expect("a name and a text");
                assert!(is_name(name) && !help.is_empty() && !help.contains('\\'), "{line}");
                assert!(seen.insert(name.to_owned()), "{name} is there twice");
                helped = Some(name.to_owned());
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect("a name and a kind");
                assert_eq!(helped.take().as_deref(), Some(name), "{line}");
                assert!(["gauge", "counter"].contains(&kind), "{line}");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                current = Some(name.to_owned());
            } else {
                let (series, value) = line.rsplit_once(' ').expect("a sample");
                let name = series.split('{').next().expect("something");
                assert_eq!(current.as_deref(), Some(name), "{line}");
                if let Some(labels) = series[name.len()..].strip_prefix('{') {
                    let labels = labels.strip_suffix("\"}").expect("closed");
                    let (label, value) = labels.split_once("=\"").expect("a label");
                    assert!(is_name(label) && !value.contains(['"', '\\', '\n']), "{line}");
                }
                let value: f64 = value.parse().expect("a number");
                assert!(value.is_finite(), "{line}");
                assert!(samples.insert(series.to_owned(), value).is_none(), "{series} twice");
            }
        }
        samples
    }

    /// A status that has everything.
    fn full() -> SideStatus {
        SideStatus {
            role: Role::Primary,
            generation: 3,
            unprotected_ms: Some(1500),
            channel: Some(ChannelStatus { execution_lag_ms: 2.5, ..ChannelStatus::default() }),
            network: Some(NetworkStatus { sent: 7, received: 8, lost: 1 }),
            join: Some(JoinReport::default()),
            epochs: Some(EpochReport::default()),
            failover: Some(FailoverReport {
                first_output_ms: Some(125.0),
                ..FailoverReport::default()
            }),
            overhead_bytes: Some(1 << 20),
            ..SideStatus::default()
        }
    }

    #[test]
    fn a_strict_reader_takes_every_metric_in_base_units() {
        let samples = strict(&render(&full()));
        for (series, value) in [
            ("vmft_role{role=\"primary\"}", 1.0),
            ("vmft_role{role=\"waiting-for-backup\"}", 0.0),
            ("vmft_generation", 3.0),
            ("vmft_unprotected_seconds", 1.5),
            ("vmft_execution_lag_seconds", 0.0025),
            ("vmft_network_packets_total{what=\"lost\"}", 1.0),
            ("vmft_failover_seconds{part=\"total\"}", 0.125),
        ] {
            assert_eq!(samples.get(series), Some(&value), "{series} in {samples:#?}");
        }
        let of_role = samples.iter().filter(|(series, _)| series.starts_with("vmft_role{"));
        assert_eq!(of_role.map(|(_, value)| value).sum::<f64>(), 1.0);
        // What a side does not have, it does not say.
        let few = strict(&render(&SideStatus::default()));
        assert!(!few.contains_key("vmft_unprotected_seconds") && few.len() < samples.len());
    }

    #[test]
    fn every_metric_is_documented() {
        let page = include_str!("../docs/operating.md");
        let text = render(&full());
        let names = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        for name in names.map(|rest| rest.split(' ').next().expect("a name")) {
            assert!(page.contains(&format!("| `{name}` |")), "{name} is not in docs/operating.md");
        }
    }
}
