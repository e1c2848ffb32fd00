//! Served disks with certificates.

use crate::server::{LIMIT, program, run};
use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // One that has ended needs no killing.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Serves at a port of this host, which is returned.
fn serve(directory: &Path, side: &str) -> (Server, String) {
    File::create(directory.join("web.img")).unwrap().set_len(1 << 20).unwrap();
    let mut export = OsString::from("web=");
    export.push(directory.join("web.img"));
    export.push(",cache=writeback");
    let mut listen = OsString::from("tls:127.0.0.1:0,tls_dir=");
    listen.push(directory.join("keys").join(side));
    let log = directory.join("server.log");
    let child = Command::new(program())
        .args(["disk".into(), "serve".into(), "--export".into(), export])
        .args(["--listen".into(), listen])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let server = Server(child);
    let deadline = Instant::now() + LIMIT;
    loop {
        let said = std::fs::read_to_string(&log).unwrap();
        if let Some((_, rest)) = said.split_once("bytes) at ")
            && let Some((address, _)) = rest.split_once('\n')
        {
            return (server, address.to_owned());
        }
        assert!(Instant::now() < deadline, "{said}");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

/// What a machine says that cannot boot, but opens its disk before.
fn open(directory: &Path, disk: OsString) -> String {
    let kernel = directory.join("kernel");
    std::fs::write(&kernel, "no kernel").unwrap();
    let words = ["run", "--serial", "null", "--kernel"].map(OsString::from);
    let words = words.into_iter().chain([kernel.into(), "--disk".into(), disk]);
    let output = run(program(), &words.collect::<Vec<_>>());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn with_certificates_an_export_is_used_by_those_who_have_one_and_nobody_is_told_anything_else() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let mut keys = OsString::from("--dir=");
    keys.push(directory.join("keys"));
    let add = ["keys".into(), keys, "add".into(), "a".into(), "disks".into()];
    assert!(run(program(), &add).status.success());
    let (_server, address) = serve(directory, "disks");
    let disk = |scheme: &str, side: Option<&str>| {
        let mut disk = OsString::from(format!("nbd={scheme}:{address}/web"));
        if let Some(side) = side {
            disk.push(",tls_dir=");
            disk.push(directory.join("keys").join(side));
        }
        disk
    };
    let said = open(directory, disk("tls", Some("a")));
    assert!(said.contains("kernel") && !said.contains("nbd"), "the disk is open: {said}");
    // Strangers who say nothing keep nobody out, however many they are.
    let strangers: Vec<_> =
        (0..300).map(|_| std::net::TcpStream::connect(&address).unwrap()).collect();
    let said = open(directory, disk("tls", Some("a")));
    assert!(said.contains("kernel") && !said.contains("nbd"), "the disk is open: {said}");
    drop(strangers);
    let said = open(directory, disk("tcp", None));
    assert!(said.contains("speaks to no one without TLS"), "{said}");
    assert!(!run("nbdinfo", &[format!("nbd://{address}/web").into()]).status.success());
    // Certified by somebody else.
    let mut keys = OsString::from("--dir=");
    keys.push(directory.join("others"));
    assert!(run(program(), &["keys".into(), keys, "add".into(), "a".into()]).status.success());
    let mut other = OsString::from(format!("nbd=tls:{address}/web,tls_dir="));
    other.push(directory.join("others").join("a"));
    let said = open(directory, other);
    assert!(said.contains("certificate"), "{said}");
}
