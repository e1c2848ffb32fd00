//! A program in a terminal: what it draws is kept as a picture, and keys are typed.

use crate::stage::{LIMIT, program};
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{Termios, tcgetattr};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How often it is looked whether the program has ended.
const POLL: Duration = Duration::from_millis(20);

fn cells(count: u16) -> NonZeroU16 {
    count.try_into().unwrap()
}

/// A terminal with a program in it.
pub struct Terminal {
    child: Child,
    keys: File,
    /// Held, so that the terminal is there after the program, too.
    line: OwnedFd,
    before: Termios,
    drawn: Receiver<Vec<u8>>,
    picture: vt100::Parser,
}

impl Terminal {
    /// Starts this program, or that of the test, as a session of its own in a new terminal.
    pub fn start(mut command: Command, columns: u16, rows: u16) -> Self {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let OpenptyResult { master, slave: line } = openpty(&size, None).unwrap();
        let before = tcgetattr(&line).unwrap();
        let end = || line.try_clone().unwrap();
        command.env("TERM", "xterm-256color").stdin(end()).stdout(end()).stderr(end());
        let child = command.spawn().unwrap();
        drop(command);
        let keys = File::from(master);
        let mut screen = keys.try_clone().unwrap();
        let (give, drawn) = channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(len @ 1..) = screen.read(&mut bytes) {
                if give.send(bytes[..len].to_vec()).is_err() {
                    return;
                }
            }
        });
        let picture = vt100::Parser::new(cells(rows), cells(columns), 0);
        Self { child, keys, line, before, drawn, picture }
    }

    /// `vmft` with these arguments, with the terminal as its own.
    pub fn vmft(arguments: &[std::ffi::OsString], columns: u16, rows: u16) -> Self {
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(program()).args(arguments);
        Self::start(command, columns, rows)
    }

    /// What the terminal shows.
    pub fn shown(&self) -> String {
        self.picture.screen().contents()
    }

    /// Takes what is drawn; false if nothing comes for a while.
    fn look(&mut self, wait: Duration) -> bool {
        match self.drawn.recv_timeout(wait) {
            Ok(bytes) => {
                self.picture.process(&bytes);
                true
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => false,
        }
    }

    /// Takes all that a program has drawn that has ended.
    fn take_rest(&mut self) {
        // Names the window, and comes out behind everything else.
        const LAST: &[u8] = b"\x1b]2;that was all\x07";
        File::from(self.line.try_clone().unwrap()).write_all(LAST).unwrap();
        let mut rest = Vec::new();
        while !rest.ends_with(LAST) {
            rest.extend(self.drawn.recv_timeout(LIMIT).unwrap());
        }
        self.picture.process(&rest);
    }

    /// Waits until the terminal shows what is wanted.
    pub fn wait_shows(&mut self, wanted: impl Fn(&str) -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !wanted(&self.shown()) {
            if !self.look(POLL)
                && let Some(end) = self.child.try_wait().unwrap()
            {
                self.take_rest();
                assert!(wanted(&self.shown()), "it has ended ({end}) and shows\n{}", self.shown());
            }
            assert!(Instant::now() < deadline, "it shows\n{}", self.shown());
        }
    }

    /// Presses keys.
    pub fn type_in(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// Sends the program a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    /// The terminal has another size from now on.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        let (columns_word, rows_word) = (columns.to_string(), rows.to_string());
        let status = Command::new("stty")
            .args(["cols", &columns_word, "rows", &rows_word])
            .stdin(self.line.try_clone().unwrap())
            .status()
            .unwrap();
        assert!(status.success());
        self.picture.screen_mut().set_size(cells(rows), cells(columns));
    }

    /// Waits until the program has ended, and takes all that it has drawn.
    pub fn wait_exit(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            while self.look(POLL) {}
            if let Some(end) = self.child.try_wait().unwrap() {
                self.take_rest();
                return end;
            }
            assert!(Instant::now() < deadline, "it does not end, and shows\n{}", self.shown());
        }
    }

    /// The terminal is as it was before the program: its modes, its screen and its cursor.
    pub fn assert_given_back(&self) {
        assert_eq!(tcgetattr(&self.line).unwrap(), self.before, "the terminal's modes");
        let screen = self.picture.screen();
        assert!(!screen.alternate_screen() && !screen.hide_cursor(), "{}", self.shown());
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // One that has ended needs no killing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
