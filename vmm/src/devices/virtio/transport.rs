//! Virtio over PCI, modern interface (specification §4.1), interrupting by INTA#.
//!
//! All structures are in one memory window of 16 KiB, a page each:
//!
//! | offset | structure |
//! |---|---|
//! | 0x0000 | common configuration |
//! | 0x1000 | interrupt status, cleared by reading |
//! | 0x2000 | device-specific configuration |
//! | 0x3000 | notification, four bytes a queue |
//!
//! The window can also be reached through configuration space (§4.1.4.9).

use super::common_config::{self as common, CommonConfig};
use super::queue::{QueueState, queue_is_usable};
use super::{DeviceContext, DeviceFault, QueueAccess, QueueFault, VirtioDevice};
use crate::devices::pci::config_space::Identity;
use crate::devices::pci::{ConfigSpace, ConfigSpaceState, PciFunction};
use crate::devices::{InvalidState, IrqLine, require};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vmft_cpu::memory::GuestMemoryMmap;

/// Length of a device's memory window.
pub const WINDOW_SIZE: u32 = 0x4000;
/// Faults kept for the run loop; a driver that goes on breaking the rules says nothing new.
const MAX_REPORTED_FAULTS: usize = 64;

const COMMON_PAGE: u64 = 0;
const INTERRUPT_PAGE: u64 = 1;
const DEVICE_PAGE: u64 = 2;
const NOTIFY_PAGE: u64 = 3;
const PAGE: u64 = 0x1000;
/// Bytes between two queues' notification addresses.
const NOTIFY_STRIDE: u64 = 4;

const VENDOR: u16 = 0x1AF4;
/// Device IDs of modern devices: this plus the virtio type.
const FIRST_DEVICE: u16 = 0x1040;
const VENDOR_CAPABILITY: u8 = 0x09;
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;

const S_FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const S_DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const S_NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const S_FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// The transport's own registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TransportRegisters {
    /// Which word of the offered features the driver reads.
    pub device_feature_select: u32,
    /// Which word of its own features the driver writes.
    pub driver_feature_select: u32,
    /// Features the driver accepted.
    pub driver_features: u64,
    /// Device status.
    pub status: u8,
    /// Which queue the queue registers show.
    pub queue_select: u16,
    /// Interrupt status.
    pub interrupt_status: u8,
}

/// A saved virtio device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioPciState<S> {
    /// PCI configuration space.
    pub config: ConfigSpaceState,
    /// The transport's registers.
    pub registers: TransportRegisters,
    /// The queues' registers.
    pub queues: Vec<QueueState>,
    /// The device's own state.
    pub device: S,
}

/// A virtio device in a PCI slot.
#[derive(Debug)]
pub struct VirtioPci<D> {
    device: D,
    config: ConfigSpace,
    /// Offset of the capability that reaches the window from configuration space.
    window_capability: u8,
    registers: TransportRegisters,
    queues: Vec<Queue>,
}

impl<D: VirtioDevice> VirtioPci<D> {
    /// Puts a device behind the transport; its window is at `window` after power-on, and its
    /// pin is wired to `line`.
    pub fn new(device: D, window: u32, line: IrqLine) -> Self {
        let kind = device.kind();
        let mut config = ConfigSpace::new(&Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE + kind.virtio_type,
            revision: 1,
            class: kind.pci_class,
            subsystem_vendor: VENDOR,
            subsystem: FIRST_DEVICE + kind.virtio_type,
        });
        config.set_window(window, WINDOW_SIZE);
        config.set_interrupt(line.number());
        let window_capability = add_capabilities(&mut config, &device);
        let queues = new_queues(&device);
        Self { device, config, window_capability, registers: TransportRegisters::default(), queues }
    }

    /// The device behind the transport.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The same, for what concerns neither the guest nor the queues.
    pub(crate) fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// Back to the state after power-on, but for requests sent out.
    pub fn power_on_reset(&mut self, window: u32, line: IrqLine)
    where
        D: Clone,
    {
        self.device.abandon();
        *self = Self::new(self.device.clone(), window, line);
    }

    /// Lets the device work on its queues, and deals with what comes of it.
    pub fn with_queues(
        &mut self,
        around: &mut DeviceContext<'_>,
        work: impl FnOnce(&mut D, &mut QueueAccess<'_>) -> Result<(), QueueFault>,
    ) {
        let live = self.is_live();
        let features = self.registers.driver_features;
        let mut access =
            QueueAccess::new(around.memory, &mut self.queues, around.effects, live, features);
        let result = work(&mut self.device, &mut access);
        if access.wants_interrupt() {
            self.registers.interrupt_status |= ISR_QUEUE;
        }
        if let Err(fault) = result {
            self.stop(fault, around.faults);
        }
        self.update_pin();
    }

    fn offered_features(&self) -> u64 {
        TRANSPORT_FEATURES | self.device.features()
    }

    /// True between a completed set-up and whatever ends it.
    fn is_live(&self) -> bool {
        let bits = S_FEATURES_OK | S_DRIVER_OK | S_NEEDS_RESET | S_FAILED;
        self.registers.status & bits == S_FEATURES_OK | S_DRIVER_OK
    }

    fn is_stopped(&self) -> bool {
        self.registers.status & S_NEEDS_RESET != 0
    }

    fn stop(&mut self, fault: QueueFault, faults: &mut Vec<DeviceFault>) {
        if faults.len() < MAX_REPORTED_FAULTS {
            faults.push(DeviceFault { device: self.device.name(), fault });
        }
        self.registers.status |= S_NEEDS_RESET;
        self.registers.interrupt_status |= ISR_CONFIG;
        self.device.abandon();
    }

    fn reset(&mut self) {
        self.device.abandon();
        self.registers = TransportRegisters::default();
        self.queues.iter_mut().for_each(QueueT::reset);
        self.update_pin();
    }

    fn update_pin(&mut self) {
        self.config.set_interrupt_condition(self.registers.interrupt_status != 0);
    }

    fn notify(&mut self, queue: u64, around: &mut DeviceContext<'_>) {
        let Ok(queue) = usize::try_from(queue) else { return };
        let ready = self.queues.get(queue).is_some_and(QueueT::ready);
        if ready && self.is_live() {
            self.with_queues(around, |device, access| device.notify(queue, access));
        }
    }

    fn common_config(&self) -> CommonConfig {
        let registers = &self.registers;
        CommonConfig {
            device_feature_select: registers.device_feature_select,
            device_features: self.offered_features(),
            driver_feature_select: registers.driver_feature_select,
            driver_features: registers.driver_features,
            num_queues: self.queues.len() as u16,
            status: registers.status,
            queue_select: registers.queue_select,
            queue: self.queues.get(usize::from(registers.queue_select)).map(QueueState::of),
        }
    }

    fn write_common(&mut self, offset: u64, data: &[u8], around: &mut DeviceContext<'_>) {
        let mut value = [0; 4];
        if data.len() == 8 {
            // Queue addresses may be written whole.
            self.write_common(offset, &data[..4], around);
            return self.write_common(offset + 4, &data[4..], around);
        }
        let Some(bytes) = value.get_mut(..data.len()) else { return };
        bytes.copy_from_slice(data);
        let value = u32::from_le_bytes(value);
        match (offset, data.len()) {
            (common::DEVICE_FEATURE_SELECT, 4) => self.registers.device_feature_select = value,
            (common::DRIVER_FEATURE_SELECT, 4) => self.registers.driver_feature_select = value,
            (common::DRIVER_FEATURE, 4) => self.write_driver_features(value),
            (common::DEVICE_STATUS, 1) => self.write_status(value as u8),
            (common::QUEUE_SELECT, 2) => self.registers.queue_select = value as u16,
            (common::QUEUE_ENABLE, 2) if value == 1 => self.enable_queue(around),
            (common::QUEUE_SIZE, 2) => {
                if let Some(queue) = self.queue_in_set_up() {
                    queue.set_size(value as u16);
                }
            }
            (common::QUEUE_DESCRIPTORS..common::QUEUE_END, 4) => {
                if let Some(queue) = self.queue_in_set_up() {
                    set_queue_address(queue, offset, value);
                }
            }
            _ => {}
        }
    }

    fn write_driver_features(&mut self, value: u32) {
        if self.registers.status & S_FEATURES_OK != 0 {
            return;
        }
        let features = &mut self.registers.driver_features;
        match self.registers.driver_feature_select {
            0 => *features = *features & !0xFFFF_FFFF | u64::from(value),
            1 => *features = *features & 0xFFFF_FFFF | u64::from(value) << 32,
            _ => {}
        }
    }

    /// Bits can only be added; zero resets.
    fn write_status(&mut self, value: u8) {
        if value == 0 {
            return self.reset();
        }
        let mut status = self.registers.status | value & !S_NEEDS_RESET;
        let features = self.registers.driver_features;
        let acceptable =
            features & !self.offered_features() == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0;
        if !acceptable {
            status &= !S_FEATURES_OK;
        }
        self.registers.status = status;
        self.apply_features();
    }

    fn apply_features(&mut self) {
        let negotiated = self.registers.status & S_FEATURES_OK != 0;
        let event_index = self.registers.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for queue in &mut self.queues {
            queue.set_event_idx(negotiated && event_index);
        }
    }

    /// The selected queue, if it can still be changed.
    fn queue_in_set_up(&mut self) -> Option<&mut Queue> {
        let selected = usize::from(self.registers.queue_select);
        self.queues.get_mut(selected).filter(|queue| !queue.ready())
    }

    fn enable_queue(&mut self, around: &mut DeviceContext<'_>) {
        let selected = usize::from(self.registers.queue_select);
        let Some(queue) = self.queue_in_set_up() else { return };
        queue.set_ready(true);
        if !queue_is_usable(queue, around.memory) {
            queue.set_ready(false);
            self.stop(QueueFault::Rings { queue: selected }, around.faults);
            self.update_pin();
        }
    }

    /// Where in the window an access through configuration space goes.
    fn indirect_target(&self) -> Option<(u64, usize)> {
        let mut fields = [0; 12];
        self.config.read(self.window_capability + 4, &mut fields);
        let [bar, _, _, _, offset @ .., l0, l1, l2, l3] = fields;
        let offset = u32::from_le_bytes(offset);
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        let within = offset.checked_add(len).is_some_and(|end| end <= WINDOW_SIZE);
        let allowed = bar == 0 && matches!(len, 1 | 2 | 4) && within;
        allowed.then_some((offset.into(), len as usize))
    }

    /// Everything a restored device needs.
    pub fn save(&self) -> VirtioPciState<D::State> {
        let Self { device, config, window_capability: _, registers, queues } = self;
        VirtioPciState {
            config: config.save(),
            registers: *registers,
            queues: queues.iter().map(QueueState::of).collect(),
            device: device.save(),
        }
    }

    /// Takes over a saved state, which must be that of a device configured alike.
    ///
    /// # Errors
    /// [`InvalidState`] if it cannot be; the device is then not to be used.
    pub fn restore(
        &mut self,
        state: &VirtioPciState<D::State>,
        memory: &GuestMemoryMmap,
    ) -> Result<(), InvalidState> {
        let check = |holds, reason| require("virtio transport", holds, reason);
        let VirtioPciState { config, registers, queues, device } = state;
        self.config.restore(config)?;
        self.registers = *registers;
        let accepted = registers.driver_features & !self.offered_features() == 0;
        check(accepted || registers.status & S_FEATURES_OK == 0, "features never offered")?;
        check(registers.interrupt_status < 4, "no such interrupt")?;
        check(
            self.config.clone().set_interrupt_condition(registers.interrupt_status != 0)
                == self.config.interrupt_pin(),
            "interrupt pin and status differ",
        )?;
        check(queues.len() == self.queues.len(), "wrong number of queues")?;
        for (queue, saved) in self.queues.iter_mut().zip(queues) {
            *queue = saved.restore(queue.max_size(), memory)?;
        }
        let sizes: Vec<u16> =
            queues.iter().map(|queue| if queue.ready { queue.size } else { 0 }).collect();
        self.device.restore(device, &sizes, self.is_stopped(), memory)
    }
}

impl<D: VirtioDevice> PciFunction for VirtioPci<D> {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_read(&mut self, offset: u8, data: &mut [u8], around: &mut DeviceContext<'_>) {
        self.config.read(offset, data);
        if offset == self.window_capability + WINDOW_DATA
            && let Some((target, len)) = self.indirect_target()
            && let Some(data) = data.get_mut(..len)
        {
            self.window_read(target, data, around);
        }
    }

    fn config_write(&mut self, offset: u8, data: &[u8], around: &mut DeviceContext<'_>) {
        self.config.write(offset, data);
        if offset == self.window_capability + WINDOW_DATA
            && let Some((target, len)) = self.indirect_target()
            && let Some(data) = data.get(..len)
        {
            self.window_write(target, data, around);
        }
    }

    fn window_read(&mut self, offset: u64, data: &mut [u8], _: &mut DeviceContext<'_>) {
        data.fill(0);
        let copy = |from: &[u8], data: &mut [u8]| {
            let start = from.len().min((offset % PAGE) as usize);
            for (to, from) in data.iter_mut().zip(&from[start..]) {
                *to = *from;
            }
        };
        match offset / PAGE {
            COMMON_PAGE => copy(&self.common_config().to_bytes(), data),
            DEVICE_PAGE => copy(self.device.config_space(), data),
            INTERRUPT_PAGE => {
                copy(&[self.registers.interrupt_status], data);
                if offset.is_multiple_of(PAGE) && !data.is_empty() {
                    self.registers.interrupt_status = 0;
                    self.update_pin();
                }
            }
            _ => {}
        }
    }

    fn window_write(&mut self, offset: u64, data: &[u8], around: &mut DeviceContext<'_>) {
        match offset / PAGE {
            COMMON_PAGE => self.write_common(offset, data, around),
            NOTIFY_PAGE => self.notify(offset % PAGE / NOTIFY_STRIDE, around),
            _ => {}
        }
    }

    fn interrupt(&self) -> bool {
        self.config.interrupt_pin()
    }
}

/// Offset of the data register in the capability for access through configuration space.
const WINDOW_DATA: u8 = 16;

fn new_queues<D: VirtioDevice>(device: &D) -> Vec<Queue> {
    let new = |size: &u16| Queue::new(*size).expect("queue sizes are powers of two");
    device.queue_sizes().iter().map(new).collect()
}

/// Adds the five capabilities of §4.1.4 and returns the offset of the last.
fn add_capabilities<D: VirtioDevice>(config: &mut ConfigSpace, device: &D) -> u8 {
    let notify = NOTIFY_STRIDE as u32 * device.queue_sizes().len() as u32;
    let structures = [
        (CAP_COMMON, COMMON_PAGE, common::LEN as u32, &[][..]),
        (CAP_ISR, INTERRUPT_PAGE, 1, &[]),
        (CAP_DEVICE, DEVICE_PAGE, device.config_space().len() as u32, &[]),
        (CAP_NOTIFY, NOTIFY_PAGE, notify, &[NOTIFY_STRIDE as u8, 0, 0, 0]),
    ];
    for (kind, page, len, extra) in structures {
        if len > 0 {
            let body = capability(kind, (page * PAGE) as u32, len, extra);
            config.add_capability(VENDOR_CAPABILITY, &body, &[]);
        }
    }
    let body = capability(CAP_PCI, 0, 0, &[0; 4]);
    let mut writable = vec![0xFF; body.len()];
    // Length and kind are fixed, the rest names the target.
    writable[..2].fill(0);
    config.add_capability(VENDOR_CAPABILITY, &body, &writable)
}

/// `struct virtio_pci_cap` after its two bytes of header: length, kind, window number and ID
/// (zero), padding, offset, length.
fn capability(kind: u8, offset: u32, len: u32, extra: &[u8]) -> Vec<u8> {
    let mut body = vec![16 + extra.len() as u8, kind, 0, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(len.to_le_bytes());
    body.extend(extra);
    body
}

/// Sets half of one of a queue's three addresses. `virtio-queue` refuses misaligned ones.
fn set_queue_address(queue: &mut Queue, offset: u64, value: u32) {
    let (low, high) =
        if offset.is_multiple_of(8) { (Some(value), None) } else { (None, Some(value)) };
    match offset & !7 {
        common::QUEUE_DESCRIPTORS => queue.set_desc_table_address(low, high),
        common::QUEUE_AVAILABLE => queue.set_avail_ring_address(low, high),
        common::QUEUE_USED => queue.set_used_ring_address(low, high),
        _ => {}
    }
}
