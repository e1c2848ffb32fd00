//! `vmft guest`.

use crate::terminal::say;
use anyhow::Result;
use clap::Args;
use std::process::ExitCode;
use vmft_guest_images::{Cache, default_guest, refresh_default_guest};

/// Options of `vmft guest`.
#[derive(Debug, Args)]
pub struct GuestOptions {
    /// Ask the package manager for newer versions
    #[arg(long)]
    refresh: bool,
}

/// Fetches or builds the default guest.
pub fn guest(options: &GuestOptions) -> Result<ExitCode> {
    let cache = Cache::from_environment()?;
    let mut progress = crate::progress::terminal();
    let guest = if options.refresh {
        refresh_default_guest(&cache, &mut progress)?
    } else {
        default_guest(&cache, &mut progress)?
    };
    drop(progress);
    say(&format!("kernel     {}", guest.kernel.display()))?;
    say(&format!("initramfs  {}", guest.initramfs.display()))?;
    Ok(ExitCode::SUCCESS)
}
