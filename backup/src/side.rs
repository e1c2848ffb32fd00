//! One side: a process that runs, or may come to run, the guest.

use crate::arbiter::{Arbiter, ArbiterError, Candidate, FenceState, GenerationFence};
use crate::bounds::Bounds;
use crate::disk_care;
use crate::fault::Faults;
use crate::mirror::{MirrorError, Mirrors};
use crate::periodic_kicks;
use crate::requests::{NoBackups, Requests};
use crate::standstill::Standstill;
use crate::status::{Role, StatusBoard};
use crate::tell;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmft_log::entry::{Generation, StopReason};
use vmft_logging_channel::transport::TransportError;
use vmft_vmm::board::Effect;
use vmft_vmm::inputs::{ClockControl, Inputs, Live, LogSink, OnReboot, Recording, WallClock};
use vmft_vmm::machine::{LockstepRefusal, Machine, MachineError, RunEnd, StateError};
use vmft_vmm::outputs::{HeldOutputs, Output, OutputGate, Outside};
use vmft_vmm::world::console::ConsoleHub;
use vmft_vmm::world::net::{NetError, NetPort};
use vmft_vmm::world::{
    DiskDesk, DiskFile, DiskFileError, Fence, HostOutside, HostSource, Mailbox, NoFence,
};

/// How long an operator's stop waits for what is on its way out.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
/// How long it waits for a console whose reader takes nothing.
const CONSOLE_PATIENCE: Duration = Duration::from_secs(2);
/// How long one wait takes before it is looked whether an operator asks for a stop.
const FINISH_STEP: Duration = Duration::from_millis(50);

/// How outputs get on, once an operator has asked for a stop.
#[derive(Debug)]
struct StopProgress {
    began: Instant,
    /// Console bytes written when that was seen to change last, and when.
    written: u64,
    moved: Instant,
}

impl StopProgress {
    fn new(written: u64) -> Self {
        Self { began: Instant::now(), written, moved: Instant::now() }
    }

    /// True if it is not worth waiting any more.
    fn is_over(&mut self, written: u64, disks_done: bool) -> bool {
        if written != self.written {
            (self.written, self.moved) = (written, Instant::now());
        }
        let is_stuck = disks_done && self.moved.elapsed() > CONSOLE_PATIENCE;
        is_stuck || self.began.elapsed() > STOP_PATIENCE
    }
}

/// Why a side cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SideError {
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskFileError),
    /// This side's copy of a disk.
    #[error(transparent)]
    Mirror(#[from] MirrorError),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetError),
    /// The arbiter.
    #[error(transparent)]
    Arbiter(#[from] ArbiterError),
    /// The channel.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The primary's machine cannot be restored here.
    #[error("the primary's machine cannot be restored")]
    State(#[from] StateError),
    /// The machine's run cannot be followed.
    #[error(transparent)]
    Lockstep(#[from] LockstepRefusal),
    /// The host.
    #[error("reading from the host")]
    Host(#[source] io::Error),
}

/// How a side's guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SideEnd {
    /// On purpose.
    Stopped(StopReason),
    /// The other side goes on; this one halted.
    Halted(String),
}

/// What a process has for its guest.
#[derive(Debug)]
pub struct Side {
    /// Who this is, to the arbiter.
    pub who: Candidate,
    /// What the world has for the guest.
    pub mailbox: Arc<Mailbox>,
    /// The guest's console.
    pub console: Arc<ConsoleHub>,
    /// The guest's disks.
    pub disks: Vec<DiskFile>,
    /// Those of which each side has a copy of its own.
    pub mirrors: Arc<Mirrors>,
    /// What is done when their storage fails.
    pub disk_desk: Arc<DiskDesk>,
    /// Where the guest's network device is connected, if it has one.
    pub network: Option<Arc<NetPort>>,
    /// What the guest's real-time clock is told when it runs here.
    pub wall_clock: WallClock,
    /// What a reset of the guest leads to while it runs here.
    pub on_reboot: OnReboot,
    /// For `vmft status`.
    pub status: Arc<StatusBoard>,
    /// What operators ask.
    pub requests: Arc<Requests>,
    /// What is to go wrong.
    pub faults: Arc<Faults>,
    /// How far its backups may be behind.
    pub bounds: Arc<Bounds>,
}

/// A live machine's way out: what carries its outputs, and the gate in front of that.
#[derive(Debug)]
pub(crate) struct OutputPath {
    pub(crate) outside: Arc<HostOutside>,
    pub(crate) gate: Arc<HeldOutputs>,
}

impl Side {
    /// Opens the way out: disks' threads and the gate, open.
    pub(crate) fn open_output_path(&self, fence: &Arc<dyn Fence>) -> Result<OutputPath, SideError> {
        let console = Arc::clone(&self.console);
        let network = self.network.clone();
        let outside = HostOutside::start(
            &self.disks,
            console,
            network,
            fence,
            &self.mailbox,
            &self.disk_desk,
        )?;
        let desk = Arc::clone(&self.disk_desk);
        self.status.set_disks(Some(Arc::new(move || disk_care::statuses(&desk))));
        let outside = Arc::new(outside);
        let gate = Arc::new(HeldOutputs::open(Arc::clone(&outside) as Arc<dyn Outside>));
        self.status.set_gate(Arc::clone(&gate));
        self.status.set_console(Arc::clone(&self.console));
        Ok(OutputPath { outside, gate })
    }

    /// Connects `machine` to the network, before it or anyone for it says anything there.
    pub(crate) fn attach_network(
        &self,
        machine: &Machine,
        fence: &Arc<dyn Fence>,
    ) -> Result<(), SideError> {
        let config = machine.config().board.net;
        if let (Some(port), Some(config)) = (&self.network, config) {
            let addresses = machine.network_addresses().cloned().unwrap_or_default();
            port.attach(&config, &addresses, fence, &self.mailbox)?;
            self.status.set_network(Arc::clone(port));
        }
        Ok(())
    }

    /// Live inputs for `machine`, which goes on from where it is.
    pub(crate) fn live_inputs(
        &self,
        output_path: &OutputPath,
        machine: &Machine,
    ) -> Result<Live<HostSource>, SideError> {
        let (outside, gate) = (Arc::clone(&output_path.outside), Arc::clone(&output_path.gate));
        self.status.set_machine(machine);
        let gauges = Arc::clone(self.status.gauges());
        let source = {
            let disk_boot = machine.boot_source().disk.clone();
            HostSource::new(Arc::clone(&self.mailbox), outside, gate, gauges, disk_boot)
        };
        let source = source.map_err(SideError::Host)?;
        let scale = machine.scale();
        self.mailbox.set_kicker(machine.kicker(), scale.kick_for_arrivals);
        let clock = ClockControl::new(&machine.clock(), machine.point(), scale);
        Ok(Live::new(source, clock).with_wall_clock(self.wall_clock).with_on_reboot(self.on_reboot))
    }

    /// Does again what the devices still wait for: a side that goes live, or that was restored,
    /// cannot know how far it came (§2.2 and §3.4 of the paper). Before that, what the guest was told
    /// is written: it may have died with the host that wrote it.
    pub(crate) fn reissue(
        &self,
        output_path: &OutputPath,
        live: &mut Live<HostSource>,
        machine: &Machine,
    ) -> Result<usize, SideError> {
        use vmft_vmm::inputs::DeviceRequest;
        let completed = machine.completed_writes();
        if completed.iter().any(|disk| !disk.writes.is_empty()) {
            output_path.outside.rewrite(&completed);
        }
        let outstanding = machine.outstanding();
        let count = outstanding.len();
        for effect in outstanding {
            match effect {
                Effect::Disk { disk, request, operation } => {
                    output_path.outside.reissue(disk, request, operation);
                }
                Effect::Entropy { request, len } => live
                    .request(DeviceRequest::Entropy { request, len })
                    .map_err(|error| SideError::Machine(error.into()))?,
                Effect::Console(_) | Effect::Packet(_) => {
                    unreachable!("console bytes and packets wait for no answer")
                }
            }
        }
        Ok(count)
    }

    /// Runs a machine that nobody follows, until it stops.
    ///
    /// # Errors
    /// See [`SideError`].
    pub fn run(&self, mut machine: Machine) -> Result<SideEnd, SideError> {
        let fence: Arc<dyn Fence> = Arc::new(NoFence);
        let output_path = self.open_output_path(&fence)?;
        self.attach_network(&machine, &fence)?;
        let mut live = self.live_inputs(&output_path, &machine)?;
        self.console.go_live(Arc::clone(&self.mailbox), None);
        self.console.reveal(machine.console_offset());
        self.reissue(&output_path, &mut live, &machine)?;
        self.status.set_role(Role::Unprotected, Generation(0));
        let end = self.run_inputs(&mut machine, &mut live, &*output_path.gate)?;
        self.finish(&output_path);
        Ok(end)
    }

    /// Runs a machine and records it to `log`, until it stops. Outputs do not wait: nobody follows.
    ///
    /// # Errors
    /// See [`SideError`].
    pub fn record(&self, machine: &mut Machine, log: impl LogSink) -> Result<SideEnd, SideError> {
        machine.check_lockstep()?;
        let fence: Arc<dyn Fence> = Arc::new(NoFence);
        let output_path = self.open_output_path(&fence)?;
        self.attach_network(machine, &fence)?;
        let mut live = self.live_inputs(&output_path, machine)?;
        self.console.go_live(Arc::clone(&self.mailbox), None);
        self.reissue(&output_path, &mut live, machine)?;
        self.status.set_role(Role::Unprotected, Generation(0));
        let gate = Arc::clone(&output_path.gate);
        let _kicks = periodic_kicks::begin(machine);
        let mut inputs = Recording::new(live, log, gate, machine.point(), machine.outputs());
        let end = self.run_inputs(machine, &mut inputs, &*output_path.gate);
        if let Ok(SideEnd::Stopped(reason)) = end {
            inputs
                .stopped(machine.point(), machine.outputs(), reason)
                .map_err(MachineError::from)?;
        }
        // What was recorded up to a failure is what shows the failure again.
        inputs.log().flush().map_err(SideError::Host)?;
        self.finish(&output_path);
        end
    }

    fn run_inputs(
        &self,
        machine: &mut Machine,
        inputs: &mut dyn Inputs,
        gate: &dyn OutputGate,
    ) -> Result<SideEnd, SideError> {
        let mut standstill = Standstill::default();
        let watched = self.status.liveness().begin();
        loop {
            match self.run_or_stand(machine, inputs, gate, &mut standstill)? {
                RunEnd::Paused => {
                    watched.aside(|| self.requests.serve(machine, &mut NoBackups));
                    self.disk_desk.answer_final();
                    self.tell_of_disks(&self.hear_of_disks(), None);
                }
                RunEnd::Stopped(reason) => return Ok(SideEnd::Stopped(reason)),
                RunEnd::Halted => return Ok(SideEnd::Halted("asked to halt".to_owned())),
                RunEnd::LogEnded => unreachable!("a live machine follows no log"),
            }
        }
    }

    /// Lets out what a machine that has stopped still owed, as the side of `generation`.
    pub(crate) fn finish_outputs(
        &self,
        machine: &Machine,
        arbiter: &Arc<dyn Arbiter>,
        generation: Generation,
        left: Vec<Output>,
    ) -> Result<(), SideError> {
        let state = Arc::new(FenceState::new(generation));
        let fence = GenerationFence::new(Arc::clone(arbiter), self.who.clone(), state, |_, _| {});
        let fence: Arc<dyn Fence> = Arc::new(fence);
        let output_path = self.open_output_path(&fence)?;
        self.attach_network(machine, &fence)?;
        let mut live = self.live_inputs(&output_path, machine)?;
        for output in left {
            output_path.gate.emit(output);
        }
        self.console.reveal(machine.console_offset());
        self.reissue(&output_path, &mut live, machine)?;
        self.finish(&output_path);
        Ok(())
    }

    /// Waits until everything let out is out: however long that takes, if the guest has ended by itself;
    /// when an operator stops the side, no longer than the disks or the console's reader get on, and
    /// [`STOP_PATIENCE`] at most. What is not out then is said.
    pub(crate) fn finish(&self, output_path: &OutputPath) {
        let mut disks = output_path.outside.drain();
        let mut progress = StopProgress::new(self.console.written());
        let (mut disks_done, mut console_done) = (false, false);
        while !(disks_done && console_done) {
            disks_done = disks_done || disks.wait(FINISH_STEP);
            self.disk_desk.answer_final();
            self.tell_of_disks(&self.hear_of_disks(), None);
            if self.mailbox.was_asked_to_stop() && self.disk_desk.stands_still() {
                // What is kept is done when an operator resumes it, and this one stops.
                disks_done = true;
            }
            console_done = self.console.drain(FINISH_STEP);
            if !self.mailbox.was_asked_to_stop() {
                progress = StopProgress::new(self.console.written());
            } else if progress.is_over(self.console.written(), disks_done) {
                break;
            }
        }
        if disks.left() > 0 {
            tell!("stopped before {} of the disks had done all requests", disks.left());
        }
        let bytes = self.console.undelivered();
        if bytes > 0 {
            let why = self.console.trouble();
            let why = why.unwrap_or_else(|| "nobody took them".to_owned());
            tell!("the last {bytes} bytes of the guest's console are not delivered: {why}");
        }
        self.console.close();
    }
}
