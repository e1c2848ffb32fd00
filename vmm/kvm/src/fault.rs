//! The report of a guest that cannot go on.

use super::vcpu::Stopped;
use super::walk::LinearView;
use std::borrow::Cow;
use vmft_cpu::EngineFault;
use vmft_cpu::memory::GuestRam;
use vmft_log::point::ExecutionPoint;

impl Stopped<'_> {
    /// The CPU cannot go on, at the instruction it stands at. An exception that KVM has raised for that instruction is taken
    /// back, so that the state is that before it.
    pub(crate) fn fault(
        &mut self,
        what: impl Into<Cow<'static, str>>,
        ram: &GuestRam,
        point: ExecutionPoint,
    ) -> EngineFault {
        if let Ok(mut events) = self.events() {
            events.exception = Default::default();
            // Without it the run ends all the same.
            let _ = self.set_events(&events);
        }
        let (rip, bytes) = match (self.regs(), self.sregs()) {
            (Ok(regs), Ok(sregs)) => {
                // In 64-bit code the base does not count.
                let base = if sregs.cs.l == 0 { sregs.cs.base } else { 0 };
                let view = LinearView { ram, cr3: sregs.cr3 };
                (regs.rip, view.instruction_bytes(base.wrapping_add(regs.rip)))
            }
            _ => (0, Vec::new()),
        };
        EngineFault { what: what.into(), rip, bytes, point }
    }
}
