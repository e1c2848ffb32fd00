//! The host as the source of live inputs.

use super::disk_boot::Booting;
use super::{Mailbox, outside::HostOutside};
use crate::inputs::{
    Asked, Boundary, DeviceRequest, Gauges, HostTime, InputError, InputSource, Room,
};
use crate::machine::{BootSource, DiskBoot};
use crate::outputs::HeldOutputs;
use std::fs::File;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use vmft_log::entry::Arrival;
use vmft_log::point::WallTime;

/// How long one wait for outputs to leave may take before an operator is looked for again. A sink outside
/// has far more to write than it can in that time.
const HOLD_STEP: Duration = Duration::from_millis(5);

/// The host's clock, disks, random numbers and mailbox.
#[derive(Debug)]
pub struct HostSource {
    live_since: Instant,
    mailbox: Arc<Mailbox>,
    outside: Arc<HostOutside>,
    gate: Arc<HeldOutputs>,
    random: File,
    gauges: Arc<Gauges>,
    /// How the guest boots, if it does from its disks.
    disk_boot: Option<DiskBoot>,
    booting: Booting,
}

impl HostSource {
    /// A source whose host time starts now, for a guest whose outputs leave by `gate`, and which
    /// boots from its disks in this way, if it does.
    ///
    /// # Errors
    /// If the host's random device cannot be opened.
    #[expect(clippy::disallowed_methods, reason = "the host's clock is an input; it comes in here")]
    pub fn new(
        mailbox: Arc<Mailbox>,
        outside: Arc<HostOutside>,
        gate: Arc<HeldOutputs>,
        gauges: Arc<Gauges>,
        disk_boot: Option<DiskBoot>,
    ) -> std::io::Result<Self> {
        let random = File::open("/dev/urandom")?;
        let (live_since, booting) = (Instant::now(), Booting::default());
        Ok(Self { live_since, mailbox, outside, gate, random, gauges, disk_boot, booting })
    }
}

impl InputSource for HostSource {
    fn now(&mut self) -> HostTime {
        let ns = self.live_since.elapsed().as_nanos();
        HostTime(u64::try_from(ns).unwrap_or(u64::MAX))
    }

    #[expect(clippy::disallowed_methods, reason = "the host's clock is an input; it comes in here")]
    fn wall_clock(&mut self) -> Option<WallTime> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        u64::try_from(since.as_nanos()).ok().map(WallTime::from_unix_ns)
    }

    fn take_asked(&mut self) -> Option<Asked> {
        self.mailbox.take_asked()
    }

    fn take_arrival(&mut self, room: Room) -> Option<Arrival> {
        self.mailbox.take_arrival(room)
    }

    fn wait(&mut self, deadline: Option<HostTime>, room: Room) -> bool {
        let deadline =
            deadline.and_then(|HostTime(ns)| self.live_since.checked_add(Duration::from_nanos(ns)));
        self.mailbox.wait(deadline, room)
    }

    fn start(&mut self, request: DeviceRequest) -> Result<(), InputError> {
        match request {
            DeviceRequest::DiskRead { disk, request, operation } => {
                self.outside.start_disk(disk, request, operation);
            }
            DeviceRequest::Entropy { request, len } => {
                let mut data = vec![0; usize::try_from(len).expect("at most 4096")];
                self.random.read_exact(&mut data).map_err(InputError::Entropy)?;
                self.mailbox.push(Arrival::Entropy { request, data });
            }
        }
        Ok(())
    }

    fn hold_back(&mut self) -> bool {
        !self.gate.is_full() || self.gate.wait_room(HOLD_STEP)
    }

    fn take_boot(&mut self) -> Option<Result<BootSource, String>> {
        let how = self.disk_boot.as_ref().expect("the guest waits for its disks");
        self.booting.take(&self.outside, how)
    }

    fn at(&mut self, boundary: &Boundary) {
        self.gauges.set_to(boundary);
    }
}
