//! Guests on the host's KVM that runs freely, protected by their state: an unmodified Debian kernel
//! where the doctor says that it can run, and the probe guest on every KVM.

use crate::engines::{held_probe, kvm_is_here, take_turn, write_probe};
use crate::linux::{assert_clean, obstacle};
use crate::random::Random;
use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;
use vmft::pair::{DemoConsole, SideProcess, Which, disk_argument, prefixed};
use vmft_backup::status::Role;
use vmft_guest_images::disk::{DiskSize, make_disk, read_disk_file};
use vmft_guest_images::workload::{DemoLine, RECORDS_FILE, Workload, count_records};

/// How long a boot may take on a busy host whose CPU is emulated.
const LIMIT: Duration = Duration::from_secs(400);

/// Lines of the probe guest.
const PROBE_LINES: u32 = 80;

/// A pair on KVM in checkpoint mode, and what its console has shown.
struct Pair {
    primary: SideProcess,
    backup: SideProcess,
    demo: DemoConsole,
}

/// Both sides get `both`; the primary also what its guest is. The backup joins once the guest has printed
/// its first line, since an emulated CPU has enough to do with a boot alone. There the guest waits, and
/// once more before it ends, for [`Pair::go_on`].
fn start(directory: &Path, guest: &[OsString], both: &[OsString]) -> Pair {
    let program = Path::new(env!("CARGO_BIN_EXE_vmft"));
    let words = ["--protect", "checkpoint,interval=100ms", "--suspect-after", "5000", "--listen"];
    let mut common: Vec<OsString> = words.iter().map(OsString::from).collect();
    common.push("tcp:127.0.0.1:0".into());
    common.extend_from_slice(both);
    let mut words: Vec<OsString> = ["--engine", "kvm", "--no-wait"].map(OsString::from).into();
    words.extend(guest.iter().chain(&common).cloned());
    let mut primary = SideProcess::start(program, Which::Primary, directory, &words).unwrap();
    let status = primary.wait_status(LIMIT, |status| status.listening.is_some()).unwrap();
    let mut demo = DemoConsole::default();
    demo.console.attach(&mut primary).unwrap();
    demo.read(LIMIT, Some(DemoLine::Line(1))).unwrap();
    let mut words: Vec<OsString> = vec!["--primary".into()];
    words.push(format!("tcp:{}", status.listening.unwrap()).into());
    words.extend(common);
    let mut backup = SideProcess::start(program, Which::Backup, directory, &words).unwrap();
    demo.console.attach(&mut backup).unwrap();
    primary.wait_status(LIMIT, |status| status.role == Role::Primary).unwrap();
    Pair { primary, backup, demo }
}

impl Pair {
    fn read(&mut self, wanted: Option<DemoLine>) {
        self.demo.read(LIMIT, wanted).unwrap();
    }

    fn said(&self) -> String {
        let (primary, backup) = (self.primary.messages(), self.backup.messages());
        format!("primary:\n{primary}backup:\n{backup}")
    }

    /// Lets a guest go on that waits for a line.
    fn go_on(&mut self) {
        self.demo.console.type_in(b"\n");
    }

    /// Kills the primary at `moment`; the guest must end on the backup.
    fn kill_at(&mut self, moment: Moment) {
        let Moment { line, epochs, side, pause } = moment;
        self.go_on();
        self.read(Some(DemoLine::Line(line)));
        println!("killing the primary at {moment:?}");
        let count = |status: &vmft_backup::status::SideStatus| {
            status.epochs.as_ref().map_or(0, |report| report.epochs)
        };
        let watched = match side {
            Which::Primary => &mut self.primary,
            Which::Backup => &mut self.backup,
        };
        let wanted = count(&watched.status().unwrap()) + epochs;
        watched.wait_status(LIMIT, |status| count(status) >= wanted).unwrap();
        std::thread::sleep(pause);
        self.primary.kill().unwrap();
        self.backup.wait_status(LIMIT, |status| status.role == Role::Alone).unwrap();
        self.go_on();
        self.read(None);
        assert!(self.backup.wait_exit(LIMIT).unwrap().success(), "{}", self.said());
        assert_eq!(self.demo.console.merger().missing(), 0, "{}", self.said());
    }
}

/// When to kill: after this line is out, and so many epochs more have been counted by one of the sides, the
/// primary's having been sent or the backup's applied; and so long after that.
#[derive(Debug, Clone, Copy)]
struct Moment {
    line: u32,
    epochs: u64,
    side: Which,
    pause: Duration,
}

impl Moment {
    /// As soon as the primary has sent so many epochs.
    fn sent(line: u32, epochs: u64) -> Self {
        Self { line, epochs, side: Which::Primary, pause: Duration::ZERO }
    }

    /// Anywhere from one epoch to the next, as one or the other side counts them: while one is taken, sent
    /// and applied as well.
    fn anywhere(random: &mut Random) -> Self {
        Self {
            line: u32::try_from(random.within(6..24)).unwrap(),
            epochs: random.within(0..4),
            side: if random.within(0..2) == 0 { Which::Primary } else { Which::Backup },
            pause: Duration::from_micros(random.within(0..60_000)),
        }
    }
}

#[test]
fn an_unmodified_linux_on_kvm_survives_its_primary_killed_between_and_inside_epochs() {
    survives(1, &[Moment::sent(12, 0), Moment::sent(20, 2)]);
}

#[test]
fn an_unmodified_linux_with_two_cpus_survives_its_primary_killed_at_moments_of_all_kinds() {
    // A guest of two CPUs takes minutes where one emulated CPU runs both, and both sides.
    let kills = std::env::var("VMFT_CPU_KILLS")
        .map_or(1, |value| value.parse().expect("VMFT_CPU_KILLS is a number"));
    let mut random = Random::seeded("kills with two CPUs", 19_562);
    let moments: Vec<Moment> = (0..kills).map(|_| Moment::anywhere(&mut random)).collect();
    survives(2, &moments);
}

fn survives(cpus: u8, moments: &[Moment]) {
    const RECORDS: u32 = 40;
    /// Between two records.
    const PAUSE_MS: u32 = 300;
    /// Here the guest waits: for its backup, however long a join takes, and for the end of its
    /// primary, however long epochs take. Two CPUs and both sides may share one emulated CPU.
    const HOLD: &str = "vmft.hold=1,30";
    if !kvm_is_here() || obstacle().is_some() {
        return;
    }
    let _turn = take_turn();
    for moment in moments {
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path().join("disk.img");
        make_disk(&disk, DiskSize::DEMO, "vmft-test").unwrap();
        // Each byte a kernel says costs the emulated CPU a hundred microseconds.
        let words = Workload::Demo { lines: RECORDS, pause_ms: PAUSE_MS }.cmdline();
        let words = format!("{words} {HOLD} quiet");
        let cpus = format!("boot={cpus}");
        let guest = ["--cmdline", &words, "--memory", "size=96M", "--cpus", &cpus];
        let guest = guest.map(OsString::from);
        let both = ["--disk".into(), disk_argument(&disk)];
        let mut pair = start(directory.path(), &guest, &both);
        pair.kill_at(*moment);
        assert_eq!(pair.demo.shown, DemoLine::all(RECORDS), "{}", pair.said());
        assert_clean(&disk);
        assert_eq!(count_records(&read_disk_file(&disk, RECORDS_FILE).unwrap()), Ok(RECORDS));
    }
}

#[test]
fn a_guest_that_runs_freely_on_kvm_survives_its_primary() {
    if !kvm_is_here() {
        return;
    }
    let _turn = take_turn();
    let directory = tempfile::tempdir().unwrap();
    let arbiter = prefixed("dir=", &directory.path().join("arbiter"));
    let probe = held_probe(PROBE_LINES, 1_000, [1, PROBE_LINES - 10]);
    let kernel = write_probe(directory.path(), &probe).into();
    let guest = ["--memory".into(), "size=64M".into(), "--kernel".into(), kernel];
    let mut pair = start(directory.path(), &guest, &["--arbiter".into(), arbiter]);
    pair.kill_at(Moment::sent(PROBE_LINES / 2, 1));
    let wanted: Vec<DemoLine> =
        (1..=PROBE_LINES).map(DemoLine::Line).chain([DemoLine::Done]).collect();
    assert_eq!(pair.demo.shown, wanted, "{}", pair.said());
}
