//! What two sides must agree on before one may replay the other, and who they are.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use vmft_log::entry::Generation;
use vmft_log::foreign::ForeignText;
use vmft_log::wire::{DecodeError, check_count};

/// Most fields a fingerprint has.
pub const MAX_FINGERPRINT_FIELDS: usize = 64;
/// Longest field name, in bytes.
pub const MAX_FIELD_NAME: usize = 64;
/// Longest field value, in bytes.
pub const MAX_FIELD_VALUE: usize = 512;
/// Longest pair name, in bytes.
pub const MAX_PAIR_NAME: usize = 64;

/// The value of a field that matches every other: of a side to which the field does not matter.
pub const ANY: &str = "any";

/// Everything about a machine that must be the same on both sides, as named texts, so that a
/// mismatch can be reported by name with both values.
///
/// ```
/// use vmft_logging_channel::fingerprint::Fingerprint;
///
/// let primary = Fingerprint::new().with("engine", "soft").with("memory size", "256 MiB");
/// let backup = Fingerprint::new().with("engine", "soft").with("memory size", "512 MiB");
/// let mismatch = primary.mismatch(&backup).expect("the sizes differ");
/// assert_eq!(mismatch.field, "memory size");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Fingerprint(BTreeMap<String, String>);

impl Fingerprint {
    /// A fingerprint without fields.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces a field.
    ///
    /// # Panics
    /// If there are more than [`MAX_FINGERPRINT_FIELDS`], or the name or value is longer than
    /// [`MAX_FIELD_NAME`] or [`MAX_FIELD_VALUE`]: long facts belong in as a digest.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, value: impl fmt::Display) -> Self {
        self.0.insert(name.into(), value.to_string());
        self.validate().expect("fingerprint fields are few and short");
        self
    }

    /// The value of a field.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// All fields, by name.
    pub fn fields(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The fields of these names, as far as there are any.
    #[must_use]
    pub fn only(&self, names: &[&str]) -> Self {
        let known = self.0.iter().filter(|(name, _)| names.contains(&name.as_str()));
        Self(known.map(|(name, value)| (name.clone(), value.clone())).collect())
    }

    /// The first field, by name, that is not the same in `other`; `self` is the primary's. [`ANY`] on
    /// either side is the same as every value.
    pub fn mismatch(&self, other: &Self) -> Option<Mismatch> {
        self.0
            .keys()
            .chain(other.0.keys())
            .filter(|name| {
                let (ours, theirs) = (self.get(name), other.get(name));
                let any = [ours, theirs].contains(&Some(ANY));
                ours != theirs && !(any && ours.is_some() && theirs.is_some())
            })
            .min()
            .map(|name| Mismatch {
                field: name.as_str().into(),
                primary: self.get(name).map(ForeignText::from),
                backup: other.get(name).map(ForeignText::from),
            })
    }

    pub(crate) fn validate(&self) -> Result<(), DecodeError> {
        check("fingerprint fields", self.0.len(), MAX_FINGERPRINT_FIELDS)?;
        for (name, value) in &self.0 {
            check("fingerprint field name", name.len(), MAX_FIELD_NAME)?;
            check("fingerprint field value", value.len(), MAX_FIELD_VALUE)?;
        }
        Ok(())
    }
}

fn check(what: &'static str, found: usize, limit: usize) -> Result<(), DecodeError> {
    if found > limit {
        return Err(DecodeError::Limit { what, found: found as u64, limit: limit as u64 });
    }
    Ok(())
}

/// A field in which two fingerprints differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mismatch {
    /// Its name.
    pub field: ForeignText,
    /// The primary's value; `None` if it has no such field.
    pub primary: Option<ForeignText>,
    /// The backup's value; `None` if it has no such field.
    pub backup: Option<ForeignText>,
}

impl Mismatch {
    pub(crate) fn validate(&self) -> Result<(), DecodeError> {
        check("fingerprint field name", self.field.len(), MAX_FIELD_NAME)?;
        for value in [&self.primary, &self.backup].into_iter().flatten() {
            check("fingerprint field value", value.len(), MAX_FIELD_VALUE)?;
        }
        Ok(())
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = |value: &Option<ForeignText>| match value {
            Some(value) => format!("{value:?}"),
            None => "missing".to_owned(),
        };
        write!(
            f,
            "{} is {} on the primary and {} on the backup",
            self.field,
            value(&self.primary),
            value(&self.backup)
        )
    }
}

/// A name that is no pair's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("pair name {0:?} is not 1 to {MAX_PAIR_NAME} letters, digits, dots, dashes or underscores")]
pub struct InvalidPairId(pub ForeignText);

/// The name of a pair, given by its operator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PairId(String);

impl TryFrom<String> for PairId {
    type Error = InvalidPairId;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
        if name.is_empty() || name.len() > MAX_PAIR_NAME || !name.chars().all(allowed) {
            return Err(InvalidPairId(name.into()));
        }
        Ok(Self(name))
    }
}

impl From<PairId> for String {
    fn from(pair: PairId) -> Self {
        pair.0
    }
}

impl std::str::FromStr for PairId {
    type Err = InvalidPairId;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::try_from(name.to_owned())
    }
}

impl fmt::Display for PairId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Who a side is and what it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The pair it belongs to.
    pub pair: PairId,
    /// For a primary, its reign; for a backup, the last one it knows of.
    pub generation: Generation,
    /// The machine it runs.
    pub fingerprint: Fingerprint,
}

impl Identity {
    pub(crate) fn validate(&self) -> Result<(), DecodeError> {
        check_count("generation", self.generation.0)?;
        self.fingerprint.validate()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_field_is_a_mismatch_on_either_side() {
        let small = Fingerprint::new().with("engine", "soft");
        let large = small.clone().with("disk 0", "1 GiB");
        assert_eq!(small.mismatch(&small), None);
        let text = small.mismatch(&large).expect("a field more").to_string();
        assert_eq!(text, r#"disk 0 is missing on the primary and "1 GiB" on the backup"#);
        let text = large.mismatch(&small).expect("a field less").to_string();
        assert_eq!(text, r#"disk 0 is "1 GiB" on the primary and missing on the backup"#);
    }

    #[test]
    fn any_matches_every_value_but_not_a_field_that_is_missing() {
        let open = Fingerprint::new().with("engine", ANY);
        let soft = Fingerprint::new().with("engine", "soft");
        assert_eq!(open.mismatch(&soft), None);
        assert_eq!(soft.mismatch(&open), None);
        assert!(open.mismatch(&Fingerprint::new()).is_some());
        assert!(Fingerprint::new().mismatch(&open).is_some());
    }

    #[test]
    fn a_pair_name_with_odd_characters_is_refused() {
        for name in ["", "a b", "a/b", "ä", &"x".repeat(65)] {
            assert_eq!(name.parse::<PairId>(), Err(InvalidPairId(name.into())));
        }
        assert_eq!("demo-1.a_b".parse::<PairId>().map(String::from), Ok("demo-1.a_b".to_owned()));
    }
}
