//! A server under test.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use vmft::pair::prefixed;

/// How long anything may take that must come, on a busy host.
pub const LIMIT: Duration = Duration::from_secs(240);

pub fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_vmft"))
}

/// `vmft disk serve` of one image called `web`, which lies in a directory of its own.
#[derive(Debug)]
pub struct Server {
    child: Child,
    options: [OsString; 2],
    /// Where it says that it listens.
    pub address: String,
    said: Arc<Mutex<String>>,
    pub directory: TempDir,
}

impl Server {
    /// Serves an image of so many bytes, all zeroes.
    pub fn of_size(bytes: u64) -> Self {
        Self::start(with_image(bytes), ",cache=writeback")
    }

    /// Serves `web.img` in `directory` at a Unix socket there, with `options` behind its name.
    pub fn start(directory: TempDir, options: &str) -> Self {
        let listen = prefixed("unix:", &directory.path().join("disks"));
        Self::listening(directory, options, listen)
    }

    /// The same somewhere else.
    pub fn listening(directory: TempDir, options: &str, listen: OsString) -> Self {
        let mut export = prefixed("web=", &directory.path().join("web.img"));
        export.push(options);
        let options = [export, listen];
        let said = Arc::default();
        let (child, lines) = spawn(&options, &said);
        let address = serving(&lines, &said);
        Self { child, options, address, said, directory }
    }

    pub fn image(&self) -> PathBuf {
        self.directory.path().join("web.img")
    }

    pub fn messages(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    /// Where it serves `export`, as an option's value.
    pub fn place(&self, export: &str) -> OsString {
        format!("nbd={}/{export}", self.address).into()
    }

    /// Where it serves its image, as other clients write it.
    pub fn uri(&self) -> OsString {
        let socket = self.address.strip_prefix("unix:").unwrap();
        format!("nbd+unix:///web?socket={socket}").into()
    }

    /// It dies, and its host does not.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again.
    pub fn start_again(&mut self) {
        let (child, lines) = spawn(&self.options, &self.said);
        self.child = child;
        assert_eq!(serving(&lines, &self.said), self.address);
    }

    /// Stops it as its operator does.
    pub fn stop(&mut self) -> ExitStatus {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        self.child.wait().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that has ended needs no killing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A directory with an image of so many bytes.
pub fn with_image(bytes: u64) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    File::create(directory.path().join("web.img")).unwrap().set_len(bytes).unwrap();
    directory
}

/// Starts the server, whose lines come through the channel, and are kept in `said`.
fn spawn(options: &[OsString; 2], said: &Arc<Mutex<String>>) -> (Child, Receiver<String>) {
    let [export, listen] = options;
    let mut child = Command::new(program())
        .args(["disk", "serve", "--export"])
        .args([export, &"--listen".into(), listen])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (tell, lines) = channel();
    let (stderr, said) = (BufReader::new(child.stderr.take().unwrap()), Arc::clone(said));
    std::thread::spawn(move || {
        for line in stderr.lines().map_while(Result::ok) {
            *said.lock().unwrap() += &format!("{line}\n");
            // Nobody listens once it serves.
            let _ = tell.send(line);
        }
    });
    (child, lines)
}

/// Waits until it serves, and returns where.
fn serving(lines: &Receiver<String>, said: &Mutex<String>) -> String {
    loop {
        let line = lines.recv_timeout(LIMIT);
        let line = line.unwrap_or_else(|_| panic!("it does not serve: {}", said.lock().unwrap()));
        if let Some((_, address)) = line.split_once(" bytes) at ") {
            return address.to_owned();
        }
    }
}

/// Runs a program to its end.
pub fn run(program: impl AsRef<std::ffi::OsStr>, arguments: &[OsString]) -> Output {
    Command::new(program).args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// The same; it succeeds. What it says.
pub fn succeed(program: &str, arguments: &[OsString]) -> String {
    let output = run(program, arguments);
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    said
}
