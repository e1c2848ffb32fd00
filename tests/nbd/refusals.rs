//! What is refused, and that it says why.

use crate::server::{Server, program, run, with_image};
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::{Command, Stdio};
use vmft::pair::prefixed;

const SIZE: u64 = 1 << 20;

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

/// The last thing that the program says to these words, which it refuses.
fn refused(arguments: Vec<OsString>) -> String {
    let output = run(program(), &arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{arguments:?}: {said}");
    said.lines().last().unwrap().to_owned()
}

fn with_disk(command: &[&str], disk: OsString) -> Vec<OsString> {
    [words(command), vec!["--disk".into(), disk]].concat()
}

const RUN: [&str; 3] = ["run", "--serial", "null"];
const PRIMARY: [&str; 5] = ["primary", "--serial", "null", "--listen", "tcp:127.0.0.1:0"];

#[test]
fn an_export_that_cannot_be_used_is_refused_with_what_to_do() {
    let server = Server::of_size(SIZE);
    let unknown = refused(with_disk(&RUN, server.place("other")));
    assert!(
        unknown.contains("no export of that name") && unknown.contains("--export"),
        "{unknown}"
    );
    let nowhere = prefixed("nbd=unix:", Path::new("/nowhere/disks"));
    let mut place = nowhere;
    place.push("/web");
    let away = refused(with_disk(&RUN, place));
    assert!(away.contains("is a server there?"), "{away}");
    let exposed = refused(with_disk(&RUN, "nbd=tcp:192.0.2.1:1/web".into()));
    assert!(exposed.contains("vmft keys"), "{exposed}");
    let other = [with_disk(&PRIMARY, server.place("web")), words(&["--arbiter", "dir=/tmp/a"])];
    let other = refused(other.concat());
    assert!(other.contains("as its arbiter"), "{other}");
}

/// What the program says to these words and `--disk`, where nbdkit serves the disk; it refuses.
fn refused_on_nbdkit(image: &Path, arguments: &[OsString]) -> String {
    let mut file = OsString::from("file=");
    file.push(image);
    // It runs the command once it listens, and ends with it, and as it.
    let output = Command::new("nbdkit")
        .args(["--unix", "-", "--run", r#"exec "$VMFT" $WORDS --disk "nbd=unix:$unixsocket/web""#])
        .args(["file".into(), file])
        .env("VMFT", program())
        .env("WORDS", arguments.join(OsStr::new(" ")))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{arguments:?}: {said}");
    said
}

#[test]
fn a_server_that_knows_no_generations_is_for_one_machine_alone() {
    let directory = with_image(SIZE);
    let image = directory.path().join("web.img");
    let said = refused_on_nbdkit(&image, &words(&PRIMARY));
    assert!(said.contains("knows no generations") && said.contains("vmft disk serve"), "{said}");
    // A guest by itself uses it as any other; this one has nothing to boot.
    let kernel = directory.path().join("kernel");
    std::fs::write(&kernel, "no kernel").unwrap();
    let alone = [words(&RUN), vec!["--kernel".into(), kernel.into()]].concat();
    let said = refused_on_nbdkit(&image, &alone);
    let said = said.lines().find(|line| line.starts_with("vmft: ")).unwrap();
    assert!(said.contains("kernel") && !said.contains("nbd"), "{said}");
}

#[test]
fn what_cannot_be_served_is_refused_before_anything_is_changed() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let serve = |export: OsString| {
        let listen = prefixed("unix:", &path("disks"));
        let words = words(&["disk", "serve", "--export"]);
        refused([words, vec![export, "--listen".into(), listen]].concat())
    };
    let named = |name: &str| prefixed("web=", &path(name));
    assert!(serve(named("none.img")).contains("truncate -s +1G"));
    std::fs::write(path("odd.img"), [1; 513]).unwrap();
    assert!(serve(named("odd.img")).contains("truncate -s %512"));
    let mut qcow2 = b"QFI\xFB\0\0\0\x03".to_vec();
    qcow2.resize(1 << 16, 0);
    std::fs::write(path("a.qcow2"), &qcow2).unwrap();
    assert!(serve(named("a.qcow2")).contains("qemu-img convert"));
    assert_eq!(std::fs::read(path("a.qcow2")).unwrap(), qcow2);
    assert!(serve("a/b=c".into()).contains("NAME=FILE"));
    std::fs::File::create(path("web.img")).unwrap().set_len(SIZE).unwrap();
    let twice = [prefixed("web=", &path("web.img")), "--export".into(), named("web.img")];
    let listen = ["--listen".into(), prefixed("unix:", &path("disks"))];
    let said =
        refused([words(&["disk", "serve", "--export"]), twice.into(), listen.into()].concat());
    assert!(said.contains("two exports"), "{said}");
    let exposed = [
        words(&["disk", "serve", "--listen", "tcp:0.0.0.0:0", "--export"]),
        vec![named("web.img")],
    ];
    assert!(refused(exposed.concat()).contains("--insecure"));
    assert!(!path("web.img.vmft").exists(), "nothing is made before a pair comes");
}
