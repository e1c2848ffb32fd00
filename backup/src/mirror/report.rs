//! What becomes of a side's copies, for its status.

use serde::{Deserialize, Serialize};
use vmft_log::foreign::ForeignText;

/// What becomes of a side's own copy of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyRole {
    /// The guest runs on it.
    Live,
    /// The same, and it is being sent to a backup that joins.
    Sending,
    /// It is being filled from a primary's.
    Filling,
    /// It has what the replay has.
    Following,
}

/// A side's own copy of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyReport {
    /// The disk's number on the board.
    pub disk: u8,
    /// Where the copy is.
    pub path: ForeignText,
    /// What becomes of it.
    pub role: CopyRole,
    /// How much of it the backup that joins has, in percent, while it is sent or filled.
    pub percent: Option<u8>,
}

impl CopyReport {
    /// What becomes of it, for people.
    pub fn text(&self) -> String {
        let percent = self.percent.unwrap_or_default();
        let what = match self.role {
            CopyRole::Live => "the guest's".to_owned(),
            CopyRole::Sending => format!("the guest's, synchronising a backup's copy: {percent} %"),
            CopyRole::Filling => format!("synchronising with the primary's: {percent} %"),
            CopyRole::Following => "follows the primary's".to_owned(),
        };
        format!("{}: {what}", self.path)
    }
}
