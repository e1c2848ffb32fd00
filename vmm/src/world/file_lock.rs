//! Locks on files, to tell who uses what. They end with the process, however it ends.

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use std::fs::File;
use std::io;

/// How a file is locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileLock {
    /// With others who share it.
    Shared,
    /// By nobody else.
    Exclusive,
}

/// Takes an open-file-description lock on the whole file, or changes the one held; false if
/// someone else's lock stands against it.
///
/// # Errors
/// The file system's error.
pub fn try_lock_file(file: &File, kind: FileLock) -> io::Result<bool> {
    let kind = match kind {
        FileLock::Shared => libc::F_RDLCK,
        FileLock::Exclusive => libc::F_WRLCK,
    };
    let lock = libc::flock {
        l_type: libc::c_short::try_from(kind).expect("lock kinds are small"),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).expect("SEEK_SET is 0"),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Takes a shared lock on something that a group of processes uses together. The first of a group
/// must find nobody else there.
///
/// # Errors
/// The file system's error.
pub fn try_join_file(file: &File, first: bool) -> io::Result<bool> {
    if first && !try_lock_file(file, FileLock::Exclusive)? {
        return Ok(false);
    }
    try_lock_file(file, FileLock::Shared)
}
