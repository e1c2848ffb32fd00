//! What a live side does about disks whose storage fails: with the machine at rest, on its thread.

use crate::events::{self, Event};
use crate::side::Side;
use crate::status::{DiskState, DiskTroubleStatus, ms};
use crate::tell;
use std::time::Instant;
use vmft_vmm::inputs::{Asked, Inputs};
use vmft_vmm::machine::{Machine, MachineError, RunEnd};
use vmft_vmm::outputs::OutputGate;
use vmft_vmm::world::{DiskDesk, DiskNews, DiskTrouble};

/// What operators see of a disk with which something is wrong.
pub(crate) fn statuses(desk: &DiskDesk) -> Vec<DiskTroubleStatus> {
    desk.troubles().iter().map(DiskTroubleStatus::from).collect()
}

/// What the machine's thread was told of.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    /// Of requests that have failed and are kept: the first of each disk.
    pub(crate) failed: Vec<DiskTrouble>,
    /// Of those that hang.
    pub(crate) hanging: Vec<DiskTrouble>,
}

/// A guest that stands still because of a disk.
#[derive(Debug, Default)]
pub(crate) struct Standstill {
    since: Option<Instant>,
}

impl Side {
    /// Takes what is new, and has it in the event log.
    pub(crate) fn hear_of_disks(&self) -> Heard {
        let mut heard = Heard::default();
        while let Some(news) = self.disk_desk.take_news() {
            match news {
                DiskNews::Failed(trouble) => {
                    let told = DiskTroubleStatus::from(&trouble);
                    events::note(|| Event::DiskFailed {
                        disk: told.path.clone(),
                        what: told.what.as_str().into(),
                        error: told.error.clone().unwrap_or_default(),
                    });
                    if !heard.failed.iter().any(|other| other.disk == trouble.disk) {
                        heard.failed.push(trouble);
                    }
                }
                DiskNews::Hangs(trouble) => {
                    let told = DiskTroubleStatus::from(&trouble);
                    events::note(|| Event::DiskHangs {
                        disk: told.path.clone(),
                        what: told.what.as_str().into(),
                    });
                    heard.hanging.push(trouble);
                }
                DiskNews::Answers(trouble, time) => {
                    let told = DiskTroubleStatus::from(&trouble);
                    tell!(
                        "disk {}: {} has ended, after {:.1} s",
                        told.path,
                        told.what,
                        time.as_secs_f64()
                    );
                    events::note(|| Event::DiskAnswers { disk: told.path, after_ms: ms(time) });
                }
            }
        }
        heard
    }

    /// Says what becomes of a guest whose disks are so: it stands still for those that failed, and waits for
    /// those that hang.
    pub(crate) fn tell_of_disks(&self, heard: &Heard, not_handed_over: Option<&str>) {
        let why = not_handed_over.map_or_else(String::new, |why| format!(" ({why})"));
        for trouble in &heard.failed {
            let told = DiskTroubleStatus::from(trouble);
            if self.disk_desk.stands_still() {
                tell!("{}; the guest stands still{why}: {}", told.text(), told.remedy());
            }
        }
        for trouble in &heard.hanging {
            let told = DiskTroubleStatus::from(trouble);
            tell!("{}; the guest waits for it{why}", told.text());
        }
        if let Some(first) = heard.failed.first().filter(|_| self.disk_desk.stands_still()) {
            let why = DiskTroubleStatus::from(first).text().into();
            events::note(|| Event::GuestStopped { why });
        }
    }

    /// Runs the machine; or leaves it at rest, and waits until something is asked, while a request of a disk is
    /// kept.
    pub(crate) fn run_or_stand(
        &self,
        machine: &mut Machine,
        inputs: &mut dyn Inputs,
        gate: &dyn OutputGate,
        standstill: &mut Standstill,
    ) -> Result<RunEnd, MachineError> {
        if self.disk_desk.stands_still() {
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

impl From<&DiskTrouble> for DiskTroubleStatus {
    fn from(trouble: &DiskTrouble) -> Self {
        let state = if trouble.error.is_some() { DiskState::Stopped } else { DiskState::Hangs };
        Self {
            disk: trouble.disk,
            path: trouble.path.display().to_string().into(),
            state,
            what: trouble.what.clone(),
            error: trouble.error.as_deref().map(Into::into),
            is_full: trouble.is_full,
            requests: trouble.requests as u64,
            for_ms: u64::try_from(trouble.since.elapsed().as_millis()).unwrap_or(u64::MAX),
        }
    }
}
