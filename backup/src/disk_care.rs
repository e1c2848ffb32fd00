//! What a live side does about disks whose storage fails: with the machine at rest, on its thread.

use crate::events::{self, Event};
use crate::side::Side;
use crate::status::{DiskState, DiskTroubleStatus, ms};
use crate::tell;
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
