//! Errors that say what to do.

use anyhow::{Error, Result, anyhow};
use std::fmt::Display;

/// Adds to an error what its reader can do about it.
pub trait Remedy<T> {
    /// The error with its causes, then the remedy, in one line.
    ///
    /// # Errors
    /// The error of `self`.
    fn remedy<M: Display>(self, remedy: impl FnOnce() -> M) -> Result<T>;
}

impl<T, E: Into<Error>> Remedy<T> for Result<T, E> {
    fn remedy<M: Display>(self, remedy: impl FnOnce() -> M) -> Result<T> {
        self.map_err(|error| anyhow!("{:#}; {}", error.into(), remedy()))
    }
}

/// One line, whatever the text's lines.
pub fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn an_error_ends_with_what_to_do() {
        let error: Result<()> = Err(anyhow!("no such port")).context("listening");
        let error = error.remedy(|| "choose another").expect_err("an error");
        assert_eq!(format!("{error:#}"), "listening: no such port; choose another");
    }

    #[test]
    fn lines_become_one() {
        assert_eq!(one_line("a\n  b\r\n\tc\n"), "a b c");
    }
}
