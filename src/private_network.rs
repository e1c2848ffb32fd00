//! A network of our own: a network namespace with a bridge, TAP devices on it for sides of a pair, and
//! an address for clients. For demonstrations and measurements.
//!
//! Nothing of the host's network changes, and it is gone with the last process in it. Making it needs
//! the right to, which root has.

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns, unshare};
use std::fs::File;
use std::net::Ipv4Addr;
use std::process::Command;

/// The guest's address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
/// The clients' address and the length of the network's prefix.
const CLIENTS: &str = "10.99.0.1/24";

/// What the guest's kernel is told of the network.
pub fn cmdline() -> String {
    format!("ip={GUEST}/24")
}

/// The network.
#[derive(Debug)]
pub struct PrivateNetwork {
    namespace: File,
}

impl PrivateNetwork {
    /// Makes a network with these TAP devices.
    ///
    /// # Errors
    /// Whatever this process is not allowed to do.
    pub fn make(taps: &[&str]) -> Result<Self> {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace")?;
            set_up(taps)?;
            File::open("/proc/thread-self/ns/net").context("opening a network namespace")
        };
        // On a thread of its own, since a namespace is a thread's.
        let namespace =
            std::thread::scope(|scope| scope.spawn(make).join().expect("it does not panic"))?;
        Ok(Self { namespace })
    }

    /// Does something on a thread in the network; what it starts is in the network, too.
    pub fn within<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        let enter = || {
            setns(&self.namespace, CloneFlags::CLONE_NEWNET).expect("this process has made it");
            body()
        };
        std::thread::scope(|scope| scope.spawn(enter).join().expect("it does not panic"))
    }
}

fn set_up(taps: &[&str]) -> Result<()> {
    ip("link set lo up")?;
    ip("link add br0 type bridge forward_delay 0")?;
    ip(&format!("address add {CLIENTS} dev br0"))?;
    ip("link set br0 up")?;
    for tap in taps {
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
