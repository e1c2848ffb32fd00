//! That two sides have the same storage, and not one of them a copy of it: a copy has the same content, the
//! same pair's name and disks of the same size, and both sides could go live on it.
//!
//! * **The arbiter.** A side that joins leaves a token of random digits with its arbiter, says it in its
//!   hello, and takes it away when it has joined; the primary looks for it with its own.
//! * **The disks.** An image on the arbiter's file system is the same on both sides if it has the same inode
//!   number there, since the token has shown that the file system is the same. One elsewhere is taken to be the same by
//!   its inode number and the moment it was made, where its file system tells that. Both are compared as
//!   fields of the fingerprint, so that a copy is refused by name before anything is sent. Of block devices
//!   nothing is compared but that they are: their numbers and names differ from host to host. Of a server's export
//!   the server tells what it is.

use crate::arbiter::{Arbiter, ArbiterError, Candidate};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::time::UNIX_EPOCH;
use vmft_logging_channel::fingerprint::{ANY, Fingerprint, Identity};
use vmft_logging_channel::handshake::Refusal;
use vmft_vmm::world::DiskFile;

/// The field with a joining side's token; a primary's is [`ANY`].
pub const TOKEN: &str = "arbiter token";

/// The field with what is known of a disk's image.
pub fn image_field(index: usize) -> String {
    format!("disk {index} image")
}

/// True for a field that [`on`] adds.
pub fn is_storage_field(name: &str) -> bool {
    name == TOKEN || name.starts_with("disk ") && name.ends_with(" image")
}

/// What tells the image at `path` from a copy of it, as seen from a host with that arbiter's
/// directory, if it has one.
pub fn image(path: &Path, arbiter: Option<&Path>) -> String {
    let Ok(data) = fs::metadata(path) else { return "not to be seen".to_owned() };
    if !data.is_file() {
        let kind = if data.file_type().is_block_device() { "block device" } else { "no file" };
        return kind.to_owned();
    }
    let mut told = format!("file {}", data.ino());
    let is_beside = |arbiter: &Path| fs::metadata(arbiter).is_ok_and(|it| it.dev() == data.dev());
    let same_file_system = arbiter.is_some_and(is_beside);
    if same_file_system {
        told.push_str(" beside the arbiter");
    } else if let Some(made) = data.created().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok())
    {
        let _ = write!(told, " made at {}.{:09}", made.as_secs(), made.subsec_nanos());
    }
    told
}

/// The fingerprint of a side with these disks and that arbiter's directory, if it has one.
#[must_use]
pub fn on(fingerprint: Fingerprint, arbiter: Option<&Path>, disks: &[DiskFile]) -> Fingerprint {
    let fingerprint = fingerprint.with(TOKEN, ANY);
    disks.iter().enumerate().fold(fingerprint, |fingerprint, (index, disk)| {
        let told = disk.identity().unwrap_or_else(|| image(disk.path(), arbiter));
        fingerprint.with(image_field(index), told)
    })
}

/// The fingerprint of a side with the same storage as the one that `other` is of.
#[must_use]
pub fn same_as(fingerprint: Fingerprint, other: &Fingerprint) -> Fingerprint {
    other
        .fields()
        .filter(|(name, _)| is_storage_field(name))
        .fold(fingerprint, |fingerprint, (name, value)| fingerprint.with(name, value))
}

/// A token that is with the arbiter for as long as this lives.
#[derive(Debug)]
pub(crate) struct Token {
    arbiter: Arc<dyn Arbiter>,
    digits: String,
}

impl Token {
    /// Leaves one.
    pub(crate) fn leave(arbiter: &Arc<dyn Arbiter>, who: &Candidate) -> Result<Self, ArbiterError> {
        let digits = arbiter.leave_token(who)?;
        Ok(Self { arbiter: Arc::clone(arbiter), digits })
    }

    /// The token there is, or another one: whoever cleans up may have taken it away.
    pub(crate) fn renew<'a>(
        token: &'a mut Option<Self>,
        arbiter: &Arc<dyn Arbiter>,
        who: &Candidate,
    ) -> Result<&'a Self, ArbiterError> {
        if let Some(there) = token.as_ref()
            && !arbiter.finds(&there.digits)?
        {
            *token = None;
        }
        match token {
            Some(token) => Ok(token),
            None => Ok(token.insert(Self::leave(arbiter, who)?)),
        }
    }

    /// What a side says of itself that has left this token.
    pub(crate) fn said_by(&self, identity: &Identity) -> Identity {
        let fingerprint = identity.fingerprint.clone().with(TOKEN, &self.digits);
        Identity { fingerprint, ..identity.clone() }
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        self.arbiter.take_token(&self.digits);
    }
}

/// The side that says it has left a token has left it with this arbiter.
///
/// # Errors
/// What it is to be told.
pub(crate) fn check(arbiter: &dyn Arbiter, peer: &Identity) -> Result<(), Refusal> {
    let token = peer.fingerprint.get(TOKEN).unwrap_or_default();
    match arbiter.finds(token) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Refusal::OtherStorage),
        Err(error) => Err(Refusal::NotAccepting(error.to_string().into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arbiter::DirectoryArbiter;
    use std::path::PathBuf;
    use vmft_log::entry::Generation;
    use vmft_vmm::world::HostCache;

    struct Host {
        image: PathBuf,
        arbiter: Arc<dyn Arbiter>,
        directory: PathBuf,
    }

    impl Host {
        fn at(directory: &Path) -> Self {
            let arbiter = directory.join("disk.img.vmft");
            let image = directory.join("disk.img");
            let opened = DirectoryArbiter::open(&arbiter).expect("there");
            Self { image, arbiter: Arc::new(opened), directory: arbiter }
        }

        fn identity(&self) -> Identity {
            let disk = DiskFile::open(&self.image, false, HostCache::WriteBack, false);
            let disks = [disk.expect("it is there")];
            let fingerprint = on(Fingerprint::new(), Some(&self.directory), &disks);
            let pair = "pair".parse().expect("a name");
            Identity { pair, generation: Generation(1), fingerprint }
        }
    }

    fn candidate() -> Candidate {
        Candidate { id: "b".into(), host: "there".into(), pid: 1, role: "backup".into() }
    }

    /// A directory with an image and its arbiter, and another one that is a copy of it.
    fn hosts() -> (tempfile::TempDir, Host, Host) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let place = |name: &str| {
            let place = dir.path().join(name);
            fs::create_dir_all(place.join("disk.img.vmft")).expect("made");
            place
        };
        let (a, b) = (place("a"), place("b"));
        fs::write(a.join("disk.img"), [0; 512]).expect("written");
        let arbiter = DirectoryArbiter::create(&a.join("disk.img.vmft")).expect("made");
        arbiter.pair("pair").expect("reachable");
        for name in ["disk.img", "disk.img.vmft/pair", "disk.img.vmft/lock"] {
            fs::copy(a.join(name), b.join(name)).expect("copied");
        }
        let (a, b) = (Host::at(&a), Host::at(&b));
        (dir, a, b)
    }

    #[test]
    fn a_side_with_a_copy_of_the_arbiter_is_refused_and_one_with_the_same_is_not() {
        let (_dir, primary, copy) = hosts();
        for (host, expected) in [(&primary, Ok(())), (&copy, Err(Refusal::OtherStorage))] {
            let mut token = None;
            let mut said = || {
                let token = Token::renew(&mut token, &host.arbiter, &candidate());
                token.expect("reachable").said_by(&host.identity())
            };
            let first = said();
            assert_eq!(said(), first, "it is still there");
            host.arbiter.take_token(first.fingerprint.get(TOKEN).expect("said"));
            let said = said();
            assert_ne!(said, first);
            assert_eq!(check(&*primary.arbiter, &said), expected);
            drop(token);
            assert_eq!(check(&*primary.arbiter, &said), Err(Refusal::OtherStorage), "taken away");
        }
        // One that says nothing has shown nothing.
        assert_eq!(check(&*primary.arbiter, &primary.identity()), Err(Refusal::OtherStorage));
    }

    #[test]
    fn a_copied_image_is_told_by_its_field() {
        let (_dir, primary, copy) = hosts();
        let ours = primary.identity().fingerprint;
        assert_eq!(ours.mismatch(&primary.identity().fingerprint), None);
        let mismatch = ours.mismatch(&copy.identity().fingerprint).expect("another file");
        assert_eq!(mismatch.field, image_field(0).as_str());
        // The same where the arbiter is on another file system.
        let elsewhere = |host: &Host| image(&host.image, Some(Path::new("/proc")));
        assert_eq!(elsewhere(&primary), elsewhere(&primary));
        assert_ne!(elsewhere(&primary), elsewhere(&copy));
    }

    #[test]
    fn a_survivor_has_the_storage_it_had_as_a_backup() {
        let (_dir, host, _) = hosts();
        let was = host.identity().fingerprint.with("engine", "any");
        let is = same_as(Fingerprint::new().with("engine", "soft"), &was);
        assert_eq!(is.get("engine"), Some("soft"));
        assert_eq!(is.get(&image_field(0)), was.get(&image_field(0)));
        assert_eq!(is.get(TOKEN), Some(ANY));
    }
}
