//! The terminal: its modes while a view is shown, its keys, and how it was before.

use super::Input;
use super::draw::{Colours, draw};
use super::model::{Key, View};
use anyhow::{Context, Result};
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::Show;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{
    EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};
use std::io::{self, Stdout};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use vmft_sandbox::Task;

/// True while the terminal is not as it was.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// The terminal, until it is dropped.
#[derive(Debug)]
pub struct Screen {
    terminal: Terminal<CrosstermBackend<Stdout>>,
    colours: Colours,
}

impl Screen {
    /// Takes the terminal. A process that panics gives it back before it says so.
    ///
    /// # Errors
    /// There is none, or it does not take its modes.
    pub fn open() -> Result<Self> {
        enable_raw_mode().context("taking the terminal")?;
        TAKEN.store(true, Ordering::SeqCst);
        let say = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            give_back();
            say(panic);
        }));
        // Given back from here on, whatever fails.
        let guard = GiveBack;
        execute!(io::stdout(), EnterAlternateScreen).context("taking the terminal")?;
        let terminal = Terminal::new(CrosstermBackend::new(io::stdout()))
            .context("reading the terminal's size")?;
        std::mem::forget(guard);
        // https://no-color.org: set, and not empty.
        let is_plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let colours = if is_plain { Colours::Off } else { Colours::On };
        Ok(Self { terminal, colours })
    }

    /// Shows a view.
    ///
    /// # Errors
    /// The terminal's.
    pub(super) fn draw(&mut self, view: &View) -> Result<()> {
        let colours = self.colours;
        let drawn = self.terminal.draw(|frame| draw(frame, view, colours));
        drawn.context("drawing on the terminal").map(drop)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back();
    }
}

struct GiveBack;

impl Drop for GiveBack {
    fn drop(&mut self) {
        give_back();
    }
}

/// The terminal is as it was before. Nothing more can be done for one that is gone.
fn give_back() {
    if TAKEN.swap(false, Ordering::SeqCst) {
        let _ = execute!(io::stdout(), LeaveAlternateScreen, Show);
        let _ = disable_raw_mode();
    }
}

fn key_of(event: KeyEvent) -> Option<Key> {
    if event.kind == KeyEventKind::Release {
        return None;
    }
    Some(match event.code {
        KeyCode::Char('c') if event.modifiers.contains(KeyModifiers::CONTROL) => Key::Quit,
        KeyCode::Char('q' | 'Q') | KeyCode::Esc => Key::Quit,
        KeyCode::Char(' ') => Key::Pause,
        KeyCode::Char('?') => Key::Help,
        KeyCode::Up => Key::Up,
        KeyCode::Down => Key::Down,
        KeyCode::PageUp => Key::PageUp,
        KeyCode::PageDown => Key::PageDown,
        KeyCode::Home => Key::Oldest,
        KeyCode::End => Key::Newest,
        _ => return None,
    })
}

/// Reads the keys on a thread of its own, until nobody listens.
///
/// # Errors
/// The host's, where it starts no thread.
pub(super) fn read_keys(told: Sender<Input>) -> io::Result<()> {
    let read = move || {
        loop {
            let input = match event::read() {
                Ok(Event::Key(key)) => key_of(key).map(Input::Key),
                Ok(Event::Resize(..)) => Some(Input::Resized),
                Ok(_) => None,
                // A terminal that cannot be read is gone.
                Err(_) => Some(Input::Quit),
            };
            let is_over = matches!(input, Some(Input::Quit));
            if input.is_some_and(|input| told.send(input).is_err()) || is_over {
                return;
            }
        }
    };
    vmft_sandbox::spawn(Task::Console, "keys", read).map(drop)
}
