//! Sides that this test plays: they are asked while somebody looks, and one that hangs holds up no other.

use crate::reader::Page;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};
use vmft_backup::status::{Role, SideStatus};

/// Of a page that asks as often as it may.
const INTERVAL: Duration = Duration::from_millis(100);
/// Many times that.
const QUIET: Duration = Duration::from_secs(2);

fn answer(mut stream: UnixStream) {
    let mut request = [0; 1024];
    let _ = stream.read(&mut request);
    let status = SideStatus { role: Role::Unprotected, ..SideStatus::default() };
    let body = serde_json::to_string(&status).unwrap();
    let len = body.len();
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close";
    let _ = stream.write_all(format!("{head}\r\nContent-Length: {len}\r\n\r\n{body}").as_bytes());
}

/// A side that answers; tells each time that it is asked.
fn side(path: &Path) -> Receiver<()> {
    let listener = UnixListener::bind(path).unwrap();
    let (tell, asked) = channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            // Not every test wants to know.
            let _ = tell.send(());
            answer(stream.unwrap());
        }
    });
    asked
}

fn page(sides: &[&Path]) -> Page {
    let words = ["dashboard", "--interval", "100ms", "--listen", "127.0.0.1:0"];
    let sides = sides.iter().map(|side| side.to_str().unwrap());
    Page::start(&words.into_iter().chain(sides).collect::<Vec<_>>())
}

#[test]
fn a_side_that_hangs_holds_up_no_other_and_is_shown_as_such() {
    let directory = tempfile::tempdir().unwrap();
    let [good, hung] = ["good.api", "hung.api"].map(|name| directory.path().join(name));
    side(&good);
    // It takes connections, as a process that stands still does, and says nothing.
    let listener = UnixListener::bind(&hung).unwrap();
    let page = page(&[&hung, &good]);
    let mut pictures = page.pictures();
    let picture = pictures.wait_headline("The guest runs on good, without a pair");
    assert_eq!(picture["sides"][0]["head"], "has not answered yet");
    assert_eq!(picture["sides"][1]["place"], "here");
    let picture = pictures.wait(|picture| picture["sides"][0]["level"] == "warning");
    let facts = picture["sides"][0]["facts"].to_string();
    assert!(facts.contains("the side does not answer"), "{facts}");
    assert_eq!(picture["sides"][1]["level"], "ok");
    drop(listener);
}

#[test]
fn sides_are_asked_once_for_all_who_look_and_not_at_all_for_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("a.api");
    let asked = side(&socket);
    let page = page(&[&socket]);
    let mut readers: Vec<_> = (0..8).map(|_| page.pictures()).collect();
    let began = Instant::now();
    asked.try_iter().for_each(drop);
    for _ in 0..20 {
        readers.iter_mut().for_each(|pictures| drop(pictures.next()));
    }
    let times = asked.try_iter().count();
    // One answer under way at each end.
    let most = began.elapsed().as_millis() / INTERVAL.as_millis() + 2;
    assert!((1..=most).contains(&(times as u128)), "asked {times} times, for {most} at most");
    drop(readers);
    // Whoever has left is noticed at the next picture, or the one after it; then nobody asks.
    let deadline = Instant::now() + crate::reader::LIMIT;
    while asked.recv_timeout(QUIET).is_ok() {
        assert!(Instant::now() < deadline, "it is asked although nobody looks");
    }
    // What it shows first may be what it knew.
    let mut pictures = page.pictures();
    pictures.wait(|_| asked.try_recv().is_ok());
}

#[test]
fn no_more_look_than_may_and_a_place_is_free_again_when_one_leaves() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("a.api");
    side(&socket);
    let page = page(&[&socket]);
    let mut readers: Vec<_> = (0..24).map(|_| page.pictures()).collect();
    readers.iter_mut().for_each(|pictures| drop(pictures.next()));
    assert!(page.get("/pictures").0.starts_with("HTTP/1.1 503 "));
    // The page itself is had all the same, with the newest picture.
    assert!(page.get("/").1.contains("without a pair"));
    readers.pop();
    let deadline = Instant::now() + crate::reader::LIMIT;
    let is_free = || {
        let mut stream = std::net::TcpStream::connect(page.address).unwrap();
        let request = format!("GET /pictures HTTP/1.1\r\nHost: {}\r\n\r\n", page.address);
        stream.write_all(request.as_bytes()).unwrap();
        let mut begin = [0; 12];
        match stream.read_exact(&mut begin) {
            Ok(()) => &begin == b"HTTP/1.1 200",
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => false,
            Err(error) => panic!("{error}"),
        }
    };
    while !is_free() {
        assert!(Instant::now() < deadline, "the place stays taken");
    }
}
