//! Makes a machine come back now and then that would run on until its guest exits, so that what waits for
//! the guest is seen.

use std::time::Duration;
use vmft_cpu::PeriodicKicks;
use vmft_kvm::PointKind;
use vmft_vmm::engine::EngineKind;
use vmft_vmm::machine::Machine;

/// How often: half of what something waits before the guest's place is named by its state.
const PERIOD: Duration = Duration::from_millis(5);

/// Begins to kick a machine that comes back at exits only, until the result is dropped; others need none.
pub(crate) fn begin(machine: &Machine) -> Option<PeriodicKicks> {
    let needs = matches!(machine.config().engine, EngineKind::Kvm { points: PointKind::Exit });
    let kicker = machine.kicker().filter(|_| needs)?;
    Some(
        kicker
            .periodically(PERIOD)
            .expect("a host that cannot start a thread cannot run a machine"),
    )
}
