//! What a side says to its operator: single lines, on standard error or in the file that was
//! chosen for them. A reader that has gone away never stops a side.

use std::fmt::Arguments;
use std::fs::File;
use std::io::{self, Write};
use std::sync::OnceLock;
use vmft_logging_channel::foreign::Printable;

static FILE: OnceLock<File> = OnceLock::new();

/// From now on messages go to `file`. Only the first call counts.
pub fn to_file(file: File) {
    FILE.get_or_init(|| file);
}

/// Says one line; see [`crate::tell!`].
pub fn say(message: Arguments<'_>) {
    // Whatever foreign text came into it: one line, which no terminal obeys.
    let line = format!("vmft: {}\n", Printable(&message.to_string()));
    // Nobody may be listening any more: a message is not worth a guest.
    let _ = match FILE.get() {
        Some(mut file) => file.write_all(line.as_bytes()),
        None => io::stderr().write_all(line.as_bytes()),
    };
}

/// Tells the operator something, in one line.
#[macro_export]
macro_rules! tell {
    ($($argument:tt)*) => {
        $crate::tell::say(format_args!($($argument)*))
    };
}
