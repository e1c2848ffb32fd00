//! Ctrl-C, SIGTERM and the API: how a running side is reached from outside.

use crate::api::{self, Api, ShutdownHook};
use anyhow::Result;
use std::path::Path;
use std::sync::Arc;
use vmft_backup::side::Side;
use vmft_logging_channel::entry::StopReason;
use vmft_vmm::inputs::Asked;

#[derive(Debug)]
struct NoHook;

impl ShutdownHook for NoHook {
    fn shutdown(&self) {}
}

/// Serves the API, and stops the side's machine cleanly on SIGINT or SIGTERM.
pub fn serve_side(side: &Side, api_socket: Option<&Path>) -> Result<()> {
    serve_side_with(side, api_socket, Arc::new(NoHook))
}

/// As [`serve_side`], with something to do beside asking the machine to stop.
pub fn serve_side_with(
    side: &Side,
    api_socket: Option<&Path>,
    on_shutdown: Arc<dyn ShutdownHook>,
) -> Result<()> {
    let mailbox = Arc::clone(&side.mailbox);
    let hook = Arc::clone(&on_shutdown);
    ctrlc::set_handler(move || {
        mailbox.ask(Asked::Stop(StopReason::Operator));
        hook.shutdown();
    })?;
    if let Some(path) = api_socket {
        let api = Api {
            status: Arc::clone(&side.status),
            mailbox: Arc::clone(&side.mailbox),
            requests: Arc::clone(&side.requests),
            on_shutdown,
        };
        api::serve(path, api)?;
    }
    Ok(())
}
