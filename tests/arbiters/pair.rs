//! A pair from one file whose arbiter is in an etcd: sides are killed, etcd loses a member, and both
//! come back.

use crate::cluster::Cluster;
use crate::server::{LIMIT, program};
use nix::sys::signal::Signal;
use std::ffi::OsString;
use std::num::NonZeroU32;
use vmft::pair::{SideProcess, Which};
use vmft_backup::status::{Role, SideStatus};
use vmft_guest_images::ProbeGuest;

/// Where a pair's files are.
struct Hosts(tempfile::TempDir);

impl Hosts {
    fn new(cluster: &Cluster) -> Self {
        let directory = tempfile::tempdir().unwrap();
        // It does not end before somebody types, which nobody does.
        let hold = [NonZeroU32::new(2), None];
        let guest =
            ProbeGuest { lines: NonZeroU32::new(4).unwrap(), hold, ..ProbeGuest::default() };
        std::fs::write(directory.path().join("probe.elf"), guest.image()).unwrap();
        let at = directory.path().display();
        let text = format!(
            "[guest]\nkernel = \"{at}/probe.elf\"\nmemory = \"64M\"\n\
             [pair]\narbiter = \"{}\"\nbegin-after = \"1s\"\n\
             [sides.a]\naddress = \"unix:{at}/a.sock\"\n[sides.b]\naddress = \"unix:{at}/b.sock\"\n",
            cluster.place("probe")
        );
        std::fs::write(directory.path().join("vmft.toml"), text).unwrap();
        Self(directory)
    }

    /// `vmft up` on the host of a side, for the so manieth time.
    fn up(&self, side: &str, time: u32) -> SideProcess {
        let file = self.0.path().join("vmft.toml");
        let arguments: Vec<OsString> = vec![file.into(), "--side".into(), side.into(), "--".into()];
        let which = if side == "a" { Which::Primary } else { Which::Backup };
        let name = format!("{side}{time}");
        SideProcess::start_named(program(), "up", (which, &name), self.0.path(), &arguments)
            .unwrap()
    }
}

fn wait(side: &mut SideProcess, role: Role, generation: u64) -> SideStatus {
    let wanted = |status: &SideStatus| status.role == role && status.generation == generation;
    side.wait_status(LIMIT, wanted).unwrap()
}

fn wait_says(side: &mut SideProcess, wanted: &str) {
    side.wait_says(LIMIT, |said| said.contains(wanted)).unwrap();
}

#[test]
fn a_pair_goes_on_while_its_etcd_has_a_majority_and_after_both_sides_were_lost() {
    let mut cluster = Cluster::start();
    let hosts = Hosts::new(&cluster);
    let mut a = hosts.up("a", 1);
    wait_says(&mut a, "side a: the guest begins here");
    wait(&mut a, Role::Alone, 1);
    let mut b = hosts.up("b", 1);
    wait_says(&mut b, "side b: a side of the pair is alive; this one follows");
    wait(&mut b, Role::Backup, 1);
    wait(&mut a, Role::Primary, 1);

    // A member of the etcd dies, then the primary: its backup goes on.
    cluster.kill(0);
    a.kill().unwrap();
    wait(&mut b, Role::Alone, 2);
    let mut a = hosts.up("a", 2);
    wait(&mut a, Role::Backup, 2);
    wait(&mut b, Role::Primary, 2);

    // Another one stands still: there is no majority, and the survivor waits until there is.
    cluster.signal(1, Signal::SIGSTOP);
    b.kill().unwrap();
    a.wait_status(LIMIT, |status| status.role == Role::Deciding).unwrap();
    cluster.signal(1, Signal::SIGCONT);
    wait(&mut a, Role::Alone, 3);
    cluster.start_again([0]);

    // Both sides are lost. Whoever comes back follows, until what was there has run out, and begins.
    a.kill().unwrap();
    let mut b = hosts.up("b", 2);
    wait_says(&mut b, "side b: a side of the pair is alive; this one follows");
    wait_says(&mut b, "no side of the pair is alive any more");
    let begun = b.wait_status(LIMIT, |status| status.role == Role::Alone).unwrap();
    assert!(begun.generation > 3, "{begun:?}");
    let mut a = hosts.up("a", 3);
    wait(&mut a, Role::Backup, begun.generation);
    wait(&mut b, Role::Primary, begun.generation);

    // An operator's stop leaves nobody there: another one begins at once.
    vmft::api_client::shutdown(&b.api()).unwrap();
    assert_eq!(b.wait_exit(LIMIT).unwrap().code(), Some(0), "{}", b.messages());
    assert_eq!(a.wait_exit(LIMIT).unwrap().code(), Some(0), "{}", a.messages());
    let mut a = hosts.up("a", 4);
    wait_says(&mut a, "no side is alive: the guest boots again here");
    assert!(!a.messages().contains("this one follows"), "{}", a.messages());
}
