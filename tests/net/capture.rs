//! What is on a wire: packets with their times, by tcpdump.

use crate::lab::{Lab, MAC, Place};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

/// A packet seen on a wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Since 1970.
    pub at: Duration,
    pub frame: Vec<u8>,
}

impl Seen {
    /// True if the guest has sent it, or somebody for the guest.
    pub fn is_from_guest(&self) -> bool {
        self.frame.get(6..12) == Some(&MAC[..])
    }

    /// True for the announcement that switches learn from.
    pub fn is_rarp(&self) -> bool {
        self.frame.get(12..14) == Some(&[0x80, 0x35][..])
    }
}

/// A capture that goes on.
#[derive(Debug)]
pub struct Capture {
    child: Child,
    file: PathBuf,
}

impl Capture {
    /// Captures a port of the switch, `a`, `b` or `c`, to a file in `directory`: what comes in there.
    pub fn start(lab: &Lab, port: &str, directory: &Path) -> Self {
        let file = directory.join(format!("{port}.pcap"));
        let mut command = lab.command(Place::Switch, "tcpdump");
        command.args([
            "-i",
            &format!("port-{port}"),
            "-Q",
            "in",
            "-U",
            "-n",
            "-s",
            "128",
            "--immediate-mode",
            "-w",
        ]);
        command.arg(&file).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        let messages = child.stderr.take().unwrap();
        let mut messages = BufReader::new(messages);
        while !line.contains("listening on") {
            line.clear();
            assert_ne!(messages.read_line(&mut line).unwrap(), 0, "tcpdump has ended");
        }
        // What it says at its end is of no interest, but must find a reader.
        std::thread::spawn(move || std::io::copy(&mut messages, &mut std::io::sink()));
        Self { child, file }
    }

    /// What was seen so far.
    pub fn seen(&self) -> Vec<Seen> {
        parse(&std::fs::read(&self.file).unwrap())
    }

    /// Ends the capture.
    pub fn stop(mut self) -> Vec<Seen> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
        self.child.wait().unwrap();
        self.seen()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // It may have been stopped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Reads a capture file (pcap, microseconds, little-endian); the last packet may be incomplete.
fn parse(file: &[u8]) -> Vec<Seen> {
    let mut seen = Vec::new();
    if file.len() < 24 {
        return seen;
    }
    assert_eq!(word(file, 0), 0xA1B2_C3D4, "not a capture file");
    let mut rest = &file[24..];
    while rest.len() >= 16 {
        let at = Duration::new(word(rest, 0).into(), word(rest, 4) * 1_000);
        let end = 16 + word(rest, 8) as usize;
        let Some(frame) = rest.get(16..end) else { break };
        seen.push(Seen { at, frame: frame.to_vec() });
        rest = &rest[end..];
    }
    seen
}
