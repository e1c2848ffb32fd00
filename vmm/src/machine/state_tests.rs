use super::*;
use crate::board::{Bytes as Size, DiskConfig, UnixSeconds};
use crate::boot::synthetic::vmlinux;
use crate::devices::virtio::block::completed::{CompletedCounts, CompletedWrite};
use std::sync::Arc;
use vmft_cpu::memory::MIN_MEMORY;

/// A machine with a disk, before its first instruction.
fn machine() -> Machine {
    let disk = DiskConfig { capacity: Size(1 << 20), read_only: false, serial: "disk".to_owned() };
    let config = MachineConfig {
        board: BoardConfig {
            memory: Size(MIN_MEMORY),
            clock_base: UnixSeconds(1_700_000_000),
            disks: vec![disk],
            entropy: false,
            net: None,
            cpus: CpuCount::ONE,
        },
        engine: EngineKind::Soft,
    };
    let source = BootSource { kernel: vmlinux().into(), ..BootSource::default() };
    Machine::new(config, source).expect("a kernel that can be loaded")
}

/// Its state when the disk has completed so many writes, and so many of them are covered by a flush.
fn state(durable: u64, completed: u64) -> MachineState {
    let mut state = machine().state();
    let write = |number: u64| CompletedWrite {
        offset: number * 512,
        data: Arc::new(vec![u8::try_from(number).expect("few"); 512]),
    };
    let (before, last) = (WriteCount(durable), WriteCount(completed));
    state.board.functions.disks[0].device.completed = CompletedCounts {
        keeps: true,
        durable: before,
        completed: last,
        bytes: (completed - durable) * 512,
        in_doubt: false,
    };
    state.completed =
        vec![CompletedWrites { before, writes: (durable..completed).map(write).collect() }];
    state
}

fn restored(state: MachineState) -> Machine {
    let ram = GuestRam::new(MIN_MEMORY).expect("memory");
    Machine::restore(state, ram).expect("a state of this machine")
}

#[test]
fn whoever_has_followed_is_told_the_newer_writes_alone_and_has_all_of_them() {
    let whole = state(2, 8);
    let told = restored(whole.clone()).state_after(&[WriteCount(5)]);
    assert_eq!(told.completed[0].writes.len(), 3);
    let ram = GuestRam::new(MIN_MEMORY).expect("memory");
    assert!(Machine::restore(told.clone(), ram).is_err(), "without the older ones");
    assert!(told.encode().len() < whole.encode().len() - 3 * 512);
    let told = MachineState::decode(&told.encode()).expect("encoded here");
    for earlier in [state(1, 5), state(2, 6), state(0, 8)] {
        let filled =
            told.clone().with_earlier_writes(&earlier.completed).expect("nothing is missing");
        assert_eq!(filled.completed, whole.completed);
        assert_eq!(restored(filled).completed_writes(), whole.completed);
    }
    for gap in [state(1, 4), state(3, 5)] {
        assert!(told.clone().with_earlier_writes(&gap.completed).is_err());
    }
}

#[test]
fn a_checkpoint_in_the_log_brings_the_writes_completed_since_its_base() {
    let mut primary = restored(state(0, 4));
    primary.keep_deltas();
    primary.begin_delta();
    let later = state(2, 7);
    let (ram, config) = (primary.ram().clone(), primary.config.board.clone());
    primary.board = Board::restore_with(&config, &ram, &later.board, &later.completed)
        .expect("the same machine's");
    let delta = primary.take_delta().expect("there is a base");
    assert_eq!(delta.state.completed[0].writes.len(), 3);
    let mut backup = restored(state(1, 5));
    backup.adopt(delta).expect("it has passed the base");
    assert_eq!(backup.completed_writes(), later.completed);
}

#[test]
fn a_snapshot_goes_with_the_image_and_has_nothing_to_write_again() {
    let state = state(2, 8).without_completed_writes();
    let mut machine = restored(state);
    assert_eq!(machine.completed_writes(), [CompletedWrites::none_after(WriteCount(8))]);
    assert_eq!(machine.state().write_counts(), [WriteCount(8)]);
}

#[test]
fn a_guest_that_knows_its_hosts_cpu_does_not_change_to_another_engine() {
    let mut state = state(0, 0);
    let free = EngineKind::Kvm { points: PointKind::Free };
    state.config.engine = free;
    for engine in [EngineKind::Soft, EngineKind::Kvm { points: PointKind::Exit }] {
        let error = state.clone().on_engine(engine).expect_err("it would find another");
        assert!(matches!(error, StateError::HostCpu { .. }), "{error}");
    }
    state.on_engine(free).expect("it is on that");
}
