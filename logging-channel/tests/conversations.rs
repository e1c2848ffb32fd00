//! Conversations with one side of a session, kept as text in `conversations/` and replayed here.
//!
//! Each line is one step; times are in microseconds, and a frame is written as its kind and
//! numbers. `docs/protocol.md` says why each step must be so.
//!
//! ```text
//! side primary CAPACITY | side backup CAPACITY ACKNOWLEDGE_DELAY
//! at TIME                          the clock says so (and is looked at)
//! push mark|progress|stop POINT    the guest's side of a primary
//! flush | leave stopped|leaving
//! take N                           the guest's side of a backup takes entry N
//! applied N                        and has replayed it
//! gets FRAME                       the peer sends this
//! gets FRAME => ERROR              and is refused with this text; nothing changes
//! sends FRAME                      the next frame that this side sends now
//! quiet                            it sends nothing more now
//! ```

use std::fmt::Write;
use std::time::Duration;
use vmft_log::codec::{CostedEntry, ENTRY_OVERHEAD, EntryBatch};
use vmft_log::entry::{Entry, EntrySequence, LogPosition, OutputSequence, StopReason};
use vmft_log::point::ExecutionPoint;
use vmft_logging_channel::frame::{Frame, FrameDecoder, UnsealedFrame};
use vmft_logging_channel::receiver::{Receiver, ReceiverConfig};
use vmft_logging_channel::sender::{Sender, SenderConfig};
use vmft_logging_channel::session::{Acknowledge, GoodbyeReason, Heartbeat, SessionId};
use vmft_logging_channel::time::MonotonicTime;

enum Side {
    Primary(Box<Sender>),
    Backup(Box<Receiver>),
}

struct Replay {
    now: MonotonicTime,
    session: SessionId,
    side: Option<Side>,
    decoder: FrameDecoder,
}

fn number(text: Option<&str>) -> u64 {
    text.expect("a number").parse().expect("a number")
}

fn goodbye(text: Option<&str>) -> GoodbyeReason {
    match text.expect("a reason") {
        "stopped" => GoodbyeReason::Stopped,
        "leaving" => GoodbyeReason::Leaving,
        other => panic!("no reason {other}"),
    }
}

/// Entry n of a log that the primary is said to have sent: progress to point 10 n.
fn progress(n: u64) -> CostedEntry {
    let entry = Entry::Progress { point: ExecutionPoint::new(n * 10) };
    CostedEntry { entry, cost: ENTRY_OVERHEAD + 2 }
}

fn parse_frame(words: &str) -> Frame {
    let mut words = words.split_whitespace();
    match words.next().expect("a frame") {
        "heartbeat" => Frame::Heartbeat(Heartbeat {
            number: number(words.next()),
            sent_at: MonotonicTime::ZERO,
            echo: None,
            last: EntrySequence(number(words.nth(1))),
        }),
        "acknowledge" => Frame::Acknowledge(Acknowledge {
            received: EntrySequence(number(words.next())),
            applied: EntrySequence(number(words.nth(1))),
            applied_point: ExecutionPoint::START,
            window: number(words.nth(1)),
        }),
        "entries" => {
            let (first, last) = (number(words.next()), number(words.nth(1)));
            Frame::Entries(EntryBatch {
                first: EntrySequence(first),
                base: ExecutionPoint::new((first - 1) * 10),
                entries: (first..=last).map(progress).collect(),
            })
        }
        "goodbye" => Frame::Goodbye(goodbye(words.next())),
        other => panic!("no frame {other}"),
    }
}

fn describe(frame: &Frame) -> String {
    let mut text = String::new();
    match frame {
        Frame::Heartbeat(beat) => write!(text, "heartbeat {} last {}", beat.number, beat.last.0),
        Frame::Acknowledge(found) => write!(
            text,
            "acknowledge {} applied {} window {}",
            found.received.0, found.applied.0, found.window
        ),
        Frame::Entries(batch) => write!(text, "entries {} to {}", batch.first.0, batch.last().0),
        Frame::Goodbye(GoodbyeReason::Stopped) => write!(text, "goodbye stopped"),
        Frame::Goodbye(GoodbyeReason::Leaving) => write!(text, "goodbye leaving"),
        other => write!(text, "{}", other.kind()),
    }
    .expect("a string takes all text");
    text
}

impl Replay {
    fn primary(&mut self) -> &mut Sender {
        match &mut self.side {
            Some(Side::Primary(sender)) => sender,
            _ => panic!("this is for a primary"),
        }
    }

    fn backup(&mut self) -> &mut Receiver {
        match &mut self.side {
            Some(Side::Backup(receiver)) => receiver,
            _ => panic!("this is for a backup"),
        }
    }

    fn begin(&mut self, mut words: std::str::SplitWhitespace<'_>) {
        let (start, now) = (ExecutionPoint::START, self.now);
        self.side = Some(match words.next().expect("a side") {
            "primary" => {
                let capacity = number(words.next());
                let config = SenderConfig { capacity, ..SenderConfig::default() };
                Side::Primary(Box::new(Sender::new(
                    config,
                    self.session,
                    LogPosition::start_of_log(start),
                    now,
                )))
            }
            "backup" => {
                let config = ReceiverConfig {
                    capacity: number(words.next()),
                    acknowledge_delay: Duration::from_micros(number(words.next())),
                    ..ReceiverConfig::default()
                };
                Side::Backup(Box::new(Receiver::new(
                    config,
                    self.session,
                    LogPosition::start_of_log(start),
                    now,
                )))
            }
            other => panic!("no side {other}"),
        });
    }

    fn push(&mut self, mut words: std::str::SplitWhitespace<'_>) {
        let kind = words.next().expect("a kind of entry");
        let point = ExecutionPoint::new(number(words.next()));
        let entry = match kind {
            "mark" => Entry::OutputMark { point, output: OutputSequence(1) },
            "progress" => Entry::Progress { point },
            "stop" => Entry::Stop { point, reason: StopReason::Operator },
            other => panic!("no entry {other}"),
        };
        let now = self.now;
        self.primary().push(now, &entry).expect("room");
    }

    fn gets(&mut self, frame: Frame) -> Option<String> {
        let now = self.now;
        match self.side.as_mut().expect("a side") {
            Side::Primary(sender) => sender.handle_frame(now, &frame).err().map(|e| e.to_string()),
            Side::Backup(receiver) => {
                receiver.handle_frame(now, frame).err().map(|e| e.to_string())
            }
        }
    }

    fn poll(&mut self) -> Option<String> {
        let now = self.now;
        let frame: UnsealedFrame = match self.side.as_mut().expect("a side") {
            Side::Primary(sender) => sender.poll_transmit(now)?,
            Side::Backup(receiver) => receiver.poll_transmit(now)?,
        };
        self.decoder.feed(&frame.seal());
        let frame = self.decoder.next_frame().expect("our own frame").expect("a whole one");
        Some(describe(&frame))
    }

    fn step(&mut self, line: &str) {
        let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
        let mut words = rest.split_whitespace();
        match verb {
            "side" => self.begin(words),
            "at" => {
                self.now = MonotonicTime::from_ns(number(words.next()) * 1_000);
                if let Some(Side::Primary(sender)) = &mut self.side {
                    let result = sender.handle_timeout(self.now).map_err(|error| error.to_string());
                    let expected = rest.split_once(" => ").map(|(_, text)| text.to_owned());
                    assert_eq!(result.err(), expected);
                }
            }
            "push" => self.push(words),
            "flush" => self.primary().flush(),
            "leave" => {
                let reason = goodbye(words.next());
                match self.side.as_mut().expect("a side") {
                    Side::Primary(sender) => sender.leave(reason),
                    Side::Backup(receiver) => receiver.leave(reason),
                }
            }
            "take" => {
                let (sequence, entry) = self.backup().poll_entry().expect("an entry");
                assert_eq!(sequence.0, number(words.next()));
                assert_eq!(entry, progress(sequence.0).entry);
            }
            "applied" => {
                let n = number(words.next());
                self.backup().report_applied(EntrySequence(n), ExecutionPoint::new(n * 10));
            }
            "gets" => {
                let (frame, expected) = match rest.split_once(" => ") {
                    Some((frame, error)) => (frame, Some(error.to_owned())),
                    None => (rest, None),
                };
                assert_eq!(self.gets(parse_frame(frame)), expected);
            }
            "sends" => assert_eq!(self.poll().as_deref(), Some(rest)),
            "quiet" => assert_eq!(self.poll(), None),
            other => panic!("no step {other}"),
        }
    }
}

fn replay(text: &str) {
    let session = SessionId::derive(b"conversation");
    let mut replay = Replay {
        now: MonotonicTime::ZERO,
        session,
        side: None,
        decoder: FrameDecoder::new(session),
    };
    for (line, number) in text.lines().zip(1..) {
        let line = line.split('#').next().expect("split gives one at least").trim();
        if !line.is_empty() {
            // Shown only when a step fails.
            println!("line {number}: {line}");
            replay.step(line);
        }
    }
}

#[test]
fn an_output_mark_is_acknowledged_on_receipt() {
    replay(include_str!("conversations/output-mark.txt"));
}

#[test]
fn the_window_holds_the_primary_back() {
    replay(include_str!("conversations/window.txt"));
}

#[test]
fn a_backup_refuses_what_a_primary_must_not_send() {
    replay(include_str!("conversations/backup-refuses.txt"));
}

#[test]
fn a_primary_refuses_what_a_backup_must_not_send() {
    replay(include_str!("conversations/primary-refuses.txt"));
}

#[test]
fn a_clean_stop_ends_in_goodbyes() {
    replay(include_str!("conversations/stop-primary.txt"));
    replay(include_str!("conversations/stop-backup.txt"));
}

#[test]
fn acknowledgements_can_be_withheld() {
    replay(include_str!("conversations/withheld.txt"));
}
