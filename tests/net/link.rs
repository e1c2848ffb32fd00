//! A bad log link: packets are lost, doubled, overtaken and late. Throughput suffers, nothing else.
//!
//! The link is two TAP devices, and the test carries frames from one to the other.

use crate::echo::Echo;
use crate::lab::{self, GUEST, Lab, LogLink, Place};
use crate::stage::{Pair, Setup, pattern};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmft::pair::Which;
use vmft_fuzzing::Random;

/// What the link does to frames, in thousandths.
#[derive(Debug, Clone, Copy)]
struct Faults {
    lost: u64,
    doubled: u64,
    overtaken: u64,
    /// Every frame is so late.
    late: Duration,
}

/// Carries frames until dropped.
#[derive(Debug)]
struct BadLink {
    stop: Arc<AtomicBool>,
    spoiled: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

/// Opens the TAP device named `log` of a host.
fn open_tap(lab: &Lab, place: Place) -> File {
    lab.within(place, || {
        let options = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
        // SAFETY: all zeroes is a value of this plain structure.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(b"log") {
            *to = *from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&options);
        // SAFETY: the request reads and writes the structure, which is there.
        let done = unsafe { libc::ioctl(fd, libc::TUNSETIFF, &raw mut request) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        options
    })
}

impl BadLink {
    fn connect(lab: &Lab, faults: Faults, seed: u64) -> Self {
        println!("link with {faults:?}, seed {seed}");
        let taps = [Place::HostA, Place::HostB].map(|place| open_tap(lab, place));
        let [a, b] = taps;
        let (a2, b2) = (a.try_clone().unwrap(), b.try_clone().unwrap());
        let (stop, spoiled): (Arc<AtomicBool>, Arc<AtomicU64>) = Default::default();
        let carry = |from: File, to: File, seed: u64| {
            let (stop, spoiled) = (Arc::clone(&stop), Arc::clone(&spoiled));
            std::thread::spawn(move || {
                carry(&from, &to, faults, Random::new(seed), &stop, &spoiled)
            })
        };
        let threads = vec![carry(a, b, seed), carry(b2, a2, !seed)];
        Self { stop, spoiled, threads }
    }
}

impl Drop for BadLink {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

fn carry(
    mut from: &File,
    mut to: &File,
    faults: Faults,
    mut dice: Random,
    stop: &AtomicBool,
    spoiled: &AtomicU64,
) {
    let mut queue: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let mut frame = vec![0; 70_000];
    while !stop.load(Ordering::Acquire) {
        while queue.front().is_some_and(|(due, _)| *due <= Instant::now()) {
            let (_, frame) = queue.pop_front().unwrap();
            // An interface that is down loses it.
            let _ = to.write(&frame);
        }
        let next = queue.front().map_or(Duration::from_millis(50), |(due, _)| {
            due.saturating_duration_since(Instant::now()) + Duration::from_millis(1)
        });
        let mut fds = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(next.min(Duration::from_millis(50))).unwrap();
        if poll(&mut fds, timeout).unwrap() == 0 {
            continue;
        }
        let Ok(len) = from.read(&mut frame) else { continue };
        if dice.below(1_000) < faults.lost {
            spoiled.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        let due = Instant::now() + faults.late;
        queue.push_back((due, frame[..len].to_vec()));
        if dice.below(1_000) < faults.doubled {
            queue.push_back((due, frame[..len].to_vec()));
            spoiled.fetch_add(1, Ordering::Relaxed);
        }
        if queue.len() > 1 && dice.below(1_000) < faults.overtaken {
            let last = queue.len() - 1;
            let (later, earlier) = (queue[last - 1].1.clone(), queue[last].1.clone());
            (queue[last - 1].1, queue[last].1) = (earlier, later);
            spoiled.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[test]
fn a_bad_log_link_costs_throughput_and_nothing_else() {
    if lab::is_missing() {
        return;
    }
    let faults = Faults { lost: 5, doubled: 20, overtaken: 50, late: Duration::from_millis(3) };
    // A lost packet is sent again after 200 ms and more, which is no reason to suspect anybody.
    let setup =
        Setup { log: LogLink::Taps, both: vec!["--suspect-after", "5000"], ..Setup::default() };
    let mut link = None;
    let mut pair =
        Pair::start_in(&setup, |lab| link = Some(BadLink::connect(lab, faults, 0x6261_6421)));
    let link = link.unwrap();
    let echo = Echo::start(&pair.lab);
    const BODY: usize = 4 << 20;
    let url = format!("http://{GUEST}/cgi-bin/pattern?{BODY}");
    let output = pair.client("curl").args(["-sS", &url]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout.into_iter().eq(pattern(BODY)), "other bytes than were sent");
    echo.wait(50);
    let before = pair.primary.status().unwrap();
    pair.kill(Which::Primary);
    echo.wait(50);
    let spoiled = link.spoiled.load(Ordering::Relaxed);
    println!("{spoiled} frames spoiled; {:?}; {before:?}", echo.finish());
    assert!(spoiled > 50, "only {spoiled} frames were spoiled");
    assert_eq!(before.generation, 1, "nobody was suspected");
}
