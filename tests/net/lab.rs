//! Two hosts, a client and a switch, each a network namespace.
//!
//! ```text
//!   host a: tap0 ─ bridge ─ uplink ─┐             ┌─ uplink ─ bridge ─ tap0 :host b
//!             │                     ├─ br0 :switch ┤                     │
//!            log ───────────────────────────────────────────────────── log
//!                                   └─ eth0 :client
//! ```
//! A test that is killed leaves its namespaces behind; the next one removes those of processes that
//! are gone.

use nix::sched::{CloneFlags, setns};
use std::fs::File;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

/// The client's address, and the guest's.
pub const CLIENT: &str = "10.99.0.1";
pub const GUEST: &str = "10.99.0.2";
/// The guest's Ethernet address.
pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0x99, 0, 2];
/// The hosts' addresses on the log link.
pub const LOG_A: &str = "10.77.0.1";
pub const LOG_B: &str = "10.77.0.2";

/// The TAP device, of the same name on both hosts.
pub const TAP: &str = "tap0";

/// A place in the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    HostA,
    HostB,
    Client,
    Switch,
}

/// How the hosts' log link is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLink {
    /// A cable.
    Cable,
    /// Two TAP devices named `log`, which the test connects.
    Taps,
}

/// The namespaces; removed when dropped.
#[derive(Debug)]
pub struct Lab {
    prefix: String,
}

/// True if the run says that this host lets nobody make networks (`VMFT_NO_NET=1`).
pub fn is_missing() -> bool {
    let missing = std::env::var_os("VMFT_NO_NET").is_some_and(|value| value == "1");
    if missing {
        eprintln!("not run: VMFT_NO_NET=1 says that this host has no network namespaces");
    }
    missing
}

/// Runs a command, which must succeed.
pub fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn ip(arguments: &str) {
    run("ip", &arguments.split(' ').collect::<Vec<_>>());
}

/// Removes what tests that were killed have left.
fn clean_up() {
    let Ok(names) = std::fs::read_dir("/run/netns") else { return };
    for name in names {
        let name = name.unwrap().file_name().into_string().unwrap();
        let pid = name.strip_prefix("vmft").and_then(|rest| rest.split('x').next());
        if let Some(pid) = pid
            && !Path::new("/proc").join(pid).exists()
        {
            // Another test may be removing it as well.
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
        }
    }
}

impl Lab {
    pub fn new(log: LogLink) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        clean_up();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let lab = Self { prefix: format!("vmft{}x{number}", std::process::id()) };
        for place in [Place::HostA, Place::HostB, Place::Client, Place::Switch] {
            ip(&format!("netns add {}", lab.name(place)));
            lab.ip(place, "link set lo up");
        }
        lab.ip(Place::Switch, "link add br0 type bridge forward_delay 0");
        lab.ip(Place::Switch, "link set br0 up");
        for (place, port) in
            [(Place::HostA, "port-a"), (Place::HostB, "port-b"), (Place::Client, "port-c")]
        {
            let far = lab.name(place);
            lab.ip(Place::Switch, &format!("link add {port} type veth peer name eth0 netns {far}"));
            lab.ip(Place::Switch, &format!("link set {port} up master br0"));
            lab.ip(place, "link set eth0 up");
        }
        lab.ip(Place::Client, &format!("address add {CLIENT}/24 dev eth0"));
        for host in [Place::HostA, Place::HostB] {
            lab.ip(host, "link add br0 type bridge forward_delay 0");
            lab.ip(host, "link set eth0 master br0");
            lab.ip(host, "link set br0 up");
            lab.ip(host, &format!("tuntap add dev {TAP} mode tap"));
            lab.ip(host, &format!("link set {TAP} up master br0"));
        }
        if log == LogLink::Cable {
            let far = lab.name(Place::HostB);
            lab.ip(Place::HostA, &format!("link add log type veth peer name log netns {far}"));
        }
        for (host, address) in [(Place::HostA, LOG_A), (Place::HostB, LOG_B)] {
            if log == LogLink::Taps {
                lab.ip(host, "tuntap add dev log mode tap");
            }
            lab.ip(host, &format!("address add {address}/30 dev log"));
            lab.ip(host, "link set log up");
        }
        lab
    }

    /// The namespace's name.
    pub fn name(&self, place: Place) -> String {
        let place = match place {
            Place::HostA => "a",
            Place::HostB => "b",
            Place::Client => "c",
            Place::Switch => "s",
        };
        format!("{}{place}", self.prefix)
    }

    /// `ip` in a namespace.
    pub fn ip(&self, place: Place, arguments: &str) {
        ip(&format!("-n {} {arguments}", self.name(place)));
    }

    /// A program in a namespace, to be given its arguments.
    pub fn command(&self, place: Place, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name(place), program]);
        command
    }

    /// Does something on a thread in a namespace.
    pub fn within<T: Send>(&self, place: Place, body: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(format!("/run/netns/{}", self.name(place))).unwrap();
        std::thread::scope(|scope| {
            let enter = move || {
                setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
                body()
            };
            scope.spawn(enter).join().unwrap()
        })
    }

    /// Cuts the log link, or mends it.
    pub fn set_log_link(&self, up: bool) {
        self.ip(Place::HostA, &format!("link set log {}", if up { "up" } else { "down" }));
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for place in [Place::HostA, Place::HostB, Place::Client, Place::Switch] {
            // What is left is removed by the next test.
            let _ = Command::new("ip").args(["netns", "del", &self.name(place)]).output();
        }
    }
}
