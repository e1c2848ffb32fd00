//! The terminal as the guest's console: raw mode, and keys on their way to the guest.

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{self, SetArg, Termios};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use vmft_backup::tell;
use vmft_log::entry::StopReason;
use vmft_log::foreign::Printable;
use vmft_sandbox::Task;
use vmft_vmm::inputs::Asked;
use vmft_vmm::world::Mailbox;
use vmft_vmm::world::console::{ConsoleHub, ConsoleTarget, Typed};

/// Prints a line, or several, to standard output, and nothing that a terminal obeys; a reader that has
/// gone away is no failure.
///
/// # Errors
/// Any other error of standard output.
pub fn say(line: &str) -> io::Result<()> {
    let lines: Vec<String> = line.split('\n').map(|line| Printable(line).to_string()).collect();
    match writeln!(io::stdout(), "{}", lines.join("\n")) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Text of whatever origin as it may be shown: nothing in it that a terminal obeys.
pub fn printable(text: &str) -> String {
    Printable(text).to_string()
}

/// Ctrl-A, then x: leave. Ctrl-A twice types one Ctrl-A.
const ESCAPE: u8 = 0x01;

/// Puts the terminal in raw mode, and back when dropped.
#[derive(Debug)]
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Raw mode; `None` if standard input is no terminal.
    pub fn enter() -> Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = termios::tcgetattr(&stdin).context("reading the terminal's mode")?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        // The guest sends carriage returns of its own; our messages need theirs.
        raw.output_flags |= termios::OutputFlags::OPOST | termios::OutputFlags::ONLCR;
        termios::tcsetattr(&stdin, SetArg::TCSANOW, &raw).context("setting the terminal's mode")?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing more can be done for a terminal that is gone.
        let _ = termios::tcsetattr(io::stdin(), SetArg::TCSANOW, &self.before);
    }
}

/// What the keys say.
#[derive(Debug, PartialEq, Eq)]
pub struct Keys {
    /// For the guest.
    pub typed: Vec<u8>,
    /// Ctrl-A x was typed.
    pub leave: bool,
}

/// Finds the escape sequence in what is typed.
#[derive(Debug, Default)]
pub struct KeyFilter {
    escaped: bool,
}

impl KeyFilter {
    /// Sorts keys.
    pub fn filter(&mut self, bytes: &[u8]) -> Keys {
        let mut typed = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            if self.escaped {
                self.escaped = false;
                match byte {
                    b'x' | b'X' => return Keys { typed, leave: true },
                    ESCAPE => typed.push(ESCAPE),
                    other => typed.extend([ESCAPE, other]),
                }
            } else if byte == ESCAPE {
                self.escaped = true;
            } else {
                typed.push(byte);
            }
        }
        Keys { typed, leave: false }
    }
}

/// Reads standard input on a thread of its own. `handle` gets the keys and returns false to end.
pub fn read_keys(mut handle: impl FnMut(Keys) -> bool + Send + 'static) -> Result<()> {
    let run = move || {
        let (stdin, mut filter) = (io::stdin(), KeyFilter::default());
        let mut bytes = [0; 1024];
        loop {
            match stdin.lock().read(&mut bytes) {
                Ok(len @ 1..) => {
                    if !handle(filter.filter(&bytes[..len])) {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Whoever shares this terminal has made it so that a read does not wait.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut readable = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
                    let polled = poll(&mut readable, PollTimeout::NONE);
                    if polled.is_err_and(|error| error != nix::errno::Errno::EINTR) {
                        return;
                    }
                }
                Ok(_) | Err(_) => return,
            }
        }
    };
    vmft_sandbox::spawn(Task::Console, "keys", run)?;
    Ok(())
}

/// Connects the terminal to a console that goes to `target`; raw mode lasts as long as the result.
pub fn attach(
    target: &ConsoleTarget,
    console: &Arc<ConsoleHub>,
    mailbox: &Arc<Mailbox>,
) -> Result<Option<RawTerminal>> {
    if *target != ConsoleTarget::Tty {
        return Ok(None);
    }
    let raw = RawTerminal::enter()?;
    if raw.is_some() {
        tell!("the guest's console; Ctrl-A x stops the guest");
    }
    let (console, mailbox) = (Arc::clone(console), Arc::clone(mailbox));
    let mut told = false;
    read_keys(move |keys| {
        if keys.leave {
            mailbox.ask(Asked::Stop(StopReason::Operator));
        }
        // While the guest takes nothing, nothing is read here.
        if !keys.typed.is_empty() && console.type_in(&keys.typed) == Typed::NotLive && !told {
            tell!("this side does not run the guest: what is typed here does not reach it");
            told = true;
        }
        !keys.leave
    })?;
    Ok(raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_leaves_and_other_keys_reach_the_guest() {
        let mut filter = KeyFilter::default();
        let typed = |keys: Keys| (keys.typed, keys.leave);
        assert_eq!(typed(filter.filter(b"ls\r")), (b"ls\r".to_vec(), false));
        assert_eq!(typed(filter.filter(&[ESCAPE])), (vec![], false));
        assert_eq!(typed(filter.filter(&[ESCAPE, b'q'])), (vec![ESCAPE, b'q'], false));
        assert_eq!(typed(filter.filter(&[ESCAPE, b'b'])), (vec![ESCAPE, b'b'], false));
        assert_eq!(typed(filter.filter(&[b'a', ESCAPE, b'x', b'z'])), (vec![b'a'], true));
    }
}
