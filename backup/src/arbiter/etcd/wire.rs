//! What etcd is asked, and what it answers: its JSON gateway (`POST /v3/…`, etcd 3.4 and later). Keys and
//! values travel in base64, 64-bit numbers as texts, and zeroes are left out.
//!
//! Whatever comes is held against what was asked: as many answers as operations, of their kinds, with keys
//! that were asked for, within bounds. What does not fit is an error, and no answer.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};
use vmft_log::foreign::ForeignText;

/// Most bytes of an answer: [`LIST_LIMIT`] values of [`MAX_VALUE`] in base64, and more than their frames.
pub(super) const ANSWER_LIMIT: usize = 2 << 20;
/// Most bytes of a key, and of a value: a candidate's are some hundreds.
const MAX_KEY: usize = 1 << 10;
const MAX_VALUE: usize = 16 << 10;
/// Most keys of a list: more than a pair has sides, or than strangers are likely to leave.
pub(super) const LIST_LIMIT: usize = 64;
/// What gRPC calls something that is not there.
const NOT_FOUND: u64 = 5;

/// Names a lease; never zero, which stands for none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LeaseId(i64);

/// What must be so for a transaction to be done.
#[derive(Debug, Clone)]
pub(super) enum Compare {
    /// The key has this value.
    Is { key: String, value: String },
    /// There is no such key.
    Absent { key: String },
    /// No key begins like this.
    NoneUnder { prefix: String },
}

/// A part of a transaction.
#[derive(Debug, Clone)]
pub(super) enum Operation {
    Put {
        key: String,
        value: String,
        lease: Option<LeaseId>,
    },
    Delete {
        key: String,
    },
    /// Reads one key.
    Get {
        key: String,
    },
    /// Reads the last [`LIST_LIMIT`] keys that begin like this, in descending order.
    List {
        prefix: String,
    },
}

/// Something that is decided as a whole, once a majority of etcd's members knows it.
#[derive(Debug, Clone, Default)]
pub(super) struct Transaction {
    pub(super) compare: Vec<Compare>,
    pub(super) success: Vec<Operation>,
    pub(super) failure: Vec<Operation>,
}

/// What is asked. Each can be asked twice.
#[derive(Debug, Clone)]
pub(super) enum Question {
    Transaction(Transaction),
    /// A lease of so many seconds.
    Grant(u64),
    KeepAlive(LeaseId),
    /// Gives a lease up, and what hangs on it.
    Revoke(LeaseId),
}

/// A key and its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pair {
    pub(super) key: String,
    pub(super) value: String,
}

/// Of which history an answer is, and how far that went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct History {
    pub(super) cluster: u64,
    pub(super) revision: u64,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    Transaction {
        history: History,
        /// What was compared was so.
        succeeded: bool,
        /// For each operation that was done, in order, what it read.
        read: Vec<Vec<Pair>>,
    },
    Granted(LeaseId),
    /// The lease goes on.
    Kept,
    /// There is no such lease, or none any more.
    LeaseGone,
    Revoked,
}

/// An answer that is none.
#[derive(Debug, thiserror::Error)]
pub(super) enum WireError {
    /// Etcd cannot do it now.
    #[error("etcd answers {status}: {message}")]
    Refused { status: u16, message: ForeignText },
    /// No JSON, or not of this shape.
    #[error("an answer that cannot be read")]
    Format(#[from] serde_json::Error),
    /// Not of what was asked.
    #[error("an answer to another question")]
    Other,
    /// Longer than anything of a pair's.
    #[error("an answer with a key or a value that is too long")]
    TooLong,
}

/// The first key behind all that begin like this.
fn behind(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    // All prefixes are ASCII.
    *end.last_mut().expect("no prefix is empty") += 1;
    end
}

fn text(bytes: impl AsRef<[u8]>) -> String {
    STANDARD.encode(bytes)
}

impl Compare {
    fn json(&self) -> Value {
        match self {
            Self::Is { key, value } => {
                json!({"target": "VALUE", "result": "EQUAL", "key": text(key), "value": text(value)})
            }
            Self::Absent { key } => json!({
                "target": "CREATE", "result": "EQUAL", "key": text(key), "create_revision": "0"
            }),
            // Of no key at all this is true, and of each there is it is false.
            Self::NoneUnder { prefix } => json!({
                "target": "CREATE", "result": "EQUAL", "key": text(prefix),
                "range_end": text(behind(prefix)), "create_revision": "0"
            }),
        }
    }
}

impl Operation {
    fn json(&self) -> Value {
        match self {
            Self::Put { key, value, lease } => {
                let lease = lease.map_or(0, |lease| lease.0).to_string();
                json!({"request_put": {"key": text(key), "value": text(value), "lease": lease}})
            }
            Self::Delete { key } => json!({"request_delete_range": {"key": text(key)}}),
            Self::Get { key } => json!({"request_range": {"key": text(key)}}),
            Self::List { prefix } => json!({"request_range": {
                "key": text(prefix), "range_end": text(behind(prefix)),
                "limit": LIST_LIMIT.to_string(), "sort_target": "KEY", "sort_order": "DESCEND"
            }}),
        }
    }

    /// What it read, of its part of the answer.
    fn read(&self, part: Part) -> Result<Vec<Pair>, WireError> {
        let found = match (self, part) {
            (Self::Put { .. }, Part { put: Some(_), range: None, delete: None })
            | (Self::Delete { .. }, Part { put: None, range: None, delete: Some(_) }) => {
                return Ok(Vec::new());
            }
            (
                Self::Get { .. } | Self::List { .. },
                Part { put: None, range: Some(range), delete: None },
            ) => range.kvs,
            _ => return Err(WireError::Other),
        };
        let limit = if matches!(self, Self::List { .. }) { LIST_LIMIT } else { 1 };
        if found.len() > limit {
            return Err(WireError::Other);
        }
        let pairs = found.into_iter().filter_map(|raw| raw.pair(self).transpose());
        let pairs = pairs.collect::<Result<Vec<Pair>, WireError>>()?;
        match pairs.iter().all(|pair| self.asks_for(&pair.key)) {
            true => Ok(pairs),
            false => Err(WireError::Other),
        }
    }

    fn asks_for(&self, found: &str) -> bool {
        match self {
            Self::List { prefix } => found.starts_with(prefix),
            Self::Get { key } | Self::Put { key, .. } | Self::Delete { key } => found == key,
        }
    }
}

/// A 64-bit number, as a text or as it is.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(u64),
        Text(String),
    }
    match Either::deserialize(deserializer)? {
        Either::Number(number) => Ok(number),
        Either::Text(text) => text.parse().map_err(serde::de::Error::custom),
    }
}

#[derive(Deserialize)]
struct Header {
    #[serde(deserialize_with = "number")]
    cluster_id: u64,
    #[serde(deserialize_with = "number")]
    revision: u64,
}

#[derive(Deserialize)]
struct RawPair {
    key: String,
    #[serde(default)]
    value: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Range {
    kvs: Vec<RawPair>,
}

/// What matters of it is that it is there.
#[derive(Deserialize)]
struct Done {}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "response_put")]
    put: Option<Done>,
    #[serde(rename = "response_range")]
    range: Option<Range>,
    #[serde(rename = "response_delete_range")]
    delete: Option<Done>,
}

#[derive(Deserialize)]
struct Decided {
    header: Header,
    #[serde(default)]
    succeeded: bool,
    #[serde(default)]
    responses: Vec<Part>,
}

#[derive(Deserialize)]
struct Lease {
    #[serde(rename = "ID", deserialize_with = "number")]
    id: u64,
    #[serde(rename = "TTL", default, deserialize_with = "number")]
    ttl: u64,
}

impl Lease {
    fn id(&self) -> Result<LeaseId, WireError> {
        let id = i64::try_from(self.id).ok().filter(|id| *id != 0);
        id.map(LeaseId).ok_or(WireError::Other)
    }
}

#[derive(Deserialize)]
struct InStream {
    result: Lease,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Refusal {
    error: String,
    code: u64,
}

fn bytes(text: &str, limit: usize) -> Result<Vec<u8>, WireError> {
    if text.len() > limit.div_ceil(3) * 4 {
        return Err(WireError::TooLong);
    }
    STANDARD.decode(text).map_err(|_| WireError::Other)
}

impl RawPair {
    /// `None` for what no pair has written: neighbours of a list that are no text are not ours to judge.
    fn pair(self, asked: &Operation) -> Result<Option<Pair>, WireError> {
        let (key, value) = (bytes(&self.key, MAX_KEY)?, bytes(&self.value, MAX_VALUE)?);
        match (String::from_utf8(key), String::from_utf8(value)) {
            (Ok(key), Ok(value)) => Ok(Some(Pair { key, value })),
            _ if matches!(asked, Operation::List { .. }) => Ok(None),
            _ => Err(WireError::Other),
        }
    }
}

impl Transaction {
    fn json(&self) -> Value {
        let all = |operations: &[Operation]| -> Vec<Value> {
            operations.iter().map(Operation::json).collect()
        };
        let compare: Vec<Value> = self.compare.iter().map(Compare::json).collect();
        json!({
            "compare": compare, "success": all(&self.success), "failure": all(&self.failure)
        })
    }

    fn read(&self, bytes: &[u8]) -> Result<Answer, WireError> {
        let Decided { header, succeeded, responses } = serde_json::from_slice(bytes)?;
        let done = if succeeded { &self.success } else { &self.failure };
        // Where nothing is compared, everything is so.
        if done.len() != responses.len() || self.compare.is_empty() && !succeeded {
            return Err(WireError::Other);
        }
        let read = done.iter().zip(responses).map(|(operation, part)| operation.read(part));
        let read = read.collect::<Result<_, _>>()?;
        let history = History { cluster: header.cluster_id, revision: header.revision };
        Ok(Answer::Transaction { history, succeeded, read })
    }
}

impl Question {
    /// Where it is asked.
    pub(super) const fn path(&self) -> &'static str {
        match self {
            Self::Transaction(_) => "/v3/kv/txn",
            Self::Grant(_) => "/v3/lease/grant",
            Self::KeepAlive(_) => "/v3/lease/keepalive",
            Self::Revoke(_) => "/v3/lease/revoke",
        }
    }

    /// As it is sent.
    pub(super) fn encode(&self) -> Vec<u8> {
        let value = match self {
            Self::Transaction(transaction) => transaction.json(),
            Self::Grant(seconds) => json!({"TTL": seconds.to_string()}),
            Self::KeepAlive(lease) | Self::Revoke(lease) => json!({"ID": lease.0.to_string()}),
        };
        value.to_string().into_bytes()
    }

    /// Reads its answer.
    ///
    /// # Errors
    /// [`WireError`]: nothing is known of what was asked.
    pub(super) fn read(&self, status: u16, bytes: &[u8]) -> Result<Answer, WireError> {
        if status != 200 {
            let refusal: Refusal = serde_json::from_slice(bytes).unwrap_or_default();
            if status == 404 && refusal.code == NOT_FOUND && self.needs_a_lease() {
                return Ok(Answer::LeaseGone);
            }
            return Err(WireError::Refused { status, message: refusal.error.into() });
        }
        match self {
            Self::Transaction(transaction) => transaction.read(bytes),
            Self::Grant(_) => {
                let lease: Lease = serde_json::from_slice(bytes)?;
                lease.id().map(Answer::Granted)
            }
            Self::KeepAlive(asked) => {
                let InStream { result } = serde_json::from_slice(bytes)?;
                match result.id()? == *asked {
                    true if result.ttl > 0 => Ok(Answer::Kept),
                    true => Ok(Answer::LeaseGone),
                    false => Err(WireError::Other),
                }
            }
            Self::Revoke(_) => {
                let _: Done = serde_json::from_slice(bytes)?;
                Ok(Answer::Revoked)
            }
        }
    }

    fn needs_a_lease(&self) -> bool {
        let has_lease =
            |operation: &Operation| matches!(operation, Operation::Put { lease: Some(_), .. });
        match self {
            Self::Transaction(transaction) => transaction.success.iter().any(has_lease),
            Self::KeepAlive(_) | Self::Revoke(_) => true,
            Self::Grant(_) => false,
        }
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
