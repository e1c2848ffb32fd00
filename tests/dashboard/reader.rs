//! A dashboard's process, and a reader of its page.

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// For what a host does soon, however busy it is.
pub const LIMIT: Duration = Duration::from_secs(240);

pub fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_vmft"))
}

/// A process that serves a page.
pub struct Page {
    child: Child,
    rest: BufReader<std::process::ChildStdout>,
    pub address: SocketAddr,
    /// Nothing, for a page without buttons.
    pub key: String,
}

impl Page {
    /// Starts the program with these words; it serves a page, and says where.
    pub fn start<W: AsRef<std::ffi::OsStr>>(words: &[W]) -> Self {
        let mut child = Command::new(program())
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut rest = BufReader::new(child.stdout.take().unwrap());
        let mut url = String::new();
        rest.read_line(&mut url).unwrap();
        let place = url.trim().strip_prefix("http://").expect("it says where the page is");
        let (address, query) = place.split_once('/').unwrap();
        let key = query.strip_prefix("?key=").unwrap_or_default().to_owned();
        Self { child, rest, address: address.parse().unwrap(), key }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    /// Sends a request as it is; returns the head and the body of the answer.
    pub fn exchange(&self, request: &str) -> (String, String) {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        (head.to_owned(), body.to_owned())
    }

    /// Asks for a path, in the name of the page's own address.
    pub fn get(&self, path: &str) -> (String, String) {
        let address = self.address;
        self.exchange(&format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n"))
    }

    /// What a button sends.
    pub fn press(&self, side: usize, act: &str) -> (String, String) {
        let (address, key) = (self.address, &self.key);
        let body = format!("{{\"side\":{side},\"act\":\"{act}\"}}");
        self.exchange(&format!(
            "POST /act HTTP/1.1\r\nHost: {address}\r\nOrigin: http://{address}\r\nX-Vmft-Key: {key}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ))
    }

    /// The pictures as they come.
    pub fn pictures(&self) -> Pictures {
        let mut stream = self.connect();
        let (address, key) = (self.address, &self.key);
        let request = format!("GET /pictures?key={key} HTTP/1.1\r\nHost: {address}\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        Pictures(BufReader::new(stream))
    }

    /// Ends it as Ctrl-C does; returns what else it has said.
    pub fn end(mut self) -> (ExitStatus, String) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let mut said = String::new();
        self.rest.read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap(), said)
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // One that has ended needs no killing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A stream of pictures.
pub struct Pictures(BufReader<TcpStream>);

impl Pictures {
    /// The next one. (Each is one chunk of the answer, and so on a line of its own.)
    pub fn next(&mut self) -> Value {
        loop {
            let mut line = String::new();
            assert!(self.0.read_line(&mut line).unwrap() > 0, "the stream has ended");
            if let Some(json) = line.strip_prefix("data: ") {
                return serde_json::from_str(json).unwrap();
            }
        }
    }

    /// The first one that is as wanted.
    pub fn wait(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        let began = std::time::Instant::now();
        loop {
            let picture = self.next();
            if wanted(&picture) {
                return picture;
            }
            assert!(began.elapsed() < LIMIT, "it does not come to that; the last is {picture:#}");
        }
    }

    /// The first one whose headline says so.
    pub fn wait_headline(&mut self, headline: &str) -> Value {
        self.wait(|picture| picture["headline"]["text"] == headline)
    }
}
