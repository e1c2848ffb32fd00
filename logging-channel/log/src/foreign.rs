//! Text that somebody else has written: a peer, the storage, a guest, whoever asks over a socket.
//!
//! Terminals obey what is printed on them, and logs are read by the line. So foreign text has a type of
//! its own from where it is decoded, and the type shows it only as a reader may see it: without control
//! and invisible characters, and no longer than [`ForeignText::SHOWN`].

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt::{self, Write};

/// Text that somebody else has written.
///
/// ```
/// use vmft_log::foreign::ForeignText;
///
/// let text = ForeignText::from("\x1b[2Jvmft: all is well\nvmft: really");
/// assert_eq!(text.to_string(), r"\u{1b}[2Jvmft: all is well\nvmft: really");
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct ForeignText(String);

impl ForeignText {
    /// Characters that are shown; what is longer ends with an ellipsis.
    pub const SHOWN: usize = 1024;

    /// Bytes of it, as it came.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True if there is nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// True if it begins so.
    pub fn starts_with(&self, beginning: &str) -> bool {
        self.0.starts_with(beginning)
    }

    /// The same, cut at a character boundary to at most `limit` bytes.
    #[must_use]
    pub fn clipped(mut self, limit: usize) -> Self {
        let end = (0..=limit.min(self.0.len())).rev().find(|end| self.0.is_char_boundary(*end));
        self.0.truncate(end.expect("0 is a boundary"));
        self
    }
}

impl From<String> for ForeignText {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl From<&str> for ForeignText {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl PartialEq<str> for ForeignText {
    fn eq(&self, other: &str) -> bool {
        self.0 == other
    }
}

impl PartialEq<&str> for ForeignText {
    fn eq(&self, other: &&str) -> bool {
        self.0 == *other
    }
}

impl fmt::Display for ForeignText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self.0.char_indices().nth(Self::SHOWN).map_or(self.0.len(), |(end, _)| end);
        write!(f, "{}", Printable(&self.0[..end]))?;
        if end < self.0.len() { f.write_char('…') } else { Ok(()) }
    }
}

impl fmt::Debug for ForeignText {
    /// In quotes, which then stand for its beginning and its end only.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.to_string().replace('"', "\\\""))
    }
}

impl Serialize for ForeignText {
    /// As it is for another program of this kind, and as it is shown where people may read it.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            serializer.serialize_str(&self.0)
        }
    }
}

impl<'de> Deserialize<'de> for ForeignText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self)
    }
}

/// A line, of whatever origin, as it may be put on a terminal: what is no visible character (control and
/// format characters, ends of lines) is escaped.
#[derive(Debug, Clone, Copy)]
pub struct Printable<'a>(pub &'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| match c {
            '"' | '\'' | '\\' => f.write_char(c),
            c => c.escape_debug().try_for_each(|escaped| f.write_char(escaped)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Escape codes of both forms, ends of lines of all kinds, and characters that turn the direction of
    /// a line or are not seen.
    const EVIL: &str =
        "a\x1b[31m\u{9b}2J\x07\x08\r\n\t\x7f\u{85}\u{2028}\u{202e}\u{2066}\u{200b}\u{feff}\0z";

    #[test]
    fn what_a_terminal_would_obey_is_escaped() {
        let text = ForeignText::from(EVIL);
        for shown in [text.to_string(), format!("{text:?}"), Printable(EVIL).to_string()] {
            assert!(shown.chars().all(|c| c.is_ascii() && !c.is_control()), "{shown:?}");
            assert!(shown.contains(r"a\u{1b}[31m\u{9b}2J\u{7}") && shown.contains(r"\u{202e}"));
        }
        let plain = "disk 0: \"1 GiB\", größer \\ 'kleiner' 例";
        assert_eq!(ForeignText::from(plain).to_string(), plain);
        assert_eq!(format!("{:?}", ForeignText::from("a\"b")), r#""a\"b""#);
    }

    #[test]
    fn long_text_is_cut_where_it_is_shown() {
        let text = ForeignText::from("ä".repeat(5000));
        assert_eq!(text.to_string().chars().count(), ForeignText::SHOWN + 1);
        assert_eq!(text.clone().clipped(1001).len(), 1000);
        assert_eq!(ForeignText::from("ä".repeat(ForeignText::SHOWN)).to_string().len(), 2048);
    }

    #[test]
    fn it_passes_between_programs_as_it_is() {
        let text = ForeignText::from(EVIL);
        let bytes = postcard::to_stdvec(&text).expect("a text");
        assert_eq!(postcard::from_bytes::<ForeignText>(&bytes), Ok(text));
        assert_eq!(postcard::to_stdvec(EVIL).expect("a text"), bytes);
    }
}
