//! A network between the two sides, that can be cut.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// What the network does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Carries,
    /// Swallows everything; connections stay open.
    Silent,
    /// Carries so many more bytes, then cuts.
    CutsAfter(usize),
}

/// Forwards connections to one address.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    mode: Arc<Mutex<Mode>>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    /// A network to `target`.
    pub fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mode = Arc::new(Mutex::new(Mode::Carries));
        let streams: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        let (carried, opened) = (Arc::clone(&mode), Arc::clone(&streams));
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let near = near.unwrap();
                let Ok(far) = TcpStream::connect(target) else { continue };
                for (from, to) in [(&near, &far), (&far, &near)] {
                    from.set_nodelay(true).unwrap();
                    opened.lock().unwrap().push(from.try_clone().unwrap());
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let mode = Arc::clone(&carried);
                    std::thread::spawn(move || carry(from, to, &mode));
                }
            }
        });
        Self { address, mode, streams }
    }

    /// Where the other side connects to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Both sides see the connection closed.
    pub fn cut(&self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            // One that is closed already is as good.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Both sides see the connection closed once so many more bytes have passed.
    pub fn cut_after(&self, bytes: usize) {
        *self.mode.lock().unwrap() = Mode::CutsAfter(bytes);
    }

    /// Both sides hear nothing more, and are not told.
    pub fn go_silent(&self) {
        *self.mode.lock().unwrap() = Mode::Silent;
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, mode: &Mutex<Mode>) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(len @ 1..) = from.read(&mut bytes) {
        let mut mode = mode.lock().unwrap();
        let carries = match &mut *mode {
            Mode::Carries => true,
            Mode::Silent => false,
            Mode::CutsAfter(left) if *left >= len => {
                *left -= len;
                true
            }
            Mode::CutsAfter(_) => {
                *mode = Mode::Carries;
                break;
            }
        };
        drop(mode);
        if carries && to.write_all(&bytes[..len]).is_err() {
            break;
        }
    }
    if *mode.lock().unwrap() != Mode::Silent {
        let _ = to.shutdown(Shutdown::Both);
        let _ = from.shutdown(Shutdown::Both);
    }
}
