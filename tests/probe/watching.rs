//! A machine whose writes are watched, as for a backup that joins, runs as one that nobody looks at;
//! and nothing it writes is missed.

use crate::guest;
use crate::recording::{record, record_resting, replay};
use vm_memory::{Address, Bytes};
use vmft_cpu::memory::{PAGE_SIZE, PageNumber, WriteView};
use vmft_kvm::PointKind;
use vmft_vmm::engine::EngineKind;
use vmft_vmm::machine::{Machine, StateError};

/// A copy of the machine's memory, kept by what its view says.
#[derive(Default)]
struct Copy {
    view: Option<WriteView>,
    memory: Vec<u8>,
    /// Pages copied again.
    copied: usize,
}

fn copy_page(machine: &Machine, page: PageNumber, memory: &mut [u8]) {
    let at = usize::try_from(page.0 * PAGE_SIZE).unwrap();
    let bytes = &mut memory[at..at + PAGE_SIZE as usize];
    machine.ram().memory().read_slice(bytes, page.address()).unwrap();
}

fn all_pages(machine: &Machine) -> impl Iterator<Item = PageNumber> + use<> {
    let ranges = machine.ram().ranges();
    ranges.into_iter().flat_map(|(start, len)| {
        let first = start.raw_value() / PAGE_SIZE;
        (first..first + len / PAGE_SIZE).map(PageNumber)
    })
}

impl Copy {
    fn follow(&mut self, machine: &mut Machine) {
        match &self.view {
            None => {
                self.view = Some(machine.watch_writes());
                self.memory = vec![0; usize::try_from(machine.ram().size()).unwrap()];
                for page in all_pages(machine) {
                    copy_page(machine, page, &mut self.memory);
                }
            }
            Some(view) => {
                for page in machine.take_written(view) {
                    copy_page(machine, page, &mut self.memory);
                    self.copied += 1;
                }
            }
        }
    }

    fn check(&self, machine: &Machine) {
        let mut memory = vec![0; self.memory.len()];
        for page in all_pages(machine) {
            copy_page(machine, page, &mut memory);
        }
        assert!(memory == self.memory, "a write was missed");
    }
}

#[test]
fn a_watched_machine_makes_the_same_log_and_no_write_of_it_is_missed() {
    let directory = tempfile::tempdir().unwrap();
    let logs = ["quiet", "watched"].map(|name| directory.path().join(name));
    let quiet = record(&logs[0]);
    let mut copies = [Copy::default(), Copy::default()];
    let mut rests = 0;
    let watched = record_resting(&logs[1], Some(1_700_000), |machine| {
        rests += 1;
        copies[0].follow(machine);
        copies[0].check(machine);
        // Another reader, later and less often, and those that prepare digests and snapshots.
        if rests % 3 == 0 {
            copies[1].follow(machine);
            copies[1].check(machine);
            machine.prepare_digest(5);
        }
        if rests % 7 == 0 {
            machine.used_pages();
        }
    });
    assert!(rests > 20 && copies.iter().all(|copy| copy.copied > 20), "{rests} rests");
    assert_eq!(watched, quiet);
    let bytes = logs.each_ref().map(|log| std::fs::read(log).unwrap());
    assert!(bytes[0] == bytes[1], "the logs differ");
    assert_eq!(replay(&logs[1], u64::MAX).0, quiet);
}

#[test]
fn a_guest_that_knows_guest_time_by_its_time_stamp_counter_does_not_change_to_kvm() {
    let mut machine = guest::machine();
    let (point, clock) = (machine.point(), machine.clock());
    for points in [PointKind::Free, PointKind::Exit, PointKind::Step] {
        let engine = EngineKind::Kvm { points };
        let error = machine.state().on_engine(engine).unwrap_err();
        assert!(matches!(error, StateError::TimeStamp { .. }), "{error}");
    }
    // To what it is on already, it changes without a change.
    let same = machine.state().on_engine(EngineKind::Soft).unwrap();
    assert_eq!(same, machine.state());
    assert_eq!((machine.point(), machine.clock()), (point, clock));
}
