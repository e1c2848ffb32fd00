//! Asking a running side over its API socket.

use crate::remedy::Remedy;
use anyhow::{Context, Result, bail, ensure};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use std::path::Path;
use std::time::Duration;
use tokio::net::UnixStream;
use vmft_backup::bounds::BoundChange;
use vmft_backup::fault::{FaultOrder, Planted};
use vmft_backup::status::SideStatus;
use vmft_log::foreign::ForeignText;

/// How long a side may take to answer. A fault waits for a point, a snapshot writes gigabytes.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);
const FAULT_TIMEOUT: Duration = Duration::from_secs(30);
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(300);

/// Largest answer taken, in bytes.
const ANSWER_LIMIT: usize = 1 << 20;

/// The status of the side at `socket`.
pub fn status(socket: &Path) -> Result<SideStatus> {
    let answer = ask(socket, Method::GET, "/api/v1/vm.info", Vec::new(), STATUS_TIMEOUT)?;
    serde_json::from_slice(&answer).context("the side's answer is no status")
}

/// The same, for whoever asks again and again and knows why: an error says only what is wrong.
pub(crate) fn look(socket: &Path) -> Result<SideStatus> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(look_from_runtime(socket))
}

/// As [`look`], for whoever has a runtime.
pub(crate) async fn look_from_runtime(socket: &Path) -> Result<SideStatus> {
    // The memory map is not looked at, which costs a side some milliseconds.
    let path = "/api/v1/vm.info?overhead=off";
    let (status, body) = converse(socket, Method::GET, path, Vec::new(), STATUS_TIMEOUT).await?;
    ensure!(status == StatusCode::OK, "the side answers {status}");
    serde_json::from_slice(&body).context("the side's answer is no status")
}

/// The metrics of the side at `socket`.
pub fn metrics(socket: &Path) -> Result<String> {
    let answer = ask(socket, Method::GET, "/metrics", Vec::new(), STATUS_TIMEOUT)?;
    String::from_utf8(answer).context("the side's answer is no text")
}

/// Stops the guest of the side at `socket`, and its pair.
pub fn shutdown(socket: &Path) -> Result<()> {
    ask(socket, Method::PUT, "/api/v1/vm.shutdown", Vec::new(), STATUS_TIMEOUT).map(|_| ())
}

/// Has the side at `socket` write a snapshot.
pub fn snapshot(socket: &Path, directory: &Path) -> Result<()> {
    let directory = std::path::absolute(directory)?;
    let body = serde_json::to_vec(&crate::api::SnapshotRequest { directory })?;
    ask(socket, Method::PUT, "/api/v1/vm.snapshot", body, SNAPSHOT_TIMEOUT).map(|_| ())
}

/// Has the guest of the side at `socket` stand still: it does when this returns.
pub fn pause(socket: &Path) -> Result<()> {
    ask(socket, Method::PUT, "/api/v1/vm.pause", Vec::new(), FAULT_TIMEOUT).map(|_| ())
}

/// Has the guest of the side at `socket` go on, and what its disks have failed at tried again.
pub fn resume(socket: &Path) -> Result<()> {
    ask(socket, Method::PUT, "/api/v1/vm.resume", Vec::new(), FAULT_TIMEOUT).map(|_| ())
}

/// Has the side at `socket` hand its guest over to a backup.
pub fn switch(socket: &Path) -> Result<()> {
    ask(socket, Method::PUT, "/api/v1/vm.switch", Vec::new(), FAULT_TIMEOUT).map(|_| ())
}

/// Changes how far a backup of the side at `socket` may be behind.
pub fn change_bound(socket: &Path, change: BoundChange) -> Result<()> {
    let body = serde_json::to_vec(&change)?;
    ask(socket, Method::PUT, "/api/v1/vm.bounds", body, STATUS_TIMEOUT).map(|_| ())
}

/// Plants a fault on the side at `socket`.
pub fn fault(socket: &Path, order: FaultOrder) -> Result<Planted> {
    let body = serde_json::to_vec(&order)?;
    let answer = ask(socket, Method::PUT, "/api/v1/vm.fault", body, FAULT_TIMEOUT)?;
    serde_json::from_slice(&answer).context("the side's answer names no point")
}

fn ask(
    socket: &Path,
    method: Method,
    path: &str,
    body: Vec<u8>,
    timeout: Duration,
) -> Result<Vec<u8>> {
    let (status, body) = exchange(socket, method, path, body, timeout)
        .with_context(|| format!("asking the side at {}", socket.display()))
        .remedy(|| "is a side running with --api-socket and this path?")?;
    if status != StatusCode::OK && status != StatusCode::NO_CONTENT {
        bail!("{}", ForeignText::from(String::from_utf8_lossy(&body).into_owned()));
    }
    Ok(body)
}

fn exchange(
    socket: &Path,
    method: Method,
    path: &str,
    body: Vec<u8>,
    timeout: Duration,
) -> Result<(StatusCode, Vec<u8>)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(converse(socket, method, path, body, timeout))
}

async fn converse(
    socket: &Path,
    method: Method,
    path: &str,
    body: Vec<u8>,
    timeout: Duration,
) -> Result<(StatusCode, Vec<u8>)> {
    let exchange = async {
        let stream = UnixStream::connect(socket).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("content-type", "application/json")
            .body(Full::<Bytes>::from(body))?;
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        let body = http_body_util::Limited::new(answer.into_body(), ANSWER_LIMIT);
        let body = body.collect().await.map_err(anyhow::Error::from_boxed)?.to_bytes().to_vec();
        anyhow::Ok((status, body))
    };
    tokio::time::timeout(timeout, exchange)
        .await
        .context("the side does not answer")
        .and_then(|answer| answer)
}
