//! Builds what is to run: the `vmft` program, or the test binaries of a `cargo test` selection.

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::env;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Something cargo has built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    /// The program.
    pub executable: PathBuf,
    /// The name of its package.
    pub package: String,
    /// The directory of its package.
    pub directory: PathBuf,
    /// Its name for people, `tests kvm`.
    pub name: String,
    /// Whether it is a test binary.
    pub test: bool,
}

/// The line of cargo's that says what a compilation made.
#[derive(Debug, Deserialize)]
struct Artifact {
    reason: String,
    package_id: Option<String>,
    executable: Option<PathBuf>,
    manifest_path: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
}

#[derive(Debug, Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Profile {
    test: bool,
}

/// Runs cargo with these words, and returns the programs that are then there.
pub fn build(words: &[String]) -> Result<Vec<Built>> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.arg(&words[0]).arg("--message-format=json-render-diagnostics").args(&words[1..]);
    // These say which package this program is, and would be taken for an order.
    command.env_remove("CARGO_MANIFEST_DIR").env_remove("CARGO_PKG_NAME");
    // For tests in the box alone: build scripts look at it, and what they say would change.
    command.env_remove("RUSTC_BOOTSTRAP");
    let mut child = command.stdout(Stdio::piped()).spawn().context("starting cargo")?;
    let stdout = child.stdout.take().context("the pipe asked for")?;
    let mut built = Vec::new();
    for line in BufReader::new(stdout).lines() {
        built.extend(parse(&line.context("reading from cargo")?)?);
    }
    let status = child.wait().context("waiting for cargo")?;
    if !status.success() {
        bail!("cargo {} ended with {status}", words.join(" "));
    }
    Ok(built)
}

fn parse(line: &str) -> Result<Option<Built>> {
    let artifact: Artifact = serde_json::from_str(line).context("what cargo says")?;
    if artifact.reason != "compiler-artifact" {
        return Ok(None);
    }
    let Some(executable) = artifact.executable else { return Ok(None) };
    let target = artifact.target.context("an artifact without a target")?;
    let manifest = artifact.manifest_path.context("an artifact without a manifest")?;
    let directory = manifest.parent().unwrap_or(Path::new("/")).to_owned();
    let package = package_name(&artifact.package_id.context("an artifact without a package")?);
    let test = artifact.profile.is_some_and(|profile| profile.test);
    let name = format!("{} {}", target.kind.join(" "), target.name);
    Ok(Some(Built { executable, package, directory, name, test }))
}

/// The package's name of a package ID (`PLACE#NAME@VERSION`, or `PLACE#VERSION` where the place ends
/// with the name; the Cargo book, "Package ID Specifications").
fn package_name(id: &str) -> String {
    let (place, rest) = id.split_once('#').unwrap_or((id, ""));
    match rest.split_once('@') {
        Some((name, _)) => name.to_owned(),
        None => place.rsplit('/').next().unwrap_or(place).to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_that_is_named_as_its_directory_is_found_by_that() {
        assert_eq!(package_name("path+file:///w/kernel-gate#0.1.0"), "kernel-gate");
        assert_eq!(package_name("path+file:///w#vmft@0.1.0"), "vmft");
    }

    #[test]
    fn programs_are_read_from_what_cargo_says() {
        let line = r#"{"reason":"compiler-artifact","package_id":"path+file:///w/vmm#vmft-vmm@0.1.0","manifest_path":"/w/vmm/Cargo.toml",
            "target":{"kind":["test"],"crate_types":["bin"],"name":"kvm","src_path":"/w"},
            "profile":{"opt_level":"2","test":true},"features":[],"filenames":["/t/kvm-1"],
            "executable":"/t/kvm-1","fresh":true}"#;
        let built = parse(line).unwrap().unwrap();
        assert_eq!(
            built,
            Built {
                executable: PathBuf::from("/t/kvm-1"),
                package: "vmft-vmm".to_owned(),
                directory: PathBuf::from("/w/vmm"),
                name: "test kvm".to_owned(),
                test: true,
            }
        );
        let library = line.replace(r#""executable":"/t/kvm-1""#, r#""executable":null"#);
        assert_eq!(parse(&library).unwrap(), None);
        assert_eq!(parse(r#"{"reason":"build-finished","success":true}"#).unwrap(), None);
        assert!(parse("warning: something").is_err());
    }
}
