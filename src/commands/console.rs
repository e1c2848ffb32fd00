//! `vmft console`: a reader attached to the pair.

use crate::remedy::Remedy;
use crate::terminal::{RawTerminal, read_keys};
use anyhow::{Context, Result};
use clap::Args;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::channel;
use vmft_backup::tell;
use vmft_vmm::world::console::{ConsoleClient, ConsoleEvent, Merger};

/// Options of `vmft console`.
#[derive(Debug, Args)]
pub struct ConsoleOptions {
    /// Console sockets (--serial socket=PATH) of one side or both; bytes are merged by offset, so
    /// each is shown once, also across a failover
    #[arg(value_name = "SOCKET", required = true)]
    sockets: Vec<PathBuf>,
    /// Console offset to begin at
    #[arg(long, value_name = "OFFSET", default_value_t = 0)]
    from: u64,
}

/// Shows the console until every side is gone.
pub fn console(options: &ConsoleOptions) -> Result<ExitCode> {
    let (sender, events) = channel();
    let mut typists = Vec::new();
    for socket in &options.sockets {
        let mut client = ConsoleClient::attach(socket, options.from)
            .with_context(|| format!("attaching to {}", socket.display()))
            .remedy(|| "is a side running with --serial socket= and this path?")?;
        typists.push(client.try_clone()?);
        let sender = sender.clone();
        let read = move || {
            loop {
                let event = client.next_event();
                let closed = event == ConsoleEvent::Closed;
                if sender.send(Some(event)).is_err() || closed {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("console".to_owned()).spawn(read)?;
    }
    let raw = RawTerminal::enter()?;
    let detach = sender.clone();
    ctrlc::set_handler(move || {
        // Without a receiver the console is closing already.
        let _ = detach.send(None);
    })?;
    if raw.is_some() {
        tell!("attached; Ctrl-A x detaches");
    }
    read_keys(move |keys| {
        for typist in &mut typists {
            // A side that is gone takes no keys; the other does.
            let _ = typist.type_in(&keys.typed);
        }
        if keys.leave {
            let _ = sender.send(None);
        }
        !keys.leave
    })?;

    let mut merger = Merger::new(options.from);
    let mut open = options.sockets.len();
    let mut stdout = std::io::stdout();
    while let Ok(Some(event)) = events.recv() {
        match event {
            ConsoleEvent::Record(record) => {
                let merged = merger.add(record);
                if merged.missing > 0 {
                    tell!("{} console bytes are not to be had any more", merged.missing);
                }
                stdout.write_all(&merged.bytes)?;
                stdout.flush()?;
            }
            ConsoleEvent::Closed => {
                open -= 1;
                if open == 0 {
                    break;
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
