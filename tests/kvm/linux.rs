//! The default guest, an unmodified Debian kernel, live on the host's KVM: where the doctor says that
//! it can run. Elsewhere it is refused, in the doctor's words.

use crate::engines::{kvm_is_here, said, take_turn, vmft};
use std::ffi::OsString;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};
use vmft::pair::{Look, PairConsole, SideProcess, Which, prefixed};
use vmft_guest_images::disk::{DiskSize, check_disk, make_disk, read_disk_file};
use vmft_guest_images::workload::{DemoLine, RECORDS_FILE, SHELL_PROMPT, Workload, count_records};
use vmft_vmm::doctor::Report;
use vmft_vmm::doctor::verdict::{Choice, Purpose, Wanted};

/// How long a boot may take on a busy host whose CPU is emulated.
pub const LIMIT: Duration = Duration::from_secs(800);
const LINES: u32 = 12;

/// Why this host cannot run Linux on KVM, in the doctor's words; `None` if it can.
pub fn obstacle() -> Option<String> {
    let report: Report = serde_json::from_slice(&vmft(["doctor", "--json"]).stdout).unwrap();
    let wanted = Wanted { purpose: Purpose::Unprotected, choice: Choice::Free };
    let obstacle = report.verdict().refusal(wanted);
    let stock_kvm = Path::new("/box/job.json").exists();
    assert!(!(stock_kvm && obstacle.is_some()), "stock KVM runs Linux: {obstacle:?}");
    obstacle
}

fn arguments(engine: &str, workload: Workload, disk: &Path) -> Vec<OsString> {
    let words = ["--engine", engine, "--cmdline", &workload.cmdline(), "--disk"];
    let words = words.iter().map(OsString::from);
    words.chain([prefixed("path=", disk)]).collect()
}

fn records(engine: &str, directory: &Path) -> Output {
    let disk = directory.join("disk.img");
    make_disk(&disk, DiskSize::DEMO, "vmft-test").unwrap();
    let workload = Workload::Demo { lines: LINES, pause_ms: 5 };
    let mut words = vec!["run".into()];
    words.extend(arguments(engine, workload, &disk));
    words.extend(["--serial".into(), prefixed("file=", &directory.join("console"))]);
    vmft(words)
}

pub fn assert_clean(disk: &Path) {
    let check = check_disk(disk).unwrap();
    assert!(check.clean, "{}", check.report);
}

#[test]
fn an_unmodified_linux_writes_its_records_and_switches_off_or_is_refused_with_the_reason() {
    if !kvm_is_here() {
        return;
    }
    let _turn = take_turn();
    let directory = tempfile::tempdir().unwrap();
    let output = records("kvm", directory.path());
    let said = said(&output);
    if let Some(why) = obstacle() {
        assert!(!output.status.success());
        assert!(said.contains(&why) && said.contains("--engine soft"), "{said}");
        return;
    }
    let console = std::fs::read_to_string(directory.path().join("console")).unwrap();
    assert!(output.status.success(), "{said}\n{console}");
    let lines: Vec<DemoLine> = console.lines().filter_map(DemoLine::parse).collect();
    let each = (1..=LINES).flat_map(|number| [DemoLine::Line(number), DemoLine::Synced(number)]);
    assert_eq!(lines, each.chain([DemoLine::Done]).collect::<Vec<_>>(), "{console}");
    let disk = directory.path().join("disk.img");
    assert_clean(&disk);
    assert_eq!(count_records(&read_disk_file(&disk, RECORDS_FILE).unwrap()), Ok(LINES));
}

/// A side alone, whose console has shown so much before.
pub fn start(directory: &Path, words: &[OsString], shown: u64) -> (SideProcess, PairConsole) {
    let program = Path::new(env!("CARGO_BIN_EXE_vmft"));
    let mut side = SideProcess::start_as(program, "run", Which::Primary, directory, words).unwrap();
    let mut console = PairConsole::starting_at(shown);
    console.attach(&mut side).unwrap();
    (side, console)
}

pub fn read_until(console: &mut PairConsole, wanted: &str) {
    let deadline = Instant::now() + LIMIT;
    let mut text = String::new();
    while !text.contains(wanted) {
        if let Look::Bytes(bytes) = console.look(Duration::from_secs(1)) {
            text.push_str(&String::from_utf8_lossy(&bytes));
        }
        assert!(Instant::now() < deadline, "{wanted:?} is not printed: {text}");
    }
}

#[test]
fn auto_takes_kvm_for_a_linux_that_nobody_follows_and_its_shell_answers() {
    if !kvm_is_here() || obstacle().is_some() {
        return;
    }
    let _turn = take_turn();
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("disk.img");
    make_disk(&disk, DiskSize::DEMO, "vmft-test").unwrap();
    let words = arguments("auto", Workload::Shell, &disk);
    let (mut side, mut console) = start(directory.path(), &words, 0);
    read_until(&mut console, SHELL_PROMPT);
    side.wait_says(LIMIT, |said| said.contains("--engine auto takes kvm, free-running")).unwrap();
    console.type_in(b"echo typed >$disk/typed && sync && echo wr''itten $((6 * 7))\n");
    read_until(&mut console, "written 42");
    console.type_in(b"poweroff\n");
    assert!(side.wait_exit(LIMIT).unwrap().success(), "{}", side.messages());
    assert_clean(&disk);
    assert_eq!(read_disk_file(&disk, "/typed").unwrap(), b"typed\n");
}

#[test]
fn auto_takes_soft_for_a_linux_that_is_to_be_followed_and_says_why() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let words = ["record", "--engine", "auto", "--serial", "null", "--memory", "size=64M"];
    let mut words: Vec<OsString> = words.iter().map(OsString::from).collect();
    words.extend(["--kernel".into(), crate::refusals::stranger(directory.path()), "--log".into()]);
    words.push(log.clone().into());
    let output = vmft(words);
    let said = said(&output);
    assert!(output.status.success() && log.exists(), "{said}");
    let told = said.lines().find(|line| line.contains("--engine auto takes")).unwrap();
    assert!(told.contains("takes soft (stock kernel, protected): "), "{told}");
}
