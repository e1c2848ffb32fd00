//! The API socket: whatever comes, it answers the next one who asks properly, and takes no more of
//! a request than it needs.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vmft::api::{Api, Server, ShutdownHook};
use vmft_fuzzing::{Random, cases, change, damage};
use vmft_log::foreign::ForeignText;

/// Cases of a quick run.
const CASES: u64 = 200;
/// Requests in a case.
const EACH: usize = 10;
/// More than any request that is served.
const ENDLESS: usize = 64 << 20;
/// For what a host does at once, however busy it is.
const LIMIT: Duration = Duration::from_secs(600);
/// What a side may take of a request that does not end, with what sockets hold.
const MOST: usize = 8 << 20;

#[derive(Debug, Default)]
struct Stops(AtomicU64);

impl ShutdownHook for Stops {
    fn shutdown(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Panics of the API's thread: it goes on in a test, where the program would end.
static PANICS: AtomicU64 = AtomicU64::new(0);

fn serve(path: &Path, on_shutdown: Arc<dyn ShutdownHook>) -> Server {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let name = std::thread::current().name().map(str::to_owned);
        PANICS
            .fetch_add(u64::from(name.is_some_and(|name| name.contains("api"))), Ordering::Relaxed);
        tell(panic);
    }));
    let api = Api {
        status: Arc::default(),
        mailbox: Arc::default(),
        requests: Arc::default(),
        faults: Arc::default(),
        bounds: Arc::default(),
        disk_desk: Arc::default(),
        on_shutdown,
    };
    vmft::api::serve(path, api).unwrap()
}

fn request(method: &str, path: &str, body: &str) -> Vec<u8> {
    let len = body.len();
    let head = "Host: vmft\r\nConnection: close\r\nContent-Type: application/json";
    format!("{method} {path} HTTP/1.1\r\n{head}\r\nContent-Length: {len}\r\n\r\n{body}")
        .into_bytes()
}

fn good() -> Vec<Vec<u8>> {
    vec![
        request("GET", "/api/v1/vm.info", ""),
        request("PUT", "/api/v1/vm.shutdown", ""),
        request("PUT", "/api/v1/vm.snapshot", r#"{"directory": "/nonexistent/snapshot"}"#),
        request("PUT", "/api/v1/vm.pause", ""),
        request("PUT", "/api/v1/vm.resume", ""),
        request("PUT", "/api/v1/vm.bounds", r#"{"max-lag": {"ms": 200, "then": "stop"}}"#),
        request("PUT", "/api/v1/vm.bounds", r#"{"interval": {"ms": 50}}"#),
        request("PUT", "/api/v1/vm.fault", r#"{"fault": "fail"}"#),
        request(
            "PUT",
            "/api/v1/vm.fault",
            r#"{"fault": {"flip-bit": {"address": 1, "bit": 2}}, "live": true}"#,
        ),
        b"PUT /api/v1/vm.snapshot HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
          Transfer-Encoding: chunked\r\n\
          Content-Type: application/json\r\n\r\n5\r\n{\"dir\r\n0\r\n\r\n"
            .to_vec(),
    ]
}

/// What comes back to its end; the side may hang up in the middle. One that waits for more of what
/// is no whole request hears that no more comes.
fn exchange(path: &Path, bytes: &[u8], is_whole: bool) -> Vec<u8> {
    let mut stream = UnixStream::connect(path).unwrap();
    let _ = stream.write_all(bytes);
    if !is_whole {
        let _ = stream.shutdown(Shutdown::Write);
    }
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

fn assert_serves(path: &Path) {
    let answer = exchange(path, &good()[0], true);
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("\"role\""), "{answer}");
    assert_eq!(PANICS.load(Ordering::Relaxed), 0, "the API has failed");
}

fn gone_bad(random: &mut Random, good: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = random.pick(good).clone();
    if random.chance(50) {
        // The body, with a length that is right.
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
        let first = bytes.split(|byte| *byte == b'\r').next().unwrap().to_vec();
        let mut body = bytes.split_off(end + 4);
        match serde_json::from_slice::<serde_json::Value>(&body) {
            Ok(mut value) if random.chance(70) => {
                change(random, &mut value);
                body = serde_json::to_vec(&value).unwrap();
            }
            _ => damage(random, &mut body, &[]),
        }
        let head = format!(
            "\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        return [first, head.into_bytes(), body].concat();
    }
    damage(random, &mut bytes, good);
    bytes
}

#[test]
fn requests_gone_bad_are_answered_or_hung_up_on_and_the_next_one_is_served() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("api");
    let _server = serve(&path, Arc::new(Stops::default()));
    let good = good();
    for bytes in &good {
        assert!(exchange(&path, bytes, true).starts_with(b"HTTP/1.1 "));
    }
    let mut answered = 0u64;
    cases(CASES, |mut random| {
        for _ in 0..EACH {
            let answer = exchange(&path, &gone_bad(&mut random, &good), false);
            if !answer.is_empty() {
                assert!(
                    answer.starts_with(b"HTTP/1."),
                    "{:?}",
                    ForeignText::from(String::from_utf8_lossy(&answer).into_owned())
                );
                answered += 1;
            }
        }
        assert_serves(&path);
    });
    println!("{answered} answered");
}

#[test]
fn a_request_without_an_end_is_not_taken_without_an_end() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("api");
    let _server = serve(&path, Arc::new(Stops::default()));
    let beginnings: [&[u8]; 3] = [
        b"GET /api/v1/vm.info HTTP/1.1\r\nX: ",
        b"GET /",
        b"PUT /api/v1/vm.snapshot HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
          Content-Length: 1000000000\r\n\r\n\"",
    ];
    for beginning in beginnings {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(beginning).unwrap();
        let mut sent = 0;
        let chunk = [b'x'; 64 << 10];
        while sent < ENDLESS {
            match stream.write(&chunk) {
                Ok(len) => sent += len,
                Err(_) => break,
            }
        }
        assert!(sent < MOST, "it took {sent} bytes of {:?}", beginning.escape_ascii().to_string());
        assert_serves(&path);
    }
}

/// Tells of a stop, and waits for a word before it is answered.
#[derive(Debug)]
struct Held {
    asked: Sender<()>,
    goes_on: Mutex<Receiver<()>>,
}

impl ShutdownHook for Held {
    fn shutdown(&self) {
        self.asked.send(()).unwrap();
        self.goes_on.lock().unwrap().recv().unwrap();
    }
}

#[test]
fn who_has_asked_a_side_to_stop_is_answered_before_it_has_ended() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("api");
    let (asked, is_asked) = channel();
    let (go_on, goes_on) = channel();
    let server = serve(&path, Arc::new(Held { asked, goes_on: Mutex::new(goes_on) }));
    let mut stream = UnixStream::connect(&path).unwrap();
    // Whoever asks for nothing is not waited for.
    let _idle = UnixStream::connect(&path).unwrap();
    stream.write_all(&request("PUT", "/api/v1/vm.shutdown", "")).unwrap();
    is_asked.recv().unwrap();
    go_on.send(()).unwrap();
    server.finish(LIMIT);
    stream.set_nonblocking(true).unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer.escape_ascii().to_string(), "HTTP/1.1 204");
}
