//! What the documents cite exists, and what can be kept in order by looking is kept in order.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the project's text is.
const FOLDERS: [&str; 17] = [
    "boot-loader",
    "fuzzing",
    "sandbox",
    "simulator",
    "backup",
    "docs",
    "guest-images",
    "kernel-gate",
    "logging-channel",
    "nbd",
    "packaging",
    "scripts",
    "src",
    "stock-kvm",
    "tests",
    "threads",
    "vmm",
];
/// Folders that a path of the documents may begin in: those above, or one of these.
const SHORTENED: [&str; 4] = ["", "vmm/src", "vmm", "vmm/src/devices"];
/// Longest file of Rust that is no test, in lines.
const LONGEST: usize = 620;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            collect(&path, files);
        } else {
            files.push(path);
        }
    }
}

/// All files of the project with this ending.
fn files(ending: &str) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for folder in FOLDERS {
        collect(&root().join(folder), &mut all);
    }
    for entry in fs::read_dir(root()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            all.push(path);
        }
    }
    all.retain(|path| path.extension().is_some_and(|found| found == ending));
    all
}

fn documents() -> Vec<(String, String)> {
    files("md")
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(root()).unwrap().display().to_string();
            (name, fs::read_to_string(path).unwrap())
        })
        .collect()
}

/// The words of a document that stand between single backquotes, outside of blocks.
fn quoted(text: &str) -> Vec<String> {
    let mut in_block = false;
    let outside: Vec<&str> = text
        .lines()
        .filter(|line| {
            let fence = line.trim_start().starts_with("```");
            in_block ^= fence;
            !in_block && !fence
        })
        .collect();
    outside.join("\n").split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// A path with alternatives in braces, one by one: `a/{b,c}.rs`.
fn alternatives(path: &str) -> Vec<String> {
    match (path.find('{'), path.find('}')) {
        (Some(open), Some(close)) if open < close => path[open + 1..close]
            .split(',')
            .map(|middle| format!("{}{middle}{}", &path[..open], &path[close + 1..]))
            .collect(),
        _ => vec![path.to_owned()],
    }
}

fn exists(path: &str) -> bool {
    SHORTENED.iter().any(|folder| {
        let path = root().join(folder).join(path);
        path.exists() || path.with_extension("rs").exists()
    })
}

#[test]
fn files_that_documents_name_exist() {
    let mut missing = Vec::new();
    for (document, text) in documents() {
        for word in quoted(&text) {
            let begins = FOLDERS.iter().chain(&["engine", "devices"]);
            let is_path = begins.clone().any(|folder| word.starts_with(&format!("{folder}/")))
                && !word.contains([' ', '*', '<', '…', '$']);
            if !is_path {
                continue;
            }
            for path in alternatives(&word) {
                if !exists(path.trim_end_matches('/')) {
                    missing.push(format!("{document}: {path}"));
                }
            }
        }
    }
    assert!(missing.is_empty(), "documents name files that are not there:\n{}", missing.join("\n"));
}

#[test]
fn tests_that_documents_name_exist() {
    let mut names = BTreeSet::new();
    for path in files("rs") {
        let text = fs::read_to_string(path).unwrap();
        let defined = text.split("fn ").skip(1);
        names.extend(defined.filter_map(|rest| rest.split('(').next()).map(str::to_owned));
    }
    let mut missing = Vec::new();
    for (document, text) in documents() {
        for word in quoted(&text) {
            // Tests are sentences: no other name has so many words.
            let sentence = word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
                && word.matches('_').count() >= 4;
            if sentence && !names.contains(&word) {
                missing.push(format!("{document}: {word}"));
            }
        }
    }
    assert!(missing.is_empty(), "documents name tests that are not there:\n{}", missing.join("\n"));
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut broken = Vec::new();
    for (document, text) in documents() {
        let folder = root().join(&document).parent().unwrap().to_owned();
        for rest in text.split("](").skip(1) {
            let Some(target) = rest.split([')', ' ']).next() else { continue };
            if target.contains("://") || target.starts_with('#') {
                continue;
            }
            let (file, heading) = target.split_once('#').unwrap_or((target, ""));
            let Ok(text) = fs::read(folder.join(file)) else {
                broken.push(format!("{document}: {target}"));
                continue;
            };
            let text = String::from_utf8_lossy(&text);
            let headings = text.lines().filter_map(|line| line.strip_prefix('#'));
            let anchor = |line: &str| -> String {
                let kept = line.trim_start_matches('#').trim().to_lowercase();
                let kept =
                    kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
                kept.map(|c| if c == ' ' { '-' } else { c }).collect()
            };
            if !heading.is_empty() && !headings.map(anchor).any(|found| found == heading) {
                broken.push(format!("{document}: {target}"));
            }
        }
    }
    assert!(broken.is_empty(), "links lead nowhere:\n{}", broken.join("\n"));
}

#[test]
fn documents_fit_a_hundred_columns() {
    let mut wide = Vec::new();
    for (document, text) in documents() {
        let mut in_block = false;
        for (number, line) in text.lines().enumerate() {
            in_block ^= line.trim_start().starts_with("```");
            let bound = in_block || line.starts_with('|') || line.contains("](");
            if !bound && line.chars().count() > 100 {
                wide.push(format!("{document}:{}", number + 1));
            }
        }
    }
    assert!(wide.is_empty(), "lines wider than 100 columns:\n{}", wide.join("\n"));
}

#[test]
fn files_of_code_are_of_one_idea() {
    let long: Vec<String> = files("rs")
        .into_iter()
        .filter(|path| !path.components().any(|part| part.as_os_str() == "tests"))
        .filter_map(|path| {
            let lines = fs::read_to_string(&path).unwrap().lines().count();
            (lines > LONGEST).then(|| format!("{} has {lines} lines", path.display()))
        })
        .collect();
    assert!(long.is_empty(), "split these by idea:\n{}", long.join("\n"));
}

/// How code calls the crate of a package. One package's name has the number of its generation at the end,
/// which the crate's has not.
fn crate_name(package: &str) -> String {
    package
        .strip_suffix("-sys2")
        .map_or(package.to_owned(), |name| format!("{name}-sys"))
        .replace('-', "_")
}

#[test]
fn every_dependency_of_the_workspace_is_used() {
    let text = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let section = text.split("[workspace.dependencies]").nth(1).unwrap();
    let section = section.split("\n[").next().unwrap();
    let names = section.lines().filter_map(|line| line.split_once(" = ")).map(|(name, _)| name);
    let code: String = files("rs").iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    let is_used = |name: &&str| {
        let name = crate_name(name);
        ["::", " as "].iter().any(|behind| code.contains(&format!("{name}{behind}")))
    };
    let unused: Vec<&str> = names.filter(|name| !is_used(name)).collect();
    assert!(unused.is_empty(), "nobody uses {unused:?}");
}

/// Licences under which others' code may be part of this program.
const LICENCES: [&str; 8] =
    ["Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "ISC", "MIT", "Unicode-3.0", "Zlib"];
/// Where its code may come from.
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";
/// What must not come in by the back door, and why.
const BANNED: [(&str, &str); 5] = [
    ("openssl-sys", "a second TLS, which is not memory-safe"),
    ("native-tls", "a second TLS"),
    ("async-std", "a second runtime"),
    ("smol", "a second runtime"),
    ("bincode", "it is not maintained, and its bytes are those of the log's past"),
];

/// True if one may have the code under licences of [`LICENCES`] alone.
fn is_allowed(licence: &str) -> bool {
    let all = licence.replace('/', " OR ").replace(['(', ')'], "");
    let mut parts = all.split(" AND ");
    parts.all(|part| part.split(" OR ").any(|one| LICENCES.contains(&one.trim())))
}

#[test]
fn dependencies_have_allowed_licences_and_sources_and_none_is_banned() {
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--locked", "--offline", "--format-version", "1"])
        .args(["--filter-platform", &platform])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let foreign: Vec<_> = packages.iter().filter(|package| !package["source"].is_null()).collect();
    assert!(!foreign.is_empty());
    for package in foreign {
        let name = package["name"].as_str().unwrap();
        assert_eq!(package["source"], REGISTRY, "{name} comes from elsewhere");
        let licence = package["license"].as_str().unwrap_or_default();
        assert!(is_allowed(licence), "{name} is licensed under {licence:?}");
        let banned = BANNED.iter().find(|(banned, _)| *banned == name);
        assert_eq!(banned, None, "{name} must not be a dependency");
    }
}

#[test]
fn a_licence_is_allowed_if_one_can_choose_it_so() {
    for allowed in ["MIT", "Unlicense/MIT", "(GPL-3.0 OR MIT) AND Unicode-3.0"] {
        assert!(is_allowed(allowed), "{allowed}");
    }
    for refused in ["", "GPL-3.0", "MIT AND GPL-3.0", "Apache-2.0 WITH LLVM-exception"] {
        assert!(!is_allowed(refused), "{refused}");
    }
}

#[test]
fn threads_of_a_side_start_in_the_sandbox() {
    // Programs beside a side, probes of the host (which end before the guest begins), and tests.
    let apart =
        ["/bin/", "/demo/", "/trust/", "/tests", "_tests.rs", "commands/console.rs", "src/pair.rs"];
    for path in files("rs") {
        let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
        let of_a_side =
            ["src/", "vmm/src", "vmm/cpu", "vmm/kvm", "backup/src", "logging-channel/src"];
        let is_side = of_a_side.iter().any(|start| name.starts_with(start));
        if !is_side || apart.iter().any(|part| name.contains(part)) {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        let starts =
            ["thread::Builder", "thread::spawn"].iter().find(|start| code.contains(**start));
        assert!(
            starts.is_none(),
            "{name} has {starts:?}; `vmft_sandbox::spawn` gives a thread its task"
        );
    }
}

/// Whoever stands between two others, and forgets to pass a method on, is to be told so by the compiler.
#[test]
fn traits_have_no_default_bodies() {
    let mut found = Vec::new();
    for path in files("rs") {
        let text = fs::read_to_string(&path).unwrap();
        let mut of: Option<(String, usize)> = None;
        for (index, line) in text.lines().enumerate() {
            let indent = line.len() - line.trim_start().len();
            let words: Vec<&str> = line.split_whitespace().collect();
            match &of {
                None => {
                    let name = words.iter().position(|word| *word == "trait");
                    let name =
                        name.filter(|at| words[..*at].iter().all(|word| word.starts_with("pub")));
                    let name = name.and_then(|at| words.get(at + 1));
                    of = name
                        .filter(|_| line.ends_with('{'))
                        .map(|name| ((*name).to_owned(), indent));
                }
                Some((_, outer)) if line.trim() == "}" && indent == *outer => of = None,
                // A body begins at the end of the line that ends the signature.
                Some((name, outer))
                    if indent == outer + 4 && (line.ends_with('{') || line.ends_with("{}")) =>
                {
                    found.push(format!("{}:{}: {name}", path.display(), index + 1));
                }
                Some(_) => {}
            }
        }
    }
    assert!(found.is_empty(), "traits with default bodies:\n{}", found.join("\n"));
}
