//! Drives the program as its users do, and looks at what it leaves behind.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take on a busy machine before it counts as hanging.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks.
const POLL: Duration = Duration::from_millis(5);

/// A directory with a probe kernel and a disk, and what was on the disk.
pub struct Place {
    directory: tempfile::TempDir,
}

/// Bytes of the disk of a [`Place`].
pub const DISK: usize = 64 << 10;

impl Place {
    pub fn new() -> Self {
        let place = Self { directory: tempfile::tempdir().unwrap() };
        fs::write(place.path("kernel"), crate::probe::kernel()).unwrap();
        fs::write(place.path("disk"), disk_content()).unwrap();
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Arguments of a machine made of the probe and the disk.
    pub fn machine(&self) -> Vec<String> {
        let mut arguments = self.probe();
        arguments.extend(self.disk());
        arguments
    }

    /// Arguments of a machine made of the probe alone.
    pub fn probe(&self) -> Vec<String> {
        ["--kernel", &self.text("kernel"), "--memory", "size=64M"].map(str::to_owned).to_vec()
    }

    pub fn disk(&self) -> Vec<String> {
        vec!["--disk".to_owned(), format!("path={}", self.text("disk"))]
    }

    pub fn file(&self, option: &str, key: &str, name: &str) -> Vec<String> {
        vec![option.to_owned(), format!("{key}{}", self.text(name))]
    }

    /// The names of everything in the directory.
    pub fn listing(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    pub fn assert_disk_unchanged(&self) {
        assert!(fs::read(self.path("disk")).unwrap() == disk_content(), "the disk was changed");
    }

    /// Starts the program in the background, its messages in `NAME.messages`.
    pub fn start(&self, name: &str, arguments: &[Vec<String>]) -> Running {
        let messages = self.path(&format!("{name}.messages"));
        let child = vmft(arguments.concat())
            .stdout(Stdio::null())
            .stderr(File::create(&messages).unwrap())
            .spawn()
            .unwrap();
        Running { name: name.to_owned(), child, messages }
    }

    /// A primary that is to listen at a free port.
    pub fn primary(&self, more: &[&str]) -> Running {
        let listen = ["primary", "--listen", "tcp:127.0.0.1:0"].map(str::to_owned).to_vec();
        let console = self.file("--serial", "file=", "primary.console");
        let more = more.iter().map(|&word| word.to_owned()).collect();
        self.start("primary", &[listen, self.machine(), console, more])
    }

    pub fn console_len(&self, name: &str) -> u64 {
        fs::metadata(self.path(name)).map_or(0, |metadata| metadata.len())
    }

    /// Waits until the guest has printed more than it had.
    pub fn wait_console_grows(&self, name: &str) {
        let before = self.console_len(name);
        wait_for("console output", || (self.console_len(name) > before + 3).then_some(()));
    }
}

fn disk_content() -> Vec<u8> {
    (0..DISK).map(|index| (index % 251) as u8).collect()
}

/// The program with these arguments, without a terminal, a cache or the environment's defaults.
pub fn vmft<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmft"));
    command.args(arguments).stdin(Stdio::null()).env("VMFT_CACHE", "/nonexistent/cache");
    command
}

pub fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

/// Runs the program to its end.
pub fn run<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Output {
    let child =
        vmft(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started");
    child.wait_with_output().expect("it ends")
}

/// Asserts that the program refused: one line, with everything of `says` in it, and no success.
pub fn assert_refused(output: &Output, says: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "accepted; it says: {stderr}");
    assert!(output.status.code().is_some(), "ended by a signal; it says: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "not one line: {stderr}");
    assert!(stderr.starts_with("vmft: "), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    for part in says {
        assert!(stderr.contains(part), "no `{part}` in: {stderr}");
    }
    let halves: Vec<&str> = stderr.split(": ").map(str::trim).collect();
    for pair in halves.windows(2) {
        assert_ne!(pair[0], pair[1], "says the same twice: {stderr}");
    }
}

pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(POLL);
    }
}

/// A process of the program. It is killed when dropped.
pub struct Running {
    name: String,
    child: Child,
    messages: PathBuf,
}

impl Running {
    pub fn messages(&self) -> String {
        fs::read_to_string(&self.messages).unwrap()
    }

    /// Waits until it has said something with `part` in it; returns the line.
    pub fn wait_says(&mut self, part: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let messages = self.messages();
            if let Some(line) = messages.lines().find(|line| line.contains(part)) {
                return line.to_owned();
            }
            let ended = self.child.try_wait().unwrap();
            let in_vain = ended.is_some() || Instant::now() > deadline;
            assert!(!in_vain, "{} ({ended:?}) never says `{part}` but: {messages}", self.name);
            std::thread::sleep(POLL);
        }
    }

    /// The address it says it listens at.
    pub fn address(&mut self) -> String {
        let line = self.wait_says(" at tcp:");
        line.split(" at tcp:").nth(1).unwrap().trim().to_owned()
    }

    pub fn assert_runs(&mut self) {
        let ended = self.child.try_wait().unwrap();
        assert!(ended.is_none(), "{} ended ({ended:?}): {}", self.name, self.messages());
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    pub fn wait(&mut self) -> ExitStatus {
        wait_for("its end", || self.child.try_wait().unwrap())
    }

    /// Interrupts it, and asserts that it ends in time, with success and without alarm.
    pub fn assert_stops_cleanly(mut self, signal: nix::sys::signal::Signal) {
        self.assert_runs();
        let asked = Instant::now();
        self.signal(signal);
        let status = self.wait();
        let took = asked.elapsed();
        let messages = self.messages();
        assert!(status.success(), "{}: {status}; it says: {messages}", self.name);
        assert!(took < STOP_LIMIT, "{} took {took:?}; it says: {messages}", self.name);
        for alarm in ["error", "ERROR", "panicked", "halted", "lost"] {
            assert!(!messages.contains(alarm), "{}: {messages}", self.name);
        }
    }
}

/// How long a side may take to stop.
const STOP_LIMIT: Duration = Duration::from_secs(2);

impl Drop for Running {
    fn drop(&mut self) {
        // One that has ended needs no killing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A copy of a file with something done to its bytes.
pub fn altered(original: &[u8], to: &Path, alter: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = original.to_vec();
    alter(&mut bytes);
    fs::write(to, bytes).unwrap();
}
