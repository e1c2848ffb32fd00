//! The page's server: the page itself, what it shows as it changes, and what its buttons ask for.
//!
//! | request | what |
//! |---|---|
//! | `GET /` | the page, whole: no other file, no other host |
//! | `GET /pictures` | a [`super::model::Picture`] as JSON whenever there is a new one (server-sent events) |
//! | `POST /act` | body `{"side": N, "act": "switch"}`: a button |
//!
//! A reader that is slow is sent the newest picture when it can take one, and none in between; one that takes
//! nothing for a while is cut off.

use super::acts::{Act, Hands};
use super::door::{Door, Refusal};
use crate::connections;
use crate::machine_options::fresh_id;
use crate::remedy::one_line;
use axum::http::header::{self, HeaderName};
use axum::http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Channel, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Deserialize;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore, watch};
use vmft_log::foreign::ForeignText;

const HTML: &str = include_str!("page.html");
const CSS: &str = include_str!("page.css");
const JS: &str = include_str!("page.js");

/// Connections at a time; more are closed at once.
const CONNECTIONS: usize = 48;
/// Readers of pictures at a time, who keep theirs.
const READERS: usize = 24;
/// How long a request may take, and a reader of pictures to take one.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a page waits for its first picture.
const FIRST: Duration = Duration::from_secs(1);
/// How long a side may take to do what it is asked for: `crate::api_client` has less for each.
const ACT_PATIENCE: Duration = Duration::from_secs(60);
/// Acts at a time.
const ACTS: usize = 4;
/// Most bytes that a button sends.
const ORDER: usize = 256;

type Answer = Response<BoxBody<Bytes, Infallible>>;

/// What is served.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) door: Door,
    pub(super) key: String,
    pub(super) sides: usize,
    pub(super) hands: Option<Arc<dyn Hands>>,
    /// The newest picture, as JSON; nothing before the first.
    pub(super) pictures: watch::Sender<Bytes>,
    /// How many look.
    pub(super) readers: watch::Sender<usize>,
    acts: Semaphore,
}

impl Served {
    /// Nothing is shown yet.
    pub(super) fn new(
        (door, key): (Door, String),
        sides: usize,
        hands: Option<Arc<dyn Hands>>,
    ) -> Self {
        let (pictures, readers) = (watch::Sender::new(Bytes::new()), watch::Sender::new(0));
        let acts = Semaphore::new(ACTS);
        Self { door, key, sides, hands, pictures, readers, acts }
    }
}

/// What a button sends.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Order {
    side: usize,
    act: Act,
}

/// A reader of pictures, as long as it is there.
struct Reader(Arc<Served>);

impl Reader {
    fn new(served: &Arc<Served>) -> Option<Self> {
        let is_let_in = served.readers.send_if_modified(|readers| {
            let has_room = *readers < READERS;
            *readers += usize::from(has_room);
            has_room
        });
        is_let_in.then(|| Self(Arc::clone(served)))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.readers.send_modify(|readers| *readers -= 1);
    }
}

fn answer(code: StatusCode, kind: &'static str, body: BoxBody<Bytes, Infallible>) -> Answer {
    let mut answer = Response::new(body);
    *answer.status_mut() = code;
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CACHE_CONTROL, "no-store"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ];
    for (name, value) in headers {
        answer.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    answer
}

fn words(code: StatusCode, text: &str) -> Answer {
    let body = Full::new(Bytes::from(format!("{text}\n"))).boxed();
    let mut answer = answer(code, "text/plain; charset=utf-8", body);
    let nothing = HeaderValue::from_static("default-src 'none'");
    answer.headers_mut().insert(header::CONTENT_SECURITY_POLICY, nothing);
    answer
}

fn refusal(refusal: Refusal) -> Answer {
    words(refusal.code, refusal.why)
}

/// The newest picture, once there is one of now.
async fn first_picture(served: &Arc<Served>) -> Bytes {
    let mut newest = served.pictures.subscribe();
    let reader = Reader::new(served);
    if reader.is_some() {
        // Without one in time the page begins empty.
        let _ = tokio::time::timeout(FIRST, newest.changed()).await;
    }
    newest.borrow_and_update().clone()
}

/// The page, with the first picture in it. What is in it beside our own files and that is of digits and
/// letters: a nonce and the key.
async fn page(served: &Arc<Served>) -> Answer {
    let Ok(nonce) = fresh_id() else {
        return words(StatusCode::INTERNAL_SERVER_ERROR, "this host gives no random bytes");
    };
    let key = if served.hands.is_some() { served.key.as_str() } else { "" };
    let first = first_picture(served).await;
    // Within a string of JSON it means the same, and begins nothing of HTML's.
    let first = String::from_utf8_lossy(&first).replace('<', "\\u003c");
    let text = HTML
        .replace("{nonce}", &nonce)
        .replace("{key}", key)
        .replace("{css}", CSS)
        .replace("{js}", JS)
        .replacen("{first}", &first, 1);
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; \
         img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
         require-trusted-types-for 'script'; trusted-types 'none'"
    );
    let body = Full::new(Bytes::from(text)).boxed();
    let mut answer = answer(StatusCode::OK, "text/html; charset=utf-8", body);
    let policy = HeaderValue::from_str(&policy).expect("letters and digits");
    answer.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    answer
}

/// The pictures, until the reader is gone, or takes none.
fn pictures(served: &Arc<Served>, cut: Arc<Notify>) -> Answer {
    let Some(reader) = Reader::new(served) else {
        return words(StatusCode::SERVICE_UNAVAILABLE, "as many look already as may");
    };
    let mut newest = served.pictures.subscribe();
    let (mut sender, body) = Channel::<Bytes, Infallible>::new(1);
    tokio::spawn(async move {
        // At once: whoever waits for the first picture knows that it will come.
        let mut next = Bytes::from_static(b": a picture follows\n\n");
        loop {
            match tokio::time::timeout(PATIENCE, sender.send_data(next)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => break,
                Err(_) => {
                    cut.notify_one();
                    break;
                }
            }
            if newest.changed().await.is_err() {
                break;
            }
            let picture = newest.borrow_and_update().clone();
            next = [&b"data: "[..], &picture, b"\n\n"].concat().into();
        }
        drop(reader);
    });
    answer(StatusCode::OK, "text/event-stream", body.boxed())
}

async fn act(served: &Served, request: Request<Incoming>) -> Answer {
    let Some(hands) = served.hands.clone() else {
        return words(StatusCode::FORBIDDEN, "this page only shows; see --control");
    };
    let body = Limited::new(request.into_body(), ORDER).collect();
    let order = match tokio::time::timeout(PATIENCE, body).await {
        Ok(Ok(body)) => serde_json::from_slice::<Order>(&body.to_bytes()),
        _ => return words(StatusCode::PAYLOAD_TOO_LARGE, "too much, or too slow"),
    };
    let Ok(Order { side, act }) = order else {
        return words(StatusCode::BAD_REQUEST, "that is no order of a button");
    };
    if side >= served.sides {
        return words(StatusCode::NOT_FOUND, "there is no such side");
    }
    let Ok(_turn) = served.acts.try_acquire() else {
        return words(StatusCode::SERVICE_UNAVAILABLE, "others are being done; once more, later");
    };
    match tokio::task::spawn_blocking(move || hands.act(side, act)).await {
        Ok(Ok(())) => words(StatusCode::OK, "done"),
        Ok(Err(error)) => {
            let why = ForeignText::from(one_line(&format!("{error:#}")));
            words(StatusCode::CONFLICT, &why.to_string())
        }
        Err(_) => words(StatusCode::INTERNAL_SERVER_ERROR, "it has failed"),
    }
}

/// A request, and how long its connection may take from then on.
async fn handle(request: Request<Incoming>, served: &Arc<Served>, line: &Line) -> Answer {
    let (headers, query) = (request.headers(), request.uri().query().unwrap_or_default());
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/") => match served.door.check_look(headers, query) {
            Ok(()) => page(served).await,
            Err(why) => refusal(why),
        },
        (&Method::GET, "/pictures") => match served.door.check_look(headers, query) {
            Ok(()) => {
                line.stays.notify_one();
                pictures(served, Arc::clone(&line.cut))
            }
            Err(why) => refusal(why),
        },
        (&Method::POST, "/act") => match served.door.check_act(headers) {
            Ok(()) => {
                line.acts.notify_one();
                act(served, request).await
            }
            Err(why) => refusal(why),
        },
        (_, "/" | "/pictures" | "/act") => {
            words(StatusCode::METHOD_NOT_ALLOWED, "GET / and /pictures, POST /act")
        }
        _ => words(StatusCode::NOT_FOUND, "there is only /"),
    }
}

/// What becomes of a connection.
#[derive(Debug, Default)]
struct Line {
    /// It is a reader's of pictures, and may stay.
    stays: Notify,
    /// It waits for a side.
    acts: Notify,
    /// It is to end.
    cut: Arc<Notify>,
}

async fn serve_connection(stream: tokio::net::TcpStream, served: Arc<Served>) {
    let line = Line::default();
    let service =
        service_fn(|request| async { Ok::<_, Infallible>(handle(request, &served, &line).await) });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_buf_size(64 << 10)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    let end = async {
        tokio::select! {
            () = tokio::time::sleep(PATIENCE) => {}
            () = line.stays.notified() => line.cut.notified().await,
            () = line.acts.notified() => tokio::time::sleep(ACT_PATIENCE).await,
        }
    };
    tokio::select! {
        // What goes wrong with a reader is the reader's.
        _ = connection => {}
        () = end => {}
    }
}

/// Serves until the process ends.
pub(super) async fn accept(listener: TcpListener, served: Arc<Served>) {
    let serve = |stream| serve_connection(stream, Arc::clone(&served));
    connections::accept(listener, CONNECTIONS, serve).await;
}
