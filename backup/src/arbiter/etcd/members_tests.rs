use super::super::wire::{Compare, Operation, Transaction};
use super::*;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

/// How long a test waits for what must come.
const LIMIT: Duration = Duration::from_secs(60);

/// A member of an etcd that answers everything with the same bytes; with none: never.
struct Fake {
    address: PeerAddress,
}

/// Reads a request, as long as it says it is. False at the end of the connection.
fn read_request(stream: &mut TcpStream) -> bool {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        if !matches!(stream.read(&mut byte), Ok(1)) {
            return false;
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).expect("text").to_lowercase();
    let (_, length) = head.split_once("content-length: ").expect("a length");
    let length = length.lines().next().expect("a line").parse().expect("a number");
    let mut body = vec![0; length];
    stream.read_exact(&mut body).is_ok()
}

impl Fake {
    fn answering(bytes: impl Into<Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let bytes = bytes.into();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                let bytes = bytes.clone();
                std::thread::spawn(move || {
                    while read_request(&mut stream) {
                        if !bytes.is_empty() && stream.write_all(&bytes).is_err() {
                            break;
                        }
                    }
                });
            }
        });
        Self { address: PeerAddress::tcp("127.0.0.1", port) }
    }

    /// Of this cluster, at this revision: it has done what it was asked for.
    fn good(cluster: u64, revision: u64) -> Self {
        Self::answering(http(200, &done(cluster, revision)))
    }

    /// One that nobody is at.
    fn nowhere() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        Self { address: PeerAddress::tcp("127.0.0.1", port) }
    }
}

fn http(status: u16, body: &str) -> String {
    format!("HTTP/1.1 {status} Status\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

fn done(cluster: u64, revision: u64) -> String {
    let header = format!(r#""header":{{"cluster_id":"{cluster}","revision":"{revision}"}}"#);
    format!(r#"{{{header},"succeeded":true,"responses":[{{"response_put":{{}}}}]}}"#)
}

fn question() -> Question {
    let key = "vmft/web/generation-0000000002".to_owned();
    Question::Transaction(Transaction {
        compare: vec![Compare::Absent { key: key.clone() }],
        success: vec![Operation::Put { key: key.clone(), value: "{}".into(), lease: None }],
        failure: vec![Operation::Get { key }],
    })
}

fn members(fakes: &[&Fake]) -> Members {
    let addresses: Vec<_> = fakes.iter().map(|fake| fake.address.clone()).collect();
    Members::start(&addresses).expect("threads")
}

fn revision(answer: io::Result<Answer>) -> u64 {
    match answer.expect("one that is good is asked") {
        Answer::Transaction { history, .. } => history.revision,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_member_that_is_of_no_use_is_passed_over() {
    let endless = "x".repeat(ANSWER_LIMIT + 1);
    let long_head = format!("HTTP/1.1 200 OK\r\nx: {}\r\n", "x".repeat(4 * HEAD_LIMIT));
    for bad in [
        Fake::nowhere(),
        Fake::answering("not http at all\r\n\r\n"),
        Fake::answering(http(200, "not json")),
        Fake::answering(http(200, &endless)),
        Fake::answering(long_head),
        Fake::answering(http(503, r#"{"error":"etcdserver: no leader","code":14}"#)),
        Fake::answering(http(404, r#"{"error":"etcdserver: requested lease not found","code":5}"#)),
        Fake::answering("HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{"),
        // The last one says nothing at all.
        Fake::answering(""),
    ] {
        let good = Fake::good(7, 2);
        let members = members(&[&bad, &good]);
        assert_eq!(revision(members.ask(&question(), LIMIT)), 2);
        // Who has answered is asked first from now on.
        assert_eq!(members.preferred.load(Ordering::Relaxed), 1);
        assert_eq!(revision(members.ask(&question(), LIMIT)), 2);
    }
}

#[test]
fn where_nobody_answers_that_is_said_when_it_is_time() {
    let silent = Fake::answering("");
    let error = members(&[&silent, &silent]).ask(&question(), Duration::from_millis(20));
    assert_eq!(error.expect_err("nobody").kind(), io::ErrorKind::TimedOut);
    let garbage = Fake::answering(http(200, "{}"));
    let error = members(&[&garbage, &garbage]).ask(&question(), LIMIT).expect_err("nobody");
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    let refusing = Fake::answering(http(503, r#"{"error":"etcdserver: no leader","code":14}"#));
    let error = members(&[&refusing]).ask(&question(), LIMIT).expect_err("nobody");
    assert!(error.to_string().contains("no leader"), "{error}");
}

#[test]
fn an_etcd_that_forgets_or_is_another_one_decides_nothing() {
    let (ours, foreign, old) = (Fake::good(7, 5), Fake::good(8, 9), Fake::good(7, 4));
    let members = members(&[&ours, &foreign, &old]);
    assert_eq!(revision(members.ask(&question(), LIMIT)), 5);
    for (first, said) in [(1, "another etcd"), (2, "put back")] {
        members.preferred.store(first, Ordering::Relaxed);
        assert_eq!(revision(members.ask(&question(), LIMIT)), 5, "by the one that is ours");
        let reply = http_reply(if first == 1 { done(8, 9) } else { done(7, 4) });
        let known = *members.known.lock();
        let error = members.judge(&question(), known, reply).expect_err("refused");
        assert!(error.to_string().contains(said), "{error}");
    }
}

fn http_reply(body: String) -> Reply {
    Ok((200, body.into_bytes()))
}
