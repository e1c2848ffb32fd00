//! The network's figures: what a client sees at a kill, and what protection costs.
//!
//! A guest with servers is booted once and saved; each guest has a network of its own, so that one
//! alone and a pair can take turns. Needs root, for the networks; without it there are no such figures.

use crate::figure::{Figure, Goal, median};
use crate::lab::{INTERRUPTED, cpu_time};
use crate::measure::Effort;
use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vmft::api_client;
use vmft::pair::{SideProcess, Which, prefixed};
use vmft::private_network::{GUEST, PrivateNetwork, cmdline};
use vmft_backup::status::Role;
use vmft_guest_images::packages::{NETWORK_PACKAGES, ensure_packages};
use vmft_guest_images::workload::ECHO_PORT;
use vmft_guest_images::{Cache, cmdline as kernel, server_guest};

/// The figures made here.
pub const NAMES: &[&str] = &[
    "client-gap",
    "protected-transmit",
    "protected-receive",
    "protected-http",
    "log-per-byte-transmit",
    "log-per-byte-receive",
    "ping-added",
];

/// Those of small packets there and back.
const EXCHANGES: &[&str] = &["protected-http", "ping-added"];

const PATIENCE: Duration = Duration::from_secs(300);
const TAPS: [&str; 2] = ["primary0", "backup0"];
const IPERF_PORT: u16 = 5201;
const HTTP_PORT: u16 = 80;
/// How long a client watches before and after a kill.
const BEFORE_KILL: Duration = Duration::from_millis(300);
const AFTER_KILL: Duration = Duration::from_millis(1_500);
/// Pings of one round.
const PINGS: u32 = 200;

/// Where the guests are started.
struct Place {
    directory: tempfile::TempDir,
    program: PathBuf,
    snapshot: PathBuf,
    guests: u32,
}

/// A guest in its network.
struct Guest {
    network: PrivateNetwork,
    sides: Vec<SideProcess>,
}

impl Place {
    /// Boots the guest with servers, and saves it when all of them answer.
    fn open(program: &Path) -> Result<Self> {
        let mut progress = vmft::progress::terminal();
        let guest = server_guest(&Cache::from_environment()?, &mut progress)?;
        drop(progress);
        let directory = tempfile::Builder::new().prefix("vmft-bench").tempdir()?;
        let words = format!("{} vmft.run=idle {}", kernel::DEFAULT, cmdline());
        let arguments: [OsString; 8] = [
            "--kernel".into(),
            guest.kernel.into(),
            "--initramfs".into(),
            guest.initramfs.into(),
            "--cmdline".into(),
            words.into(),
            "--memory".into(),
            "size=160M".into(),
        ];
        let network = PrivateNetwork::make(&TAPS)?;
        let start = || start(program, "run", Which::Primary, directory.path(), &arguments);
        let side = network.within(start)?;
        let booted = Guest { network, sides: vec![side] };
        for port in [ECHO_PORT, HTTP_PORT, IPERF_PORT] {
            booted.wait_for(port)?;
        }
        let snapshot = directory.path().join("snapshot");
        api_client::snapshot(&booted.sides[0].api(), &snapshot)?;
        Ok(Self { directory, program: program.to_owned(), snapshot, guests: 0 })
    }

    fn new_directory(&mut self) -> Result<PathBuf> {
        self.guests += 1;
        let path = self.directory.path().join(self.guests.to_string());
        std::fs::create_dir(&path)?;
        Ok(path)
    }

    fn alone(&mut self) -> Result<Guest> {
        let directory = self.new_directory()?;
        let network = PrivateNetwork::make(&TAPS)?;
        let arguments: [OsString; 2] = ["--restore".into(), self.snapshot.clone().into()];
        let start = || start(&self.program, "run", Which::Primary, &directory, &arguments);
        let side = network.within(start)?;
        Ok(Guest { network, sides: vec![side] })
    }

    fn pair(&mut self) -> Result<Guest> {
        let directory = self.new_directory()?;
        let network = PrivateNetwork::make(&TAPS)?;
        let arbiter = prefixed("dir=", &directory.join("arbiter"));
        let program = &self.program;
        let arguments: Vec<OsString> = vec![
            "--restore".into(),
            self.snapshot.clone().into(),
            "--listen".into(),
            "tcp:127.0.0.1:0".into(),
            "--arbiter".into(),
            arbiter.clone(),
        ];
        let start_one = |which: Which, arguments: &[OsString]| {
            network.within(|| start(program, which.name(), which, &directory, arguments))
        };
        let mut primary = start_one(Which::Primary, &arguments)?;
        let status = primary.wait_status(PATIENCE, |status| status.listening.is_some())?;
        let address = status.listening.expect("just seen");
        let arguments: Vec<OsString> =
            vec!["--primary".into(), format!("tcp:{address}").into(), "--arbiter".into(), arbiter];
        let mut backup = start_one(Which::Backup, &arguments)?;
        backup.wait_status(PATIENCE, |status| status.role == Role::Backup)?;
        primary.wait_status(PATIENCE, |status| status.role == Role::Primary)?;
        Ok(Guest { network, sides: vec![primary, backup] })
    }
}

fn start(
    program: &Path,
    subcommand: &str,
    which: Which,
    directory: &Path,
    arguments: &[OsString],
) -> Result<SideProcess> {
    let tap = TAPS[usize::from(which == Which::Backup)];
    let mut arguments = arguments.to_vec();
    arguments.extend(["--net".into(), format!("tap={tap}").into()]);
    SideProcess::start_as(program, subcommand, which, directory, &arguments)
}

impl Guest {
    fn connect(&self, port: u16) -> std::io::Result<TcpStream> {
        if INTERRUPTED.load(Ordering::Relaxed) {
            return Err(std::io::ErrorKind::Interrupted.into());
        }
        let connect = || TcpStream::connect_timeout(&(GUEST, port).into(), Duration::from_secs(1));
        let stream = self.network.within(connect)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        Ok(stream)
    }

    /// True if a server at this port takes a connection, and has seen its end: one of which it has
    /// not would be open for ever in a guest that is saved now.
    fn serves(&self, port: u16) -> bool {
        let Ok(mut stream) = self.connect(port) else { return false };
        let ended = stream.shutdown(Shutdown::Write);
        ended.and_then(|()| stream.read_to_end(&mut Vec::new())).is_ok()
    }

    /// Waits until there is a server at this port.
    fn wait_for(&self, port: u16) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.serves(port) {
            if Instant::now() > deadline || INTERRUPTED.load(Ordering::Relaxed) {
                bail!("the guest does not get ready: {}", self.sides[0].messages());
            }
        }
        Ok(())
    }

    /// Does something that has an amount and takes a time; adds both to `work`, and the CPU time that the live
    /// side's process took meanwhile.
    fn does(&self, work: &mut Work, body: impl FnOnce() -> Result<(f64, f64)>) -> Result<()> {
        let pid = self.sides[0].pid();
        let before = cpu_time(pid);
        let (amount, seconds) = body()?;
        work.amount += amount;
        work.seconds += seconds;
        work.cpu += (cpu_time(pid) - before).as_secs_f64();
        Ok(())
    }

    /// Bytes of log so far.
    fn log_bytes(&self) -> Result<u64> {
        Ok(self.sides[0].status()?.channel.unwrap_or_default().log_bytes)
    }

    /// Runs iperf3 for a second: payload bytes that came through, and how long it took, in seconds.
    fn iperf(&self, reverse: bool) -> Result<(f64, f64)> {
        let mut command = Command::new("iperf3");
        command.args(["-J", "-c", &GUEST.to_string(), "-t", "1"]);
        if reverse {
            command.arg("-R");
        }
        let output = self.network.within(|| command.output()).context("running iperf3")?;
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let received = &report["end"]["sum_received"];
        let number = |name: &str| received[name].as_f64();
        number("bytes")
            .zip(number("seconds"))
            .with_context(|| format!("iperf3 says {}", report["error"]))
    }

    /// HTTP requests, one after the other: how many, and how long they took, in seconds.
    fn http(&self, time: Duration) -> Result<(f64, f64)> {
        let started = Instant::now();
        let mut requests = 0;
        while started.elapsed() < time {
            let mut stream = self.connect(HTTP_PORT)?;
            stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n")?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            if !answer.ends_with(b"vmft\n") {
                bail!("the guest's HTTP server answers something else");
            }
            requests += 1;
        }
        Ok((f64::from(requests), started.elapsed().as_secs_f64()))
    }

    /// The median round trip of pings, in milliseconds.
    fn ping(&self) -> Result<f64> {
        let mut command = Command::new("ping");
        command.args(["-n", "-i", "0.01", "-c", &PINGS.to_string(), &GUEST.to_string()]);
        let output = self.network.within(|| command.output()).context("running ping")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let times: Vec<f64> = text
            .lines()
            .filter_map(|line| line.split_once("time=")?.1.split(' ').next()?.parse().ok())
            .collect();
        if times.len() < PINGS as usize / 2 {
            bail!("ping hears too little: {text}");
        }
        Ok(median(&times))
    }

    /// Kills the primary under a client's eyes; the longest time without an answer.
    fn client_gap(&mut self) -> Result<Duration> {
        let stream = self.connect(ECHO_PORT)?;
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let client = scope.spawn(|| longest_wait(stream, &stop));
            std::thread::sleep(BEFORE_KILL);
            let killed = self.sides[0].kill();
            std::thread::sleep(AFTER_KILL);
            stop.store(true, Ordering::Relaxed);
            let gap = client.join().expect("it does not panic");
            killed?;
            gap.context("the client's connection is lost")
        })
    }
}

fn longest_wait(mut stream: TcpStream, stop: &AtomicBool) -> std::io::Result<Duration> {
    let mut longest = Duration::ZERO;
    let mut number = 0u64;
    while !stop.load(Ordering::Relaxed) {
        let asked = Instant::now();
        stream.write_all(&number.to_be_bytes())?;
        let mut answer = [0; 8];
        stream.read_exact(&mut answer)?;
        if answer != number.to_be_bytes() {
            return Err(std::io::Error::other("another answer"));
        }
        longest = longest.max(asked.elapsed());
        number += 1;
    }
    Ok(longest)
}

/// The figures that are wanted; none where this user may not make networks, which is said.
pub fn figures(program: &Path, effort: &Effort, wanted: &[&str]) -> Result<Vec<Figure>> {
    if let Err(error) = PrivateNetwork::make(&[]) {
        println!("no figures of the network: {error:#}; only root can make one");
        return Ok(Vec::new());
    }
    ensure_packages(NETWORK_PACKAGES, &mut vmft::progress::terminal())?;
    measure(program, effort, wanted)
}

fn measure(program: &Path, effort: &Effort, wanted: &[&str]) -> Result<Vec<Figure>> {
    let mut place = Place::open(program)?;
    let mut figures = Vec::new();
    if wanted.contains(&"client-gap") {
        let mut gaps = Vec::new();
        for _ in 0..effort.kills {
            gaps.push(place.pair()?.client_gap()?.as_secs_f64() * 1e3);
        }
        let goal = Goal::AtMostWorst { median: 200.0, worst: 600.0 };
        let note = "longest wait for an answer around SIGKILL".to_owned();
        figures.push(Figure::new("client-gap", "ms", goal, gaps, note));
    }
    let others = wanted.iter().filter(|name| NAMES[1..].contains(name));
    let (exchanged, transferred): (Vec<&str>, Vec<&str>) =
        others.partition(|name| EXCHANGES.contains(name));
    if exchanged.is_empty() && transferred.is_empty() {
        return Ok(figures);
    }
    let (alone, pair) = (place.alone()?, place.pair()?);
    alone.wait_for(ECHO_PORT)?;
    if !transferred.is_empty() {
        // A server takes one transfer after the other, and wants some time in between.
        let company = [place.alone()?, place.alone()?];
        for guest in &company {
            guest.wait_for(ECHO_PORT)?;
        }
        figures.extend(transfers(&alone, &company, &pair, effort)?);
    }
    if !exchanged.is_empty() {
        figures.extend(exchanges(&alone, &pair, effort)?);
    }
    figures.retain(|figure| wanted.contains(&figure.name));
    Ok(figures)
}

/// What was done, in so many seconds, with so many seconds of CPU time.
#[derive(Debug, Clone, Copy, Default)]
struct Work {
    amount: f64,
    seconds: f64,
    cpu: f64,
}

/// Ratios of rates, of a pair and a guest alone.
#[derive(Debug, Default)]
struct Ratios {
    ratios: Vec<f64>,
    by_cpu: Vec<f64>,
    rates: Vec<f64>,
}

impl Ratios {
    fn add(&mut self, alone: Work, pair: Work) {
        let rate = |work: Work| work.amount / work.seconds;
        let of_cpu = |work: Work| work.amount / work.cpu;
        self.ratios.push(rate(pair) / rate(alone));
        self.by_cpu.push(of_cpu(pair) / of_cpu(alone));
        self.rates.push(rate(alone));
    }

    /// The figure; its note says what an unprotected guest does, times `scale`, and the ratio by the CPU time
    /// of the guest's own process: on a host that lacks cores for two guests and a client, the rest of a loss
    /// is theirs.
    fn figure(self, name: &'static str, goal: f64, unit: &str, scale: f64) -> Figure {
        let (rate, by_cpu) = (median(&self.rates) * scale, median(&self.by_cpu));
        let note = format!("unprotected {rate:.0} {unit}; {by_cpu:.2} by CPU time");
        Figure::new(name, "ratio", Goal::AtLeast(goal), self.ratios, note)
    }
}

/// Turns in a round: the host's own speed may change from second to second.
const TURNS: u32 = 6;

/// Requests and pings: small packets there and back.
fn exchanges(alone: &Guest, pair: &Guest, effort: &Effort) -> Result<Vec<Figure>> {
    let (mut requests, mut added) = (Ratios::default(), Vec::new());
    for _ in 0..effort.rounds {
        let (mut by_alone, mut by_pair) = (Work::default(), Work::default());
        for _ in 0..TURNS {
            alone.does(&mut by_alone, || alone.http(effort.round / TURNS))?;
            pair.does(&mut by_pair, || pair.http(effort.round / TURNS))?;
        }
        requests.add(by_alone, by_pair);
        added.push(pair.ping()? - alone.ping()?);
    }
    Ok(vec![
        requests.figure("protected-http", 0.80, "requests/s", 1.0),
        Figure::new("ping-added", "ms", Goal::AtMost(0.5), added, String::new()),
    ])
}

/// Ratios and log bytes of transfers in both directions. It is measured as well what an unprotected guest
/// loses to another that does the same beside it: as much of a ratio is the host's.
fn transfers(
    alone: &Guest,
    company: &[Guest; 2],
    pair: &Guest,
    effort: &Effort,
) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for (reverse, ratio, ratio_goal, log, log_goal) in [
        (true, "protected-transmit", 0.90, "log-per-byte-transmit", 0.05),
        (false, "protected-receive", 0.85, "log-per-byte-receive", 1.1),
    ] {
        let (mut ratios, mut beside, mut logged) =
            (Ratios::default(), Ratios::default(), Vec::new());
        for _ in 0..effort.rounds {
            let [mut by_alone, mut by_pair, mut in_company] = [Work::default(); 3];
            let mut log_bytes = 0;
            for _ in 0..effort.round.as_secs().max(1) {
                alone.does(&mut by_alone, || alone.iperf(reverse))?;
                std::thread::scope(|scope| {
                    let [one, other] = company;
                    let beside = scope.spawn(|| other.iperf(reverse));
                    let done = one.does(&mut in_company, || one.iperf(reverse));
                    beside.join().expect("it does not panic").and(done)
                })?;
                let before = pair.log_bytes()?;
                pair.does(&mut by_pair, || pair.iperf(reverse))?;
                log_bytes += pair.log_bytes()? - before;
            }
            ratios.add(by_alone, by_pair);
            beside.add(by_alone, in_company);
            logged.push(log_bytes as f64 / by_pair.amount);
        }
        let mut figure = ratios.figure(ratio, ratio_goal, "Mbit/s", 8e-6);
        let (rate, by_cpu) = (median(&beside.ratios), median(&beside.by_cpu));
        figure.note +=
            &format!("; two unprotected side by side {rate:.2}, {by_cpu:.2} by CPU time");
        figures.push(figure);
        let goal = Goal::AtMost(log_goal);
        figures.push(Figure::new(log, "bytes", goal, logged, String::new()));
    }
    Ok(figures)
}
