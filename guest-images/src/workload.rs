//! What the default guest's init can run, and how its output reads.

use std::fmt::Write as _;

/// Bytes of one record in the demo's file.
pub const RECORD_LEN: usize = 128;
/// The demo's file of records, in the disk's file system.
pub const RECORDS_FILE: &str = "/records";
/// Where the guest's server answers with what it is told (RFC 862).
pub const ECHO_PORT: u16 = 7;
/// The prompt of the guest's shell in its first directory; whoever sees it may type. Busybox
/// then asks the terminal for the cursor's position (`ESC [ 6 n`), and needs no answer.
pub const SHELL_PROMPT: &str = "vmft:/# ";
/// The last line of a demo that did all it should.
pub const DEMO_DONE: &str = "vmft-done";
/// The line that says the guest idles.
pub const IDLE: &str = "vmft-idle";
/// How a line begins that says why the guest gave up.
pub const FAIL_PREFIX: &str = "vmft-fail ";

/// What the guest does after it has started. Everything but [`Self::Idle`] ends with the guest
/// switching itself off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// An interactive shell on the console.
    Shell,
    /// Prints numbered lines, and writes and syncs a record to the disk for each.
    Demo {
        /// How many.
        lines: u32,
        /// Milliseconds to wait between two.
        pause_ms: u32,
    },
    /// Waits for ever.
    Idle,
    /// Repeats one thing; [`Bench::begin`] and [`Bench::end`] are printed around it.
    Bench {
        /// What.
        bench: Bench,
        /// How often.
        count: u32,
    },
}

/// What a bench workload repeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bench {
    /// Integer arithmetic in the shell, about 25,000 instructions each.
    Compute,
    /// A fork, an exec of busybox, and waiting for it: about 800,000 instructions each.
    Fork,
    /// Appending 4 KiB to a file and its fsync.
    Disk,
}

impl Bench {
    /// Its name in the guest's output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::Fork => "fork",
            Self::Disk => "disk",
        }
    }

    /// The line printed before the first.
    pub fn begin(self, count: u32) -> String {
        format!("vmft-bench {} begin {count}", self.name())
    }

    /// The line printed after the last.
    pub fn end(self, count: u32) -> String {
        format!("vmft-bench {} end {count}", self.name())
    }
}

impl Workload {
    /// The words on the kernel command line that make init run it.
    pub fn cmdline(self) -> String {
        let mut words = String::from("vmft.run=");
        let written = match self {
            Self::Shell => write!(words, "shell"),
            Self::Demo { lines, pause_ms } => {
                write!(words, "demo vmft.lines={lines} vmft.pause_ms={pause_ms}")
            }
            Self::Idle => write!(words, "idle"),
            Self::Bench { bench, count } => {
                write!(words, "bench-{} vmft.count={count}", bench.name())
            }
        };
        written.expect("writing to a string does not fail");
        words
    }
}

/// A line of the demo's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DemoLine {
    /// The numbered line, counted from 1.
    Line(u32),
    /// The record of this number is on the disk.
    Synced(u32),
    /// All lines were printed.
    Done,
}

impl DemoLine {
    /// All lines of a demo with so many records that did all it should.
    pub fn all(records: u32) -> Vec<Self> {
        let each = (1..=records).flat_map(|number| [Self::Line(number), Self::Synced(number)]);
        each.chain([Self::Done]).collect()
    }

    /// Reads a line of the console, without its line feed; `None` for any other line.
    pub fn parse(line: &str) -> Option<Self> {
        let line = line.strip_suffix('\r').unwrap_or(line);
        let number = |digits: &str| {
            let good = digits.len() >= 6 && digits.bytes().all(|byte| byte.is_ascii_digit());
            good.then(|| digits.parse().ok()).flatten()
        };
        if line == DEMO_DONE {
            return Some(Self::Done);
        }
        if let Some(digits) = line.strip_prefix("vmft-line ") {
            return number(digits).map(Self::Line);
        }
        number(line.strip_prefix("vmft-record ")?.strip_suffix(" synced")?).map(Self::Synced)
    }
}

/// The record of this number, counted from 1, as the demo writes it.
pub fn record(number: u32) -> Vec<u8> {
    format!("vmft-record {number:06} {number:0108}\n").into_bytes()
}

/// Why a file of records is not what the demo writes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordsError {
    /// A record has other bytes than it should.
    #[error("record {number} is damaged")]
    Damaged {
        /// Its number.
        number: u32,
    },
    /// The file ends inside a record.
    #[error("record {number} is cut short")]
    CutShort {
        /// Its number.
        number: u32,
    },
}

/// Checks a file of records and counts them: 1 to the count, each once and in order.
///
/// # Errors
/// [`RecordsError`] at the first record that is not what it should be.
pub fn count_records(file: &[u8]) -> Result<u32, RecordsError> {
    let mut count = 0;
    for chunk in file.chunks(RECORD_LEN) {
        let number = count + 1;
        if chunk.len() < RECORD_LEN {
            return Err(RecordsError::CutShort { number });
        }
        if chunk != record(number) {
            return Err(RecordsError::Damaged { number });
        }
        count = number;
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_names_the_workload_and_its_numbers() {
        let demo = Workload::Demo { lines: 20, pause_ms: 5 };
        assert_eq!(demo.cmdline(), "vmft.run=demo vmft.lines=20 vmft.pause_ms=5");
        let bench = Workload::Bench { bench: Bench::Fork, count: 9 };
        assert_eq!(bench.cmdline(), "vmft.run=bench-fork vmft.count=9");
        assert_eq!(Workload::Shell.cmdline(), "vmft.run=shell");
    }

    #[test]
    fn only_whole_demo_lines_are_read_as_such() {
        assert_eq!(DemoLine::parse("vmft-line 000012"), Some(DemoLine::Line(12)));
        assert_eq!(
            DemoLine::parse("vmft-record 1000000 synced"),
            Some(DemoLine::Synced(1_000_000))
        );
        assert_eq!(DemoLine::parse("vmft-done\r"), Some(DemoLine::Done));
        for other in ["vmft-line 00012", "vmft-line 00001x", "vmft-record 000001", "", "vmft-line "]
        {
            assert_eq!(DemoLine::parse(other), None, "{other:?}");
        }
    }

    #[test]
    fn a_damaged_missing_repeated_or_cut_record_is_found() {
        assert!((1..1_000_000).step_by(99_999).all(|number| record(number).len() == RECORD_LEN));
        let file: Vec<u8> = (1..=5).flat_map(record).collect();
        assert_eq!(count_records(&file), Ok(5));
        assert_eq!(count_records(&[]), Ok(0));
        assert_eq!(count_records(&file[1..]), Err(RecordsError::Damaged { number: 1 }));
        assert_eq!(count_records(&file[..300]), Err(RecordsError::CutShort { number: 3 }));
        let repeated: Vec<u8> = [1, 2, 2, 3].into_iter().flat_map(record).collect();
        assert_eq!(count_records(&repeated), Err(RecordsError::Damaged { number: 3 }));
    }
}
