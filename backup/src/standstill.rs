//! A guest that stands still until an operator resumes it: because of a disk, or because an operator has paused
//! it. Its side goes on: signs of life, joins, epochs, snapshots and a switch do not need a guest that runs.

use crate::events::{self, Event};
use crate::side::Side;
use crate::status::ms;
use crate::tell;
use std::time::Instant;
use vmft_vmm::inputs::{Asked, Inputs};
use vmft_vmm::machine::{Machine, MachineError, RunEnd};
use vmft_vmm::outputs::OutputGate;

/// Since when, and why.
#[derive(Debug, Default)]
pub(crate) struct Standstill {
    since: Option<Instant>,
    /// It has been said that an operator has paused it.
    is_paused: bool,
}

impl Side {
    /// Runs the machine; or leaves it at rest, and waits until something is asked, while an operator wants that
    /// or a request of a disk is kept.
    pub(crate) fn run_or_stand(
        &self,
        machine: &mut Machine,
        inputs: &mut dyn Inputs,
        gate: &dyn OutputGate,
        standstill: &mut Standstill,
    ) -> Result<RunEnd, MachineError> {
        let is_paused = self.requests.is_paused();
        if is_paused != std::mem::replace(&mut standstill.is_paused, is_paused) {
            self.status.update(|status| status.is_paused = is_paused);
            if is_paused {
                tell!(
                    "the guest stands still: an operator has paused it; `vmft resume` lets it go on"
                );
                events::note(|| Event::GuestStopped { why: "an operator has paused it".into() });
            }
        }
        match is_paused {
            true => self.requests.tell_paused(),
            false => self.requests.tell_resumed(),
        }
        if is_paused || self.disk_desk.stands_still() {
            standstill.since.get_or_insert_with(Instant::now);
            return Ok(match self.mailbox.wait_asked() {
                Asked::Pause => RunEnd::Paused,
                Asked::Stop(reason) => RunEnd::Stopped(reason),
                Asked::Halt => RunEnd::Halted,
            });
        }
        if let Some(since) = standstill.since.take() {
            let time = since.elapsed();
            inputs.stood_still(time);
            tell!("the guest goes on, after {:.1} s", time.as_secs_f64());
            events::note(|| Event::GuestResumed { after_ms: ms(time) });
        }
        machine.run(inputs, gate)
    }
}
