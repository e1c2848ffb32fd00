//! A station at the other end of the guest's network socket: answers ARP, and pings the guest.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const ADDRESS: [u8; 4] = [10, 0, 0, 1];
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const GUEST: [u8; 4] = [10, 0, 0, 2];
/// What the guest's device and kernel are told.
pub const NET: &str = "mac=02:00:00:00:00:02";
pub const WORDS: &str = "ip=10.0.0.2/24";
/// Between a question and the same question again.
const AGAIN: Duration = Duration::from_secs(1);

/// What comes from the socket.
#[derive(Debug)]
enum Event {
    Connected(UnixStream),
    Frame(Vec<u8>),
}

/// The station.
#[derive(Debug)]
pub struct Station {
    events: Receiver<Event>,
    stream: Option<UnixStream>,
}

fn serve(listener: &UnixListener, events: &Sender<Event>) -> std::io::Result<()> {
    for stream in listener.incoming() {
        let mut stream = stream?;
        if events.send(Event::Connected(stream.try_clone()?)).is_err() {
            return Ok(());
        }
        let mut length = [0; 4];
        while stream.read_exact(&mut length).is_ok() {
            let mut frame = vec![0; u32::from_be_bytes(length) as usize];
            stream.read_exact(&mut frame)?;
            if events.send(Event::Frame(frame)).is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// The checksum of the Internet protocols.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low));
    let sum: u32 = bytes.chunks(2).map(word).sum();
    let folded = (sum & 0xFFFF) + (sum >> 16);
    let folded = (folded & 0xFFFF) + (folded >> 16);
    (!(folded as u16)).to_be_bytes()
}

/// An ICMP echo request with `len` bytes of data.
fn question(number: u16, len: usize) -> Vec<u8> {
    let mut icmp = vec![8, 0, 0, 0, 0x76, 0x6D];
    icmp.extend(number.to_be_bytes());
    icmp.extend((0..len).map(|index| (index * 7 + usize::from(number)) as u8));
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum);
    let mut ip = vec![0x45, 0];
    ip.extend((20 + icmp.len() as u16).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 1, 0, 0]);
    ip.extend(ADDRESS);
    ip.extend(GUEST);
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum);
    [&GUEST_MAC[..], &MAC, &[8, 0], &ip, &icmp].concat()
}

/// Says where the station is.
fn arp_reply() -> Vec<u8> {
    let head = [8, 6, 0, 1, 8, 0, 6, 4, 0, 2];
    [&GUEST_MAC[..], &MAC, &head, &MAC, &ADDRESS, &GUEST_MAC, &GUEST].concat()
}

impl Station {
    /// Listens where a side is to connect.
    pub fn listen(path: &Path) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let (sender, events) = channel();
        std::thread::spawn(move || serve(&listener, &sender));
        Self { events, stream: None }
    }

    fn send(&mut self, frame: &[u8]) {
        if let Some(stream) = &mut self.stream {
            let length = u32::try_from(frame.len()).unwrap().to_be_bytes();
            // A side that is gone hears nothing.
            let _ = stream.write_all(&[&length[..], frame].concat());
        }
    }

    /// The next frame; answers the guest's ARP on the way.
    fn next(&mut self, limit: Duration) -> Option<Vec<u8>> {
        match self.events.recv_timeout(limit) {
            Ok(Event::Connected(stream)) => {
                self.stream = Some(stream);
                None
            }
            Ok(Event::Frame(frame)) => {
                let asks_for_us =
                    frame[12..14] == [8, 6] && frame[20..22] == [0, 1] && frame[38..42] == ADDRESS;
                if asks_for_us {
                    self.send(&arp_reply());
                }
                Some(frame)
            }
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => panic!("the socket is gone"),
        }
    }

    /// Asks until the guest answers with the same `len` bytes; false if it does not within `limit`.
    pub fn ping(&mut self, number: u16, len: usize, limit: Duration) -> bool {
        let question = question(number, len);
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            self.send(&question);
            let again = Instant::now() + AGAIN;
            while Instant::now() < again {
                let left = again.saturating_duration_since(Instant::now());
                let Some(frame) = self.next(left) else { continue };
                let is_answer = frame.get(12..14) == Some(&[8, 0][..])
                    && frame.get(34) == Some(&0)
                    && frame.get(38..42) == Some(&question[38..42]);
                if is_answer {
                    let data = &frame[42..42 + len.min(frame.len() - 42)];
                    assert_eq!(data, &question[42..], "other bytes came back");
                    return true;
                }
            }
        }
        false
    }
}
