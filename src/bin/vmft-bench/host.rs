//! The machine the figures were measured on.

use serde::Serialize;
use std::path::Path;

/// What the host is, and how busy it was.
#[derive(Debug, Clone, Serialize)]
pub struct Host {
    cpu: String,
    cores: usize,
    memory_mib: u64,
    kernel: String,
    /// Load average over one minute, when the bench began.
    load_before: f64,
    /// The same, when it ended.
    load_after: f64,
}

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(path)).unwrap_or_default()
}

/// The value of the first line of `text` that begins with `key`, after its colon.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    line.split_once(':').map(|(_, value)| value.trim())
}

/// Load average over one minute; 0 where the host does not say.
pub fn load() -> f64 {
    let text = read("/proc/loadavg");
    text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0.0)
}

impl Host {
    /// Looks at this machine.
    pub fn now() -> Self {
        let memory = read("/proc/meminfo");
        let kilobytes = field(&memory, "MemTotal").and_then(|text| text.split(' ').next());
        Self {
            cpu: field(&read("/proc/cpuinfo"), "model name").unwrap_or("unknown").to_owned(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: kilobytes.and_then(|text| text.parse::<u64>().ok()).unwrap_or(0) / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load_before: load(),
            load_after: 0.0,
        }
    }

    /// Notes how busy the machine is at the end.
    pub fn finish(&mut self) {
        self.load_after = load();
    }

    /// One line for people.
    pub fn line(&self) -> String {
        format!(
            "{}, {} cores, {} MiB, Linux {}, load {:.1} at the start, {:.1} at the end",
            self.cpu, self.cores, self.memory_mib, self.kernel, self.load_before, self.load_after
        )
    }
}
