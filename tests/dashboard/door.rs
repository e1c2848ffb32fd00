//! Who is let in, and what is served.

use crate::reader::{Page, program};
use std::process::Command;

/// A page of a side that is not there.
fn page(more: &[&str]) -> Page {
    let words = ["dashboard", "--listen", "127.0.0.1:0", "/nonexistent/<script>alert.api"];
    Page::start(&[&words[..], more].concat())
}

#[test]
fn the_page_is_one_file_that_runs_its_own_script_alone() {
    let page = page(&[]);
    assert!(page.key.is_empty());
    let (head, body) = page.get("/");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    let policy =
        head.lines().find_map(|line| line.strip_prefix("content-security-policy: ")).unwrap();
    assert!(policy.starts_with("default-src 'none'; script-src 'nonce-"), "{policy}");
    assert!(!policy.contains("unsafe") && policy.contains("frame-ancestors 'none'"), "{policy}");
    let nonce = policy.split("'nonce-").nth(1).unwrap().split('\'').next().unwrap();
    assert_eq!(body.matches(&format!("nonce=\"{nonce}\"")).count(), 2);
    // Two scripts: ours, and the first picture, which is none. The side's name begins no third.
    assert_eq!(body.matches("<script").count(), 2);
    assert!(body.contains(r"\u003cscript>alert"), "{body}");
    for outside in ["src=", "href=\"http", "@import", "url(", "onclick=\"", "style=\"", "innerHTML"]
    {
        assert!(!body.contains(outside), "{outside}");
    }
    let (other, _) = page.get("/");
    assert!(!other.contains(nonce), "a nonce is used once");
    assert!(page.get("/x").0.starts_with("HTTP/1.1 404 "));
    let (address, key) = (page.address, "0".repeat(32));
    for wrong in ["evil.example", "127.0.0.1.evil.example:80", ""] {
        for path in ["/", "/pictures"] {
            let (head, body) =
                page.exchange(&format!("GET {path} HTTP/1.1\r\nHost: {wrong}\r\n\r\n"));
            assert!(head.starts_with("HTTP/1.1 421 ") && !body.contains("nonce"), "{head}");
        }
    }
    let put = page.exchange(&format!("PUT / HTTP/1.1\r\nHost: {address}\r\n\r\n"));
    assert!(put.0.starts_with("HTTP/1.1 405 "), "{}", put.0);
    // It has no buttons, whatever is sent.
    let request = format!(
        "POST /act HTTP/1.1\r\nHost: {address}\r\nOrigin: http://{address}\r\nX-Vmft-Key: {key}\r\n\
         Content-Type: application/json\r\nContent-Length: 0\r\n\r\n"
    );
    let (head, body) = page.exchange(&request);
    assert!(head.starts_with("HTTP/1.1 403 ") && body.contains("--control"), "{head} {body}");
}

#[test]
fn a_page_with_buttons_takes_orders_from_itself_alone() {
    let page = page(&["--control"]);
    let (address, key) = (page.address, page.key.clone());
    assert_eq!(key.len(), 32);
    for path in ["/", "/pictures", "/?key=", &format!("/?key={}", "0".repeat(32))] {
        let (head, body) = page.get(path);
        assert!(head.starts_with("HTTP/1.1 403 ") && !body.contains(&key), "{path}: {head}");
    }
    let (head, body) = page.get(&format!("/?key={key}"));
    assert!(head.starts_with("HTTP/1.1 200 ") && body.contains(&format!("data-key=\"{key}\"")));
    let order = r#"{"side":0,"act":"pause"}"#;
    let own = format!("http://{address}");
    let post = |host: &str, origin: &str, key: &str, kind: &str, body: &str| {
        let len = body.len();
        let (head, body) = page.exchange(&format!(
            "POST /act HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\nX-Vmft-Key: {key}\r\n\
             Content-Type: {kind}\r\nContent-Length: {len}\r\n\r\n{body}"
        ));
        (head["HTTP/1.1 ".len()..][..3].parse::<u16>().unwrap(), body)
    };
    let (host, json) = (address.to_string(), "application/json");
    // A good one comes to the side, which is not there.
    let (code, body) = post(&host, &own, &key, json, order);
    assert!(code == 409 && body.contains("No such file"), "{code} {body}");
    assert_eq!(post("evil.example", "http://evil.example", &key, json, order).0, 421);
    for origin in ["http://evil.example", "null", "", "http://127.0.0.1:1"] {
        assert_eq!(post(&host, origin, &key, json, order).0, 403, "{origin}");
    }
    for wrong in ["", "0", &"0".repeat(32)] {
        assert_eq!(post(&host, &own, wrong, json, order).0, 403, "{wrong}");
    }
    for kind in ["text/plain", "application/x-www-form-urlencoded"] {
        assert_eq!(post(&host, &own, &key, kind, order).0, 415, "{kind}");
    }
    let (unknown, nobody) = (r#"{"side":0,"act":"format"}"#, r#"{"side":1,"act":"pause"}"#);
    let more = r#"{"side":0,"act":"pause","more":1}"#;
    let owned = r#"{"side":0,"act":"kill"}"#;
    let endless = " ".repeat(1000);
    for (body, wanted) in
        [("", 400), (unknown, 400), (more, 400), (nobody, 404), (owned, 409), (&endless, 413)]
    {
        assert_eq!(post(&host, &own, &key, json, body).0, wanted, "{body}");
    }
}

#[test]
fn an_address_for_everybody_is_refused_unless_it_is_said() {
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:80"] {
        let words = ["dashboard", "--listen", address, "/nonexistent/a.api"];
        let output = Command::new(program()).args(words).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("insecure=on"), "{said}");
    }
    let page = Page::start(&["dashboard", "--listen", "0.0.0.0:0,insecure=on", "/nonexistent/a"]);
    let port = page.address.port();
    let request = format!("GET / HTTP/1.1\r\nHost: 10.1.2.3:{port}\r\n\r\n");
    assert!(page.exchange(&request).0.starts_with("HTTP/1.1 200 "));
}
