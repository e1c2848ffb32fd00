//! Saving and restoring the whole machine.
//!
//! A checkpoint is a [`MachineState`] and the pages of memory that are not zero. It names a
//! point by its state: a machine restored from it goes on exactly as the saved one does.

use super::boot_source::{BootSource, decode_all};
use super::memory_sum::MemorySum;
use super::{Machine, SetupError};
use crate::board::{Board, BoardConfig, BoardError, BoardState};
use crate::boot;
use crate::devices::virtio::block::completed::{CompletedWrites, WriteCount};
use crate::engine::{EngineError, EngineKind};
use crate::inputs::PointScale;
use serde::{Deserialize, Serialize};
use vm_memory::{Address, Bytes};
use vmft_cpu::memory::{GuestRam, MemoryError, PAGE_SIZE, PageNumber, WriteView};
use vmft_cpu::{CpuCount, Cpus, InvalidState};
use vmft_kvm::PointKind;
use vmft_log::entry::OutputSequence;
use vmft_log::point::{ExecutionPoint, VirtualClock, VirtualTime};
use vmft_log::wire::MAX_COUNT;

/// Version of the encoding of [`MachineState`]; another version is refused.
pub const STATE_VERSION: u32 = 9;

/// What a machine is made of. Both sides of a pair have the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Memory and devices.
    pub board: BoardConfig,
    /// What executes its instructions, and what it counts.
    pub engine: EngineKind,
}

impl MachineConfig {
    /// How many CPUs there are.
    pub fn cpus(&self) -> CpuCount {
        self.board.cpus
    }

    /// Guest memory in bytes.
    pub fn memory(&self) -> u64 {
        self.board.memory.0
    }
}

/// Everything of a machine but its memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    version: u32,
    pub(super) config: MachineConfig,
    /// Left out of a snapshot's `state.json`: it has files of its own.
    #[serde(skip)]
    source: BootSource,
    pub(super) cpus: Cpus,
    pub(super) point: ExecutionPoint,
    pub(super) board: BoardState,
    /// Of each disk, the completed writes that no flush has covered; whoever follows may have the older ones.
    pub(super) completed: Vec<CompletedWrites>,
    pub(super) clock: VirtualClock,
    pub(super) outputs: OutputSequence,
    pub(super) console_offset: u64,
    /// It was reset, and waits for what its disks boot now.
    pub(super) awaits_boot: bool,
}

impl MachineState {
    /// The state in its encoded form, without what the guest boots from: that is
    /// [`BootSource::encode`]d apart.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("plain state always encodes")
    }

    /// Reads an encoded state. What the guest boots from is still to be given:
    /// [`Self::with_source`].
    ///
    /// # Errors
    /// [`StateError::Version`] or [`StateError::Encoding`].
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let (version, _): (u32, _) =
            postcard::take_from_bytes(bytes).map_err(StateError::Encoding)?;
        if version != STATE_VERSION {
            return Err(StateError::Version { found: version });
        }
        decode_all(bytes)
    }

    /// How many writes each disk has completed.
    pub fn write_counts(&self) -> Vec<WriteCount> {
        self.board.functions.disks.iter().map(|disk| disk.device.completed.completed).collect()
    }

    /// The completed writes it has, of each disk.
    pub fn completed_writes(&self) -> &[CompletedWrites] {
        &self.completed
    }

    /// The state with the completed writes that were left out of it, which whoever has followed so far has.
    ///
    /// # Errors
    /// [`StateError::OtherMachine`] if some are missing.
    pub fn with_earlier_writes(mut self, earlier: &[CompletedWrites]) -> Result<Self, StateError> {
        let disks = &self.board.functions.disks;
        if disks.len() != self.completed.len() || disks.len() != earlier.len() {
            return Err(StateError::OtherMachine);
        }
        let count = disks.len();
        for ((disk, own), earlier) in disks.iter().zip(&mut self.completed).zip(earlier) {
            let counts = disk.device.completed;
            let whole = own.after(earlier, counts.durable);
            let whole = whole.filter(|whole| whole.are(counts, count));
            *own = whole.ok_or(StateError::OtherMachine)?;
        }
        Ok(self)
    }

    /// The state of a machine that starts where its disks' completed writes are as good as on the disk: its
    /// host lives, and whoever restores it gives it the same images.
    pub fn without_completed_writes(mut self) -> Self {
        for (disk, completed) in self.board.functions.disks.iter_mut().zip(&mut self.completed) {
            let counts = &mut disk.device.completed;
            (counts.durable, counts.bytes) = (counts.completed, 0);
            *completed = CompletedWrites::none_after(counts.completed);
        }
        self
    }

    /// The state, and apart from it what the guest boots from.
    pub fn into_parts(mut self) -> (Self, BootSource) {
        let source = std::mem::take(&mut self.source);
        (self, source)
    }

    /// The state of a machine that boots from `source`.
    pub fn with_source(self, source: BootSource) -> Self {
        Self { source, ..self }
    }

    /// The same machine on another engine. Its points go on from the same number, though they count
    /// something else from here; guest time goes on from where it is, at the new engine's pace.
    ///
    /// # Errors
    /// [`StateError::TimeStamp`] if the guest was started where the time stamp counter is guest time,
    /// and would find the host's in its place; [`StateError::HostCpu`] if it ran freely and knows its
    /// host's CPU. A kernel that is known to look at neither may change over.
    pub fn on_engine(mut self, engine: EngineKind) -> Result<Self, StateError> {
        let from = self.config.engine;
        if from == engine {
            return Ok(self);
        }
        engine
            .check_cpus(self.config.cpus())
            .map_err(|source| StateError::Engine { engine, source })?;
        if !boot::is_vouched_for(&self.source.kernel) {
            match from {
                EngineKind::Soft => return Err(StateError::TimeStamp { engine }),
                EngineKind::Kvm { points: PointKind::Free } => {
                    return Err(StateError::HostCpu { engine });
                }
                EngineKind::Kvm { .. } => {}
            }
        }
        self.config.engine = engine;
        self.clock = VirtualClock {
            sync_point: self.point,
            sync_time: self.clock.time_at(self.point),
            rate: PointScale::of(engine).initial_rate,
        };
        Ok(self)
    }

    /// What the machine is made of.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Where the machine is.
    pub fn point(&self) -> ExecutionPoint {
        self.point
    }

    /// Guest time there.
    pub fn time(&self) -> VirtualTime {
        self.clock.time_at(self.point)
    }

    /// Console bytes written by the guest so far.
    pub fn console_offset(&self) -> u64 {
        self.console_offset
    }

    /// Outputs produced so far.
    pub fn outputs(&self) -> OutputSequence {
        self.outputs
    }
}

impl MachineState {
    /// What is wrong with it as a whole: each of its parts looks at itself when it is restored.
    fn validate(&self) -> Result<(), StateError> {
        if self.version != STATE_VERSION {
            return Err(StateError::Version { found: self.version });
        }
        if self.completed.len() != self.config.board.disks.len() {
            return Err(StateError::OtherMachine);
        }
        let VirtualClock { sync_point, sync_time, rate } = self.clock;
        // Whoever counts on from one of these does not overflow.
        let counts = [
            ("point", self.point.get()),
            ("number of outputs", self.outputs.0),
            ("number of console bytes", self.console_offset),
            ("guest time", sync_time.as_ns()),
        ];
        for (what, found) in counts {
            if found > MAX_COUNT {
                return Err(StateError::Impossible { what, found });
            }
        }
        if sync_point > self.point {
            let found = sync_point.get();
            return Err(StateError::Impossible { what: "last clock correction", found });
        }
        // A guest whose time stands still would wait for ever.
        if !(1..=PointScale::of(self.config.engine).max_rate.raw()).contains(&rate.raw()) {
            return Err(StateError::Impossible { what: "clock rate", found: rate.raw() });
        }
        Ok(())
    }
}

/// Why a saved machine cannot be restored. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Made by another version.
    #[error("machine state has version {found}, this program reads {STATE_VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// Not a machine state.
    #[error("machine state cannot be decoded")]
    Encoding(#[source] postcard::Error),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// This host has no such engine.
    #[error("the machine runs on engine {engine}")]
    Engine {
        /// The machine's engine.
        engine: EngineKind,
        /// Why not here.
        #[source]
        source: EngineError,
    },
    /// The guest knows a time stamp counter that the engine cannot give it.
    #[error(
        "its guest was started on soft, where the time stamp counter is guest time; on {engine} it \
         would find the host's"
    )]
    TimeStamp {
        /// The engine it was to change to.
        engine: EngineKind,
    },
    /// The guest knows the CPU of its host.
    #[error(
        "its guest ran freely on kvm and knows the CPU of its host; on {engine} it would find another"
    )]
    HostCpu {
        /// The engine it was to change to.
        engine: EngineKind,
    },
    /// It is another machine's.
    #[error("it is the state of another machine")]
    OtherMachine,
    /// A value that no machine gets to.
    #[error("no machine has a {what} of {found}")]
    Impossible {
        /// Of what.
        what: &'static str,
        /// The value.
        found: u64,
    },
    /// A value no CPU can have.
    #[error(transparent)]
    Cpu(#[from] InvalidState),
    /// A value no device can have.
    #[error(transparent)]
    Board(#[from] BoardError),
}

impl Machine {
    /// The state of a machine whose log begins here: forgets what the engine has cached and what
    /// memory was written, so that this machine and one restored from the checkpoint go on from
    /// the same, empty caches and digest alike. Between two points, too: the state is what names
    /// the place, and neither side's log says anything more of it before the next point.
    pub fn checkpoint(&mut self) -> MachineState {
        self.engine.flush_caches();
        self.fold_written();
        self.begin_delta();
        self.state()
    }

    /// What this machine boots from again when it is reset.
    pub fn boot_source(&self) -> &BootSource {
        &self.source
    }

    /// A view of the pages written from here on. Guests that run do not notice: what the engine
    /// renews is invisible to them, so this may be done on one side of a pair alone.
    pub fn watch_writes(&mut self) -> WriteView {
        self.engine.collect_written();
        self.engine.renew_write_tracking();
        self.engine.ram().tracker().view()
    }

    /// The pages written since `view` began or was last asked for, in address order: by the guest,
    /// and by devices.
    pub fn take_written(&mut self, view: &WriteView) -> Vec<PageNumber> {
        self.engine.collect_written();
        self.engine.renew_write_tracking();
        view.take()
    }

    /// Everything but memory. A machine restored from it goes on as a CPU would that had just
    /// flushed its translations.
    pub fn state(&mut self) -> MachineState {
        self.state_after(&[])
    }

    /// The same for somebody who has followed so far: without the completed writes that are `known` to it.
    pub fn state_after(&mut self, known: &[WriteCount]) -> MachineState {
        let Self {
            config,
            source,
            engine,
            // The state names the place.
            at_point: _,
            board,
            clock,
            outputs,
            console_offset,
            awaits_boot,
            // Of memory, which is not part of the state.
            memory_sum: _,
            since_base: _,
            keeps_deltas: _,
            broken: _,
            fails: _,
            history: _,
            reports: _,
        } = self;
        MachineState {
            version: STATE_VERSION,
            config: config.clone(),
            source: source.clone(),
            cpus: engine.save_cpus(),
            point: engine.point(),
            board: board.save(),
            completed: board.completed_writes(known),
            clock: *clock,
            outputs: *outputs,
            console_offset: *console_offset,
            awaits_boot: *awaits_boot,
        }
    }

    /// The machine saved as `state`, with the memory in `ram`, whose size must be the state's, and in
    /// which everything that is not zero counts as written.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn restore(state: MachineState, ram: GuestRam) -> Result<Self, StateError> {
        Self::restore_known(state, ram).map(|(machine, _)| machine)
    }

    /// The same, with a hash of the memory as it was found.
    pub(crate) fn restore_known(
        state: MachineState,
        ram: GuestRam,
    ) -> Result<(Self, u64), StateError> {
        // Whoever filled this memory did so through its tracker. It is looked at before the engine has it, which may
        // deliver an event that was on its way.
        let memory_sum = MemorySum::of(&ram, ram.tracker().take_written());
        let known = memory_sum.sum();
        let machine = Self::restore_at_once(state, ram)?;
        Ok((Self { memory_sum, ..machine }, known))
    }

    /// The same in a time that does not depend on what is in memory. That is looked at when it is asked for: by a digest,
    /// or a snapshot.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn restore_at_once(state: MachineState, ram: GuestRam) -> Result<Self, StateError> {
        state.validate()?;
        if state.awaits_boot && state.source.disk.is_none() {
            return Err(StateError::OtherMachine);
        }
        let MachineState {
            version: _,
            config,
            source,
            cpus,
            point,
            board,
            completed,
            clock,
            outputs,
            console_offset,
            awaits_boot,
        } = state;
        if ram.size() != config.memory() {
            return Err(MemoryError::Size { size: ram.size() }.into());
        }
        let board = Board::restore_with(&config.board, &ram, &board, &completed)?;
        let kind = config.engine;
        let open = kind.open(ram, config.cpus());
        let mut engine = open.map_err(|source| StateError::Engine { engine: kind, source })?;
        engine.restore_cpus(&cpus, point)?;
        Ok(Self {
            memory_sum: MemorySum::default(),
            since_base: None,
            keeps_deltas: false,
            broken: false,
            fails: false,
            history: super::reset::History::default(),
            reports: super::edge::usual_directories(),
            config,
            source,
            engine,
            // What begins here begins at this state, whatever its number.
            at_point: true,
            board,
            clock,
            outputs,
            console_offset,
            awaits_boot,
        })
    }

    /// Becomes the machine saved as `state`, which was made like this one and boots from the same. Its memory is what it is:
    /// whoever changes it to fit does so through its tracker.
    ///
    /// # Errors
    /// [`StateError`]; the machine is of use only once it has become another then.
    pub fn become_state(&mut self, state: &MachineState) -> Result<(), StateError> {
        if state.config != self.config || state.awaits_boot && self.source.disk.is_none() {
            return Err(StateError::OtherMachine);
        }
        state.validate()?;
        let ram = self.engine.ram();
        let board = Board::restore_with(&self.config.board, ram, &state.board, &state.completed)?;
        self.engine.restore_cpus(&state.cpus, state.point)?;
        self.board = board;
        self.clock = state.clock;
        self.outputs = state.outputs;
        self.console_offset = state.console_offset;
        self.awaits_boot = state.awaits_boot;
        self.at_point = true;
        Ok(())
    }

    /// The pages of memory that are not all zero, in address order.
    pub fn nonzero_pages(&self) -> Vec<PageNumber> {
        nonzero_pages(self.engine.ram())
    }
}

fn nonzero_pages(ram: &GuestRam) -> Vec<PageNumber> {
    let mut bytes = [0; PAGE_SIZE as usize];
    let mut pages = Vec::new();
    for (start, len) in ram.ranges() {
        let first = PageNumber::containing(start.raw_value()).0;
        for page in (first..first + len / PAGE_SIZE).map(PageNumber) {
            ram.memory().read_slice(&mut bytes, page.address()).expect("within a range of memory");
            if bytes.iter().any(|byte| *byte != 0) {
                pages.push(page);
            }
        }
    }
    pages
}

impl From<StateError> for SetupError {
    fn from(error: StateError) -> Self {
        match error {
            StateError::Memory(error) => Self::Memory(error),
            StateError::Cpu(error) => Self::Cpu(error),
            StateError::Board(error) => Self::Board(error),
            StateError::Engine { source, .. } => Self::Engine(source),
            StateError::Version { .. }
            | StateError::Encoding(_)
            | StateError::OtherMachine
            | StateError::Impossible { .. }
            | StateError::TimeStamp { .. }
            | StateError::HostCpu { .. } => Self::State(error),
        }
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
