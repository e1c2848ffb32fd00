//! Sends a backup its checkpoint, and waits until it has it.
//!
//! Both sides say how far they are while they work ([`Frame::Progress`]), so the limits here are on silence:
//! a guest of any size joins, on hosts however busy, as long as somebody works on it.

use super::connection::{Connection, FrameReader, FrameWriter};
use super::pieces::{Giver, Taker, pieces};
use super::primary::{CheckpointStream, TakesDigests};
use super::primary_session::{Context, PrimarySide};
use super::session_loop::{Effect, SessionSide};
use super::{PROGRESS_EVERY, TransportError, Violation, clock};
use crate::backups::BackupSession;
use crate::frame::{Frame, FrameKind};
use crate::handshake::SessionTerms;
use crate::sender::SendError;
use crate::session::{GoodbyeReason, Progress, Reign, SessionId};
use crate::time::MonotonicTime;
use std::sync::Arc;
use std::time::Duration;
use vmft_log::checkpoint::{JoinPiece, PieceKind};
use vmft_log::entry::Generation;
use vmft_sandbox::Task;

/// Sealed pieces that may wait between the thread that packs and the one that sends: both have
/// something to do then.
const PIECES_AHEAD: usize = 4;

/// A piece ready to be sent, and whether it is the last.
type Sealed = Result<(Vec<u8>, bool), TransportError>;

/// Packs the pieces of a checkpoint on a thread of its own. The stream is dropped when it is over,
/// or when nobody takes its pieces any more: after the channel of the pieces, so whoever sees it go
/// knows that all have been given.
fn pack(
    mut stream: Box<dyn CheckpointStream>,
    session: SessionId,
) -> Result<Taker<Sealed>, TransportError> {
    let (giver, taker) = pieces(PIECES_AHEAD).map_err(TransportError::Thread)?;
    let pack = move || {
        give_all(stream.as_mut(), session, giver);
        drop(stream);
    };
    // It reads disks of which the backup has copies.
    vmft_sandbox::spawn(Task::Disk, "vmft-join", pack).map_err(TransportError::Thread)?;
    Ok(taker)
}

/// Gives the sealed pieces of a checkpoint to whoever sends them, until one of the two has no more to do.
#[expect(clippy::needless_pass_by_value, reason = "the channel ends with the pieces")]
fn give_all(stream: &mut dyn CheckpointStream, session: SessionId, giver: Giver<Sealed>) {
    loop {
        let sealed = match stream.next_piece() {
            Ok(None) => return,
            Err(reason) => Err(TransportError::NoCheckpoint(reason)),
            Ok(Some(piece)) => {
                let (last, frame) = match piece {
                    JoinPiece::Checkpoint(piece) => {
                        (piece.kind() == PieceKind::End, Frame::Checkpoint(piece))
                    }
                    JoinPiece::Disk(piece) => (false, Frame::Disk(piece)),
                };
                let frame = frame.encode(session);
                frame.map(|frame| (frame.seal(), last)).map_err(TransportError::from)
            }
        };
        let failed = sealed.is_err();
        if !giver.give(sealed) || failed {
            return;
        }
    }
}

/// Sends the checkpoint and waits until the backup has it.
pub(super) async fn set_up(
    context: &Context,
    side: &PrimarySide<'_>,
    connection: &mut Connection,
    terms: &SessionTerms,
    stream: Box<dyn CheckpointStream>,
) -> Result<MonotonicTime, TransportError> {
    let limit = context.config.setup_timeout;
    let digests = Digests(stream.digests());
    let pieces = pack(stream, terms.session)?;
    let Connection { reader, writer } = connection;
    // Nothing but news is to be read before the whole checkpoint is sent. Frames are never left half
    // written: either all are, or the session is over.
    tokio::select! {
        biased;
        sent = send(context, side, writer, terms.session, pieces) => sent?,
        error = hear(reader, limit, &digests) => return Err(error),
    }
    let mut told = terms.generation;
    loop {
        tell_generation(context, connection, terms.session, &mut told).await?;
        let frame = connection.reader.next_frame(limit, "accepting the checkpoint").await?;
        if matches!(frame, Frame::Progress(_)) {
            continue;
        }
        let accepted = matches!(frame, Frame::Acknowledge(_));
        let now = clock::now();
        if accepted {
            tell_generation(context, connection, terms.session, &mut told).await?;
            side.with(BackupSession::accepted);
        }
        if let Effect::Departed(reason) = side.handle_frame(now, frame)? {
            return Err(TransportError::Departed(reason));
        }
        if accepted {
            context.shared.changed.notify_all();
            return Ok(now);
        }
    }
}

/// Sends the pieces as they are made, and says how many there are while the next one is.
async fn send(
    context: &Context,
    side: &PrimarySide<'_>,
    writer: &mut FrameWriter,
    session: SessionId,
    mut pieces: Taker<Sealed>,
) -> Result<(), TransportError> {
    let every = PROGRESS_EVERY.min(context.config.setup_timeout / 4);
    let mut sent = Progress { pieces: 0 };
    loop {
        if context.shared.lock().closing {
            return Err(TransportError::Closed { what: "the checkpoint" });
        }
        let Some(piece) = clock::within(every, pieces.next()).await else {
            writer.write(&Frame::Progress(sent).encode(session)?.seal()).await?;
            writer.flush().await?;
            continue;
        };
        let stopped = || TransportError::NoCheckpoint("the machine has stopped".to_owned());
        let (bytes, last) = piece.ok_or_else(stopped)??;
        if last {
            side.with(BackupSession::complete);
        }
        writer.write(&bytes).await?;
        writer.flush().await?;
        sent.pieces += 1;
        if last {
            return Ok(());
        }
    }
}

/// Who is told of a backup's digests, and of their end.
struct Digests(Option<Arc<dyn TakesDigests>>);

impl Drop for Digests {
    fn drop(&mut self) {
        if let Some(taker) = &self.0 {
            taker.end();
        }
    }
}

/// Hears of the backup's progress; ends when it is silent for `limit`, or says something else.
async fn hear(reader: &mut FrameReader, limit: Duration, digests: &Digests) -> TransportError {
    loop {
        match reader.next_frame(limit, "taking the checkpoint").await {
            Ok(Frame::Progress(_)) => {}
            Ok(Frame::DiskDigests(said)) => {
                let unexpected = SendError::Unexpected(FrameKind::DiskDigests);
                let taken = digests.0.as_ref().ok_or(unexpected);
                if let Err(error) = taken.and_then(|taker| taker.take(said)) {
                    return Violation::from(error).into();
                }
            }
            Ok(Frame::Goodbye(reason)) => return TransportError::Departed(reason),
            Ok(other) => return Violation::from(SendError::Unexpected(other.kind())).into(),
            Err(error) => return error,
        }
    }
}

/// Tells a backup that may have its whole checkpoint that this side does not go on with it, so that it does
/// not take the end of the connection for the end of its primary.
pub(super) async fn turn_away(
    connection: &mut Connection,
    session: SessionId,
    error: &TransportError,
    limit: Duration,
) {
    let reason = GoodbyeReason::Fault(error.to_string().into()).clipped();
    let Ok(frame) = Frame::Goodbye(reason).encode(session) else { return };
    connection.tell_and_drain(frame, limit).await;
}

/// Tells the backup of a generation that was won after the one that it was `told`: what was agreed when it shook
/// hands may be over when its session begins, and it would ask the arbiter for a generation that is gone.
async fn tell_generation(
    context: &Context,
    connection: &mut Connection,
    session: SessionId,
    told: &mut Generation,
) -> Result<(), TransportError> {
    let generation = context.shared.lock().backups.identity().generation;
    if generation > *told {
        let frame = Frame::Reign(Reign { generation }).encode(session)?;
        let limit = context.config.setup_timeout;
        connection.writer.send(frame, limit, "taking the generation").await?;
        *told = generation;
    }
    Ok(())
}

#[cfg(test)]
#[path = "set_up_tests.rs"]
mod tests;
