//! The primary's half of the handshake, with somebody of whom nothing is known.
//!
//! All of it, from the first byte to the confirmation, has one deadline, and the first byte a shorter one:
//! neither silence nor a byte now and then keeps a place for long. Who is refused hears why as far as he
//! has shown that he may ([`Refusal::to_a_stranger`]); the primary's own log has all of it.

use super::connection::{Connection, Stream};
use super::listener::Origin;
use super::lobby::Visit;
use super::primary::Shared;
use super::primary_session::Context;
use super::tls::ServerIdentity;
use super::{TransportError, clock, fresh_nonce};
use crate::frame::Frame;
use crate::handshake::{Answered, HandshakeError, Hello, Refusal, SessionTerms};
use crate::session::SessionId;
use std::sync::Arc;
use std::time::Duration;

/// How long the first byte may take: who connects has it ready, and a network that lost it sends it
/// again after a second.
const FIRST_BYTE: Duration = Duration::from_secs(2);

/// Somebody who has connected.
pub(super) struct Stranger {
    pub(super) stream: Stream,
    pub(super) origin: Origin,
    pub(super) tls: Option<Arc<ServerIdentity>>,
}

/// A place for a backup; taken while this lives.
#[derive(Debug)]
pub(super) struct Place {
    shared: Arc<Shared>,
}

impl Place {
    fn take(shared: &Arc<Shared>) -> Self {
        shared.lock().backups.take_place();
        Self { shared: Arc::clone(shared) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.lock().backups.leave_place();
    }
}

/// What a greeting comes to.
pub(super) type Greeted = Result<(Connection, SessionTerms, Place), TransportError>;

/// Hears one who connected, unless he has to make way or takes too long.
pub(super) async fn hear(context: &Context, stranger: Stranger, visit: Visit) -> Greeted {
    let limit = context.config.setup_timeout;
    // Only they can know the pair: a certificate, or a socket to which nobody else may connect.
    let trusted = stranger.tls.is_some() || stranger.origin == Origin::Unix;
    let mut connection = None;
    let greeting = greet(context, stranger, &visit, &mut connection);
    let greeted = tokio::select! {
        biased;
        () = visit.sent_away() => return Err(TransportError::MadeWay),
        greeted = clock::within(limit, greeting) => greeted,
    };
    let timed_out = TransportError::TimedOut { what: "its greeting", limit };
    let greeted = greeted.unwrap_or(Err(timed_out));
    if let (Err(TransportError::Handshake(HandshakeError::Refused(refusal))), Some(connection)) =
        (&greeted, &mut connection)
    {
        let told = if trusted { refusal.clone() } else { refusal.to_a_stranger() };
        tokio::select! {
            biased;
            () = visit.sent_away() => {}
            () = refuse(connection, told, limit.min(super::LINGER)) => {}
        }
    }
    let (terms, place) = greeted?;
    Ok((connection.expect("greeted over it"), terms, place))
}

/// The handshake, from the first byte to the backup's confirmation. The connection is there as soon as
/// there is one.
async fn greet(
    context: &Context,
    stranger: Stranger,
    visit: &Visit,
    connection: &mut Option<Connection>,
) -> Result<(SessionTerms, Place), TransportError> {
    let limit = context.config.setup_timeout;
    let tls = stranger.tls.map(|identity| identity.config()).transpose()?;
    let accepting = Connection::accept(stranger.stream, tls, FIRST_BYTE.min(limit), visit);
    let connection = connection.insert(accepting.await?);
    let hello = connection.reader.next_frame(limit, "its hello").await?;
    let (answered, reply, place) = {
        let state = context.shared.lock();
        let admission = state.backups.admission(context.config.backups);
        let identity = state.backups.identity().clone();
        let answer = Answered::new(&hello, identity, fresh_nonce(), &admission);
        drop(state);
        let (answered, reply) = answer?;
        // No await between looking and taking: nobody else can take the place meanwhile.
        (answered, reply, Place::take(&context.shared))
    };
    if let (Some(check), Frame::Hello(Hello { identity, .. })) = (&context.config.check, hello) {
        check.make(identity, limit).await.map_err(HandshakeError::Refused)?;
    }
    let session = answered.session();
    let reply = reply.encode(SessionId::HANDSHAKE)?;
    connection.writer.send(reply, limit, "taking the hello's reply").await?;
    connection.reader.set_session(session);
    let confirm = connection.reader.next_frame(limit, "its confirmation").await?;
    Ok((answered.handle_frame(&confirm)?, place))
}

/// Tells the peer that it is refused, and lets it read that before the connection is closed.
async fn refuse(connection: &mut Connection, refusal: Refusal, limit: Duration) {
    let Ok(frame) = Frame::Refusal(refusal).encode(SessionId::HANDSHAKE) else { return };
    connection.tell_and_drain(frame, limit).await;
}

#[cfg(test)]
#[path = "greeting_tests.rs"]
mod tests;
