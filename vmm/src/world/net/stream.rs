//! The stream protocol of `passt` and of QEMU's `-netdev stream`: frames on a Unix stream socket,
//! each behind its length in four bytes, the most significant first.
//!
//! The peer is not trusted: a length that no frame has ends the connection.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use vmft_log::entry::{MAX_PACKET, Packet, PacketOffload};

const LENGTH: usize = 4;
/// Bytes kept for a peer that does not take them; beyond it, frames are lost whole.
const UNSENT_LIMIT: usize = 1 << 20;
/// Bytes read at a time.
const READ: usize = 128 << 10;

/// A connection.
#[derive(Debug)]
pub(super) struct Stream<S = UnixStream> {
    socket: S,
    unsent: VecDeque<u8>,
    /// Bytes received of frames that are not complete.
    partial: Vec<u8>,
    buffer: Vec<u8>,
}

impl Stream {
    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        let socket = UnixStream::connect(path)?;
        socket.set_nonblocking(true)?;
        Ok(Self::over(socket))
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<S: Read + Write> Stream<S> {
    /// Over a socket that does not block.
    pub(super) fn over(socket: S) -> Self {
        Self { socket, unsent: VecDeque::new(), partial: Vec::new(), buffer: vec![0; READ] }
    }

    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Sends a frame, or keeps the part that the socket does not take now.
    pub(super) fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        let length =
            u32::try_from(frame.len()).expect("frames are shorter than 4 GiB").to_be_bytes();
        if self.has_unsent() {
            if self.unsent.len() + frame.len() > UNSENT_LIMIT {
                return Err(ErrorKind::WouldBlock.into());
            }
            self.unsent.extend(length);
            self.unsent.extend(frame);
            return self.send_rest();
        }
        let taken = match self.socket.write_vectored(&[IoSlice::new(&length), IoSlice::new(frame)])
        {
            Ok(taken) => taken,
            Err(error) if is_temporary(&error) => 0,
            Err(error) => return Err(error),
        };
        self.unsent.extend(length.iter().chain(frame).skip(taken));
        Ok(())
    }

    /// Sends what is left, as far as the socket takes it.
    pub(super) fn send_rest(&mut self) -> io::Result<()> {
        while self.has_unsent() {
            let (front, back) = self.unsent.as_slices();
            match self.socket.write_vectored(&[IoSlice::new(front), IoSlice::new(back)]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(taken) => drop(self.unsent.drain(..taken)),
                Err(error) if is_temporary(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Receives whole frames, about `limit` of them.
    pub(super) fn receive(&mut self, limit: usize, into: &mut Vec<Packet>) -> io::Result<()> {
        let enough = into.len() + limit;
        while into.len() < enough {
            match self.socket.read(&mut self.buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(len) => self.partial.extend_from_slice(&self.buffer[..len]),
                Err(error) if is_temporary(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
            self.take_frames(into)?;
        }
        Ok(())
    }

    fn take_frames(&mut self, into: &mut Vec<Packet>) -> io::Result<()> {
        let mut rest = self.partial.as_slice();
        while let Some((length, behind)) = rest.split_first_chunk::<LENGTH>() {
            let length = u32::from_be_bytes(*length) as usize;
            if length == 0 || length > MAX_PACKET {
                let text = format!("a frame of {length} bytes");
                return Err(io::Error::new(ErrorKind::InvalidData, text));
            }
            let Some((frame, behind)) = behind.split_at_checked(length) else { break };
            into.push(Packet { offload: PacketOffload::default(), frame: frame.to_vec() });
            rest = behind;
        }
        let done = self.partial.len() - rest.len();
        self.partial.drain(..done);
        Ok(())
    }
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
