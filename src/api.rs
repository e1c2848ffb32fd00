//! The API socket: HTTP on a Unix socket, as in Cloud Hypervisor. Only its owner may connect: whoever
//! may ask can stop the guest and have its memory written to a file.
//!
//! | request | what |
//! |---|---|
//! | `GET /api/v1/vm.info` | the side's status as JSON; with `?overhead=off` without its `overhead_bytes`, which cost more than all the rest |
//! | `GET /metrics` | the same for Prometheus, as text |
//! | `PUT /api/v1/vm.shutdown` | stops the guest and its pair, cleanly |
//! | `PUT /api/v1/vm.snapshot` | body `{"directory": PATH}`: writes a snapshot |
//! | `PUT /api/v1/vm.switch` | hands the guest over to a backup |
//! | `PUT /api/v1/vm.pause` | the guest stands still |
//! | `PUT /api/v1/vm.resume` | it goes on; what disks have failed at is tried again |
//! | `PUT /api/v1/vm.bounds` | body `{"max-lag": {"ms": N, "then": "slow"}}` or `{"interval": {"ms": N}}`: how far a backup may be behind from now on |
//! | `PUT /api/v1/vm.fault` | body `{"fault": {"flip-bit": {"address": N, "bit": N}}, "live": BOOL}`, `{"hold-replay": {"ms": N}}` or `"fail"`: plants a fault at the next point, and answers `{"point": N}` |

use crate::metrics;
use crate::remedy::Remedy;
use anyhow::{Context, Result, bail};
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, HeaderName};
use axum::routing::{get, put};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::Notify;
use vmft_backup::bounds::{BoundChange, Bounds};
use vmft_backup::fault::{FaultDesk, FaultOrder, Faults, Planted};
use vmft_backup::hand_over::HandOverError;
use vmft_backup::requests::Requests;
use vmft_backup::status::{Role, SideStatus, StatusBoard};
use vmft_log::entry::StopReason;
use vmft_sandbox::Task;
use vmft_sandbox::bind_private_socket;
use vmft_vmm::inputs::Asked;
use vmft_vmm::world::{DiskDesk, Mailbox};

/// What the API can ask.
#[derive(Debug, Clone)]
pub struct Api {
    /// The side's status.
    pub status: Arc<StatusBoard>,
    /// Where a stop goes.
    pub mailbox: Arc<Mailbox>,
    /// Where a snapshot request goes.
    pub requests: Arc<Requests>,
    /// Where a fault goes.
    pub faults: Arc<Faults>,
    /// How far a backup may be behind.
    pub bounds: Arc<Bounds>,
    /// Where a guest is resumed that stands still because of a disk.
    pub disk_desk: Arc<DiskDesk>,
    /// What to do beside asking the machine to stop.
    pub on_shutdown: Arc<dyn ShutdownHook>,
}

/// Ends a side that has no running machine to ask, such as one that waits for its peer.
pub trait ShutdownHook: std::fmt::Debug + Send + Sync {
    /// The operator asked for a stop.
    fn shutdown(&self);
}

/// Body of `vm.snapshot`.
#[derive(Debug, Serialize, Deserialize)]
pub struct SnapshotRequest {
    /// The new directory.
    pub directory: PathBuf,
}

/// The thread that answers.
#[derive(Debug)]
pub struct Server {
    /// Nobody else is to be let in.
    end: Arc<Notify>,
    /// Closed once everybody who was let in has an answer.
    answered: Mutex<Receiver<Infallible>>,
}

impl Server {
    /// Lets nobody else in, and waits until everybody who was has an answer, for at most `limit`: before a
    /// process ends, which may be what was asked for.
    pub fn finish(&self, limit: Duration) {
        self.end.notify_one();
        let answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        let _: Result<Infallible, RecvTimeoutError> = answered.recv_timeout(limit);
    }
}

/// Serves the API on a thread of its own until [`Server::finish`], or the process ends.
pub fn serve(path: &Path, api: Api) -> Result<Server> {
    let listener = match bind_private_socket(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => bail!(
            "API socket {} is in use by another process; stop that one, or name another",
            path.display()
        ),
        other => other
            .with_context(|| format!("listening on API socket {}", path.display()))
            .remedy(|| "--api-socket takes a path for a new socket")?,
    };
    listener.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let router = Router::new()
        .route("/api/v1/vm.info", get(info))
        .route("/metrics", get(metrics_text))
        .route("/api/v1/vm.shutdown", put(shutdown))
        .route("/api/v1/vm.snapshot", put(snapshot))
        .route("/api/v1/vm.switch", put(switch))
        .route("/api/v1/vm.pause", put(pause))
        .route("/api/v1/vm.resume", put(resume))
        .route("/api/v1/vm.bounds", put(bounds))
        .route("/api/v1/vm.fault", put(fault))
        .with_state(api);
    let end = Arc::new(Notify::new());
    let (is_answering, answered) = channel();
    let ending = Arc::clone(&end);
    let serve = move || {
        runtime.block_on(async move {
            let served = match UnixListener::from_std(listener) {
                Ok(listener) => {
                    let ending = async move { ending.notified().await };
                    axum::serve(listener, router).with_graceful_shutdown(ending).await
                }
                Err(error) => Err(error),
            };
            if let Err(error) = served {
                tracing::error!(%error, "the API is gone");
            }
        });
        // Before the runtime is dropped, which waits for its threads.
        drop(is_answering);
        drop(runtime);
    };
    vmft_sandbox::spawn(Task::Api, "api", serve)?;
    Ok(Server { end, answered: Mutex::new(answered) })
}

/// The status, with what takes a look at the whole process.
fn status_of(api: &Api) -> SideStatus {
    let mut status = api.status.status();
    status.overhead_bytes = crate::process::overhead_bytes(&api.status.guest_memory());
    status
}

async fn info(State(api): State<Api>, RawQuery(query): RawQuery) -> Json<SideStatus> {
    Json(match query.as_deref() {
        Some("overhead=off") => api.status.status(),
        _ => status_of(&api),
    })
}

async fn metrics_text(State(api): State<Api>) -> ([(HeaderName, &'static str); 1], String) {
    ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics::render(&status_of(&api)))
}

async fn shutdown(State(api): State<Api>) -> StatusCode {
    api.mailbox.ask(Asked::Stop(StopReason::Operator));
    api.on_shutdown.shutdown();
    StatusCode::NO_CONTENT
}

/// What a side says that follows, or is about to.
const NOT_THE_GUEST: &str = "this side does not run the guest; ask the one that does";

/// Why a side whose role this is writes no snapshot; `None` if it may.
fn no_snapshot(role: Role, faults: &Faults) -> Option<&'static str> {
    match role {
        Role::Starting | Role::Joining | Role::Backup => Some(NOT_THE_GUEST),
        Role::Deciding if faults.has_replay() => Some(
            "the primary is lost, and this side is about to take over; ask again once it is live",
        ),
        // A live side that has lost its backup runs the guest, and its snapshot is the guest's.
        Role::Deciding
        | Role::Unprotected
        | Role::WaitingForBackup
        | Role::Primary
        | Role::Alone
        | Role::Halted
        | Role::Stopped => None,
    }
}

async fn snapshot(
    State(api): State<Api>,
    Json(request): Json<SnapshotRequest>,
) -> Result<StatusCode, (StatusCode, String)> {
    if let Some(why) = no_snapshot(api.status.status().role, &api.faults) {
        return Err((StatusCode::CONFLICT, why.to_owned()));
    }
    let result = api.requests.snapshot(request.directory, &api.mailbox);
    let waited = tokio::task::spawn_blocking(move || result.recv()).await;
    match waited {
        Ok(Ok(Ok(()))) => Ok(StatusCode::NO_CONTENT),
        Ok(Ok(Err(error))) => {
            Err((StatusCode::CONFLICT, format!("{:#}", anyhow::Error::from(error))))
        }
        _ => Err((StatusCode::GONE, "the guest is over".to_owned())),
    }
}

/// Why a side whose role this is hands no guest over; `None` if it may.
fn no_switch(role: Role) -> Option<String> {
    match role {
        Role::Primary => None,
        Role::Starting | Role::Joining | Role::Backup => Some(NOT_THE_GUEST.to_owned()),
        Role::Unprotected
        | Role::WaitingForBackup
        | Role::Deciding
        | Role::Alone
        | Role::Halted
        | Role::Stopped => Some(HandOverError::Nobody.to_string()),
    }
}

/// How often a guest that is between two points is asked again, and after how long.
const SWITCH_TRIES: u32 = 200;
const SWITCH_WAIT: Duration = Duration::from_millis(10);

async fn switch(State(api): State<Api>) -> Result<StatusCode, (StatusCode, String)> {
    if let Some(why) = no_switch(api.status.status().role) {
        return Err((StatusCode::CONFLICT, why));
    }
    let Api { mailbox, requests, .. } = api;
    let ask = move || {
        for _ in 1..SWITCH_TRIES {
            match requests.hand_over(&mailbox).recv() {
                Ok(Err(HandOverError::NotNow)) => std::thread::sleep(SWITCH_WAIT),
                other => return other,
            }
        }
        requests.hand_over(&mailbox).recv()
    };
    match tokio::task::spawn_blocking(ask).await {
        Ok(Ok(Ok(()))) => Ok(StatusCode::NO_CONTENT),
        Ok(Ok(Err(error))) => Err((StatusCode::CONFLICT, error.to_string())),
        _ => Err((StatusCode::GONE, "this side does not run the guest".to_owned())),
    }
}

/// Why a side whose role this is has no guest to pause; `None` if it has one.
fn no_pause(role: Role) -> Option<&'static str> {
    match role {
        Role::Starting | Role::Joining | Role::Backup => Some(NOT_THE_GUEST),
        Role::WaitingForBackup => Some("the guest has not begun: this side waits for its backup"),
        Role::Halted | Role::Stopped => Some("the guest is over"),
        Role::Unprotected | Role::Primary | Role::Deciding | Role::Alone => None,
    }
}

async fn pause(State(api): State<Api>) -> Result<StatusCode, (StatusCode, String)> {
    if let Some(why) = no_pause(api.status.status().role) {
        return Err((StatusCode::CONFLICT, why.to_owned()));
    }
    let stands = api.requests.pause(&api.mailbox);
    match tokio::task::spawn_blocking(move || stands.recv()).await {
        Ok(Ok(())) => Ok(StatusCode::NO_CONTENT),
        _ => Err((StatusCode::GONE, "the guest is over".to_owned())),
    }
}

async fn resume(State(api): State<Api>) -> Result<StatusCode, (StatusCode, String)> {
    let tried_again = api.disk_desk.resume();
    // The machine's thread waits for something to be asked: this is, too.
    let goes_on = api.requests.resume(&api.mailbox);
    if tried_again == 0 && goes_on.is_none() {
        let why = match api.status.status().role {
            Role::Starting | Role::Joining | Role::Backup => NOT_THE_GUEST,
            _ => {
                "the guest is not paused, and no disk of this side has failed at anything, so nothing is \
                 to be resumed"
            }
        };
        return Err((StatusCode::CONFLICT, why.to_owned()));
    }
    let wait = move || goes_on.map_or(Ok(()), |goes_on| goes_on.recv());
    match tokio::task::spawn_blocking(wait).await {
        Ok(Ok(())) => Ok(StatusCode::NO_CONTENT),
        _ => Err((StatusCode::GONE, "the guest is over".to_owned())),
    }
}

async fn bounds(
    State(api): State<Api>,
    Json(change): Json<BoundChange>,
) -> Result<StatusCode, (StatusCode, String)> {
    match api.bounds.change(change, &api.status) {
        Ok(()) => Ok(StatusCode::NO_CONTENT),
        Err(error) => Err((StatusCode::CONFLICT, error.to_string())),
    }
}

async fn fault(
    State(api): State<Api>,
    Json(order): Json<FaultOrder>,
) -> Result<Json<Planted>, (StatusCode, String)> {
    let Api { status, mailbox, requests, faults, .. } = api;
    let desk = FaultDesk { faults, requests, mailbox, status };
    match tokio::task::spawn_blocking(move || desk.plant(order)).await {
        Ok(Ok(planted)) => Ok(Json(planted)),
        Ok(Err(error)) => Err((StatusCode::CONFLICT, error.to_string())),
        Err(_) => Err((StatusCode::GONE, "the guest is over".to_owned())),
    }
}
