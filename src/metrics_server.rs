//! `--metrics-listen`: the metrics, for a Prometheus that reads them over the network.
//!
//! Whoever may connect may read them, so the address is this host's alone unless the operator says otherwise;
//! and nobody who connects may cost a side more than a few connections.

use crate::connections;
use crate::metrics;
use crate::options::{OptionError, Pairs, parse_switch};
use crate::remedy::Remedy;
use anyhow::{Context, Result};
use axum::http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use vmft_backup::status::StatusBoard;
use vmft_backup::tell;
use vmft_sandbox::Task;

/// Connections at a time; more are closed at once.
const CONNECTIONS: usize = 16;
/// How long one may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// `--metrics-listen ADDRESS:PORT[,insecure=on]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetricsOption {
    /// Where to listen.
    pub address: SocketAddr,
    /// Other hosts may read.
    pub insecure: bool,
}

impl FromStr for MetricsOption {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let error = || OptionError::Metrics(text.to_owned());
        let (address, rest) = match text.split_once(',') {
            Some((address, rest)) => (address, Some(rest)),
            None => (text, None),
        };
        let address: SocketAddr = address.parse().map_err(|_| error())?;
        let insecure = match rest {
            None => false,
            Some(rest) => {
                let pairs = Pairs::parse(rest, &["insecure"])?;
                pairs.get("insecure").map_or(Ok(false), parse_switch)?
            }
        };
        if !address.ip().is_loopback() && !insecure {
            return Err(OptionError::MetricsExposed(text.to_owned()));
        }
        Ok(Self { address, insecure })
    }
}

type Answer = Response<Full<Bytes>>;

fn answer(request: &Request<Incoming>, status: &StatusBoard) -> Answer {
    let (code, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => (StatusCode::OK, metrics::render(&status.status())),
        (_, "/metrics") => (StatusCode::METHOD_NOT_ALLOWED, "GET only\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, "there is /metrics\n".to_owned()),
    };
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = code;
    let kind = header::HeaderValue::from_static(metrics::CONTENT_TYPE);
    answer.headers_mut().insert(header::CONTENT_TYPE, kind);
    answer
}

/// Serves them on a thread of its own until the process ends. Returns the address.
///
/// # Errors
/// The address is taken, or not of this host.
pub fn serve(option: MetricsOption, status: Arc<StatusBoard>) -> Result<SocketAddr> {
    let listener = TcpListener::bind(option.address)
        .with_context(|| format!("listening for readers of metrics at {}", option.address))
        .remedy(|| "--metrics-listen takes an address of this host and a free port")?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    if !address.ip().is_loopback() {
        tell!("{address} is insecure: whoever reaches it can read the metrics");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let serve = move || {
        runtime.block_on(async move {
            match tokio::net::TcpListener::from_std(listener) {
                Ok(listener) => accept(listener, status).await,
                Err(error) => tracing::error!(%error, "the metrics are gone"),
            }
        });
    };
    vmft_sandbox::spawn(Task::Api, "metrics", serve)?;
    Ok(address)
}

async fn accept(listener: tokio::net::TcpListener, status: Arc<StatusBoard>) {
    let serve = |stream| serve_connection(stream, Arc::clone(&status));
    connections::accept(listener, CONNECTIONS, serve).await;
}

async fn serve_connection(stream: tokio::net::TcpStream, status: Arc<StatusBoard>) {
    let service = service_fn(|request| {
        let answer = answer(&request, &status);
        async move { Ok::<_, Infallible>(answer) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_buf_size(16 << 10)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    // What goes wrong with a reader is the reader's.
    let _ = tokio::time::timeout(PATIENCE, connection).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpStream;

    #[test]
    fn metrics_are_for_this_host_unless_the_operator_says_otherwise() {
        let parse = |text: &str| text.parse::<MetricsOption>();
        assert!(parse("127.0.0.1:9100").is_ok() && parse("[::1]:9100").is_ok());
        assert!(matches!(parse("0.0.0.0:9100"), Err(OptionError::MetricsExposed(_))));
        assert!(parse("10.0.0.1:9100,insecure=on").is_ok());
        for wrong in ["", "9100", "localhost:9100", "127.0.0.1", "127.0.0.1:1,x=on"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).expect("it listens");
        stream.write_all(request.as_bytes()).expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("text");
        answer
    }

    #[test]
    fn readers_get_metrics_and_idle_connections_do_not_keep_them_out() {
        let option = "127.0.0.1:0".parse().expect("an address");
        let address = serve(option, Arc::default()).expect("a free port");
        let get = |path: &str| ask(address, &format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"));
        let answer = get("/metrics");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        assert!(head.starts_with("HTTP/1.1 200") && head.contains(metrics::CONTENT_TYPE), "{head}");
        assert!(body.contains("vmft_role{role=\"starting\"} 1\n"), "{body}");
        assert!(get("/").starts_with("HTTP/1.1 404"));
        assert!(ask(address, "PUT /metrics HTTP/1.1\r\nHost: x\r\n\r\n").contains(" 405 "));
        // So many hold a place each, and the next are closed at once, without an answer.
        let idle: Vec<TcpStream> =
            (0..CONNECTIONS).map(|_| TcpStream::connect(address).expect("it listens")).collect();
        let mut closed = TcpStream::connect(address).expect("it listens");
        let mut nothing = Vec::new();
        // A connection that is closed with something unread may be reset.
        let _ = closed.read_to_end(&mut nothing);
        assert!(nothing.is_empty());
        drop(idle);
    }
}
