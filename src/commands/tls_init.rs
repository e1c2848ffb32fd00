//! `vmft tls-init`.

use crate::remedy::Remedy;
use crate::terminal::say;
use anyhow::Result;
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;
use vmft_logging_channel::transport::{TLS_SIDES, create_tls_directories};

/// Options of `vmft tls-init`.
#[derive(Debug, Args)]
pub struct TlsInitOptions {
    /// The new directory; each side gets a directory in it
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Makes certificates for a pair.
pub fn tls_init(options: &TlsInitOptions) -> Result<ExitCode> {
    create_tls_directories(&options.directory)
        .remedy(|| "name a new directory in a place where this user may write")?;
    for side in TLS_SIDES {
        say(&options.directory.join(side).display().to_string())?;
    }
    say("copy each to its host, keep key.pem secret, and name it with tls_dir=")?;
    Ok(ExitCode::SUCCESS)
}
