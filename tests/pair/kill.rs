//! Twenty kills of the primary, and twenty of the backup, at moments of all kinds.

use crate::random::Random;
use crate::stage::{LIMIT, Pair, Setup, records_script};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use vmft::pair::{Look, Which};
use vmft_guest_images::Workload;

/// Records of one run.
const RECORDS: u32 = 8;
/// Records of one run that boots.
const BOOT_RECORDS: u32 = 3;
const DEFAULT_SEED: u64 = 20_101_213;

/// When to kill. All but `Boot` are counted from the moment the script was typed.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// A booting guest has retired so many instructions.
    Boot { point: u64 },
    /// The guest waits, after so many records.
    Idle { records: u32 },
    /// The guest computes, so many instructions after the record of this number was synced.
    Computing { record: u32, instructions: u64 },
    /// The line before the record of this number is out: its write and flush come next.
    DiskWrite { record: u32 },
    /// The console has shown so many bytes.
    Console { bytes: u64 },
}

/// What an undisturbed run needs.
#[derive(Debug, Clone, Copy)]
struct Rehearsal {
    console_bytes: u64,
    /// Of these, before the first line: the echo of the script.
    echo_bytes: u64,
    /// From the first to the last line.
    instructions: u64,
    /// From the first instruction to the first line, booting.
    boot_instructions: u64,
}

/// An undisturbed run of each kind: shows how long they are, and that they end well.
fn rehearsal() -> Rehearsal {
    static REHEARSAL: OnceLock<Rehearsal> = OnceLock::new();
    *REHEARSAL.get_or_init(|| {
        let mut pair = Pair::start(&Setup::default());
        pair.type_in(&records_script(RECORDS));
        pair.read_text("vmft-line 000001");
        let from = pair.status(Which::Primary).point;
        pair.read_text(&format!("vmft-record {:06} synced", RECORDS - 1));
        let to = pair.status(Which::Primary).point;
        finish(&mut pair, Which::Primary, RECORDS);
        assert_eq!(pair.wait_exit(Which::Backup).code(), Some(0));
        assert_eq!(pair.generation(), 1, "a power-off is no failover; {}", pair.report());
        let console_bytes = pair.text.len() as u64;
        let first = pair.text.windows(16).position(|window| window == b"vmft-line 000001");
        let echo_bytes = first.unwrap() as u64;
        drop(pair);

        let mut pair = Pair::start(&boot_setup());
        pair.read_text("vmft-line 000001");
        let boot_instructions = pair.status(Which::Primary).point;
        finish(&mut pair, Which::Primary, BOOT_RECORDS);
        assert_eq!(pair.wait_exit(Which::Backup).code(), Some(0));
        let instructions = to - from;
        Rehearsal { console_bytes, echo_bytes, instructions, boot_instructions }
    })
}

fn boot_setup() -> Setup {
    let workload = Workload::Demo { lines: BOOT_RECORDS, pause_ms: 1 };
    Setup { boot: Some(workload), ..Setup::default() }
}

/// The guest's end on the side that is left, and everything that must hold then.
pub fn finish(pair: &mut Pair, survivor: Which, records: u32) {
    let exit = pair.wait_exit_reading(survivor);
    assert_eq!(exit.code(), Some(0), "{}", pair.report());
    pair.check_records(survivor, records);
}

impl Pair {
    /// Waits for a side's end, and reads its console meanwhile.
    pub fn wait_exit_reading(&mut self, which: Which) -> std::process::ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Look::Bytes(bytes) = self.console.look(Duration::from_millis(5)) {
                self.text.extend(bytes);
            }
            if let Some(exit) = self.side(which).try_exit().unwrap() {
                return exit;
            }
            assert!(Instant::now() < deadline, "the guest does not end; {}", self.report());
        }
    }

    /// Waits until the primary is as far as `moment` says.
    fn wait_moment(&mut self, moment: Moment) {
        let line = |record: u32| format!("vmft-line {record:06}");
        let synced = |record: u32| format!("vmft-record {record:06} synced");
        match moment {
            Moment::Boot { point } => self.wait_point(point),
            Moment::Idle { records } => {
                self.read_text(&synced(records));
                self.primary.wait_status(LIMIT, |status| status.guest_idle).unwrap();
            }
            Moment::Computing { record, instructions } => {
                self.read_text(&synced(record));
                let point = self.status(Which::Primary).point;
                self.wait_point(point + instructions);
            }
            Moment::DiskWrite { record } => self.read_text(&line(record)),
            Moment::Console { bytes } => self.read_until(|text| text.len() as u64 >= bytes),
        }
    }

    fn wait_point(&mut self, point: u64) {
        self.primary.wait_status(LIMIT, |status| status.point >= point).unwrap();
    }
}

/// Twenty moments of all kinds.
fn moments(random: &mut Random, rehearsal: Rehearsal, boots: usize) -> Vec<Moment> {
    let middle = |random: &mut Random| u32::try_from(random.within(1..7)).unwrap();
    let each_record = rehearsal.instructions / u64::from(RECORDS);
    (0..20)
        .map(|index| match index {
            _ if index < boots => {
                let point =
                    random.within(rehearsal.boot_instructions / 50..rehearsal.boot_instructions);
                Moment::Boot { point }
            }
            _ => match index % 4 {
                0 => Moment::Idle { records: middle(random) },
                1 => Moment::Computing {
                    record: middle(random),
                    instructions: random.within(0..each_record / 2),
                },
                2 => Moment::DiskWrite { record: middle(random) },
                _ => {
                    let last = rehearsal.console_bytes * 9 / 10;
                    Moment::Console { bytes: random.within(rehearsal.echo_bytes..last) }
                }
            },
        })
        .collect()
}

fn kill_one(moment: Moment, victim: Which) {
    println!("killing the {} at {moment:?}", victim.name());
    let (mut pair, records) = if let Moment::Boot { .. } = moment {
        (Pair::start(&boot_setup()), BOOT_RECORDS)
    } else {
        let mut pair = Pair::start(&Setup::default());
        pair.type_in(&records_script(RECORDS));
        // Keys that the guest has not been given when its host dies are lost with the host. Once
        // the first line is out, all have been given.
        pair.read_text("vmft-line 000001");
        (pair, RECORDS)
    };
    pair.wait_moment(moment);
    let survivor = victim.other();
    pair.side(victim).kill().unwrap();
    finish(&mut pair, survivor, records);
    assert_eq!(pair.generation(), 2, "one failover; {}", pair.report());
}

fn kill_twenty(name: &str, victim: Which, boots: usize) {
    let mut random = Random::seeded(name, DEFAULT_SEED);
    let rehearsal = rehearsal();
    println!("{rehearsal:?}");
    for moment in moments(&mut random, rehearsal, boots) {
        kill_one(moment, victim);
    }
}

#[test]
fn twenty_kills_of_the_primary_lose_and_repeat_nothing() {
    kill_twenty("kills of the primary", Which::Primary, 3);
}

#[test]
fn twenty_kills_of_the_backup_lose_and_repeat_nothing() {
    kill_twenty("kills of the backup", Which::Backup, 2);
}
