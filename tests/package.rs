//! The Debian package: built, installed, replaced by a later one and removed, in a directory of its own.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use nix::unistd::geteuid;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{command:?}: {said}");
    said
}

/// Builds the package of this program in `directory`.
fn build(directory: &Path, version: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut package = Command::new(root.join("scripts/package"));
    package.args(["--program", env!("CARGO_BIN_EXE_vmft"), "--version", version]).arg(directory);
    // It is not sent anywhere.
    succeed(package.env("DPKG_DEB_COMPRESSOR_TYPE", "none"));
    let mut files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    files.find(|path| path.to_str().unwrap().contains(&format!("vmft_{version}_"))).unwrap()
}

/// Where packages are installed, with a package manager's records of its own.
struct Installed(tempfile::TempDir);

impl Installed {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let records = directory.path().join("var/lib/dpkg");
        for part in ["info", "updates", "triggers"] {
            fs::create_dir_all(records.join(part)).unwrap();
        }
        fs::write(records.join("status"), "").unwrap();
        Self(directory)
    }

    fn dpkg(&self, words: &[&str]) -> String {
        // Files are to belong to root: to somebody who is root in here, at least.
        let mut dpkg = match geteuid().is_root() {
            true => Command::new("dpkg"),
            false => {
                let mut unshare = Command::new("unshare");
                unshare.args(["--map-root-user", "dpkg"]);
                unshare
            }
        };
        dpkg.arg(format!("--root={}", self.0.path().display()));
        // There is no Debian around it, with a shell and a C library.
        succeed(dpkg.args(["--force-depends", "--force-script-chrootless"]).args(words))
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    /// Everything that is not the package manager's.
    fn files(&self) -> Vec<String> {
        let mut left = vec![self.0.path().to_owned()];
        let mut found = Vec::new();
        while let Some(directory) = left.pop() {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(self.0.path()).unwrap().to_str().unwrap().to_owned();
                match path.is_dir() {
                    true if name == "var" => {}
                    true => left.push(path),
                    false => found.push(name),
                }
            }
        }
        found
    }
}

#[test]
fn the_package_installs_upgrades_and_goes_without_a_trace() {
    let place = tempfile::tempdir().unwrap();
    let first = build(place.path(), "0.1.0-1");
    let second = build(place.path(), "0.1.0-2");
    let installed = Installed::new();
    installed.dpkg(&["--install", first.to_str().unwrap()]);
    let said = succeed(Command::new(installed.path("usr/bin/vmft")).arg("--version"));
    assert!(said.starts_with("vmft "), "{said}");
    for file in [
        "usr/lib/systemd/system/vmft@.service",
        "usr/share/man/man1/vmft.1.gz",
        "usr/share/man/man1/vmft-up.1.gz",
        "usr/share/bash-completion/completions/vmft",
        "usr/share/doc/vmft/copyright",
    ] {
        assert!(installed.path(file).is_file(), "{file}");
    }
    let mode = fs::metadata(installed.path("etc/vmft")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700, "keys may lie there");
    assert_eq!(installed.dpkg(&["--verify", "vmft"]), "", "every file is as it was packed");
    // What its operator writes there is nobody else's.
    fs::write(installed.path("etc/vmft/web.toml"), "# a pair\n").unwrap();
    installed.dpkg(&["--install", second.to_str().unwrap()]);
    let status = installed.dpkg(&["--status", "vmft"]);
    assert!(status.contains("Version: 0.1.0-2"), "{status}");
    installed.dpkg(&["--purge", "vmft"]);
    assert_eq!(installed.files(), ["etc/vmft/web.toml"]);
}

#[test]
fn the_same_sources_and_program_are_the_same_package() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let [one, two] = [one, two].map(|place| fs::read(build(place.path(), "0.1.0-1")).unwrap());
    assert!(one == two);
}
