//! `--event-log FILE`: where a side's events go.

use crate::remedy::Remedy;
use anyhow::{Context, Result};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use tracing::field::{Field, Visit};
use tracing::{Event as Message, Level, Subscriber};
use tracing_subscriber::layer::{Context as LayerContext, Layer};
use vmft_backup::arbiter::Candidate;
use vmft_backup::events::{self, Event};
use vmft_sandbox::outside_of_landlock;

/// Names the boot of this host.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// From now on this side's events are added to the file at `path`, which only its owner may read: it tells
/// what a guest's host does. `name` is this side's in each of them.
///
/// # Errors
/// The file cannot be opened.
pub fn open(path: &Path, name: &str, who: &Candidate) -> Result<()> {
    let (named, wanted) = (path.to_owned(), path.to_owned());
    let file = outside_of_landlock(move || append(&wanted));
    let file = file
        .with_context(|| format!("opening {}", path.display()))
        .remedy(|| "--event-log takes a file that this user may write")?;
    let boot_id = std::fs::read_to_string(BOOT_ID).unwrap_or_default();
    let begin = Event::Begin {
        program: concat!("vmft ", env!("CARGO_PKG_VERSION")).into(),
        host: who.host.clone(),
        boot_id: boot_id.trim().into(),
        pid: who.pid,
        id: who.id.as_str().into(),
    };
    events::to_file(file, named, name.into(), begin)
        .context("starting the thread that writes the event log")
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// Has warnings of this program in the event log.
#[derive(Debug)]
pub struct Troubles;

/// The text of a message, and its fields behind it.
#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        use std::fmt::Write;
        // Writing to a text does not fail.
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

impl<S: Subscriber> Layer<S> for Troubles {
    fn on_event(&self, message: &Message<'_>, _: LayerContext<'_, S>) {
        let (level, part) = (*message.metadata().level(), message.metadata().target());
        // Whoever says something again and again counts it (`Repeats`); other crates may not.
        if level > Level::WARN || !part.starts_with("vmft") {
            return;
        }
        events::note(|| {
            let mut text = Text::default();
            message.record(&mut text);
            Event::Trouble { part: part.into(), text: text.0.into() }
        });
    }
}
