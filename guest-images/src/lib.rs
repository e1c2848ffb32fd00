//! Recipes that fetch or build guests.
//!
//! The default guest is Debian's own cloud kernel, taken unmodified from its package, with an
//! initramfs made of Debian's static busybox, the virtio modules it needs and the scripts in
//! `init/`. [`default_guest`] resolves the packages through Debian's package manager, once, and
//! keeps the result in a [`Cache`] with its checksums. [`stock_kvm_host`] makes a Linux with
//! upstream KVM of the same packages. [`disk`] makes and checks disk images,
//! [`cmdline`] knows the kernel command line, and [`workload`] what the guest's init can run.
//!
//! [`probe`] makes a guest of a few hundred bytes, which runs where no Linux does.
//!
//! [`build_lockstep_guest`] compiles a kernel of Debian's source, with the configuration and patches in
//! `linux/`, which can be followed on the host's CPU; it is the only recipe that compiles or installs
//! anything, and runs only when asked for.
//!
//! Nothing is mounted. Loading a kernel into a machine is not done here.

#![deny(unsafe_code)]

pub mod cache;
pub mod cmdline;
mod command;
pub mod cpio;
mod debian;
mod debian_server;
pub mod disk;
mod error;
mod guest;
mod initramfs;
mod lock;
mod lockstep;
mod manifest;
mod modules;
pub mod packages;
pub mod probe;
mod programs;
mod progress;
pub mod workload;

pub use cache::Cache;
pub use command::CommandError;
pub use debian_server::{DebianRelease, DebianServer};
pub use error::GuestError;
pub use guest::{Guest, default_guest, refresh_default_guest, server_guest, stock_kvm_host};
pub use lockstep::{build_lockstep_guest, lockstep_guest};
pub use manifest::{Manifest, PackageRecord, Sha256};
pub use packages::ensure_packages;
pub use probe::ProbeGuest;
pub use progress::{NoProgress, Progress};
pub use workload::Workload;
