//! A disk on a server: a side's end of it, and of the arbiter that goes with it.

use crate::disk_images::DisksOf;
use crate::options::NbdExport;
use anyhow::{Context, Result, anyhow, bail};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use vmft_backup::arbiter::{Answer, Call, RemoteArbiter, RemoteError};
use vmft_backup::tell;
use vmft_logging_channel::transport::PeerAddress;
use vmft_nbd::rustls::ClientConfig;
use vmft_nbd::rustls::pki_types::ServerName;
use vmft_nbd::wire::{ENOSPC, EPERM, MAX_DATA, READ_ONLY};
use vmft_nbd::{
    ByteStream, CallError, Client, ClientError, Connect, Control, Event, NegotiationError, Request,
};
use vmft_vmm::world::{DiskFile, DiskFileError, HostCache, Permit, Storage, WriteError};

/// How long a call to the server may take before it counts as away.
const CALL_LIMIT: Duration = Duration::from_secs(5);

/// How a server is reached.
#[derive(Debug, Clone)]
struct Server(PeerAddress);

impl Connect for Server {
    async fn connect(&self) -> io::Result<Box<dyn ByteStream>> {
        Ok(Box::new(self.0.open_stream().await.map_err(io::Error::other)?))
    }

    fn tls(&self) -> io::Result<Option<(Arc<ClientConfig>, ServerName<'static>)>> {
        self.0.client_identity().map_err(io::Error::other)
    }
}

fn control(export: &NbdExport) -> Result<Control> {
    // Before anything is sent.
    export.address.check()?;
    let started = Control::start(Server(export.address.clone()), CALL_LIMIT);
    started.with_context(|| format!("starting the thread that speaks to {export}"))
}

/// Takes the arbiter of an export for a new pair.
///
/// # Errors
/// There is none, or another pair has it.
pub fn create_arbiter(export: &NbdExport) -> Result<RemoteArbiter> {
    let created = RemoteArbiter::create(control(export)?, export.to_string(), &export.name);
    created.map_err(|error: RemoteError| error.into())
}

/// Opens the arbiter of an export for a side that joins.
///
/// # Errors
/// There is none, or no pair has it.
pub fn open_arbiter(export: &NbdExport) -> Result<RemoteArbiter> {
    let opened = RemoteArbiter::open(control(export)?, export.to_string(), &export.name);
    opened.map_err(|error: RemoteError| error.into())
}

/// A disk of a server, as storage.
#[derive(Debug)]
struct NbdStorage {
    export: NbdExport,
    client: Client,
    control: Control,
    identity: Option<String>,
}

/// Opens a disk of a server. A side of a pair uses none but what `vmft disk serve` serves, which
/// knows generations.
///
/// # Errors
/// What keeps it from being used, before anything on it is changed.
pub fn open(export: &NbdExport, read_only: bool, of: DisksOf) -> Result<DiskFile> {
    let control = control(export)?;
    let name = export.to_string();
    let told = name.clone();
    let on_event = move |event| match event {
        Event::Lost(error) => {
            tell!("disk {told}: the server is away ({error}); what the guest asks of it waits");
        }
        Event::Back => tell!("disk {told}: the server is back"),
    };
    let server = Server(export.address.clone());
    let client = Client::open(server, &export.name, Call::Life.encode(), on_event)
        .map_err(|error| anyhow!("disk {name}: {error}; {}", remedy(&error)))?;
    let identity = ask(&control, &Call::DiskIdentity { export: export.name.clone() })
        .with_context(|| format!("disk {name}"))?;
    let identity = match identity {
        Some(Answer::Text(text)) => Some(text),
        _ => None,
    };
    if of != DisksOf::Alone && identity.is_none() && !read_only {
        bail!(
            "disk {name} is served by something that knows no generations, so that a side which was thought \
             dead could go on writing to it; serve it with `vmft disk serve`"
        );
    }
    let told = client.export();
    if of == DisksOf::Alone && !read_only && told.flags & READ_ONLY != 0 {
        bail!(
            "disk {name} cannot be written by this machine: its server serves it readonly=on, or it belongs to a \
             pair, whose sides are `vmft primary` and `vmft backup`; readonly=on here does without writing"
        );
    }
    let storage = NbdStorage { export: export.clone(), client, control, identity };
    DiskFile::on(PathBuf::from(&name), Arc::new(storage), told.size, read_only, of.is_new())
        .map_err(|error| match error {
            DiskFileError::Open { source, .. } => anyhow!("disk {name}: {source}"),
            other => other.into(),
        })
}

fn remedy(error: &NegotiationError) -> &'static str {
    match error {
        NegotiationError::Io(_) => "is a server there? --disk nbd= takes [tls:]HOST:PORT/NAME",
        NegotiationError::NoTls => {
            "for a server on this host without TLS, write nbd=tcp:HOST:PORT/NAME"
        }
        NegotiationError::TlsRequired => {
            "write nbd=tls:HOST:PORT/NAME, with certificates of `vmft keys`"
        }
        NegotiationError::Unknown => {
            "`vmft disk serve` names what it serves with --export NAME=FILE"
        }
        _ => {
            "--disk nbd= takes an export of `vmft disk serve`, or, for one machine alone, of another server"
        }
    }
}

/// `None` from a server that does not know such calls.
fn ask(control: &Control, call: &Call) -> io::Result<Option<Answer>> {
    match control.call(call.encode()) {
        Ok(answer) => Answer::decode(&answer).map(Some).map_err(io::Error::other),
        Err(CallError::Negotiation(NegotiationError::Unsupported)) => Ok(None),
        Err(CallError::Unreachable(error)) => Err(error),
        Err(error) => Err(io::Error::other(error)),
    }
}

/// A server's error with its kind, as far as anything depends on that.
fn io_error(error: ClientError) -> io::Error {
    let kind = match error {
        ClientError::Server(ENOSPC) => io::ErrorKind::StorageFull,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}

impl NbdStorage {
    /// The call that a connection begins with which writes in a generation.
    fn binding(&self, permit: Permit) -> Option<Vec<u8>> {
        let export = self.export.name.clone();
        permit.0.map(|generation| Call::Write { export, generation }.encode())
    }
}

impl Storage for NbdStorage {
    fn unit(&self) -> u64 {
        u64::from(self.client.export().block.max(1))
    }

    fn cache(&self) -> HostCache {
        HostCache::None
    }

    fn identity(&self) -> Option<String> {
        self.identity.clone()
    }

    fn join(&self, first: bool) -> io::Result<bool> {
        let call = |first| Call::JoinDisk { export: self.export.name.clone(), first };
        match ask(&self.control, &call(first))? {
            Some(Answer::Flag(joined)) => {
                if joined {
                    self.control.stand(call(false).encode());
                }
                Ok(joined)
            }
            // A server that does not know who else has it.
            None => Ok(true),
            Some(_) => Err(io::Error::other("the server does not say whether it is shared")),
        }
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let mut at = offset;
        for piece in data.chunks_mut(MAX_DATA as usize) {
            let len = u32::try_from(piece.len()).expect("at most MAX_DATA");
            let read = self.client.request(None, Request::Read { offset: at, len });
            piece.copy_from_slice(&read.map_err(io_error)?);
            at += u64::from(len);
        }
        Ok(())
    }

    fn write(&self, permit: Permit, offset: u64, data: &[u8]) -> Result<(), WriteError> {
        let binding = self.binding(permit);
        let mut at = offset;
        for piece in data.chunks(MAX_DATA as usize) {
            let write = Request::Write { offset: at, data: piece.into() };
            match self.client.request(binding.as_deref(), write) {
                Ok(_) => at += piece.len() as u64,
                Err(ClientError::Refused(_) | ClientError::Server(EPERM)) if permit.0.is_some() => {
                    return Err(WriteError::Fenced);
                }
                Err(error) => return Err(WriteError::Io(io_error(error))),
            }
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.client.request(None, Request::Flush).map(|_| ()).map_err(io_error)
    }

    fn repeats_flush(&self, error: &io::Error) -> bool {
        // What a server has lost that began anew, its next flush knows nothing of.
        let reason = error.get_ref().and_then(|reason| reason.downcast_ref());
        !matches!(reason, Some(ClientError::Lost))
    }

    fn fences(&self) -> bool {
        self.identity.is_some()
    }
}
