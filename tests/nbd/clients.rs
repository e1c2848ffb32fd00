//! Other people's clients of the protocol.

use crate::server::{Server, run, succeed};
use std::ffi::OsString;

const SIZE: u64 = 16 << 20;

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

#[test]
fn libnbd_and_qemu_read_and_write_what_is_there() {
    let mut server = Server::of_size(SIZE);
    let told = succeed("nbdinfo", &[server.uri()]);
    for line in ["export=\"web\":", "export-size: 16777216", "is_read_only: false"] {
        assert!(told.contains(line), "{line}: {told}");
    }
    for can in ["flush", "fua", "multi_conn", "trim", "zero"] {
        assert!(told.contains(&format!("can_{can}: true")), "{can}: {told}");
    }
    // Bytes that are nowhere the same.
    let content: Vec<u8> =
        (0..SIZE / 4).flat_map(|word| (word as u32 ^ 0x5a5a_5a5a).to_le_bytes()).collect();
    let file = server.directory.path().join("content");
    std::fs::write(&file, &content).unwrap();
    succeed("nbdcopy", &[file.into(), server.uri()]);
    assert!(std::fs::read(server.image()).unwrap() == content, "nbdcopy");
    let copy = server.directory.path().join("copy");
    succeed("nbdcopy", &[server.uri(), copy.clone().into()]);
    assert!(std::fs::read(copy).unwrap() == content, "nbdcopy");
    let mut commands = words(&["-f", "raw"]);
    for command in [
        "write -P 0x11 100 300",
        "read -P 0x11 100 300",
        "write -f -P 7 1M 1M",
        "read -P 7 1M 1M",
        "write -z 2M 64k",
        "read -P 0 2M 64k",
        "write -z -u 3M 64k",
        "read -P 0 3M 64k",
        "discard 4M 1M",
        "flush",
    ] {
        commands.extend(words(&["-c", command]));
    }
    commands.push(server.uri());
    let said = succeed("qemu-io", &commands);
    assert!(!said.contains("verification failed") && !said.contains("error"), "{said}");
    let image = server.image();
    let compare = [words(&["compare", "-f", "raw", "-F", "raw"]), vec![server.uri(), image.into()]];
    succeed("qemu-img", &compare.concat());
    assert!(server.stop().success(), "{}", server.messages());
}

#[test]
fn an_export_served_read_only_is_not_written() {
    let mut server = Server::of_size(SIZE);
    assert!(server.stop().success());
    let directory = std::mem::replace(&mut server.directory, tempfile::tempdir().unwrap());
    let server = Server::start(directory, ",readonly=on,cache=writeback");
    assert!(succeed("nbdinfo", &[server.uri()]).contains("is_read_only: true"));
    let write = [words(&["-f", "raw", "-c", "write 0 512"]), vec![server.uri()]].concat();
    assert!(!run("qemu-io", &write).status.success());
}
