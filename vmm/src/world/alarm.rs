//! Interrupts a running engine at a time of the host's.

use crate::engine::Kicker;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Instant;

#[derive(Debug, Default)]
struct Setting {
    at: Option<Instant>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    setting: Mutex<Setting>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Setting> {
        self.setting.lock().expect("no holder of the alarm's lock panics")
    }
}

/// One alarm, on a thread of its own, which ends when this is dropped.
#[derive(Debug)]
pub(super) struct Alarm {
    shared: Arc<Shared>,
}

impl Alarm {
    /// An alarm that is not set yet.
    ///
    /// # Errors
    /// If the host has no thread for it.
    pub(super) fn start(kicker: Kicker) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let ringer = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("alarm".to_owned())
            .spawn(move || ring(&ringer, &kicker))?;
        Ok(Self { shared })
    }

    /// Sets the alarm; it rings once. What was set before is forgotten.
    pub(super) fn set(&self, at: Instant) {
        let mut setting = self.shared.lock();
        let sooner = setting.at.is_none_or(|before| at < before);
        setting.at = Some(at);
        // One that is put off wakes the thread at the old time, which then looks at the new one.
        if sooner {
            self.shared.changed.notify_one();
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_one();
    }
}

#[expect(clippy::disallowed_methods, reason = "the rim waits in host time")]
fn ring(shared: &Shared, kicker: &Kicker) {
    let mut setting = shared.lock();
    while !setting.closed {
        let Some(at) = setting.at else {
            setting = shared.changed.wait(setting).expect("no holder of the alarm's lock panics");
            continue;
        };
        let left = at.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            let waited = shared.changed.wait_timeout(setting, left);
            setting = waited.expect("no holder of the alarm's lock panics").0;
            continue;
        }
        setting.at = None;
        drop(setting);
        kicker.kick();
        setting = shared.lock();
    }
}
