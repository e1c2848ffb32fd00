//! Progress on the terminal, for anything that takes longer than a second.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::Duration;
use vmft_backup::tell;
use vmft_guest_images::Progress;

/// Progress on standard error: a spinner on a terminal, lines elsewhere.
#[derive(Debug)]
pub struct TerminalProgress {
    bar: Option<ProgressBar>,
}

/// Progress for whoever sits at this process's terminal.
pub fn terminal() -> TerminalProgress {
    TerminalProgress { bar: None }
}

/// A spinner that says what is going on, with the time it has taken.
pub fn spinner(what: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})");
    bar.set_style(style.expect("the template is well formed"));
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

impl Progress for TerminalProgress {
    fn step(&mut self, what: &str) {
        if std::io::stderr().is_terminal() {
            if let Some(bar) = self.bar.take() {
                bar.finish_and_clear();
            }
            self.bar = Some(spinner(what));
        } else {
            tell!("{what}");
        }
    }

    fn note(&mut self, what: &str) {
        match &self.bar {
            Some(bar) => bar.println(format!("vmft: {what}")),
            None => tell!("{what}"),
        }
    }
}

impl Drop for TerminalProgress {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
