//! What is to be done in the box: a file in its initramfs, written outside and read inside.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Where the job lies in the box.
pub const FILE: &str = "/box/job.json";

/// Commands, which run one after the other.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// The commands. The status of the first that fails is the job's; all are run.
    pub commands: Vec<Command>,
    /// The whole environment of each.
    pub environment: BTreeMap<String, String>,
}

/// A program and its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Said on standard error before it begins.
    pub heading: Option<String>,
    /// A path in the box, or a name that is looked up in `PATH`.
    pub program: String,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Where it runs.
    pub directory: PathBuf,
}
