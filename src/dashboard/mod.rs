//! `vmft dashboard`: the sides of a pair on a page, as they are; with buttons where they are wanted.
//!
//! | file | what |
//! |---|---|
//! | `model.rs` | what the sides' answers come to: samples in, a picture out |
//! | `timeline.rs` | a failover in its parts |
//! | `acts.rs` | what the buttons do, and which of them there are |
//! | `door.rs` | who may ask for what |
//! | `server.rs` | the page's server |
//! | `page.html`, `page.css`, `page.js` | the page, which only draws pictures |
//!
//! The sides are asked once in an interval for all who look, and not at all while nobody does. Each is asked
//! by a task of its own: one that does not answer holds up no other.

pub mod acts;
mod door;
mod model;
mod server;
#[cfg(test)]
mod tests;
mod timeline;

pub use door::ListenOption;

use crate::api_client;
use crate::explain::{Story, read_all};
use crate::machine_options::fresh_id;
use crate::remedy::{Remedy, one_line};
use crate::watch::facts::shown;
use crate::watch::model::{Sample, Stamp};
use crate::watch::names;
use acts::{Hands, Power};
use anyhow::{Context, Result};
use door::Door;
use hyper::body::Bytes;
use model::{Model, Picture};
use server::Served;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use timeline::{Timeline, of_story};
use tokio::sync::{mpsc, watch};

/// How long a picture stays where nothing comes: it tells how long a side has been gone.
const REDRAW: Duration = Duration::from_millis(500);
/// How long answers that come together are waited for.
const TOGETHER: Duration = Duration::from_millis(20);
/// The largest event log that is read, in bytes: it is read again at each failover.
const LOG: u64 = 16 << 20;

/// What a dashboard shows.
#[derive(Debug)]
pub struct Shown {
    /// The sides' API sockets.
    pub sides: Vec<PathBuf>,
    /// How they are called; by their sockets where this is empty.
    pub names: Vec<String>,
    /// Event logs of them, as far as they can be read from here.
    pub event_logs: Vec<PathBuf>,
    /// How often the sides are asked.
    pub interval: Duration,
    /// Whoever does what the buttons ask for; without, there are none.
    pub hands: Option<Arc<dyn Hands>>,
    /// The guest's console, line by line, where it is known.
    pub console: Option<mpsc::Receiver<String>>,
}

/// A dashboard that listens, and serves once it is told to.
#[derive(Debug)]
pub struct Dashboard {
    listener: TcpListener,
    shown: Shown,
    served: Arc<Served>,
    url: String,
}

/// What comes to the picture.
#[derive(Debug)]
enum News {
    Sample(Sample),
    Story(Timeline),
}

impl Dashboard {
    /// Listens.
    ///
    /// # Errors
    /// The address is taken, or not of this host; or the host gives no random bytes.
    pub fn listen(option: &ListenOption, mut shown: Shown) -> Result<Self> {
        let listener = TcpListener::bind(option.address)
            .with_context(|| format!("listening for readers of the page at {}", option.address))
            .remedy(|| "--listen takes an address of this host and a free port")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        if shown.names.is_empty() {
            shown.names = short_names(&shown.sides);
        }
        let (key, has_buttons) = (fresh_id()?, shown.hands.is_some());
        let door = Door::new(option.name.clone(), key.clone(), has_buttons);
        let host = match &option.name {
            Some(name) => format!("{name}:{}", address.port()),
            None => address.to_string(),
        };
        let url = match has_buttons {
            true => format!("http://{host}/?key={key}"),
            false => format!("http://{host}/"),
        };
        let (sides, hands) = (shown.sides.len(), shown.hands.clone());
        let served = Arc::new(Served::new((door, key), sides, hands));
        Ok(Self { listener, shown, served, url })
    }

    /// Where the page is; with its key, if it has buttons.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The host's.
    pub fn address(&self) -> Result<SocketAddr> {
        Ok(self.listener.local_addr()?)
    }

    /// Serves, on this thread, until the process ends.
    ///
    /// # Errors
    /// The host's.
    pub fn serve(self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async move {
            let Self { listener, shown, served, .. } = self;
            let listener = tokio::net::TcpListener::from_std(listener)?;
            let began = Instant::now();
            let (told, news) = mpsc::channel(64);
            for (side, socket) in shown.sides.iter().enumerate() {
                let asked = Asked { side, socket: socket.clone(), interval: shown.interval, began };
                tokio::spawn(ask(asked, served.readers.subscribe(), told.clone()));
            }
            tokio::spawn(show(shown, Arc::clone(&served), began, news, told));
            server::accept(listener, served).await;
            Ok(())
        })
    }
}

/// How the sides are called: as in a terminal, and without what sockets have at their ends, unless they would
/// be alike.
fn short_names(sockets: &[PathBuf]) -> Vec<String> {
    let names = names(sockets);
    let short = |name: &String| {
        let ends = [".api", ".sock"];
        let short = ends.iter().find_map(|end| name.strip_suffix(end));
        short.filter(|short| !short.is_empty() && !short.ends_with('/')).unwrap_or(name).to_owned()
    };
    let shorter: Vec<String> = names.iter().map(short).collect();
    let is_alone = |name: &String| shorter.iter().filter(|other| *other == name).count() == 1;
    if shorter.iter().all(is_alone) { shorter } else { names }
}

/// Who is asked, and how often.
struct Asked {
    side: usize,
    socket: PathBuf,
    interval: Duration,
    began: Instant,
}

/// Asks a side again and again, while somebody looks.
async fn ask(asked: Asked, mut readers: watch::Receiver<usize>, told: mpsc::Sender<News>) {
    let Asked { side, socket, interval, began } = asked;
    while readers.wait_for(|readers| *readers > 0).await.is_ok() {
        let next = tokio::time::Instant::now() + interval;
        let answer = api_client::look_from_runtime(&socket).await.map(Box::new);
        let answer = answer.map_err(|error| shown(&one_line(&format!("{error:#}"))));
        let sample = Sample { side, at: Stamp::now(began), answer };
        if told.send(News::Sample(sample)).await.is_err() {
            return;
        }
        tokio::time::sleep_until(next).await;
    }
}

/// A picture as it is sent: on one line.
fn json(picture: &Picture) -> Bytes {
    serde_json::to_vec(picture).expect("texts and numbers").into()
}

/// Makes the pictures, while somebody looks.
async fn show(
    shown: Shown,
    served: Arc<Served>,
    began: Instant,
    mut news: mpsc::Receiver<News>,
    told: mpsc::Sender<News>,
) {
    let Shown { names, event_logs, interval, hands, mut console, .. } = shown;
    let mut model = Model::new(names, interval);
    let mut readers = served.readers.subscribe();
    let mut looked_at = false;
    // Of which failover the event logs have been read, and whether all of it had happened.
    let mut read_for = None;
    let mut next = tokio::time::Instant::now() + REDRAW;
    let mut heard_last = None;
    let soon = || tokio::time::Instant::now() + TOGETHER;
    loop {
        tokio::select! {
            heard = news.recv() => match heard {
                None => return,
                Some(News::Sample(sample)) => {
                    heard_last = Some(soon());
                    model.handle_sample(sample);
                    next = next.min(soon());
                }
                Some(News::Story(told)) => {
                    model.handle_story(told);
                    next = next.min(soon());
                }
            },
            line = next_line(&mut console) => match line {
                Some(line) => model.handle_console_line(&line),
                None => console = None,
            },
            changed = readers.changed() => {
                if changed.is_err() {
                    return;
                }
                let looked_at_now = *readers.borrow_and_update() > 0;
                if looked_at_now && !looked_at {
                    model.ask_again(Stamp::now(began));
                    // Where everybody has answered within the interval, nobody is about to.
                    let is_fresh = heard_last.is_some_and(|heard| soon() < heard + interval);
                    next = if is_fresh { soon() } else { soon() + REDRAW };
                }
                looked_at = looked_at_now;
            }
            () = tokio::time::sleep_until(next), if looked_at => {
                next = tokio::time::Instant::now() + REDRAW;
                let power = |side| hands.as_ref().map_or(Power::Looks, |hands| hands.power(side));
                let powers: Vec<Power> = (0..served.sides).map(power).collect();
                served.pictures.send_replace(json(&model.picture(Stamp::now(began), &powers)));
            }
        }
        let last = model.last_failover();
        if let Some((generation, _)) = last.filter(|_| !event_logs.is_empty() && last != read_for) {
            read_for = last;
            let (logs, told) = (event_logs.clone(), told.clone());
            tokio::task::spawn_blocking(move || {
                if let Some(timeline) = read_story(&logs, generation) {
                    // Without a receiver nobody wants to know.
                    let _ = told.blocking_send(News::Story(timeline));
                }
            });
        }
    }
}

async fn next_line(console: &mut Option<mpsc::Receiver<String>>) -> Option<String> {
    match console {
        Some(lines) => lines.recv().await,
        None => std::future::pending().await,
    }
}

/// What those event logs that are there tell of a failover.
fn read_story(logs: &[PathBuf], generation: u64) -> Option<Timeline> {
    let has_size = |log: &&PathBuf| {
        std::fs::metadata(log).is_ok_and(|file| file.is_file() && (1..=LOG).contains(&file.len()))
    };
    let logs: Vec<&PathBuf> = logs.iter().filter(has_size).collect();
    let lives = read_all(&logs).ok()?;
    of_story(&Story::of(&lives), generation)
}
