//! A way to a server on which requests fail, or get lost, as long as they are to: one side's, while the other
//! side has a way of its own.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use vmft_nbd::wire::{
    COMMAND_DISCONNECT, COMMAND_FLUSH, COMMAND_READ, COMMAND_WRITE, OPTION_HEAD, OPTION_MAGIC,
    OPTION_REPLY_HEAD, OPTION_REPLY_MAGIC, REQUEST_HEAD, REQUEST_MAGIC, RequestHead,
    SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, encode_error_chunk,
};

/// What becomes of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// They are passed on.
    Well,
    /// Whatever changes the disk is answered with this error.
    WritesFail(u32),
    /// Flushes are.
    FlushesFail(u32),
    /// Everything is.
    AllFails(u32),
    /// Nobody hears of them.
    Silent,
}

/// The way.
#[derive(Debug)]
pub struct BadWay {
    socket: PathBuf,
    mood: Arc<Mutex<Mood>>,
}

impl BadWay {
    /// A way to the server at `address` that begins at `socket`.
    pub fn to(address: &str, socket: PathBuf) -> Self {
        let server = PathBuf::from(address.strip_prefix("unix:").unwrap());
        let listener = UnixListener::bind(&socket).unwrap();
        let mood = Arc::new(Mutex::new(Mood::Well));
        let moods = Arc::clone(&mood);
        std::thread::spawn(move || {
            // Until the test's process ends.
            for client in listener.incoming() {
                let _ = pass(client.unwrap(), &server, &moods);
            }
        });
        Self { socket, mood }
    }

    pub fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    /// Where it leads to `export`, as an option's value.
    pub fn place(&self, export: &str) -> OsString {
        format!("nbd=unix:{}/{export}", self.socket.display()).into()
    }
}

/// Passes a connection on, each way on a thread of its own.
fn pass(client: UnixStream, server: &Path, mood: &Arc<Mutex<Mood>>) -> io::Result<()> {
    let server = UnixStream::connect(server)?;
    let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
    let mood = Arc::clone(mood);
    // A message at a time: answers come from both ends.
    let to_client = Arc::new(Mutex::new(client));
    let answers = Arc::clone(&to_client);
    std::thread::spawn(move || {
        let _ = requests(&mut from_client, &mut to_server, &answers, &mood);
        let _ = to_server.shutdown(std::net::Shutdown::Both);
    });
    std::thread::spawn(move || {
        let mut server = server;
        let _ = replies(&mut server, &to_client);
        let _ = to_client.lock().unwrap().shutdown(std::net::Shutdown::Both);
    });
    Ok(())
}

fn read_more(from: &mut UnixStream, message: &mut Vec<u8>, len: usize) -> io::Result<()> {
    let start = message.len();
    message.resize(start + len, 0);
    from.read_exact(&mut message[start..])
}

/// The number that a head ends with: how many bytes follow.
fn following(message: &[u8]) -> usize {
    let len = message.last_chunk::<4>().unwrap();
    usize::try_from(u32::from_be_bytes(*len)).unwrap()
}

/// From the client: its flags, options, requests.
fn requests(
    from: &mut UnixStream,
    to: &mut UnixStream,
    answers: &Mutex<UnixStream>,
    mood: &Mutex<Mood>,
) -> io::Result<()> {
    let mut flags = Vec::new();
    read_more(from, &mut flags, 4)?;
    to.write_all(&flags)?;
    loop {
        let mut message = Vec::new();
        read_more(from, &mut message, 4)?;
        if message == OPTION_MAGIC.to_be_bytes()[..4] {
            read_more(from, &mut message, OPTION_HEAD - 4)?;
            let len = following(&message);
            read_more(from, &mut message, len)?;
            to.write_all(&message)?;
            continue;
        }
        assert_eq!(message, REQUEST_MAGIC.to_be_bytes());
        read_more(from, &mut message, REQUEST_HEAD - 4)?;
        let head = RequestHead::parse(message.first_chunk().unwrap()).unwrap();
        if head.command == COMMAND_WRITE {
            let len = following(&message);
            read_more(from, &mut message, len)?;
        }
        let mood =
            if head.command == COMMAND_DISCONNECT { Mood::Well } else { *mood.lock().unwrap() };
        match mood {
            Mood::WritesFail(error) if head.command != COMMAND_READ => {
                answers.lock().unwrap().write_all(&encode_error_chunk(head.cookie, error))?;
            }
            Mood::FlushesFail(error) if head.command == COMMAND_FLUSH => {
                answers.lock().unwrap().write_all(&encode_error_chunk(head.cookie, error))?;
            }
            Mood::AllFails(error) => {
                answers.lock().unwrap().write_all(&encode_error_chunk(head.cookie, error))?;
            }
            Mood::Silent => {}
            Mood::Well | Mood::WritesFail(_) | Mood::FlushesFail(_) => to.write_all(&message)?,
        }
    }
}

/// From the server: its greeting, replies to options, replies to requests.
fn replies(from: &mut UnixStream, to: &Mutex<UnixStream>) -> io::Result<()> {
    let mut greeting = Vec::new();
    read_more(from, &mut greeting, 18)?;
    to.lock().unwrap().write_all(&greeting)?;
    loop {
        let mut message = Vec::new();
        read_more(from, &mut message, 4)?;
        if message == SIMPLE_REPLY_MAGIC.to_be_bytes() {
            read_more(from, &mut message, 12)?;
        } else {
            let is_option = message == OPTION_REPLY_MAGIC.to_be_bytes()[..4];
            assert!(is_option || message == STRUCTURED_REPLY_MAGIC.to_be_bytes());
            // Both heads are as long, and end alike.
            read_more(from, &mut message, OPTION_REPLY_HEAD - 4)?;
            let len = following(&message);
            read_more(from, &mut message, len)?;
        }
        to.lock().unwrap().write_all(&message)?;
    }
}
