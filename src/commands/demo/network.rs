//! The demo's client, which keeps one TCP connection to the guest open.

use crate::private_network::{GUEST, PrivateNetwork};
use anyhow::{Context, Result};
use serde::Serialize;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use vmft_guest_images::workload::ECHO_PORT;

/// The sides' TAP devices.
pub(super) const TAPS: [&str; 2] = ["primary0", "backup0"];
/// Between an answer and the next question.
const PAUSE: Duration = Duration::from_millis(2);
const CONNECT: Duration = Duration::from_secs(1);
/// How long an answer may take before the connection counts as lost.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the client has seen.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct ClientReport {
    /// Answers, each to its question, over one connection.
    pub(super) answers: u64,
    /// Answers after the primary was killed.
    pub(super) answers_after_kill: u64,
    /// The median time an answer took.
    pub(super) median_ms: f64,
    /// The longest time without an answer.
    pub(super) longest_gap_ms: f64,
    /// An answer was not the one to its question.
    pub(super) wrong: bool,
}

#[derive(Debug, Default)]
struct Session {
    times: Vec<Duration>,
    killed_after: Option<usize>,
    wrong: bool,
}

/// The client, on a thread of its own. It ends with its connection.
#[derive(Debug, Clone, Default)]
pub(super) struct Client(Arc<Mutex<Session>>);

impl Client {
    pub(super) fn start(network: &PrivateNetwork) -> Result<Self> {
        let client = Self::default();
        let session = client.clone();
        network.within(|| {
            let thread = std::thread::Builder::new().name("client".to_owned());
            thread.spawn(move || session.converse()).context("starting the client")
        })?;
        Ok(client)
    }

    fn lock(&self) -> MutexGuard<'_, Session> {
        self.0.lock().expect("no holder of the client's lock panics")
    }

    /// True once the guest has answered.
    pub(super) fn is_connected(&self) -> bool {
        !self.lock().times.is_empty()
    }

    /// From now on, answers come from a guest that has lost its primary.
    pub(super) fn primary_killed(&self) {
        let mut session = self.lock();
        session.killed_after = Some(session.times.len());
    }

    fn converse(&self) {
        // The guest is still to boot.
        let address = (GUEST, ECHO_PORT).into();
        let stream = loop {
            match TcpStream::connect_timeout(&address, CONNECT) {
                Ok(stream) => break stream,
                Err(_) => std::thread::sleep(CONNECT / 10),
            }
        };
        // The connection ends when the guest switches itself off.
        let _ = self.ask_and_answer(stream);
    }

    fn ask_and_answer(&self, mut stream: TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        for number in 0u64.. {
            let question = number.to_be_bytes();
            let asked = Instant::now();
            stream.write_all(&question)?;
            let mut answer = [0; 8];
            stream.read_exact(&mut answer)?;
            let mut session = self.lock();
            session.times.push(asked.elapsed());
            session.wrong |= answer != question;
            drop(session);
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    pub(super) fn report(&self) -> ClientReport {
        let session = self.lock();
        let mut times = session.times.clone();
        times.sort_unstable();
        let ms = |time: Option<&Duration>| time.map_or(0.0, |time| time.as_secs_f64() * 1e3);
        let after = session.killed_after.map_or(0, |before| session.times.len() - before);
        ClientReport {
            answers: session.times.len() as u64,
            answers_after_kill: after as u64,
            median_ms: ms(times.get(times.len() / 2)),
            longest_gap_ms: ms(times.last()),
            wrong: session.wrong,
        }
    }
}

impl ClientReport {
    /// The connection has outlived the primary, and every answer was right.
    pub(super) fn is_good(&self) -> bool {
        self.answers_after_kill > 0 && !self.wrong
    }
}
