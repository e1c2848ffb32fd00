//! A guest that is handed on from side to side: any number of them, some waiting, some dead.

use crate::stage::{LIMIT, Shown, TURN, booted, contains, program, read_until};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vmft::pair::{Lines, Look, PairConsole, SideProcess, Which, disk_argument};
use vmft_backup::status::{Role, SideStatus};
use vmft_guest_images::disk::{DiskSize, check_disk, read_disk_file};
use vmft_guest_images::workload::{DemoLine, RECORDS_FILE, count_records};

/// What the guest does until a key is typed: numbered lines, and records with their fsync.
pub const RECORDS_UNTIL_KEY: &str = "$bb mount -t ext4 /dev/vda $disk; n=0; \
    until read -r -t 0.02 -u 0 _; do n=$((n+1)); \
    printf 'vmft-line %06d\\n' $n; \
    printf 'vmft-record %06d %0108d\\n' $n $n >>$disk/records; \
    sync $disk/records; printf 'vmft-record %06d synced\\n' $n; done; \
    echo vmft-done; poweroff\n";

/// Two loops beside the records: one that forks, one that writes memory.
pub const LOAD: &str = "(while :; do $bb true; done) & \
    (while :; do $bb dd if=/dev/urandom of=/tmp-load bs=64k count=64 2>/dev/null; done) & ";

/// The guest, and everybody who has had it or may come to have it.
pub struct Relay {
    pub sides: BTreeMap<usize, SideProcess>,
    console: PairConsole,
    pub text: Vec<u8>,
    start: u64,
    next: usize,
    more: Vec<OsString>,
    disk: PathBuf,
    /// Each side has a copy of the disk, and these are not their own numbers'.
    copies: Option<BTreeMap<usize, PathBuf>>,
    pub directory: TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Relay {
    /// The saved guest, live and alone on side 0, `more` on the command line of every side.
    pub fn start(more: &[&str]) -> Self {
        Self::start_with(more, None)
    }

    /// The same, where each side has a copy of the disk.
    pub fn start_mirrored(more: &[&str]) -> Self {
        Self::start_with(more, Some(BTreeMap::new()))
    }

    fn start_with(more: &[&str], copies: Option<BTreeMap<usize, PathBuf>>) -> Self {
        let saved = booted();
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path().join("disk.img");
        std::fs::copy(&saved.disk, &disk).unwrap();
        let mut relay = Self {
            sides: BTreeMap::new(),
            console: PairConsole::starting_at(saved.console_offset),
            text: Vec::new(),
            start: saved.console_offset,
            next: 0,
            more: more.iter().map(Into::into).collect(),
            disk,
            copies,
            directory,
            _turn: turn,
        };
        if relay.copies.is_some() {
            std::fs::rename(&relay.disk, relay.copy(0)).unwrap();
        }
        let mut arguments: Vec<OsString> = vec!["--no-wait".into(), "--restore".into()];
        arguments.push(saved.snapshot.clone().into());
        relay.add("primary", &arguments);
        // Keys typed before the side is live would be lost.
        relay.wait(0, |status| status.role == Role::Alone);
        relay
    }

    /// Starts a side that listens; its number.
    fn add(&mut self, subcommand: &str, arguments: &[OsString]) -> usize {
        let number = self.next;
        self.next += 1;
        let mut all = arguments.to_vec();
        all.extend(["--listen".into(), "tcp:127.0.0.1:0".into(), "--disk".into()]);
        all.extend(self.disk_words(number));
        all.extend(self.more.iter().cloned());
        // The console wants a name of two; each side's files have its number.
        let name = (Which::Primary, &*format!("side-{number}"));
        let directory = self.directory.path();
        let mut side =
            SideProcess::start_named(program(), subcommand, name, directory, &all).unwrap();
        self.console.attach(&mut side).unwrap();
        self.sides.insert(number, side);
        number
    }

    /// Where a side's copy is.
    pub fn copy(&self, number: usize) -> PathBuf {
        let copies = self.copies.as_ref().expect("each side has one");
        let own = || self.directory.path().join(format!("copy-{number}.img"));
        copies.get(&number).cloned().unwrap_or_else(own)
    }

    /// The next side that starts has the copy that side `of` had.
    pub fn next_has_copy_of(&mut self, of: usize) {
        let (copy, next) = (self.copy(of), self.next);
        self.copies.as_mut().expect("each side has one").insert(next, copy);
    }

    /// What stands behind `--disk` for a side.
    pub fn disk_words(&self, number: usize) -> Vec<OsString> {
        if self.copies.is_none() {
            return vec![disk_argument(&self.disk)];
        }
        let copy = self.copy(number);
        // What its file system can do, one that is there says.
        let there = disk_argument(&booted().disk).into_string().unwrap();
        let cache = if there.ends_with("cache=writeback") { ",cache=writeback" } else { "" };
        let size = DiskSize::DEMO.bytes();
        let disk = format!("path={},mirror=on,size={size}{cache}", copy.display());
        let arbiter = format!("dir={}", self.directory.path().join("arbiter").display());
        vec![disk.into(), "--arbiter".into(), arbiter.into()]
    }

    /// The saved guest again, on the copy that a side had, as a side of its own; its number.
    pub fn begin_on_copy_of(&mut self, of: usize) -> usize {
        let saved = booted();
        self.next_has_copy_of(of);
        self.console = PairConsole::starting_at(saved.console_offset);
        self.text.clear();
        let restore: Vec<OsString> =
            vec!["--no-wait".into(), "--restore".into(), saved.snapshot.clone().into()];
        let number = self.add("primary", &restore);
        self.wait(number, |status| status.role == Role::Alone);
        number
    }

    /// Where a side listens, or will.
    pub fn address(&mut self, number: usize) -> String {
        let side = self.sides.get_mut(&number).unwrap();
        let status = side.wait_status(LIMIT, |status| status.listening.is_some()).unwrap();
        format!("tcp:{}", status.listening.unwrap())
    }

    /// Starts a standby that joins whichever of `others` is live; its number.
    pub fn add_standby(&mut self, others: &[usize]) -> usize {
        let addresses: Vec<String> = others.iter().map(|&number| self.address(number)).collect();
        self.add_standby_at(&addresses)
    }

    /// The same, of addresses.
    pub fn add_standby_at(&mut self, addresses: &[String]) -> usize {
        let mut arguments: Vec<OsString> = vec!["--join".into()];
        arguments.extend(addresses.iter().map(Into::into));
        self.add("standby", &arguments)
    }

    /// Waits until a side is as wanted.
    pub fn wait(&mut self, number: usize, wanted: impl Fn(&SideStatus) -> bool) -> SideStatus {
        match self.sides.get_mut(&number).unwrap().wait_status(LIMIT, wanted) {
            Ok(status) => status,
            Err(error) => panic!("{error:#}\n{}", self.report()),
        }
    }

    /// Waits until a side is live and so many follow it.
    pub fn wait_followed(&mut self, number: usize, followers: u64) -> SideStatus {
        self.wait(number, |status| status.role == Role::Primary && status.followers == followers)
    }

    /// Waits until one of `numbers` is live in a later generation than the first; which.
    pub fn wait_one_live(&mut self, numbers: &[usize]) -> usize {
        let deadline = Instant::now() + LIMIT;
        loop {
            let mut live = Vec::new();
            for &number in numbers {
                let Some(side) = self.sides.get_mut(&number) else { continue };
                let status = side.status();
                let is_live = |status: &SideStatus| {
                    matches!(status.role, Role::Alone | Role::Primary) && status.generation > 1
                };
                if status.as_ref().is_ok_and(is_live) {
                    live.push(number);
                }
            }
            if let [live] = live[..] {
                return live;
            }
            assert!(live.is_empty(), "{live:?} are live; {}", self.report());
            assert!(Instant::now() < deadline, "nobody is live; {}", self.report());
            std::thread::yield_now();
        }
    }

    /// The image all sides share.
    pub fn disk(&self) -> &Path {
        &self.disk
    }

    /// Waits until a side has ended by itself, and in order.
    pub fn wait_end(&mut self, number: usize) {
        let exit = self.sides.get_mut(&number).unwrap().wait_exit(LIMIT).unwrap();
        assert!(exit.success(), "{}", self.report());
    }

    /// Kills a side at once.
    pub fn kill(&mut self, number: usize) {
        self.sides.remove(&number).unwrap().kill().unwrap();
    }

    pub fn type_in(&mut self, text: &str) {
        self.console.type_in(text.as_bytes());
    }

    pub fn read_text(&mut self, wanted: &str) {
        read_until(&mut self.console, &mut self.text, |text| contains(text, wanted));
    }

    /// Reads the console until so many more records are synced than now.
    pub fn read_records(&mut self, more: usize) {
        self.read_now();
        let wanted = self.shown().synced.len() + more;
        read_until(&mut self.console, &mut self.text, |text| shown(text).synced.len() >= wanted);
    }

    fn read_now(&mut self) {
        while let Look::Bytes(bytes) = self.console.look(Duration::ZERO) {
            self.text.extend(bytes);
        }
    }

    pub fn shown(&self) -> Shown {
        shown(&self.text)
    }

    /// So far every byte has come, and every line and record once and in order.
    pub fn check_so_far(&mut self) {
        self.read_now();
        let merger = self.console.merger();
        assert_eq!(merger.missing(), 0, "console bytes are missing; {}", self.report());
        assert_eq!(merger.end(), self.start + self.text.len() as u64, "{}", self.report());
        let Shown { lines, synced, .. } = self.shown();
        for numbers in [&lines, &synced] {
            let wanted: Vec<u32> = (1..=numbers.len() as u32).collect();
            assert_eq!(*numbers, wanted, "{}", self.report());
        }
        for side in self.sides.values() {
            let messages = side.messages();
            assert!(!messages.contains("divergence"), "{messages}");
        }
    }

    /// Waits until a side has said something with `part` in it.
    pub fn wait_says(&mut self, side: usize, part: &str) {
        let side = self.sides.get_mut(&side).unwrap();
        side.wait_says(LIMIT, |said| said.contains(part)).unwrap();
    }

    /// Ends the guest with a key, and checks everything there is.
    pub fn finish(&mut self, live: usize) {
        self.type_in("\n");
        self.read_text("vmft-done");
        let exit = self.sides.get_mut(&live).unwrap().wait_exit(LIMIT).unwrap();
        assert!(exit.success(), "{}", self.report());
        self.check_so_far();
        let shown = self.shown();
        let records = shown.synced.len() as u32;
        assert_eq!(shown.lines.len() as u32, records, "{}", self.report());
        let disk = if self.copies.is_some() { self.copy(live) } else { self.disk.clone() };
        let file = read_disk_file(&disk, RECORDS_FILE).unwrap();
        assert_eq!(count_records(&file), Ok(records), "{}", self.report());
        let check = check_disk(&disk).unwrap();
        assert!(check.clean, "{}", check.report);
    }

    /// What everybody who lives says, and the end of the console.
    pub fn report(&self) -> String {
        let messages =
            |(number, side): (&usize, &SideProcess)| format!("side {number}:\n{}", side.messages());
        let sides: String = self.sides.iter().map(messages).collect();
        let tail = self.text.len().saturating_sub(4000);
        format!("{sides}console:\n{}", String::from_utf8_lossy(&self.text[tail..]))
    }
}

fn shown(text: &[u8]) -> Shown {
    let mut shown = Shown { lines: Vec::new(), synced: Vec::new(), done: false };
    for line in Lines::default().add(text) {
        match DemoLine::parse(&line) {
            Some(DemoLine::Line(number)) => shown.lines.push(number),
            Some(DemoLine::Synced(number)) => shown.synced.push(number),
            Some(DemoLine::Done) => shown.done = true,
            None => {}
        }
    }
    shown
}
