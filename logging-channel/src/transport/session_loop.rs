//! Carries one session over one connection, the same way on both sides: read, write, watch.

use super::connection::{Connection, FrameReader, FrameWriter};
use super::waker::WakeUps;
use super::{EndCause, LINGER, Violation, clock};
use crate::detector::{Detector, Verdict};
use crate::frame::{Frame, UnsealedFrame};
use crate::session::GoodbyeReason;
use crate::time::MonotonicTime;
use std::cell::RefCell;
use std::io;
use std::time::Duration;

/// What a frame means for the session as a whole.
#[derive(Debug)]
pub(super) enum Effect {
    /// It goes on.
    Continue,
    /// The machine was stopped: whatever happens now is no failure.
    Stopped,
    /// The peer said goodbye.
    Departed(GoodbyeReason),
}

/// What there is to send.
#[derive(Debug)]
pub(super) enum Transmit {
    /// This frame.
    Frame(UnsealedFrame),
    /// Nothing before this moment, unless woken.
    Wait(Option<MonotonicTime>),
    /// Nothing any more: the goodbye has been sent.
    Finished,
    /// Nothing any more: the channel is being closed without a goodbye.
    Abandoned,
}

/// One side's session, as the loop needs it. Called on the channel's thread only.
pub(super) trait SessionSide {
    /// Takes a frame.
    fn handle_frame(&self, now: MonotonicTime, frame: Frame) -> Result<Effect, Violation>;
    /// Called when no more frames are at hand: threads that wait can be told.
    fn frames_handled(&self);
    /// Looks at the clock and says what to send.
    fn poll_transmit(&self, now: MonotonicTime) -> Result<Transmit, Violation>;
    /// The frame's bytes are on their way.
    fn frame_sent(&self, bytes: Vec<u8>);
    /// True for the side that the other one replaces when it takes it for dead.
    fn is_watched(&self) -> bool;
    /// When [`Self::poll_transmit`] should be asked again.
    fn wake_ups(&self) -> &WakeUps;
}

/// How a session ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) cause: EndCause,
    pub(super) last_contact: MonotonicTime,
}

/// Runs a session to its end, and closes the connection.
pub(super) async fn run(
    connection: Connection,
    side: &impl SessionSide,
    detector: Detector,
    on_late: fn(Duration),
) -> Ended {
    let Connection { mut reader, mut writer } = connection;
    let detector = RefCell::new(detector);
    look_for_suspension(side, &detector);
    // In this order: nobody is suspected before everything that has come was read.
    let cause = tokio::select! {
        biased;
        cause = read(&mut reader, side, &detector) => cause,
        cause = write(&mut writer, side, &detector, on_late) => cause,
        cause = watch(side, &detector) => cause,
    };
    Ended { cause, last_contact: detector.borrow().last_contact() }
}

fn of_verdict(verdict: &Verdict) -> Option<EndCause> {
    match verdict {
        Verdict::Alive => None,
        Verdict::Departed(reason) => Some(EndCause::Departed(reason.clone())),
        Verdict::Lost(suspicion) => Some(EndCause::Lost(*suspicion)),
    }
}

async fn read(
    reader: &mut FrameReader,
    side: &impl SessionSide,
    detector: &RefCell<Detector>,
) -> EndCause {
    loop {
        if let Some(cause) = handle_buffered(reader, side, detector) {
            return cause;
        }
        match reader.fill().await {
            Ok(true) => {}
            // Damaged TLS records; all else is a connection that is gone.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return EndCause::Violation(Violation::Tls(error.to_string().into()));
            }
            Ok(false) | Err(_) => {
                // After our own goodbye, this is what was waited for.
                if matches!(
                    side.poll_transmit(clock::now()),
                    Ok(Transmit::Finished | Transmit::Abandoned)
                ) {
                    return EndCause::Left;
                }
                let cause = of_verdict(detector.borrow_mut().handle_closed());
                return cause.expect("a closed connection is a verdict");
            }
        }
    }
}

fn handle_buffered(
    reader: &mut FrameReader,
    side: &impl SessionSide,
    detector: &RefCell<Detector>,
) -> Option<EndCause> {
    if let Some(cause) = look_for_suspension(side, detector) {
        return Some(cause);
    }
    let now = clock::now();
    let cause = loop {
        let frame = match reader.buffered_frame() {
            Ok(Some(frame)) => frame,
            Ok(None) => break None,
            Err(error) => break Some(EndCause::Violation(error.into())),
        };
        match side.handle_frame(now, frame) {
            Ok(effect) => {
                let mut detector = detector.borrow_mut();
                detector.handle_contact(now);
                match effect {
                    Effect::Continue => {}
                    Effect::Stopped => detector.handle_departure(GoodbyeReason::Stopped),
                    Effect::Departed(reason) => {
                        detector.handle_departure(reason);
                        break of_verdict(detector.verdict());
                    }
                }
            }
            Err(violation) => break Some(EndCause::Violation(violation)),
        }
    };
    side.frames_handled();
    cause
}

async fn write(
    writer: &mut FrameWriter,
    side: &impl SessionSide,
    detector: &RefCell<Detector>,
    on_late: fn(Duration),
) -> EndCause {
    loop {
        let sent = match side.poll_transmit(clock::now()) {
            Err(violation) => return EndCause::Violation(violation),
            Ok(Transmit::Abandoned) => return EndCause::Left,
            Ok(Transmit::Finished) => {
                // The peer closes when it has read the goodbye. Were we to close first, with its
                // last frames unread, the goodbye could be lost.
                let _ = writer.shutdown().await;
                clock::sleep_until(Some(clock::now().after(LINGER))).await;
                return EndCause::Left;
            }
            Ok(Transmit::Wait(until)) => {
                let flushed = writer.flush().await;
                tokio::select! {
                    () = side.wake_ups().next() => {}
                    () = clock::sleep_until(until) => {}
                }
                if let Some(late) =
                    until.and_then(|due| detector.borrow().own_lateness(due, clock::now()))
                {
                    on_late(late);
                }
                flushed
            }
            Ok(Transmit::Frame(frame)) => {
                let bytes = frame.seal();
                let written = writer.write(&bytes).await;
                side.frame_sent(bytes);
                written
            }
        };
        if sent.is_err() {
            // There may still be something to read, a goodbye even; the reader finds the end.
            return std::future::pending().await;
        }
    }
}

/// The end of a session, if the host of a side that is watched was suspended.
fn look_for_suspension(side: &impl SessionSide, detector: &RefCell<Detector>) -> Option<EndCause> {
    let mut detector = detector.borrow_mut();
    side.is_watched().then(|| of_verdict(detector.handle_suspension(clock::suspended()))).flatten()
}

async fn watch(side: &impl SessionSide, detector: &RefCell<Detector>) -> EndCause {
    loop {
        let next = detector.borrow().poll_timeout();
        clock::sleep_until(next).await;
        if let Some(cause) = look_for_suspension(side, detector) {
            return cause;
        }
        let mut detector = detector.borrow_mut();
        let verdict = detector.handle_timeout(clock::now()).clone();
        // After a `Stop` the goodbye is still to come: that the peer is on its way out is no reason
        // to hang up on it.
        if matches!(verdict, Verdict::Departed(_)) && !detector.is_silent() {
            continue;
        }
        if let Some(cause) = of_verdict(&verdict) {
            return cause;
        }
    }
}
