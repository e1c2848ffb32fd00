//! `vmft disk serve`.

use crate::disk_server::{ExportConfig, ServedDisk, Service, serve};
use crate::options::{OptionError, Pairs, is_export_name, parse_cache, parse_switch};
use crate::pair_options::taken;
use crate::sandbox_options::{NamesFiles, SandboxOptions, files_of};
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use vmft_backup::arbiter::DirectoryArbiter;
use vmft_backup::tell;
use vmft_logging_channel::transport::{Listener, PeerAddress};
use vmft_sandbox::{Files, Use};
use vmft_vmm::world::HostCache;

/// Options of `vmft disk`.
#[derive(Debug, Args)]
pub struct DiskOptions {
    #[command(subcommand)]
    command: DiskCommand,
}

#[derive(Debug, Subcommand)]
enum DiskCommand {
    /// Serve disks to pairs, each with its arbiter, by the NBD protocol
    #[command(after_help = crate::examples::DISK_SERVE)]
    Serve(ServeOptions),
}

/// Options of `vmft disk serve`.
#[derive(Debug, Args)]
struct ServeOptions {
    /// A raw image that clients know as NAME; may be given several times. The arbiter of its pair
    /// is a directory, by default the image's path with `.vmft` added. With cache=writeback, what a
    /// guest has not flushed is lost when this host loses its power
    #[arg(
        long,
        required = true,
        value_name = "NAME=FILE[,readonly=on|off][,arbiter=DIR][,cache=none|writeback]"
    )]
    export: Vec<ExportOption>,
    /// Where to listen: with tls: both ends show certificates (see `vmft keys`); without, only on this host
    #[arg(long, value_name = "tls:HOST:PORT[,tls_dir=DIR]")]
    listen: PeerAddress,
    /// Listen on addresses of other hosts without TLS: whoever reaches them can read and change the disks
    #[arg(long)]
    insecure: bool,
    #[command(flatten)]
    sandbox: SandboxOptions,
}

/// `--export NAME=FILE`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ExportOption {
    name: String,
    path: PathBuf,
    read_only: bool,
    arbiter: Option<PathBuf>,
    cache: HostCache,
}

impl FromStr for ExportOption {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let error = || OptionError::Served(text.to_owned());
        let (name, rest) = text.split_once('=').ok_or_else(error)?;
        let (path, options) = match rest.split_once(',') {
            Some((path, options)) => (path, Some(options)),
            None => (rest, None),
        };
        if !is_export_name(name) || path.is_empty() {
            return Err(error());
        }
        let known = ["readonly", "arbiter", "cache"];
        let pairs = options.map(|options| Pairs::parse(options, &known)).transpose()?;
        let get = |key| pairs.as_ref().and_then(|pairs| pairs.get(key));
        Ok(Self {
            name: name.to_owned(),
            path: path.into(),
            read_only: get("readonly").map_or(Ok(false), parse_switch)?,
            arbiter: get("arbiter").map(PathBuf::from),
            cache: get("cache").map_or(Ok(HostCache::None), parse_cache)?,
        })
    }
}

impl ExportOption {
    fn config(&self) -> Result<ExportConfig> {
        let is_device = self.path.metadata().is_ok_and(|data| data.file_type().is_block_device());
        let arbiter = match &self.arbiter {
            Some(arbiter) => arbiter.clone(),
            None if is_device => bail!(
                "{} is a device, beside which nothing lasts: say where the arbiter of its pair is, with \
                 --export {}={},arbiter=DIR",
                self.path.display(),
                self.name,
                self.path.display()
            ),
            None => DirectoryArbiter::beside(&self.path),
        };
        Ok(ExportConfig {
            name: self.name.clone(),
            path: self.path.clone(),
            arbiter,
            read_only: self.read_only,
            cache: self.cache,
        })
    }
}

impl NamesFiles for Vec<ExportConfig> {
    fn name_files(&self, files: &mut Files) {
        for export in self {
            files.add(&export.path, if export.read_only { Use::Read } else { Use::Write });
            files.add(&export.arbiter, Use::Directory);
        }
    }
}

/// `vmft disk`.
pub fn disk(options: &DiskOptions) -> Result<ExitCode> {
    match &options.command {
        DiskCommand::Serve(options) => serve_disks(options),
    }
}

fn serve_disks(options: &ServeOptions) -> Result<ExitCode> {
    let exports = options.export.iter().map(ExportOption::config).collect::<Result<Vec<_>>>()?;
    for (index, export) in exports.iter().enumerate() {
        if exports[..index].iter().any(|other| other.name == export.name) {
            bail!("two exports are called {}; give each a name of its own", export.name);
        }
    }
    options.sandbox.enter(files_of(&[&exports, &options.listen]))?;
    // Before anybody can connect, and so before anybody can have taken it for ready.
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let mut stop = Some(stop);
    ctrlc::set_handler(move || drop(stop.take()))?;
    let address = PeerAddress { insecure: options.insecure, ..options.listen.clone() };
    address.check()?;
    if address.is_exposed() {
        tell!("{address} is insecure: whoever reaches it can read and change the disks");
    }
    let disks = exports.into_iter().map(ServedDisk::open).collect::<Result<Vec<_>>>()?;
    let listener = taken(Listener::reserve(&address))?;
    for disk in &disks {
        let (config, size) = (disk.config(), disk.size());
        let path = config.path.display();
        tell!("serving {} ({path}, {size} bytes) at {}", config.name, listener.local_address());
    }
    let stopped = async move {
        // It ends when the other end is dropped.
        let _ = stopped.await;
    };
    let served = serve(Service { disks, listener }, stopped);
    served.context("serving the disks")?;
    tell!("stopped; everything that was written is on the disks");
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_has_a_name_and_a_file() {
        let parse = |text: &str| text.parse::<ExportOption>();
        let web = ExportOption {
            name: "web".into(),
            path: "/disks/web.img".into(),
            read_only: false,
            arbiter: None,
            cache: HostCache::None,
        };
        assert_eq!(parse("web=/disks/web.img"), Ok(web.clone()));
        let all = ExportOption {
            read_only: true,
            arbiter: Some("/a".into()),
            cache: HostCache::WriteBack,
            ..web
        };
        let text = "web=/disks/web.img,readonly=on,arbiter=/a,cache=writeback";
        assert_eq!(parse(text), Ok(all));
        for wrong in
            ["web", "=a", "web=", "a b=c", "a/b=c", "-a=b", "web=a,size=1", "web=a,readonly=1"]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
