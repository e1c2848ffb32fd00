//! The demo's network: a bridge with a TAP device for each side, in a network namespace of this
//! process, and a client that keeps one TCP connection to the guest open.
//!
//! The namespace is the demo's own: nothing of the host's network changes, and it is gone with the
//! demo. Making it needs the right to, which root has.

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, unshare};
use serde::Serialize;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use vmft_guest_images::workload::ECHO_PORT;

const HOST: &str = "10.99.0.1/24";
const GUEST: [u8; 4] = [10, 99, 0, 2];
/// The sides' TAP devices.
pub(super) const TAPS: [&str; 2] = ["primary0", "backup0"];
/// Between an answer and the next question.
const PAUSE: Duration = Duration::from_millis(2);
const CONNECT: Duration = Duration::from_secs(1);
/// How long an answer may take before the connection counts as lost.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the guest's kernel is told.
pub(super) fn cmdline() -> String {
    let [a, b, c, d] = GUEST;
    format!("ip={a}.{b}.{c}.{d}/24")
}

/// Makes the network around this thread, and whatever it starts from now on.
pub(super) fn make() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace")?;
    ip("link set lo up")?;
    ip("link add br0 type bridge forward_delay 0")?;
    ip(&format!("address add {HOST} dev br0"))?;
    ip("link set br0 up")?;
    for tap in TAPS {
        ip(&format!("tuntap add dev {tap} mode tap"))?;
        ip(&format!("link set {tap} up master br0"))?;
    }
    Ok(())
}

fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip").args(arguments.split(' ')).output().context("running `ip`")?;
    if !output.status.success() {
        bail!("`ip {arguments}`: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

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
    pub(super) fn start() -> Result<Self> {
        let client = Self::default();
        let thread = std::thread::Builder::new().name("client".to_owned());
        let session = client.clone();
        thread.spawn(move || session.converse()).context("starting the client")?;
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
        let address = SocketAddr::from((GUEST, ECHO_PORT));
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
