//! Orders of buttons, gone bad: whatever comes, the page answers the next one who asks properly.

use crate::reader::Page;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use vmft_fuzzing::{Random, cases, change, damage};

/// Cases of a quick run.
const CASES: u64 = 200;
/// Requests in a case.
const EACH: usize = 10;

fn order(page: &Page, body: &[u8]) -> Vec<u8> {
    let (address, key, len) = (page.address, &page.key, body.len());
    let head = format!(
        "POST /act HTTP/1.1\r\nHost: {address}\r\nOrigin: http://{address}\r\nX-Vmft-Key: {key}\r\n\
         Content-Type: application/json\r\nContent-Length: {len}\r\n\r\n"
    );
    [head.as_bytes(), body].concat()
}

fn gone_bad(random: &mut Random, page: &Page) -> Vec<u8> {
    let mut body = br#"{"side":0,"act":"pause"}"#.to_vec();
    if random.chance(50) {
        // The body, with a length that is right.
        match serde_json::from_slice::<serde_json::Value>(&body) {
            Ok(mut value) if random.chance(70) => {
                change(random, &mut value);
                body = serde_json::to_vec(&value).unwrap();
            }
            _ => damage(random, &mut body, &[]),
        }
        return order(page, &body);
    }
    let mut bytes = order(page, &body);
    damage(random, &mut bytes, &[]);
    bytes
}

/// What comes back to its end. One that waits for more of what is no whole request hears that no more comes.
fn exchange(page: &Page, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(page.address).unwrap();
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

#[test]
fn orders_gone_bad_are_answered_or_hung_up_on_and_the_next_one_is_served() {
    let words = ["dashboard", "--control", "--listen", "127.0.0.1:0", "/nonexistent/a.api"];
    let page = Page::start(&words);
    cases(CASES, |mut random| {
        for _ in 0..EACH {
            let answer = exchange(&page, &gone_bad(&mut random, &page));
            assert!(answer.is_empty() || answer.starts_with(b"HTTP/1."), "{answer:?}");
        }
        let (head, body) = page.press(0, "pause");
        assert!(head.starts_with("HTTP/1.1 409 ") && body.contains("No such file"), "{head}");
    });
}
