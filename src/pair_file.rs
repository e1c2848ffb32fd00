//! `vmft.toml`: one file for a pair, the same on each of its hosts.
//!
//! What it says becomes options of `vmft primary` and `vmft standby`, word for word: so a value means the
//! same in the file as on a command line, and is checked by the same code. Each keeps the line it comes
//! from, for messages and for `vmft config`.

mod resolve;
#[cfg(test)]
mod tests;

pub use resolve::{InForce, Options, Origin, Setting, primary, standby};

use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use toml::Spanned;

/// Most bytes of a file.
const MAX_FILE: u64 = 1 << 20;

/// Why a file says nothing that can be used.
#[derive(Debug, thiserror::Error)]
pub enum PairFileError {
    /// The host's reason.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is longer than any such file.
    #[error("{}: more than {MAX_FILE} bytes", .0.display())]
    TooLong(PathBuf),
    /// A line that cannot be.
    #[error("{}, line {line}: {text}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// Why.
        text: String,
    },
    /// A side that it does not have.
    #[error("{}: it has no side `{side}`; its sides are {sides}", path.display())]
    NoSide {
        /// The file.
        path: PathBuf,
        /// Which.
        side: String,
        /// Those it has.
        sides: String,
    },
    /// A value on the command line that cannot be.
    #[error("{0}")]
    CommandLine(String),
}

/// A text, or several.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "expected a text, or several in brackets")]
pub(crate) enum Words {
    One(String),
    Several(Vec<String>),
}

impl Words {
    fn all(&self) -> &[String] {
        match self {
            Self::One(word) => std::slice::from_ref(word),
            Self::Several(words) => words,
        }
    }
}

type Value<T> = Option<Spanned<T>>;

/// `[guest]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(crate) struct Guest {
    pub(crate) kernel: Value<String>,
    pub(crate) lockstep_kernel: Value<bool>,
    pub(crate) initramfs: Value<String>,
    pub(crate) cmdline: Value<String>,
    pub(crate) cpus: Value<u8>,
    pub(crate) memory: Value<String>,
    pub(crate) disk: Value<Words>,
    pub(crate) engine: Value<String>,
    pub(crate) points: Value<String>,
}

/// `[pair]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(crate) struct Pair {
    pub(crate) arbiter: Value<String>,
    pub(crate) protect: Value<String>,
    pub(crate) suspect_after: Value<u64>,
    pub(crate) max_lag: Value<String>,
    pub(crate) bound_replay: Value<String>,
    pub(crate) insecure: Value<bool>,
    pub(crate) backups: Value<u8>,
    pub(crate) tls_dir: Value<String>,
    /// Whether a guest that begins waits for its backups.
    pub(crate) wait_for_backup: Value<bool>,
    /// Which side begins where nobody is live; the first by name if none is named.
    pub(crate) first: Value<String>,
    /// After how long another one begins.
    pub(crate) begin_after: Value<String>,
}

/// `[sides.NAME]`, and `[every-side]`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(crate) struct Side {
    pub(crate) address: Value<String>,
    pub(crate) listen: Value<String>,
    pub(crate) disk: Value<Words>,
    pub(crate) arbiter: Value<String>,
    pub(crate) net: Value<String>,
    pub(crate) serial: Value<String>,
    pub(crate) clock: Value<String>,
    pub(crate) on_error: Value<String>,
    pub(crate) disk_timeout: Value<String>,
    pub(crate) api_socket: Value<String>,
    pub(crate) metrics_listen: Value<String>,
    pub(crate) event_log: Value<String>,
    pub(crate) user: Value<String>,
    pub(crate) sandbox: Value<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct Contents {
    guest: Guest,
    pair: Pair,
    every_side: Side,
    sides: BTreeMap<String, Side>,
}

/// A file for a pair.
#[derive(Debug, Clone)]
pub struct PairFile {
    path: PathBuf,
    /// Where each line begins.
    lines: Vec<usize>,
    contents: Contents,
}

impl PairFile {
    /// Reads a file.
    ///
    /// # Errors
    /// [`PairFileError`], with the line.
    pub fn read(path: &Path) -> Result<Self, PairFileError> {
        use std::io::Read;
        let io_error = |source| PairFileError::Io { path: path.to_owned(), source };
        let mut text = String::new();
        let file = std::fs::File::open(path).map_err(io_error)?;
        file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(io_error)?;
        if text.len() as u64 > MAX_FILE {
            return Err(PairFileError::TooLong(path.to_owned()));
        }
        Self::parse(path, &text)
    }

    /// Takes a file's text.
    ///
    /// # Errors
    /// [`PairFileError`], with the line.
    pub fn parse(path: &Path, text: &str) -> Result<Self, PairFileError> {
        let ends = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        let lines = std::iter::once(0).chain(ends.map(|(end, _)| end + 1)).collect();
        let mut file = Self { path: path.to_owned(), lines, contents: Contents::default() };
        file.contents = toml::from_str(text).map_err(|error: toml::de::Error| {
            let at = error.span().map_or(0, |span| span.start);
            file.wrong(at, error.message())
        })?;
        if file.contents.sides.is_empty() {
            return Err(file.wrong(text.len(), "there is no [sides.NAME]: a pair has two or more"));
        }
        for (name, side) in &file.contents.sides {
            if !crate::options::is_export_name(name) {
                let at = side.address.as_ref().map_or(0, |address| address.span().start);
                return Err(file.wrong(
                    at,
                    &format!("`{name}` is no side's name: letters, digits, dots and dashes"),
                ));
            }
            if side.address.is_none() {
                return Err(file.wrong(
                    text.find(&format!("sides.{name}")).unwrap_or(0),
                    &format!("side {name} has no address, where the others find it"),
                ));
            }
        }
        if let Some(first) = &file.contents.pair.first
            && !file.contents.sides.contains_key(first.get_ref())
        {
            return Err(file.wrong(first.span().start, "there is no such side"));
        }
        if let Some(address) = &file.contents.every_side.address {
            return Err(file.wrong(address.span().start, "each side has an address of its own"));
        }
        Ok(file)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn line(&self, at: usize) -> usize {
        self.lines.partition_point(|begin| *begin <= at).max(1)
    }

    fn wrong(&self, at: usize, text: &str) -> PairFileError {
        PairFileError::Line {
            path: self.path.clone(),
            line: self.line(at),
            text: crate::remedy::one_line(text),
        }
    }

    /// The side of that name.
    fn side(&self, name: &str) -> Result<&Side, PairFileError> {
        self.contents.sides.get(name).ok_or_else(|| PairFileError::NoSide {
            path: self.path.clone(),
            side: name.to_owned(),
            sides: self.contents.sides.keys().cloned().collect::<Vec<_>>().join(", "),
        })
    }

    /// Its sides' names, in order.
    pub fn sides(&self) -> impl Iterator<Item = &str> {
        self.contents.sides.keys().map(String::as_str)
    }

    /// The side that begins where nobody is live.
    pub fn first(&self) -> &str {
        match &self.contents.pair.first {
            Some(first) => first.get_ref(),
            None => self.sides().next().expect("a pair has sides"),
        }
    }

    /// After how long another one begins.
    ///
    /// # Errors
    /// [`PairFileError`], with the line.
    pub fn begin_after(&self) -> Result<std::time::Duration, PairFileError> {
        /// A host that comes up beside the first one's gives it so long.
        const DEFAULT: std::time::Duration = std::time::Duration::from_secs(15);
        self.contents.pair.begin_after.as_ref().map_or(Ok(DEFAULT), |time| {
            crate::options::parse_time(time.get_ref())
                .map_err(|error| self.wrong(time.span().start, &error.to_string()))
        })
    }
}
