//! `vmft dashboard`: the sides of a pair on a page.

use crate::dashboard::acts::{ByApi, Hands};
use crate::dashboard::{Dashboard, ListenOption, Shown};
use crate::terminal::say;
use crate::watch::IntervalOption;
use anyhow::Result;
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use vmft_backup::tell;

/// Options of `vmft dashboard`.
#[derive(Debug, Args)]
pub struct DashboardOptions {
    /// The sides' --api-socket, one or several; they may come and go
    #[arg(required = true, num_args = 1..=16, value_name = "SOCKET")]
    sides: Vec<PathBuf>,
    /// Where the page is; an address that other hosts reach needs insecure=on, and by what name, if it is
    /// to be found by one: whoever reaches it sees the page, and nothing is encrypted
    #[arg(
        long,
        value_name = "ADDRESS:PORT[,insecure=on][,name=HOST]",
        default_value = "127.0.0.1:8080"
    )]
    listen: ListenOption,
    /// Buttons: switch, pause, resume, stop. The page's address then has a key in it
    #[arg(long)]
    control: bool,
    /// What a side writes with its --event-log, where it can be read from here: a failover is then shown
    /// with all its steps. May be given several times
    #[arg(long, value_name = "FILE")]
    event_log: Vec<PathBuf>,
    /// How often the sides are asked while somebody looks, 100ms to 60s
    #[arg(long, value_name = "TIME", default_value = "500ms")]
    interval: IntervalOption,
}

/// Serves the page until it is ended.
pub fn dashboard(options: &DashboardOptions) -> Result<ExitCode> {
    let sides = options.sides.clone();
    let hands = options.control.then(|| Arc::new(ByApi(sides.clone())) as Arc<dyn Hands>);
    let shown = Shown {
        sides,
        names: Vec::new(),
        event_logs: options.event_log.clone(),
        interval: options.interval.0,
        hands,
        console: None,
    };
    let dashboard = Dashboard::listen(&options.listen, shown)?;
    let address = dashboard.address()?;
    if !address.ip().is_loopback() {
        let may = if options.control { "and, with its key, stop the guest" } else { "and no more" };
        tell!("{address} is insecure: whoever reaches it can see the page, {may}");
    }
    say(dashboard.url())?;
    dashboard.serve()?;
    Ok(ExitCode::SUCCESS)
}
