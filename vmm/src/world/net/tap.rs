//! A TAP device: one packet a read or write, with `struct virtio_net_hdr` in front, so that what is
//! left to be done goes to the host's kernel and comes from it (Linux's
//! `Documentation/networking/tuntap.rst`, `drivers/net/tun.c`).

use super::{NetError, NetTarget};
use nix::errno::Errno;
use nix::poll::{PollTimeout, poll};
use nix::sys::uio::{readv, writev};
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use vmft_log::entry::{MAX_PACKET, Packet, PacketOffload};

const TUN: &str = "/dev/net/tun";
/// The kernel's header is in the host's byte order, which is little-endian.
const HEADER_LEN: usize = PacketOffload::LEN;

/// The kernel's `TUN_F_…`: what a reader takes unfinished.
const TUN_F_CSUM: libc::c_uint = 0x01;
const TUN_F_TSO4: libc::c_uint = 0x02;
const TUN_F_TSO6: libc::c_uint = 0x04;

/// How often to look whether the device carries packets, a millisecond apart.
const RUNNING_LOOKS: u32 = 200;

/// An open TAP device.
#[derive(Debug)]
pub(super) struct Tap {
    file: File,
    has_header: bool,
    /// Where packets are read to; one byte more than any may have, to notice one that is cut.
    buffer: Vec<u8>,
}

fn open_error(target: NetTarget) -> impl Fn(io::Error) -> NetError {
    move |source| NetError::Open { target: target.clone(), source }
}

fn request(name: &str) -> Result<libc::ifreq, NetError> {
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes.len() >= libc::IFNAMSIZ || bytes.contains(&0) {
        return Err(NetError::Name(name.to_owned()));
    }
    // SAFETY: the structure is plain data of the C interface, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok(request)
}

fn open_tun(target: &NetTarget) -> Result<File, NetError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    options.open(TUN).map_err(open_error(target.clone()))
}

fn exists(name: &str) -> bool {
    let Ok(name) = std::ffi::CString::new(name) else { return false };
    // SAFETY: the name is a string that ends with a zero, and is only read.
    unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
}

/// The TAP device is there, and this process may open such devices.
pub(super) fn check(name: &str) -> Result<(), NetError> {
    request(name)?;
    if !exists(name) {
        return Err(NetError::NoDevice(name.to_owned()));
    }
    open_tun(&NetTarget::Tap(name.to_owned())).map(drop)
}

/// The file descriptor is that of a TAP device.
pub(super) fn check_fd(number: i32) -> Result<(), NetError> {
    flags(number).map(drop)
}

fn flags(number: i32) -> Result<libc::c_int, NetError> {
    let target = NetTarget::TapFd(number);
    // SAFETY: the structure is plain data of the C interface, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the request writes one `ifreq`, which is there; a descriptor that is none, or is of
    // something else, is an error.
    let done = unsafe { libc::ioctl(number, libc::TUNGETIFF, &raw mut request) };
    Errno::result(done).map_err(|errno| open_error(target.clone())(errno.into()))?;
    // SAFETY: TUNGETIFF has filled the flags.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    let wanted = libc::IFF_TAP | libc::IFF_NO_PI;
    if flags & wanted == wanted { Ok(flags) } else { Err(NetError::NotTap(target)) }
}

/// Waits until the device carries packets, if it is up. Opening it plugs its cable in, which a bridge
/// notices some 20 ms later; until then the bridge drops what comes.
fn wait_running(mut request: libc::ifreq) -> io::Result<()> {
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0))
        .or_else(|_| std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0)))?;
    for _ in 0..RUNNING_LOOKS {
        // SAFETY: the request reads and writes one `ifreq`, which is there.
        let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) };
        Errno::result(done)?;
        // SAFETY: SIOCGIFFLAGS has filled the flags.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & libc::IFF_UP == 0 || flags & libc::IFF_RUNNING != 0 {
            return Ok(());
        }
        // There is nothing to wait on; an interrupted wait only looks earlier.
        let _ = poll(&mut [], PollTimeout::from(1u8));
    }
    Ok(())
}

impl Tap {
    /// Opens the TAP device of that name, which must be there.
    pub(super) fn open(name: &str, offloads: bool) -> Result<Self, NetError> {
        let target = NetTarget::Tap(name.to_owned());
        check(name)?;
        let file = open_tun(&target)?;
        let mut request = request(name)?;
        let mode = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = mode as libc::c_short;
        // SAFETY: the request reads and writes one `ifreq`, which is there.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        match Errno::result(done) {
            Ok(_) => {}
            Err(Errno::EBUSY) => return Err(NetError::InUse(name.to_owned())),
            Err(errno) => return Err(open_error(target)(errno.into())),
        }
        let error = open_error(NetTarget::Tap(name.to_owned()));
        let tap = Self::set_up(file, true, offloads).map_err(&error)?;
        wait_running(request).map_err(error)?;
        // The flag is there a moment before the bridge has heard of it, under one hold of the kernel's
        // lock of network devices, which this call takes too (`linkwatch_event`, `__tun_chr_ioctl`).
        flags(tap.file.as_raw_fd())?;
        Ok(tap)
    }

    /// Takes a copy of an inherited descriptor.
    pub(super) fn inherit(number: i32, offloads: bool) -> Result<Self, NetError> {
        let error = open_error(NetTarget::TapFd(number));
        let has_header = flags(number)? & libc::IFF_VNET_HDR != 0;
        // SAFETY: the request only makes a new descriptor.
        let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 0) };
        let copy = Errno::result(copy).map_err(|errno| error(errno.into()))?;
        // SAFETY: the descriptor is new, and nobody else has it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(copy) });
        // SAFETY: the request changes flags of an open file only.
        let done = unsafe { libc::fcntl(copy, libc::F_SETFL, libc::O_RDWR | libc::O_NONBLOCK) };
        Errno::result(done).map_err(|errno| error(errno.into()))?;
        Self::set_up(file, has_header, offloads).map_err(error)
    }

    fn set_up(file: File, has_header: bool, offloads: bool) -> io::Result<Self> {
        if has_header {
            let length = HEADER_LEN as libc::c_int;
            // SAFETY: the request reads one integer, which is there.
            let done =
                unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const length) };
            Errno::result(done)?;
            let offload = if offloads { TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 } else { 0 };
            // SAFETY: the request takes a number.
            let done = unsafe {
                libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offload))
            };
            Errno::result(done)?;
        }
        Ok(Self { file, has_header, buffer: vec![0; HEADER_LEN + MAX_PACKET + 1] })
    }

    /// True if a header is in front of every packet.
    pub(super) fn has_header(&self) -> bool {
        self.has_header
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Sends a packet, or fails: a TAP device keeps nothing.
    pub(super) fn send(&self, packet: &Packet) -> io::Result<()> {
        let header = packet.offload.to_bytes();
        let header = if self.has_header { &header[..] } else { &[] };
        writev(&self.file, &[IoSlice::new(header), IoSlice::new(&packet.frame)])?;
        Ok(())
    }

    /// Receives at most `limit` packets.
    pub(super) fn receive(&mut self, limit: usize, into: &mut Vec<Packet>) -> io::Result<()> {
        let header = if self.has_header { HEADER_LEN } else { 0 };
        for _ in 0..limit {
            let len = match readv(&self.file, &mut [IoSliceMut::new(&mut self.buffer)]) {
                Ok(len) => len,
                Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
                // The device is down; it may come back.
                Err(Errno::EIO) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            };
            if (header..=header + MAX_PACKET).contains(&len) {
                // Without a header, nothing is left to do.
                let offload = self.buffer[..header].first_chunk().copied();
                let offload = offload.map(PacketOffload::from_bytes).unwrap_or_default();
                into.push(Packet { offload, frame: self.buffer[header..len].to_vec() });
            }
        }
        Ok(())
    }
}
