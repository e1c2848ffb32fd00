//! Ctrl-C, SIGTERM and the API: how a running side is reached from outside.

use crate::api::{self, Api, Server, ShutdownHook};
use crate::machine_options::SideOptions;
use crate::metrics_server;
use crate::service;
use anyhow::Result;
use std::process;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use vmft_backup::events::{self, Ending, Event};
use vmft_backup::side::Side;
use vmft_backup::tell;
use vmft_log::entry::StopReason;
use vmft_vmm::inputs::Asked;

/// Signals that come sooner after the first mean the same: a terminal and a supervisor may both
/// send one.
const SECOND_SIGNAL: Duration = Duration::from_secs(1);

/// How long the message about that may take to be read.
const LAST_WORDS: Duration = Duration::from_millis(200);

static API: OnceLock<Server> = OnceLock::new();

/// Waits until who has asked this process's side for something has an answer, for at most `limit`: before a
/// process ends.
pub fn finish(limit: Duration) {
    if let Some(api) = API.get() {
        api.finish(limit);
    }
}

#[derive(Debug)]
struct NoHook;

impl ShutdownHook for NoHook {
    fn shutdown(&self) {}
}

/// Serves the API and the metrics, tells a service manager how the side is, and stops the side's machine
/// cleanly on SIGINT, SIGTERM or SIGHUP. If that takes too long for the operator, another signal ends the
/// process at once.
pub fn serve_side(side: &Side, options: &SideOptions) -> Result<()> {
    serve_side_with(side, options, Arc::new(NoHook))
}

/// As [`serve_side`], with something to do beside asking the machine to stop.
pub fn serve_side_with(
    side: &Side,
    options: &SideOptions,
    on_shutdown: Arc<dyn ShutdownHook>,
) -> Result<()> {
    if let Some(option) = options.metrics_listen {
        let address = metrics_server::serve(option, Arc::clone(&side.status))?;
        tell!("metrics at http://{address}/metrics");
    }
    if let Some(path) = &options.api_socket {
        let api = Api {
            status: Arc::clone(&side.status),
            mailbox: Arc::clone(&side.mailbox),
            requests: Arc::clone(&side.requests),
            faults: Arc::clone(&side.faults),
            bounds: Arc::clone(&side.bounds),
            disk_desk: Arc::clone(&side.disk_desk),
            on_shutdown: Arc::clone(&on_shutdown),
        };
        // A process has one side.
        let _ = API.set(api::serve(path, api)?);
    }
    service::serve(side)?;
    let mailbox = Arc::clone(&side.mailbox);
    let mut asked: Option<Instant> = None;
    ctrlc::set_handler(move || match asked {
        None => {
            asked = Some(Instant::now());
            mailbox.ask(Asked::Stop(StopReason::Operator));
            on_shutdown.shutdown();
        }
        Some(first) if first.elapsed() >= SECOND_SIGNAL => {
            tell!("ended at once, on a second signal");
            events::note(|| Event::End { how: Ending::Failed("a second signal".into()) });
            finish(LAST_WORDS);
            events::finish(LAST_WORDS);
            tell::finish(LAST_WORDS);
            process::exit(1);
        }
        Some(_) => {}
    })?;
    Ok(())
}
