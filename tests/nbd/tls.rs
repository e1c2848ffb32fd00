//! Served disks with certificates.

use crate::server::{Server, program, run, with_image};
use std::ffi::OsString;
use std::path::Path;

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
    let directory = with_image(1 << 20);
    let mut keys = OsString::from("--dir=");
    keys.push(directory.path().join("keys"));
    let add = ["keys".into(), keys, "add".into(), "a".into(), "disks".into()];
    assert!(run(program(), &add).status.success());
    let mut listen = OsString::from("tls:127.0.0.1:0,tls_dir=");
    listen.push(directory.path().join("keys").join("disks"));
    let server = Server::listening(directory, ",cache=writeback", listen);
    let (directory, address) = (server.directory.path(), &server.address);
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
        (0..300).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
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
