//! `vmft keys` and `vmft tls-init`.

use crate::remedy::Remedy;
use crate::terminal::say;
use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use vmft_logging_channel::transport::{DEFAULT_DAYS, KeyStore, MAX_DAYS, SideName, TLS_SIDES};

/// Options of `vmft keys`.
#[derive(Debug, Args)]
pub struct KeysOptions {
    /// The directory of the authority and of its sides. Keep it where the sides' hosts cannot read it
    #[arg(long, value_name = "DIR", default_value = "vmft-keys", global = true)]
    dir: PathBuf,
    #[command(subcommand)]
    command: KeysCommand,
}

#[derive(Debug, Subcommand)]
enum KeysCommand {
    /// Make a key and a certificate for each new side; the authority, too, if there is none
    Add {
        /// Names of sides, for instance of their hosts
        #[arg(value_name = "SIDE", required = true)]
        sides: Vec<SideName>,
        #[command(flatten)]
        validity: Validity,
    },
    /// Certify sides again, from today; their keys stay
    Renew {
        /// Names of sides; all that are not revoked, if none is given
        #[arg(value_name = "SIDE")]
        sides: Vec<SideName>,
        #[command(flatten)]
        validity: Validity,
    },
    /// Trust a side no more
    Revoke {
        /// Its name
        #[arg(value_name = "SIDE")]
        side: SideName,
    },
    /// Show the sides, and until when their certificates are valid
    List,
}

#[derive(Debug, Args)]
struct Validity {
    /// How long the certificates are valid, in days
    #[arg(long, value_name = "N", default_value_t = DEFAULT_DAYS,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_DAYS)))]
    days: u32,
}

/// Options of `vmft tls-init`.
#[derive(Debug, Args)]
pub struct TlsInitOptions {
    /// The new directory; the sides primary and backup get a directory each in it
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Makes, renews, revokes and lists certificates.
pub fn keys(options: &KeysOptions) -> Result<ExitCode> {
    let dir = &options.dir;
    match &options.command {
        KeysCommand::Add { sides, validity } => add(dir, sides, validity.days)?,
        KeysCommand::Renew { sides, validity } => renew(dir, sides, validity.days)?,
        KeysCommand::Revoke { side } => {
            open(dir)?.revoke(side)?;
            say(&format!(
                "{side} is revoked: copy revoked.pem to the tls_dir of every other side. It counts from \
                 the next connection on; a side that follows now is stopped with `vmft stop`"
            ))?;
        }
        KeysCommand::List => {
            for issued in open(dir)?.sides() {
                let state = match issued.revoked {
                    Some(date) => format!("revoked on {date}"),
                    None => format!("valid until {}", issued.expires),
                };
                say(&format!("{:<20} {state}", issued.side.to_string()))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn open(dir: &Path) -> Result<KeyStore> {
    KeyStore::open(dir).remedy(|| "--dir names a directory that `vmft keys add` has made")
}

fn add(dir: &Path, sides: &[SideName], days: u32) -> Result<()> {
    let mut store = KeyStore::open_or_create(dir)
        .remedy(|| "name a directory with --dir in a place where this user may write")?;
    for side in sides {
        say(&store.add(side, days)?.display().to_string())?;
    }
    say(
        "copy each to its host as ~/.config/vmft/tls, or name it with tls_dir=; keep key.pem secret",
    )?;
    Ok(())
}

fn renew(dir: &Path, sides: &[SideName], days: u32) -> Result<()> {
    let mut store = open(dir)?;
    let living = || {
        let living = store.sides().into_iter().filter(|issued| issued.revoked.is_none());
        living.map(|issued| issued.side.clone()).collect()
    };
    let sides: Vec<SideName> = if sides.is_empty() { living() } else { sides.to_vec() };
    if sides.is_empty() {
        bail!("there is no side to renew in {}", dir.display());
    }
    for side in &sides {
        say(&store.renew(side, days)?.display().to_string())?;
    }
    say("copy each to the tls_dir of its side, which reads it with its next connection")?;
    Ok(())
}

/// As `vmft keys --dir DIR add primary backup`.
pub fn tls_init(options: &TlsInitOptions) -> Result<ExitCode> {
    let sides = TLS_SIDES.map(|side| side.parse().expect("a good name"));
    add(&options.directory, &sides, DEFAULT_DAYS)?;
    Ok(ExitCode::SUCCESS)
}
