//! A server under test.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vmft::pair::prefixed;
use vmft_nbd::wire::MAGIC;

/// How long anything may take that must come, on a busy host.
pub const LIMIT: Duration = Duration::from_secs(240);

pub fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_vmft"))
}

/// `vmft disk serve` of one image called `web`, at a Unix socket in a directory of its own.
#[derive(Debug)]
pub struct Server {
    child: Child,
    options: String,
    pub directory: TempDir,
}

impl Server {
    /// Serves an image of so many bytes, all zeroes.
    pub fn of_size(bytes: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        File::create(directory.path().join("web.img")).unwrap().set_len(bytes).unwrap();
        Self::start(directory, ",cache=writeback")
    }

    /// Serves `web.img` in `directory`, with `options` behind its name.
    pub fn start(directory: TempDir, options: &str) -> Self {
        let child = spawn(directory.path(), options);
        let server = Self { child, options: options.to_owned(), directory };
        server.wait_ready();
        server
    }

    pub fn image(&self) -> PathBuf {
        self.directory.path().join("web.img")
    }

    fn wait_ready(&self) {
        let deadline = Instant::now() + LIMIT;
        while !greets(&self.directory.path().join("disks")) {
            assert!(Instant::now() < deadline, "{}", self.messages());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn messages(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("server.log")).unwrap_or_default()
    }

    /// Where it serves `export`, as an option's value.
    pub fn place(&self, export: &str) -> OsString {
        let mut place = prefixed("nbd=unix:", &self.directory.path().join("disks"));
        place.push(format!("/{export}"));
        place
    }

    /// Where it serves its image, as other clients write it.
    pub fn uri(&self) -> OsString {
        let mut uri = OsString::from("nbd+unix:///web?socket=");
        uri.push(self.directory.path().join("disks"));
        uri
    }

    /// It dies, and its host does not.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again.
    pub fn start_again(&mut self) {
        self.child = spawn(self.directory.path(), &self.options);
        self.wait_ready();
    }

    /// Stops it as its operator does.
    pub fn stop(&mut self) -> ExitStatus {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        self.child.wait().unwrap()
    }
}

/// True if a server of NBD is heard there.
pub fn greets(socket: &Path) -> bool {
    let mut word = [0; 8];
    let heard = UnixStream::connect(socket).and_then(|mut stream| stream.read_exact(&mut word));
    heard.is_ok() && word == MAGIC.to_be_bytes()
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that has ended needs no killing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(directory: &Path, options: &str) -> Child {
    let mut export = OsString::from("web=");
    export.push(directory.join("web.img"));
    export.push(options);
    let log = directory.join("server.log");
    Command::new(program())
        .args(["disk", "serve", "--export"])
        .arg(export)
        .arg("--listen")
        .arg(prefixed("unix:", &directory.join("disks")))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::options().create(true).append(true).open(log).unwrap())
        .spawn()
        .unwrap()
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
