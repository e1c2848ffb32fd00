//! How a recipe tells its caller what it is doing.

/// Told about every step that may take longer than a second.
pub trait Progress {
    /// A step begins, and with it the one before ends: `downloading busybox-static`.
    fn step(&mut self, what: &str);
    /// Something the user should know: a damaged cache was found and is built again.
    fn note(&mut self, what: &str);
}

/// Says nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn step(&mut self, _what: &str) {}
    fn note(&mut self, _what: &str) {}
}
