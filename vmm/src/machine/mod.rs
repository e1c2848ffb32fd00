//! The machine: a CPU, a board and guest time, and the loop that runs them.
//!
//! The machine is a deterministic function of its inputs. The loop is the same on the primary
//! and on the backup; only the [`Inputs`] and the [`OutputGate`] given to it differ.
//!
//! **Order at one point.** Timers due at the point come first, then the point's arrivals in log
//! order, then at most one interrupt. After an interrupt is delivered the guest retires at least
//! one instruction before the next arrival. So a log entry that names a point names one place
//! in this order, without saying more.
//!
//! **Places without a name.** An engine that the host made come back between two points is at a
//! place that no log can name. The loop serves an operator there, who only looks; nothing reaches
//! the guest before the next point.

mod boot_source;
mod boundary;
mod copy;
mod delta;
mod digest;
mod edge;
mod error;
mod memory_sum;
mod reset;
mod state;

#[cfg(test)]
mod edge_tests;
#[cfg(test)]
mod off_tests;

pub use boot_source::{BootSource, DiskBoot};
pub use copy::{CopyError, FRESH_BYTES};
pub use delta::{Delta, DeltaBase};
pub(crate) use edge::contained;
pub use edge::{FaultReport, Kept, abort_on_panics};
pub use error::{LockstepRefusal, MachineError};
pub use memory_sum::differing_page;
pub use state::{MachineConfig, MachineState, STATE_VERSION, StateError};

use crate::board::{Board, BoardError, DiskOperation, Effect};
use crate::boot::BootError;
use crate::devices::reset::ResetCause;
use crate::devices::virtio::block::completed::{CompletedWrites, WriteCount};
use crate::devices::virtio::net::addresses::Addresses;
use crate::engine::EngineError;
use crate::inputs::{DeviceRequest, Inputs, PointScale, PointStep, Step};
use crate::outputs::{Output, OutputGate, OutputKind};
use crate::world::Repeats;
use delta::SinceBase;
use memory_sum::MemorySum;
use reset::History;
use std::path::PathBuf;
use std::sync::Arc;
use vmft_cpu::Kicker;
use vmft_cpu::memory::{GuestRam, MemoryError};
use vmft_cpu::soft::CompilerGauge;
use vmft_cpu::{Bus, Engine, Exit, InvalidState, PortWidth};
use vmft_log::entry::{Arrival, OutputSequence, StopReason};
use vmft_log::point::{ExecutionPoint, VirtualClock, VirtualTime};

/// Why [`Machine::run`] came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunEnd {
    /// The guest switched itself off, or the inputs said stop.
    Stopped(StopReason),
    /// The inputs asked for a pause; the machine can be saved and run on.
    Paused,
    /// This side has lost its generation.
    Halted,
    /// The log is over; the machine can go live from here.
    LogEnded,
}

/// Why a machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel or initramfs.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The devices.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The boot loader's CPU state.
    #[error(transparent)]
    Cpu(#[from] InvalidState),
    /// A saved machine.
    #[error(transparent)]
    State(StateError),
}

/// What is said of what a guest does, which can do it as often as it likes.
static GUESTS_DOING: Repeats = Repeats::new();

/// A guest: everything that a digest covers, and nothing else.
#[derive(Debug)]
pub struct Machine {
    config: MachineConfig,
    source: BootSource,
    engine: Box<dyn Engine>,
    /// False behind a place without a name, until the next point.
    at_point: bool,
    board: Board,
    clock: VirtualClock,
    outputs: OutputSequence,
    /// Console bytes written by the guest so far.
    console_offset: u64,
    /// It was reset, and waits for what its disks boot now: no instruction is executed.
    awaits_boot: bool,
    memory_sum: MemorySum,
    /// Pages written since both sides last agreed on all of memory, where that may be needed.
    since_base: Option<SinceBase>,
    /// It may be needed although the engine does without.
    keeps_deltas: bool,
    /// Left in the middle of something by a panic: it runs no more.
    broken: bool,
    /// It is to panic at its next step.
    fails: bool,
    /// What an operator is told of a guest that does not start.
    history: History,
    /// Where reports of faults may be written.
    reports: Vec<PathBuf>,
}

/// The board as the CPU sees it: guest time is computed where it is asked for.
struct Wiring<'a> {
    board: &'a mut Board,
    clock: VirtualClock,
}

impl Bus for Wiring<'_> {
    fn port_read(&mut self, at: ExecutionPoint, port: u16, width: PortWidth) -> u32 {
        self.board.port_read(self.clock.time_at(at), port, width)
    }

    fn port_write(&mut self, at: ExecutionPoint, port: u16, width: PortWidth, value: u32) {
        self.board.port_write(self.clock.time_at(at), port, width, value);
    }

    fn memory_read(&mut self, at: ExecutionPoint, address: u64, data: &mut [u8]) {
        self.board.memory_read(self.clock.time_at(at), address, data);
    }

    fn memory_write(&mut self, at: ExecutionPoint, address: u64, data: &[u8]) {
        self.board.memory_write(self.clock.time_at(at), address, data);
    }

    fn time_stamp(&mut self, at: ExecutionPoint) -> u64 {
        // The time-stamp counter runs at 1 GHz: one tick is one nanosecond of guest time.
        self.clock.time_at(at).as_ns()
    }
}

impl Machine {
    /// A machine that is about to execute the kernel's first instruction.
    ///
    /// # Errors
    /// See [`SetupError`].
    pub fn new(config: MachineConfig, source: BootSource) -> Result<Self, SetupError> {
        let ram = GuestRam::new(config.memory())?;
        let engine = config.engine.open(ram, config.cpus())?;
        Self::on_engine(config, source, engine)
    }

    /// The same on an engine of the configured kind that is open already, over fresh memory of the
    /// configured size: one whose counter is not the host's, say.
    ///
    /// # Errors
    /// See [`SetupError`].
    pub fn on_engine(
        config: MachineConfig,
        source: BootSource,
        mut engine: Box<dyn Engine>,
    ) -> Result<Self, SetupError> {
        let board = Board::new(&config.board, engine.ram())?;
        let cpu = source.load(engine.ram(), config.cpus())?;
        engine.restore(&cpu, ExecutionPoint::START)?;
        let rate = PointScale::of(config.engine).initial_rate;
        Ok(Self {
            config,
            source,
            engine,
            at_point: true,
            board,
            clock: VirtualClock {
                sync_point: ExecutionPoint::START,
                sync_time: VirtualTime::ZERO,
                rate,
            },
            outputs: OutputSequence(0),
            console_offset: 0,
            awaits_boot: false,
            memory_sum: MemorySum::default(),
            since_base: None,
            keeps_deltas: false,
            broken: false,
            fails: false,
            history: History::default(),
            reports: edge::usual_directories(),
        })
    }

    /// The last point reached: on `soft`, instructions retired.
    pub fn point(&self) -> ExecutionPoint {
        self.engine.point()
    }

    /// True if the machine is at the point itself, and not behind it at a place without a name.
    pub fn is_at_point(&self) -> bool {
        self.at_point
    }

    /// Guest time as a function of the point.
    pub fn clock(&self) -> VirtualClock {
        self.clock
    }

    /// Outputs produced so far.
    pub fn outputs(&self) -> OutputSequence {
        self.outputs
    }

    /// Console bytes written by the guest so far.
    pub fn console_offset(&self) -> u64 {
        self.console_offset
    }

    /// What the machine is made of.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// What a point is worth on this machine's engine.
    pub fn scale(&self) -> PointScale {
        PointScale::of(self.config.engine)
    }

    /// Makes a running machine come back to its loop soon, from another thread. `None` if it
    /// always does.
    pub fn kicker(&self) -> Option<Kicker> {
        self.engine.kicker()
    }

    /// The machine's run can be repeated from a log: its engine names points, and whatever the
    /// engine cannot keep from the guest, the guest is known to leave alone.
    ///
    /// # Errors
    /// [`LockstepRefusal`]
    pub fn check_lockstep(&self) -> Result<(), LockstepRefusal> {
        let engine = self.config.engine;
        if !engine.is_replayable() {
            return Err(LockstepRefusal::FreeRunning);
        }
        if engine.trusts_the_guest() {
            crate::boot::examine(&self.source.kernel)
                .map_err(|source| LockstepRefusal::Kernel { engine, source })?;
        }
        Ok(())
    }

    /// The kernel file it boots from.
    pub fn kernel(&self) -> &[u8] {
        &self.source.kernel
    }

    /// How much of what the engine executes is compiled, if it is one that may compile.
    pub fn compiler(&self) -> Option<Arc<CompilerGauge>> {
        self.engine.compiler()
    }

    /// The guest's memory.
    pub fn ram(&self) -> &GuestRam {
        self.engine.ram()
    }

    /// The requests of devices that wait for the outside world, in the order they were made: what
    /// a side that goes live must do again.
    pub fn outstanding(&self) -> Vec<Effect> {
        self.board.outstanding()
    }

    /// From now on the machine keeps the disk writes it has completed until a flush has covered them: it is a
    /// pair's. To be said before anybody follows; whoever does, does the same.
    pub fn keep_completed_writes(&mut self) {
        self.board.keep_completed_writes();
    }

    /// How many writes each disk has completed, while they are kept.
    pub fn write_counts(&self) -> Vec<WriteCount> {
        self.board.write_counts()
    }

    /// The completed writes of each disk that no flush has covered: what a side that goes live must make
    /// again, before anything else.
    pub fn completed_writes(&self) -> Vec<CompletedWrites> {
        self.board.completed_writes(&[])
    }

    /// The addresses the guest was seen to use on the network; `None` without a network.
    pub fn network_addresses(&self) -> Option<&Addresses> {
        self.board.network_addresses()
    }

    /// Runs until something ends it. The machine is at rest from then on: between two instructions, on
    /// every CPU.
    ///
    /// # Errors
    /// See [`MachineError`]. The machine is at rest and can still be saved, unless it is
    /// [`MachineError::Broken`].
    ///
    /// # Panics
    /// If the machine is broken.
    pub fn run(
        &mut self,
        inputs: &mut dyn Inputs,
        gate: &dyn OutputGate,
    ) -> Result<RunEnd, MachineError> {
        assert!(!self.broken, "a broken machine is not run again");
        let end = self.run_on(inputs, gate);
        if self.broken {
            return end;
        }
        if self.guarded(|machine| Ok(machine.bring_to_rest()))? {
            self.emit_effects(inputs, gate)?;
        }
        end
    }

    /// Several CPUs run on while the loop looks at the world; here they stop. True if that used the board.
    fn bring_to_rest(&mut self) -> bool {
        self.engine.rest(&mut Wiring { board: &mut self.board, clock: self.clock })
    }

    fn run_on(
        &mut self,
        inputs: &mut dyn Inputs,
        gate: &dyn OutputGate,
    ) -> Result<RunEnd, MachineError> {
        if let Some(exits) = self.engine.exit_stream() {
            exits.watch_exits(inputs.watches_exits());
        }
        let mut exits = Vec::new();
        loop {
            self.guarded(|machine| {
                machine.board.advance(machine.time());
                Ok(())
            })?;
            self.report_faults();
            self.emit_effects(inputs, gate)?;
            // What several CPUs asked for while they came to rest.
            if self.board.reset_requested() {
                self.guarded(|machine| machine.reset(machine.board.reset_cause()))?;
            }
            if self.is_off() {
                return Ok(RunEnd::Stopped(StopReason::GuestPowerOff));
            }
            let bound = match inputs.next(&self.boundary())? {
                Step::RunTo(bound) => bound,
                Step::Here(_, step) => {
                    self.step_at_point(step, inputs)?;
                    continue;
                }
                Step::Checkpoint => {
                    let delta = self.guarded(|machine| Ok(machine.take_delta()))?;
                    inputs.checkpoint(delta)?;
                    continue;
                }
                Step::Boot(source) => {
                    if let Err(why) = self.guarded(|machine| Ok(machine.boot(*source)))? {
                        tracing::error!("the guest cannot start again: {why}");
                        return Ok(RunEnd::Stopped(StopReason::CannotBoot));
                    }
                    continue;
                }
                Step::Whole => {
                    let delta = self.guarded(|machine| Ok(machine.take_whole()))?;
                    inputs.checkpoint(Some(delta))?;
                    continue;
                }
                Step::Adopt(delta) => {
                    let point = self.engine.point();
                    let outputs = self.guarded(|machine| {
                        let adopted = machine.adopt(*delta);
                        adopted.map_err(|source| MachineError::Adopt { point, source })
                    })?;
                    outputs.into_iter().for_each(|output| gate.emit(output));
                    continue;
                }
                Step::Pause => return Ok(RunEnd::Paused),
                Step::Stop(reason) => {
                    if reason == StopReason::CannotBoot {
                        self.tell_last_words();
                    }
                    return Ok(RunEnd::Stopped(reason));
                }
                Step::Halt => return Ok(RunEnd::Halted),
                Step::LogEnded => return Ok(RunEnd::LogEnded),
            };
            if let Some(branch) = inputs.branch_before(bound)
                && let Some(branches) = self.engine.branch_points()
            {
                branches.expect_branch(bound, branch);
            }
            let ran = self.guarded(|machine| machine.run_slice(bound));
            if let Err(broken @ MachineError::Broken(_)) = ran {
                return Err(broken);
            }
            if let Some(stream) = self.engine.exit_stream() {
                stream.take_exits(&mut exits);
            }
            if !exits.is_empty() {
                inputs.exits(self.engine.point(), &exits)?;
                exits.clear();
            }
            ran?;
        }
    }

    /// Does what is done to a guest at a point.
    fn step_at_point(
        &mut self,
        step: PointStep,
        inputs: &mut dyn Inputs,
    ) -> Result<(), MachineError> {
        match step {
            PointStep::Deliver(arrival) => self.guarded(|machine| machine.deliver(&arrival))?,
            PointStep::Digest => {
                let digest = self.guarded(|machine| Ok(machine.digest()))?;
                inputs.digest(self.engine.point(), digest)?;
                if inputs.is_base() {
                    self.begin_delta();
                }
            }
            PointStep::Flush => drop(self.checkpoint()),
        }
        Ok(())
    }

    /// Runs to `bound`, or to the first exit that needs the loop. If an interrupt is delivered,
    /// goes on until an instruction has retired.
    fn run_slice(&mut self, bound: ExecutionPoint) -> Result<(), MachineError> {
        assert!(!self.fails, "planted with `vmft fault`");
        let start = self.engine.point();
        let mut bound = bound;
        // Else timers are due at the points that come, and a point ahead is none to stop at.
        let stops_anywhere = self.scale().stops_anywhere;
        loop {
            let wanted = self.board.interrupt_pending();
            if wanted && self.engine.is_halted() {
                self.inject();
                if stops_anywhere {
                    bound = bound.min(start.after(1));
                }
                continue;
            }
            let timer =
                self.board.next_timer().map_or(ExecutionPoint::NEVER, |t| self.clock.point_at(t));
            let until = match stops_anywhere {
                true => bound.min(timer.max(start.after(1))),
                false => bound,
            };
            let mut wiring = Wiring { board: &mut self.board, clock: self.clock };
            let exit = self.engine.run(until, wanted, &mut wiring);
            match exit {
                Exit::Bound | Exit::BusAccess | Exit::Halted { .. } => self.at_point = true,
                // On the way from one point to the next.
                Exit::InterruptWindow => {}
                // Nothing retires: a reset makes another place of the same number.
                Exit::Kicked | Exit::Shutdown | Exit::Caught(_) | Exit::Fatal(_) => {
                    self.at_point = false;
                }
            }
            match exit {
                Exit::Bound | Exit::Halted { .. } | Exit::Kicked => return Ok(()),
                Exit::BusAccess => {
                    if self.board.reset_requested() {
                        self.reset(self.board.reset_cause())?;
                    }
                    return Ok(());
                }
                Exit::InterruptWindow => {
                    self.inject();
                    if stops_anywhere {
                        bound = bound.min(self.engine.point().after(1));
                    }
                }
                Exit::Shutdown => {
                    self.reset(ResetCause::TripleFault)?;
                    return Ok(());
                }
                Exit::Caught(caught) => {
                    tracing::warn!("the guest is caught in its own fault handlers: {caught}");
                    self.reset(ResetCause::FaultLoop)?;
                    return Ok(());
                }
                Exit::Fatal(fault) => return Err(fault.into()),
            }
        }
    }

    fn inject(&mut self) {
        let vector = self.board.acknowledge_interrupt();
        self.engine.inject(vector);
    }

    fn deliver(&mut self, arrival: &Arrival) -> Result<(), MachineError> {
        let point = self.engine.point();
        if let Arrival::ClockSync { time, rate } = arrival {
            let sync_time = (*time).max(self.time());
            self.clock = VirtualClock { sync_point: point, sync_time, rate: *rate };
            return Ok(());
        }
        self.board
            .deliver(self.time(), arrival)
            .map_err(|source| MachineError::Delivery { point, source })
    }

    /// Tells the operator of devices that stopped because the guest broke their rules.
    fn report_faults(&mut self) {
        if self.board.has_faults() {
            for fault in self.board.take_faults() {
                if let Some(times) = GUESTS_DOING.note(&fault.to_string()) {
                    tracing::error!("{fault}: {}{times}", fault.fault);
                }
            }
        }
    }

    /// Hands what the devices asked for to the two doors.
    fn emit_effects(
        &mut self,
        inputs: &mut dyn Inputs,
        gate: &dyn OutputGate,
    ) -> Result<(), MachineError> {
        if !self.board.has_effects() {
            return Ok(());
        }
        for effect in self.board.effects() {
            let kind = match effect {
                Effect::Console(bytes) => {
                    self.history.console(&bytes);
                    let offset = self.console_offset;
                    self.console_offset += bytes.len() as u64;
                    OutputKind::Console { offset, bytes }
                }
                Effect::Disk {
                    disk,
                    request,
                    operation: operation @ DiskOperation::Read { .. },
                } => {
                    inputs.request(DeviceRequest::DiskRead { disk, request, operation })?;
                    continue;
                }
                Effect::Disk { disk, request, operation } => {
                    if matches!(operation, DiskOperation::Write { .. }) {
                        self.history.disk_written();
                    }
                    OutputKind::Disk { disk, request, operation }
                }
                Effect::Packet(packet) => OutputKind::Packet(packet),
                Effect::Entropy { request, len } => {
                    inputs.request(DeviceRequest::Entropy { request, len })?;
                    continue;
                }
            };
            self.outputs = OutputSequence(self.outputs.0 + 1);
            gate.emit(Output { sequence: self.outputs, kind });
        }
        Ok(())
    }
}
