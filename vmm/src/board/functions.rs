//! The PCI bus: which device is in which slot, where its window is, which line it pulls.
//!
//! | slot | function | line |
//! |---|---|---|
//! | 0 | host bridge | none |
//! | 1 to 16 | disks, in command-line order | 11, 9, 5, 10, 11, … |
//! | 30 | network | 9 |
//! | 31 | entropy | 5 |
//!
//! The windows are 16 KiB each from [`WINDOWS`] on, by slot: in the hole below 4 GiB, clear of
//! the addresses where a PC has interrupt controllers and firmware.

use super::{BoardConfig, MAX_DISKS};
use crate::devices::pci::{ConfigSpaceState, HostBridge, PciFunction, SLOTS, Slot};
use crate::devices::virtio::block::completed::{CompletedWrites, KeepLimit};
use crate::devices::virtio::block::{Block, SECTOR_SIZE, requests::RequestsState};
use crate::devices::virtio::entropy::{Entropy, EntropyState};
use crate::devices::virtio::net::{Net, NetState};
use crate::devices::virtio::transport::WINDOW_SIZE;
use crate::devices::virtio::{VirtioPci, VirtioPciState};
use crate::devices::{InvalidState, IrqLine, require};
use serde::{Deserialize, Serialize};
use vmft_cpu::memory::GuestMemoryMmap;

/// Guest-physical address of slot 0's window, if it had one.
const WINDOWS: u32 = 0xE000_0000;
/// The addresses that the slots' windows lie in after power-on.
pub(crate) const PCI_WINDOWS: std::ops::Range<u32> = WINDOWS..WINDOWS + SLOTS as u32 * WINDOW_SIZE;
const BRIDGE: u8 = 0;
const FIRST_DISK: u8 = 1;
const LAST_DISK: u8 = FIRST_DISK + MAX_DISKS as u8 - 1;
const ENTROPY: u8 = SLOTS - 1;
const NETWORK: u8 = ENTROPY - 1;

/// The lines of INTA# by slot modulo 4.
const LINES: [IrqLine; 4] = [IrqLine::new(10), IrqLine::new(11), IrqLine::new(9), IrqLine::new(5)];
/// The same lines as a bit mask: PCI interrupts are levels.
pub(super) const LEVEL_TRIGGERED: u16 = 1 << 5 | 1 << 9 | 1 << 10 | 1 << 11;

/// The functions' saved states.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionsState {
    /// The host bridge.
    pub bridge: ConfigSpaceState,
    /// The disks, in command-line order.
    pub disks: Vec<VirtioPciState<RequestsState>>,
    /// The entropy device, if there is one.
    pub entropy: Option<VirtioPciState<EntropyState>>,
    /// The network device, if there is one.
    pub net: Option<VirtioPciState<NetState>>,
}

/// The functions on the bus.
#[derive(Debug)]
pub(super) struct Functions {
    bridge: HostBridge,
    pub(super) disks: Vec<VirtioPci<Block>>,
    pub(super) entropy: Option<VirtioPci<Entropy>>,
    pub(super) net: Option<VirtioPci<Net>>,
}

fn window(slot: u8) -> u32 {
    WINDOWS + u32::from(slot) * WINDOW_SIZE
}

fn line_index(slot: u8) -> usize {
    usize::from(slot) % LINES.len()
}

/// The line that a slot pulls.
pub(crate) fn line(slot: u8) -> IrqLine {
    LINES[line_index(slot)]
}

impl Functions {
    /// The functions of a board; its configuration has been checked.
    pub(super) fn new(config: &BoardConfig) -> Self {
        let keep = KeepLimit::for_disks(config.disks.len());
        let disk = |(number, disk): (u8, &super::DiskConfig)| {
            let sectors = disk.capacity.0 / SECTOR_SIZE;
            let device = Block::new(number, sectors, disk.read_only, &disk.serial, keep);
            VirtioPci::new(device, window(FIRST_DISK + number), line(FIRST_DISK + number))
        };
        Self {
            bridge: HostBridge::new(),
            disks: (0u8..).zip(&config.disks).map(disk).collect(),
            entropy: config
                .entropy
                .then(|| VirtioPci::new(Entropy::new(), window(ENTROPY), line(ENTROPY))),
            net: config.net.map(|net| {
                let device = Net::new(net.mac, net.offloads);
                VirtioPci::new(device, window(NETWORK), line(NETWORK))
            }),
        }
    }

    pub(super) fn reset(&mut self) {
        self.bridge = HostBridge::new();
        for (slot, disk) in (FIRST_DISK..).zip(&mut self.disks) {
            disk.power_on_reset(window(slot), line(slot));
        }
        if let Some(entropy) = &mut self.entropy {
            entropy.power_on_reset(window(ENTROPY), line(ENTROPY));
        }
        if let Some(net) = &mut self.net {
            net.power_on_reset(window(NETWORK), line(NETWORK));
        }
    }

    /// The function in a slot.
    pub(super) fn in_slot(&mut self, slot: Slot) -> Option<&mut dyn PciFunction> {
        match slot.0 {
            BRIDGE => Some(&mut self.bridge),
            ENTROPY => self.entropy.as_mut().map(|entropy| entropy as &mut dyn PciFunction),
            NETWORK => self.net.as_mut().map(|net| net as &mut dyn PciFunction),
            number @ FIRST_DISK..=LAST_DISK => self
                .disks
                .get_mut(usize::from(number - FIRST_DISK))
                .map(|disk| disk as &mut dyn PciFunction),
            _ => None,
        }
    }

    /// The function whose window holds all of an access, and the offset in it. If the guest
    /// has laid two windows over each other, the lower slot answers.
    pub(super) fn claiming(
        &mut self,
        address: u64,
        len: usize,
    ) -> Option<(&mut dyn PciFunction, u64)> {
        let claim = |function: &dyn PciFunction| {
            let window = function.config().window()?;
            let offset = address.checked_sub(window.base)?;
            (offset.checked_add(len as u64)? <= window.len).then_some(offset)
        };
        for disk in &mut self.disks {
            if let Some(offset) = claim(disk) {
                return Some((disk, offset));
            }
        }
        if let Some(net) = &mut self.net
            && let Some(offset) = claim(net)
        {
            return Some((net, offset));
        }
        let entropy = self.entropy.as_mut()?;
        let offset = claim(entropy)?;
        Some((entropy, offset))
    }

    /// The levels of the four lines.
    pub(super) fn interrupt_lines(&self) -> [(IrqLine, bool); 4] {
        let mut levels = LINES.map(|line| (line, false));
        for (slot, disk) in (FIRST_DISK..).zip(&self.disks) {
            levels[line_index(slot)].1 |= disk.interrupt();
        }
        if let Some(entropy) = &self.entropy {
            levels[line_index(ENTROPY)].1 |= entropy.interrupt();
        }
        if let Some(net) = &self.net {
            levels[line_index(NETWORK)].1 |= net.interrupt();
        }
        levels
    }

    pub(super) fn save(&self) -> FunctionsState {
        let Self { bridge, disks, entropy, net } = self;
        FunctionsState {
            bridge: bridge.save(),
            disks: disks.iter().map(VirtioPci::save).collect(),
            entropy: entropy.as_ref().map(VirtioPci::save),
            net: net.as_ref().map(VirtioPci::save),
        }
    }

    pub(super) fn restore(
        config: &BoardConfig,
        state: &FunctionsState,
        completed: &[CompletedWrites],
        memory: &GuestMemoryMmap,
    ) -> Result<Self, InvalidState> {
        let FunctionsState { bridge, disks, entropy, net } = state;
        let mut restored = Self::new(config);
        restored.bridge = HostBridge::restore(bridge)?;
        let same_disks = disks.len() == restored.disks.len();
        require("PCI bus", same_disks, "another number of disks")?;
        for (number, (disk, saved)) in restored.disks.iter_mut().zip(disks).enumerate() {
            disk.restore(saved, memory)?;
            let none = CompletedWrites::none_after(saved.device.completed.durable);
            disk.device_mut().restore_completed(completed.get(number).unwrap_or(&none))?;
        }
        match (&mut restored.entropy, entropy) {
            (Some(device), Some(saved)) => device.restore(saved, memory)?,
            (None, None) => {}
            _ => require("PCI bus", false, "an entropy device on one side only")?,
        }
        match (&mut restored.net, net) {
            (Some(device), Some(saved)) => device.restore(saved, memory)?,
            (None, None) => {}
            _ => require("PCI bus", false, "a network device on one side only")?,
        }
        Ok(restored)
    }
}
