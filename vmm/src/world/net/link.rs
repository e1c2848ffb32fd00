//! One open link to the network, whatever it is made of.

use super::stream::Stream;
use super::tap::{self, Tap};
use super::{NetError, NetTarget};
use crate::devices::virtio::net::offload;
use std::io;
use std::os::fd::BorrowedFd;
use vmft_log::entry::{Packet, PacketOffload};

/// An open link.
#[derive(Debug)]
pub(super) enum Link {
    Tap(Tap),
    Stream(Stream),
}

/// Looks whether a link could be opened.
pub(super) fn check(target: &NetTarget) -> Result<(), NetError> {
    match target {
        NetTarget::Tap(name) => tap::check(name),
        NetTarget::TapFd(number) => tap::check_fd(*number),
        // Whoever listens there may be started when it is needed.
        NetTarget::Socket(_) => Ok(()),
    }
}

impl Link {
    pub(super) fn open(target: &NetTarget, offloads: bool) -> Result<Self, NetError> {
        match target {
            NetTarget::Tap(name) => Tap::open(name, offloads).map(Self::Tap),
            NetTarget::TapFd(number) => Tap::inherit(*number, offloads).map(Self::Tap),
            NetTarget::Socket(path) => Stream::connect(path)
                .map(Self::Stream)
                .map_err(|source| NetError::Open { target: target.clone(), source }),
        }
    }

    /// Sends a packet, finished first if the link takes no other.
    ///
    /// # Errors
    /// The host's, or [`io::ErrorKind::InvalidData`] for a packet that nobody could send.
    pub(super) fn send(&mut self, packet: Packet) -> io::Result<()> {
        match self {
            Self::Tap(tap) if tap.has_header() => tap.send(&packet),
            Self::Tap(tap) => finished(packet)?.iter().try_for_each(|packet| tap.send(packet)),
            Self::Stream(stream) => {
                finished(packet)?.iter().try_for_each(|packet| stream.send(&packet.frame))
            }
        }
    }

    /// Receives what has come, at most `limit` packets; fewer if there is no more.
    ///
    /// # Errors
    /// The link is of no more use.
    pub(super) fn receive(&mut self, limit: usize, into: &mut Vec<Packet>) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.receive(limit, into),
            Self::Stream(stream) => stream.receive(limit, into),
        }
    }

    /// True if something is left that the link did not take.
    pub(super) fn has_unsent(&self) -> bool {
        matches!(self, Self::Stream(stream) if stream.has_unsent())
    }

    /// Sends what is left, as far as the link takes it.
    ///
    /// # Errors
    /// The link is of no more use.
    pub(super) fn send_rest(&mut self) -> io::Result<()> {
        match self {
            Self::Tap(_) => Ok(()),
            Self::Stream(stream) => stream.send_rest(),
        }
    }

    /// What to wait on.
    pub(super) fn try_clone_fd(&self) -> io::Result<std::os::fd::OwnedFd> {
        let fd: BorrowedFd<'_> = match self {
            Self::Tap(tap) => tap.fd(),
            Self::Stream(stream) => stream.fd(),
        };
        fd.try_clone_to_owned()
    }
}

fn finished(packet: Packet) -> io::Result<Vec<Packet>> {
    let frames = offload::finish(packet)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    let plain = |frame| Packet { offload: PacketOffload::default(), frame };
    Ok(frames.into_iter().map(plain).collect())
}
