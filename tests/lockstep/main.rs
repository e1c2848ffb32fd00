//! The lockstep kernel: pairs of it on `soft`, and on the host's CPU, where only it can be followed.
//!
//! It is built first, by `vmft guest --lockstep`. The tests on KVM need one that runs Linux, such as
//! that of `scripts/stock-kvm test -p vmft --test lockstep -- --include-ignored kvm`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![expect(dead_code, reason = "the stage and its parts belong to the tests of pairs")]

#[path = "../pair/proxy.rs"]
mod proxy;
#[path = "../pair/random.rs"]
mod random;
#[path = "../pair/stage.rs"]
mod stage;
#[path = "../pair/witness.rs"]
mod witness;

use crate::random::Random;
use crate::stage::{LIMIT, Pair, Setup};
use std::ffi::OsString;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use vmft::pair::{Look, Which};
use vmft_backup::status::SideStatus;
use vmft_guest_images::workload::Bench;
use vmft_guest_images::{Cache, Workload, lockstep_guest};

const DEFAULT_SEED: u64 = 20_101_213;
/// Records of one run.
const RECORDS: u32 = 10;
/// Between two records, in milliseconds.
const PAUSE: u32 = 20;
/// The same where the guest is to be seen idle.
const LONG_PAUSE: u32 = 1_500;
/// Kills of the primary in one test, unless `VMFT_LOCKSTEP_KILLS` says how many: of the kinds in turn. On an
/// emulated CPU each takes minutes, and the simulator has the schedules.
const KILLS: usize = 1;
/// Guest memory: little, because all of it is sent when the backup joins, by an emulated CPU.
const MEMORY: Option<&str> = Some("size=64M");
const SOFT: [&str; 3] = ["--lockstep-kernel", "--engine", "soft"];
const KVM: [&str; 5] = ["--lockstep-kernel", "--engine", "kvm", "--points", "exit"];

/// When to kill the primary.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// The guest boots; so many points are behind it.
    Boot { point: u64 },
    /// The line before the record of this number is out: its write and flush come next.
    DiskWrite { record: u32 },
    /// The record of this number is on the disk, and the guest waits.
    Idle { record: u32 },
    /// So many points after the record of this number was synced.
    Later { record: u32, points: u64 },
}

fn demo(options: &[&'static str], pause_ms: u32) -> Setup {
    let boot = Some(Workload::Demo { lines: RECORDS, pause_ms });
    setup(boot, options)
}

/// A killed side closes its connections; only that is taken for its loss, since one emulated CPU
/// may have all to do.
fn setup(boot: Option<Workload>, options: &[&'static str]) -> Setup {
    let both = vec!["--suspect-after", "60000"];
    Setup { boot, memory: MEMORY, both, primary: options.to_vec(), ..Setup::default() }
}

/// What an undisturbed run came to.
#[derive(Debug, Clone, Copy)]
struct Rehearsal {
    /// Points before the first line.
    boot: u64,
    /// Points from the first record to the last but one.
    records: u64,
}

/// An undisturbed run: both sides end well, and agree all along.
fn rehearse(options: &[&'static str]) -> Rehearsal {
    let mut pair = Pair::start(&demo(options, PAUSE));
    pair.read_text("vmft-line 000001");
    let boot = pair.status(Which::Primary).point;
    pair.read_text(&format!("vmft-record {:06} synced", RECORDS - 1));
    let records = pair.status(Which::Primary).point - boot;
    let follower = pair.status(Which::Backup);
    assert!(follower.exits_agreed > 0, "nothing was compared; {}", pair.report());
    assert_eq!(follower.divergence, None, "{}", pair.report());
    finish(&mut pair, Which::Primary);
    assert_eq!(pair.wait_exit(Which::Backup).code(), Some(0), "{}", pair.report());
    assert_eq!(pair.generation(), 1, "a power-off is no failover; {}", pair.report());
    println!("{follower:?}");
    Rehearsal { boot, records }
}

/// Waits for a side's end, reading its console meanwhile, and checks everything that must hold then.
fn finish(pair: &mut Pair, survivor: Which) {
    let deadline = Instant::now() + LIMIT;
    let exit = loop {
        if let Look::Bytes(bytes) = pair.console.look(Duration::from_millis(5)) {
            pair.text.extend(bytes);
        }
        if let Some(exit) = pair.side(survivor).try_exit().unwrap() {
            break exit;
        }
        assert!(Instant::now() < deadline, "the guest does not end; {}", pair.report());
    };
    assert_eq!(exit.code(), Some(0), "{}", pair.report());
    pair.check_records(survivor, RECORDS);
}

fn moments(random: &mut Random, rehearsal: Rehearsal) -> Vec<Moment> {
    let middle = |random: &mut Random| u32::try_from(random.within(1..5)).unwrap();
    let each = (rehearsal.records / u64::from(RECORDS)).max(2);
    let kills = std::env::var("VMFT_LOCKSTEP_KILLS")
        .map_or(KILLS, |value| value.parse().expect("VMFT_LOCKSTEP_KILLS is a number"));
    (0..kills)
        .map(|index| match index % 4 {
            0 => Moment::DiskWrite { record: middle(random) },
            1 => Moment::Later { record: middle(random), points: random.within(1..each) },
            2 => Moment::Boot { point: random.within(rehearsal.boot / 20..rehearsal.boot) },
            _ => Moment::Idle { record: middle(random) },
        })
        .collect()
}

fn wait_for(pair: &mut Pair, moment: Moment) {
    let synced = |record: u32| format!("vmft-record {record:06} synced");
    let wait = |pair: &mut Pair, wanted: &dyn Fn(&SideStatus) -> bool| {
        pair.primary.wait_status(LIMIT, wanted).unwrap();
    };
    match moment {
        Moment::Boot { point } => wait(pair, &|status| status.point >= point),
        Moment::DiskWrite { record } => pair.read_text(&format!("vmft-line {record:06}")),
        Moment::Idle { record } => {
            pair.read_text(&synced(record));
            wait(pair, &|status| status.guest_idle);
        }
        Moment::Later { record, points } => {
            pair.read_text(&synced(record));
            let until = pair.status(Which::Primary).point + points;
            wait(pair, &|status| status.point >= until);
        }
    }
}

fn kill_primaries(options: &[&'static str]) {
    let mut random = Random::seeded("kills of the lockstep kernel's primary", DEFAULT_SEED);
    let rehearsal = rehearse(options);
    println!("{rehearsal:?}");
    for moment in moments(&mut random, rehearsal) {
        println!("killing the primary at {moment:?}");
        let pause = if matches!(moment, Moment::Idle { .. }) { LONG_PAUSE } else { PAUSE };
        let mut pair = Pair::start(&demo(options, pause));
        wait_for(&mut pair, moment);
        pair.side(Which::Primary).kill().unwrap();
        finish(&mut pair, Which::Backup);
        assert_eq!(pair.generation(), 2, "one failover; {}", pair.report());
    }
}

#[test]
fn the_kernel_that_was_built_passes_the_gate() {
    let guest = lockstep_guest(&Cache::from_environment().unwrap()).unwrap();
    let kernel = std::fs::read(guest.kernel).unwrap();
    let examination = vmft_vmm::boot::examine(&kernel).unwrap();
    assert!(examination.bytes > 1 << 20, "{examination}");
}

#[test]
fn a_pair_on_soft_runs_to_its_end_and_agrees() {
    // Long enough for digests, which come every 33 million instructions.
    let boot = Some(Workload::Bench { bench: Bench::Fork, count: 300 });
    let mut pair = Pair::start(&setup(boot, &SOFT));
    pair.read_text("vmft-bench fork end 300");
    let point = pair.status(Which::Primary).point;
    let reached = |status: &SideStatus| status.digests_agreed > 0;
    pair.backup.wait_status(LIMIT, reached).unwrap();
    println!("{point} instructions from the first to the end of 300 forks");
    assert_eq!(pair.wait_exit(Which::Primary).code(), Some(0), "{}", pair.report());
    assert_eq!(pair.wait_exit(Which::Backup).code(), Some(0), "{}", pair.report());
    pair.check_console(Which::Primary);
    assert_eq!(pair.generation(), 1, "a power-off is no failover; {}", pair.report());
}

#[test]
#[ignore = "needs a KVM that runs Linux: scripts/stock-kvm"]
fn on_kvm_a_primary_killed_at_any_moment_loses_and_repeats_nothing() {
    kill_primaries(&KVM);
}

/// Reads the time-stamp counter twice, and succeeds if it is neither zero nor runs backwards.
const TIME_STAMPS: &[&[u8]] = &[
    &[0x0F, 0x31],             // rdtsc
    &[0x48, 0xC1, 0xE2, 32],   // shl rdx, 32
    &[0x48, 0x09, 0xD0],       // or rax, rdx
    &[0x48, 0x89, 0xC3],       // mov rbx, rax
    &[0x0F, 0x31],             // rdtsc
    &[0x48, 0xC1, 0xE2, 32],   // shl rdx, 32
    &[0x48, 0x09, 0xD0],       // or rax, rdx
    &[0x31, 0xFF],             // xor edi, edi
    &[0x48, 0x39, 0xD8],       // cmp rax, rbx
    &[0x40, 0x0F, 0x92, 0xC7], // setb dil
    &[0x48, 0x85, 0xDB],       // test rbx, rbx
    &[0x0F, 0x94, 0xC0],       // sete al
    &[0x40, 0x08, 0xC7],       // or dil, al
    &[0xB8, 60, 0, 0, 0],      // mov eax, exit
    &[0x0F, 0x05],             // syscall
];

/// Computes for ever, and never enters the kernel.
const SPIN: &[&[u8]] = &[
    &[0x48, 0xFF, 0xC0], // inc rax
    &[0xEB, 0xFB],       // jmp to it
];

/// A command of the guest's shell that makes a program of `code`: an ELF executable of one segment.
fn make_program(name: &str, code: &[&[u8]]) -> String {
    const BASE: u64 = 0x40_0000;
    let code = code.concat();
    let mut file = vec![0x7F, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    file.extend([2u16, 62].iter().flat_map(|half| half.to_le_bytes()));
    file.extend(1u32.to_le_bytes());
    file.extend([BASE + 120, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
    file.extend(0u32.to_le_bytes());
    file.extend([64u16, 56, 1, 0, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    file.extend([1u32, 5].iter().flat_map(|word| word.to_le_bytes()));
    let len = 120 + code.len() as u64;
    file.extend([0, BASE, BASE, len, len, 0x1000].iter().flat_map(|word| word.to_le_bytes()));
    file.extend(code);
    let escaped: String = file.iter().map(|byte| format!("\\{byte:03o}")).collect();
    format!("printf '{escaped}' >/{name}; $bb chmod +x /{name}")
}

/// Has a program of the guest read the time-stamp counter, which the kernel answers from guest time.
fn read_time_stamps(pair: &mut Pair) {
    pair.read_text(vmft_guest_images::workload::SHELL_PROMPT);
    let make = make_program("stamps", TIME_STAMPS);
    pair.type_in(&format!("{make}; /stamps; echo sta''mps: $?\n"));
    pair.read_text("stamps: 0");
}

#[test]
fn on_soft_a_program_reads_guest_time_as_its_time_stamps() {
    let boot = Some(Workload::Shell);
    let mut pair = Pair::start(&setup(boot, &SOFT));
    read_time_stamps(&mut pair);
    pair.type_in("poweroff\n");
    assert_eq!(pair.wait_exit(Which::Primary).code(), Some(0), "{}", pair.report());
    assert_eq!(pair.wait_exit(Which::Backup).code(), Some(0), "{}", pair.report());
}

/// What a guest says that busies itself in its shell, and then waits, on KVM: both sides have agreed
/// all along, and the guest's timer kept its pace.
#[test]
#[ignore = "needs a KVM that runs Linux: scripts/stock-kvm"]
fn on_kvm_a_shell_loop_and_an_idle_guest_are_followed() {
    let boot = Some(Workload::Shell);
    let mut pair = Pair::start(&setup(boot, &KVM));
    read_time_stamps(&mut pair);
    pair.type_in(
        "n=0; while [ $n -lt 40 ]; do n=$((n+1)); $bb true; echo $n; done; echo lo''oped; \
         read -r -t 2 -u 9 _; echo wo''ken; poweroff\n",
    );
    pair.read_text("looped");
    pair.primary.wait_status(LIMIT, |status| status.guest_idle).unwrap();
    let before = pair.status(Which::Primary);
    pair.read_text("woken");
    let after = pair.status(Which::Primary);
    let idle_points = after.point - before.point;
    println!("two idle seconds: {idle_points} exits");
    assert!(idle_points < 2_000, "an idle guest makes {idle_points} exits in two seconds");
    assert_eq!(pair.status(Which::Backup).divergence, None, "{}", pair.report());
    assert_eq!(pair.wait_exit(Which::Primary).code(), Some(0), "{}", pair.report());
    assert_eq!(pair.wait_exit(Which::Backup).code(), Some(0), "{}", pair.report());
    pair.check_console(Which::Primary);
}

/// Twenty waits of 100 ms, alone and beside a program that never enters the kernel: without what lets a timer
/// in between two exits, the second twenty would never end.
#[test]
#[ignore = "needs a KVM that runs Linux: scripts/stock-kvm"]
fn on_kvm_a_task_of_timers_gets_on_beside_a_program_that_never_enters_the_kernel() {
    let boot = Some(Workload::Shell);
    let mut pair = Pair::start(&setup(boot, &KVM));
    pair.read_text(vmft_guest_images::workload::SHELL_PROMPT);
    pair.type_in(&format!("{}; echo ma''de\n", make_program("spin", SPIN)));
    pair.read_text("made");
    pair.type_in(
        "waits() { read -r from _ </proc/uptime; n=0; while [ $n -lt 20 ]; do $bb usleep 100000; \
         n=$((n+1)); echo \"$1 $n\"; done; read -r to _ </proc/uptime; echo \"$1: $from to $to s\"; }\n",
    );
    pair.type_in("waits alo''ne; /spin & waits besi''de; kill $!; echo ki''lled\n");
    pair.read_text("killed");
    assert_eq!(pair.status(Which::Backup).divergence, None, "{}", pair.report());
    pair.type_in("poweroff\n");
    assert_eq!(pair.wait_exit(Which::Primary).code(), Some(0), "{}", pair.report());
    assert_eq!(pair.wait_exit(Which::Backup).code(), Some(0), "{}", pair.report());
    pair.check_console(Which::Primary);
    println!("{}", pair.report());
}

/// The program's own recording, replayed: every digest agrees, and both come to the same state.
#[test]
#[ignore = "needs a KVM that runs Linux: scripts/stock-kvm"]
fn on_kvm_a_recorded_boot_replays_to_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
    let mut record = words(&["record", "--serial", "null", "--memory", "size=64M"]);
    record.extend(words(&KVM));
    record.extend(words(&["--cmdline", "vmft.run=bench-fork vmft.count=20", "--log"]));
    record.push(log.clone().into());
    succeed(&record);
    let mut replay = words(&["replay", "--serial", "null"]);
    replay.push(log.into());
    let said = succeed(&replay);
    println!("{said}");
    assert!(said.contains("the guest stopped: GuestPowerOff"), "{said}");
    assert!(!said.contains(" 0 digests agree"), "nothing was compared: {said}");
}

fn succeed(arguments: &[OsString]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmft"));
    let output = command.args(arguments).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    format!("{}{said}", String::from_utf8_lossy(&output.stdout))
}
