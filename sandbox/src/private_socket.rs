//! Unix sockets that are their owner's alone.

use nix::sys::stat::{Mode, fchmod};
use socket2::{Domain, SockAddr, Socket, Type};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Listens on a Unix socket at `path` to which only its owner may connect (mode 0600), in place of one
/// that a process left there when it died. Anything else at that place stays.
///
/// # Errors
/// `AddrInUse` if a process listens there, `AlreadyExists` if it is no socket, or the host's error.
pub fn bind_private_socket(path: &Path) -> io::Result<UnixListener> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "something else is there"));
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        Ok(_) => std::fs::remove_file(path)?,
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Before there is a name: Linux gives the name the socket's mode (unix(7)), so that there is no
    // moment in which others may connect.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    Ok(UnixListener::from(OwnedFd::from(socket)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_socket_is_its_owners_alone_and_takes_only_the_place_of_a_dead_one() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("socket");
        let listener = bind_private_socket(&path).expect("a free place");
        let mode = std::fs::metadata(&path).expect("made").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let taken = bind_private_socket(&path).expect_err("in use");
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        let _again = bind_private_socket(&path).expect("nobody listens there");
        let file = dir.path().join("file");
        std::fs::write(&file, "precious").expect("written");
        let other = bind_private_socket(&file).expect_err("no socket");
        assert_eq!(other.kind(), io::ErrorKind::AlreadyExists);
    }
}
