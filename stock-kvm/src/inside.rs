//! In the box: runs the job's commands and sends what they print and how they end.
//!
//! Started by the box's init. When the owner goes away it ends, and init ends the box.

use crate::channel::{Frame, GO};
use crate::job::{self, Command, Job};
use crate::{NOT_STARTED, SIGNALLED};
use anyhow::{Context, Result, bail};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{self, ExitCode, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// First argument of this program when it is to do this.
pub const WORD: &str = "--inside-the-box";

/// The port, as the kernel names it before anybody gives it a nicer name.
const PORT: &str = "/dev/vport0p1";
/// How long the kernel may take to offer the port.
const PORT_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause between two looks for the port.
const PORT_PAUSE: Duration = Duration::from_millis(5);
/// Most that is read from a command at once.
const CHUNK: usize = 16 << 10;

/// Runs the job.
pub fn run() -> Result<ExitCode> {
    let text = fs::read(job::FILE).context(job::FILE)?;
    let job: Job = serde_json::from_slice(&text).context(job::FILE)?;
    let port = open_port()?;
    let owner = port.try_clone()?;
    thread::spawn(move || leave_with(owner));
    let channel = Mutex::new(port);
    let mut status = 0;
    for command in &job.commands {
        let ended = run_command(command, &job, &channel)?;
        if status == 0 {
            status = ended;
        }
    }
    send(&channel, &Frame::Ended(status))?;
    Ok(ExitCode::SUCCESS)
}

/// Opens the port and waits until the owner listens.
fn open_port() -> Result<File> {
    let limit = Instant::now() + PORT_TIMEOUT;
    let mut port = loop {
        match File::options().read(true).write(true).open(PORT) {
            Ok(port) => break port,
            Err(error) if Instant::now() > limit => return Err(error).context(PORT),
            Err(_) => thread::sleep(PORT_PAUSE),
        }
    };
    // Until the other side is known to be connected, reading finds the end of the file. However long a busy host
    // takes for that: the box has its limit from outside, and does not outlive its owner.
    let mut byte = [0];
    while port.read(&mut byte)? == 0 {
        thread::sleep(PORT_PAUSE);
    }
    if byte[0] != GO {
        bail!("byte {:#x} instead of the word to begin", byte[0]);
    }
    Ok(port)
}

/// Ends the process when the owner closes the port.
fn leave_with(mut owner: File) {
    let mut bytes = [0; 16];
    while owner.read(&mut bytes).is_ok_and(|count| count > 0) {}
    process::exit(1);
}

fn send(channel: &Mutex<File>, frame: &Frame) -> Result<()> {
    let mut port = channel.lock().unwrap_or_else(PoisonError::into_inner);
    frame.write(&mut *port).context(PORT)
}

/// The command's exit status as a shell would give it.
fn run_command(command: &Command, job: &Job, channel: &Mutex<File>) -> Result<u8> {
    let say = |text: String| send(channel, &Frame::Errors(text.into_bytes()));
    if let Some(heading) = &command.heading {
        say(format!("{heading}\n"))?;
    }
    let path = job.environment.get("PATH").map_or("", String::as_str);
    let mut process = process::Command::new(find(&command.program, path));
    process.args(&command.arguments).env_clear().envs(&job.environment);
    process.current_dir(&command.directory).stdin(Stdio::null());
    process.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match process.spawn() {
        Ok(child) => child,
        Err(error) => {
            say(format!("stock-kvm: {} in the box: {error}\n", command.program))?;
            return Ok(NOT_STARTED);
        }
    };
    let output = child.stdout.take().context("the pipe asked for")?;
    let errors = child.stderr.take().context("the pipe asked for")?;
    let status = thread::scope(|scope| {
        let copies = [
            scope.spawn(|| copy(output, channel, Frame::Output)),
            scope.spawn(|| copy(errors, channel, Frame::Errors)),
        ];
        let status = child.wait();
        end_what_is_left();
        for copy in copies {
            copy.join().expect("copying does not panic")?;
        }
        status.context("waiting for the command")
    })?;
    if let Some(signal) = status.signal() {
        say(format!("stock-kvm: {} was ended by signal {signal}\n", command.program))?;
    }
    Ok(shell_status(status))
}

/// The file that `name` means: itself if it has a slash, else the first in `path`.
///
/// The standard library would look in this process's own `PATH` when the new one is given.
fn find(name: &str, path: &str) -> String {
    if name.contains('/') {
        return name.to_owned();
    }
    let mut candidates = path.split(':').map(|directory| format!("{directory}/{name}"));
    candidates.find(|file| fs::metadata(file).is_ok()).unwrap_or_else(|| name.to_owned())
}

fn shell_status(status: ExitStatus) -> u8 {
    let signalled = || status.signal().map(|signal| i32::from(SIGNALLED) + signal);
    let code = status.code().or_else(signalled).unwrap_or(i32::from(u8::MAX));
    u8::try_from(code).unwrap_or(u8::MAX)
}

/// Kills whatever a command left running, which would hold its output open and disturb the next.
fn end_what_is_left() {
    // -1 is every process but the first one, which is the box's init, and the one that asks. There
    // may be none, and then it is an error.
    let _none_left = signal::kill(Pid::from_raw(-1), Signal::SIGKILL);
}

fn copy(mut from: impl Read, channel: &Mutex<File>, frame: fn(Vec<u8>) -> Frame) -> Result<()> {
    let mut bytes = vec![0; CHUNK];
    loop {
        let count = from.read(&mut bytes)?;
        if count == 0 {
            return Ok(());
        }
        send(channel, &frame(bytes[..count].to_vec()))?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_a_shells() {
        let status = |script: &str| {
            let ended = process::Command::new("sh").args(["-c", script]).status();
            shell_status(ended.unwrap())
        };
        assert_eq!(status("exit 0"), 0);
        assert_eq!(status("exit 3"), 3);
        assert_eq!(status("kill -9 $$"), 137);
    }
}
