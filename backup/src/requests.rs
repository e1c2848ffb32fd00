//! What is asked of the machine's thread between two instructions.

use crate::copied::CopiedPages;
use crate::hand_over::HandOverError;
use crate::join::{Rest, RoundEnd, Watched};
use crate::join_content::JoinContent;
use std::collections::VecDeque;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;
use vmft_cpu::memory::WriteView;
use vmft_log::entry::LogPosition;
use vmft_logging_channel::transport::JoinTicket;
use vmft_threads::{Mutex, MutexGuard};
use vmft_vmm::inputs::Asked;
use vmft_vmm::machine::{Machine, MachineState};
use vmft_vmm::outputs::Output;
use vmft_vmm::snapshot::{self, SnapshotError};
use vmft_vmm::world::{Mailbox, TapEnd};

/// Pages looked at in one rest before a log begins.
const PREPARED_PAGES: usize = 1024;

/// The machine is over, or the join was given up: what was asked is not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the machine has stopped, or goes on without this backup")]
pub(crate) struct SideGone;

/// Something to be done with the machine at rest.
struct AtRest(Box<dyn FnOnce(&mut Machine) + Send>);

impl fmt::Debug for AtRest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AtRest")
    }
}

#[derive(Debug)]
enum Request {
    /// An epoch is taken.
    AtRest(AtRest),
    /// A snapshot to a new directory.
    Snapshot { directory: PathBuf, reply: Sender<Result<(), SnapshotError>> },
    /// A backup is to take the guest.
    HandOver { reply: Sender<Result<(), HandOverError>> },
    /// A backup wants to join.
    Watch { reply: Sender<Watched> },
    /// A part of what the machine has to do before a log can begin.
    Prepare { reply: Sender<usize> },
    /// A round of a join is sent.
    Round {
        view: Arc<WriteView>,
        /// If no more pages than this were written, it was the last.
        limit: usize,
        ticket: JoinTicket,
        /// What is closed where the log begins.
        taps: Vec<TapEnd>,
        reply: Sender<RoundEnd>,
    },
}

/// Where a backup's log begins, for the thread of the machine.
pub(crate) trait JoinHost {
    /// Begins the backup's log with the machine at rest where it is, and takes its state. `None` if
    /// that backup cannot be had any more. `Later` if the machine must reach its next point first.
    fn begin(&mut self, machine: &mut Machine, ticket: &JoinTicket) -> Beginning;

    /// A backup is to take the guest, once everything else is done that was asked. `reply` is told what
    /// came of it.
    fn hand_over(&mut self, reply: Sender<Result<(), HandOverError>>);
}

/// Whether a backup's log has begun.
#[derive(Debug)]
pub(crate) enum Beginning {
    /// It has, here; and these outputs, made before, are not known to be out.
    Here(LogPosition, Box<MachineState>, Vec<Output>),
    /// The machine is at a place without a name, and somebody follows already.
    Later,
    /// The backup is gone.
    Gone,
}

/// A machine that takes no backups.
#[derive(Debug)]
pub(crate) struct NoBackups;

impl JoinHost for NoBackups {
    fn begin(&mut self, _: &mut Machine, _: &JoinTicket) -> Beginning {
        Beginning::Gone
    }

    fn hand_over(&mut self, reply: Sender<Result<(), HandOverError>>) {
        // Whoever asked may have gone.
        let _ = reply.send(Err(HandOverError::Nobody));
    }
}

/// Requests on their way to the thread that runs the machine.
#[derive(Debug)]
pub struct Requests {
    /// `None` once the machine is over.
    asked: Mutex<Option<AskedFor>>,
    /// An operator wants the guest to stand still.
    is_paused: AtomicBool,
}

/// What is asked of a machine that is not over.
#[derive(Debug, Default)]
struct AskedFor {
    queue: VecDeque<Request>,
    /// Who wants to hear when the guest stands still.
    pausing: Vec<Sender<()>>,
    /// Who wants to hear when it goes on.
    resuming: Vec<Sender<()>>,
}

impl Default for Requests {
    fn default() -> Self {
        Self { asked: Mutex::new(Some(AskedFor::default())), is_paused: AtomicBool::new(false) }
    }
}

impl Requests {
    fn lock(&self) -> MutexGuard<'_, Option<AskedFor>> {
        self.asked.lock()
    }

    fn take(&self) -> Option<Request> {
        self.lock().as_mut()?.queue.pop_front()
    }

    /// A request to a machine that is over is dropped, which whoever waits for it notices.
    fn put(&self, request: Request, mailbox: &Mailbox) {
        if let Some(asked) = self.lock().as_mut() {
            asked.queue.push_back(request);
        }
        mailbox.ask(Asked::Pause);
    }

    /// Asks for a snapshot; the result comes through the receiver.
    pub fn snapshot(
        &self,
        directory: PathBuf,
        mailbox: &Mailbox,
    ) -> Receiver<Result<(), SnapshotError>> {
        let (reply, result) = channel();
        self.put(Request::Snapshot { directory, reply }, mailbox);
        result
    }

    /// Asks for the guest to be handed over to a backup; what came of it comes through the receiver.
    pub fn hand_over(&self, mailbox: &Mailbox) -> Receiver<Result<(), HandOverError>> {
        let (reply, result) = channel();
        self.put(Request::HandOver { reply }, mailbox);
        result
    }

    /// Has the guest stand still until [`Self::resume`]; the receiver hears when it does.
    pub fn pause(&self, mailbox: &Mailbox) -> Receiver<()> {
        let (reply, stands) = channel();
        // A machine that is over never stands still: then the reply is dropped, which is noticed.
        if let Some(asked) = self.lock().as_mut() {
            asked.pausing.push(reply);
        }
        self.is_paused.store(true, Ordering::Release);
        // Who still waits for it to go on need not.
        self.tell_resumed();
        mailbox.ask(Asked::Pause);
        stands
    }

    /// The guest stands still, and its side's status says so.
    pub(crate) fn tell_paused(&self) {
        self.tell(|asked| &mut asked.pausing);
    }

    /// The guest is not paused, and its side's status says so.
    pub(crate) fn tell_resumed(&self) {
        self.tell(|asked| &mut asked.resuming);
    }

    fn tell(&self, who: impl Fn(&mut AskedFor) -> &mut Vec<Sender<()>>) {
        for reply in self.lock().iter_mut().flat_map(|asked| who(asked).drain(..)) {
            // Whoever asked may have gone.
            let _ = reply.send(());
        }
    }

    /// Has it go on; the receiver hears when it is not paused any more. `None` if nobody had paused it.
    pub fn resume(&self, mailbox: &Mailbox) -> Option<Receiver<()>> {
        let (reply, goes_on) = channel();
        let was_paused = self.is_paused.swap(false, Ordering::AcqRel);
        // Who still waits for the pause need not.
        self.tell_paused();
        if let Some(asked) = self.lock().as_mut().filter(|_| was_paused) {
            asked.resuming.push(reply);
        }
        // Behind that: the machine's thread comes by once more.
        mailbox.ask(Asked::Pause);
        was_paused.then_some(goes_on)
    }

    /// An operator wants the guest to stand still.
    pub(crate) fn is_paused(&self) -> bool {
        self.is_paused.load(Ordering::Acquire)
    }

    /// Begins to watch what the machine writes. Waits for the machine.
    pub(crate) fn watch(&self, mailbox: &Mailbox) -> Result<Watched, SideGone> {
        let (reply, watched) = channel();
        self.put(Request::Watch { reply }, mailbox);
        watched.recv().map_err(|_| SideGone)
    }

    /// Has the machine do a part of what it would have to do when a log begins: a rest of a few
    /// milliseconds. How many pages are left to look at.
    pub(crate) fn prepare(&self, mailbox: &Mailbox) -> Result<usize, SideGone> {
        let (reply, left) = channel();
        self.put(Request::Prepare { reply }, mailbox);
        left.recv().map_err(|_| SideGone)
    }

    /// Has `task` done with the machine at rest, and waits for what comes of it.
    pub(crate) fn at_rest<T: Send + 'static>(
        &self,
        mailbox: &Mailbox,
        task: impl FnOnce(&mut Machine) -> T + Send + 'static,
    ) -> Result<T, SideGone> {
        let (reply, done) = channel();
        let task = move |machine: &mut Machine| {
            // Whoever asked waits for it.
            let _ = reply.send(task(machine));
        };
        self.put(Request::AtRest(AtRest(Box::new(task))), mailbox);
        done.recv().map_err(|_| SideGone)
    }

    /// Asks for what was written since the last round; if that is no more than `limit` pages, the
    /// backup's log begins, and the taps are closed. Waits for the machine.
    pub(crate) fn round(
        &self,
        view: Arc<WriteView>,
        limit: usize,
        (ticket, taps): (JoinTicket, Vec<TapEnd>),
        mailbox: &Mailbox,
    ) -> Result<RoundEnd, SideGone> {
        let (reply, end) = channel();
        self.put(Request::Round { view, limit, ticket, taps, reply }, mailbox);
        end.recv().map_err(|_| SideGone)
    }

    /// Does what was asked, with the machine at rest.
    pub(crate) fn serve(&self, machine: &mut Machine, host: &mut dyn JoinHost) {
        while let Some(request) = self.take() {
            match request {
                Request::Snapshot { directory, reply } => {
                    // Whoever asked may have gone; the snapshot is there all the same.
                    let _ = reply.send(snapshot::save(machine, &directory));
                }
                Request::AtRest(AtRest(task)) => task(machine),
                Request::HandOver { reply } => host.hand_over(reply),
                Request::Watch { reply } => {
                    let _ = reply.send(Watched::begin(machine));
                }
                Request::Prepare { reply } => {
                    let _ = reply.send(machine.prepare_digest(PREPARED_PAGES));
                }
                Request::Round { view, limit, ticket, taps, reply } => {
                    let paused = Instant::now();
                    let written = machine.take_written(&view);
                    if written.len() > limit {
                        let _ = reply.send(RoundEnd::Written(written));
                        continue;
                    }
                    match host.begin(machine, &ticket) {
                        Beginning::Here(position, state, outputs) => {
                            // What is completed from here on, the backup knows by its log.
                            taps.iter().for_each(TapEnd::close);
                            let mut pages = CopiedPages::default();
                            pages.copy(machine.ram(), &written);
                            let content = JoinContent { machine: state.encode(), outputs };
                            let state = content.encode();
                            let rest = rest(position, state, pages, paused);
                            // Without a taker the session ends, and what began with it.
                            let _ = reply.send(RoundEnd::Begun(rest));
                        }
                        // What was written is in the view again, for the next try.
                        Beginning::Later => {
                            view.put_back(&written);
                            let _ = reply.send(RoundEnd::Later);
                        }
                        Beginning::Gone => {}
                    }
                }
            }
        }
    }

    /// Refuses what was asked and not done, and whatever is asked from now on: the machine is over.
    pub(crate) fn close(&self) {
        self.lock().take();
    }
}

fn rest(position: LogPosition, state: Vec<u8>, pages: CopiedPages, paused: Instant) -> Rest {
    Rest { position, state, pages, pause: paused.elapsed() }
}
