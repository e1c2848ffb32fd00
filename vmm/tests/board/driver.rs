//! A virtio-pci driver: finds the structures by the capability list, sets a queue up, submits
//! chains and collects what was used, as Linux's `virtio_pci_modern_dev.c` and `virtio_ring.c`.

use crate::machine::Machine;
use vmft_cpu::PortWidth;

pub const FIRST_DISK: u8 = 1;
pub const SECOND_DISK: u8 = 2;
pub const ENTROPY: u8 = 31;
pub const NETWORK: u8 = 30;

pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_INDEX: u64 = 1 << 29;
pub const INDIRECT: u64 = 1 << 28;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT_TABLE: u16 = 4;

pub const NEEDS_RESET: u8 = 0x40;
pub const DRIVER_OK: u8 = 0x0F;

/// Where the driver keeps its rings: a page each.
const RINGS: u64 = 0x10_0000;

/// A piece of guest memory.
pub type Buffer = (u64, u32);

#[derive(Clone)]
pub struct Driver {
    /// Which queue of the device.
    pub queue: u16,
    pub common: u64,
    pub isr: u64,
    pub device: u64,
    pub notify: u64,
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    next_descriptor: u16,
    available_index: u16,
    used_index: u16,
}

/// Length and offset of the structure of a kind, by the capability list.
fn find(machine: &mut Machine, slot: u8, wanted: u8) -> Option<(u32, u32)> {
    let mut link = machine.config_read(slot, 0x34, PortWidth::Byte) as u8;
    while link != 0 {
        let kind = machine.config_read(slot, link + 3, PortWidth::Byte) as u8;
        if kind == wanted {
            let offset = machine.config_read(slot, link + 8, PortWidth::Long);
            let len = machine.config_read(slot, link + 12, PortWidth::Long);
            return Some((len, offset));
        }
        link = machine.config_read(slot, link + 1, PortWidth::Byte) as u8;
    }
    None
}

impl Driver {
    /// Finds the device's structures; nothing is set up yet.
    pub fn probe(machine: &mut Machine, slot: u8) -> Self {
        machine.config_write(slot, 0x04, PortWidth::Word, 0x0006);
        let window = u64::from(machine.config_read(slot, 0x10, PortWidth::Long) & !0xF);
        let at = |machine: &mut Machine, kind| {
            find(machine, slot, kind).map(|(_, offset)| window + u64::from(offset))
        };
        let rings = RINGS + u64::from(slot) * 0x4000;
        Self {
            queue: 0,
            common: at(machine, 1).unwrap(),
            notify: at(machine, 2).unwrap(),
            isr: at(machine, 3).unwrap(),
            device: at(machine, 4).unwrap_or(0),
            size: 16,
            descriptors: rings,
            available: rings + 0x1000,
            used: rings + 0x2000,
            next_descriptor: 0,
            available_index: 0,
            used_index: 0,
        }
    }

    /// Sets a device with two queues up, and returns a driver for each.
    pub fn start_two(machine: &mut Machine, slot: u8, wanted: u64) -> [Self; 2] {
        let mut first = Self::probe(machine, slot);
        let mut second = first.clone();
        second.queue = 1;
        for address in [&mut second.descriptors, &mut second.available, &mut second.used] {
            *address += 0x10_0000;
        }
        first.restart_two(&mut second, machine, wanted);
        [first, second]
    }

    /// Resets a device with two queues and sets it up again.
    pub fn restart_two(&mut self, second: &mut Self, machine: &mut Machine, wanted: u64) {
        self.begin_set_up(machine, wanted);
        second.forget(machine);
        self.enable_queue(machine);
        second.enable_queue(machine);
        self.set_status(machine, DRIVER_OK);
        assert_eq!(self.status(machine), DRIVER_OK);
    }

    /// Sets the device up with the features offered that are also in `wanted`.
    pub fn start(machine: &mut Machine, slot: u8, wanted: u64) -> Self {
        let mut driver = Self::probe(machine, slot);
        driver.set_up(machine, wanted);
        driver
    }

    fn forget(&mut self, machine: &Machine) {
        (self.next_descriptor, self.available_index, self.used_index) = (0, 0, 0);
        machine.poke_bytes(self.descriptors, &[0; 0x3000]);
    }

    pub fn set_up(&mut self, machine: &mut Machine, wanted: u64) {
        self.begin_set_up(machine, wanted);
        self.enable_queue(machine);
        self.set_status(machine, DRIVER_OK);
        assert_eq!(self.status(machine), DRIVER_OK);
    }

    fn begin_set_up(&mut self, machine: &mut Machine, wanted: u64) {
        self.set_status(machine, 0);
        assert_eq!(self.status(machine), 0);
        self.forget(machine);
        self.set_status(machine, 0x01);
        self.set_status(machine, 0x03);
        let features = self.offered(machine) & (wanted | VERSION_1);
        self.accept(machine, features);
        self.set_status(machine, 0x0B);
        assert_eq!(self.status(machine), 0x0B);
    }

    pub fn offered(&self, machine: &mut Machine) -> u64 {
        let mut word = |select: u32| {
            machine.store(self.common, &select.to_le_bytes());
            u64::from(u32::from_le_bytes(machine.load(self.common + 4)))
        };
        word(0) | word(1) << 32
    }

    pub fn accept(&self, machine: &mut Machine, features: u64) {
        for (select, word) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            machine.store(self.common + 8, &select.to_le_bytes());
            machine.store(self.common + 12, &word.to_le_bytes());
        }
    }

    pub fn enable_queue(&self, machine: &mut Machine) {
        machine.store(self.common + 0x16, &self.queue.to_le_bytes());
        machine.store(self.common + 0x18, &self.size.to_le_bytes());
        for (offset, address) in
            [(0x20, self.descriptors), (0x28, self.available), (0x30, self.used)]
        {
            machine.store(self.common + offset, &(address as u32).to_le_bytes());
            machine.store(self.common + offset + 4, &((address >> 32) as u32).to_le_bytes());
        }
        machine.store(self.common + 0x1C, &1u16.to_le_bytes());
    }

    pub fn status(&self, machine: &mut Machine) -> u8 {
        machine.load::<1>(self.common + 0x14)[0]
    }

    pub fn set_status(&self, machine: &mut Machine, status: u8) {
        machine.store(self.common + 0x14, &[status]);
    }

    /// Reads and thereby clears the interrupt status.
    pub fn interrupt_status(&self, machine: &mut Machine) -> u8 {
        machine.load::<1>(self.isr)[0]
    }

    pub fn write_descriptor(
        &self,
        machine: &Machine,
        index: u16,
        (address, len): Buffer,
        flags: u16,
        next: u16,
    ) {
        write_descriptor(machine, self.descriptors, index, (address, len), flags, next);
    }

    /// Makes a chain available without telling the device; returns its head.
    pub fn add(&mut self, machine: &Machine, readable: &[Buffer], writable: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        let count = (readable.len() + writable.len()) as u16;
        let buffers = readable.iter().map(|buffer| (*buffer, 0));
        let buffers = buffers.chain(writable.iter().map(|buffer| (*buffer, WRITE)));
        for (index, (buffer, flags)) in (0..).zip(buffers) {
            let here = (head + index) % self.size;
            let next = (here + 1) % self.size;
            let flags = flags | if index + 1 < count { NEXT } else { 0 };
            self.write_descriptor(machine, here, buffer, flags, next);
        }
        self.next_descriptor = (head + count) % self.size;
        self.make_available(machine, head);
        head
    }

    pub fn make_available(&mut self, machine: &Machine, head: u16) {
        let slot = u64::from(self.available_index % self.size);
        machine.poke(self.available + 4 + 2 * slot, head);
        self.available_index = self.available_index.wrapping_add(1);
        machine.poke(self.available + 2, self.available_index);
    }

    pub fn kick(&self, machine: &mut Machine) {
        let place = self.notify + 4 * u64::from(self.queue);
        machine.store(place, &self.queue.to_le_bytes());
    }

    pub fn submit(
        &mut self,
        machine: &mut Machine,
        readable: &[Buffer],
        writable: &[Buffer],
    ) -> u16 {
        let head = self.add(machine, readable, writable);
        self.kick(machine);
        head
    }

    /// The next used chain and the length written.
    pub fn next_used(&mut self, machine: &Machine) -> Option<(u16, u32)> {
        if machine.peek::<u16>(self.used + 2) == self.used_index {
            return None;
        }
        let element = self.used + 4 + 8 * u64::from(self.used_index % self.size);
        self.used_index = self.used_index.wrapping_add(1);
        Some((machine.peek::<u32>(element) as u16, machine.peek(element + 4)))
    }
}

pub fn write_descriptor(
    machine: &Machine,
    table: u64,
    index: u16,
    (address, len): Buffer,
    flags: u16,
    next: u16,
) {
    let descriptor = table + 16 * u64::from(index);
    machine.poke(descriptor, address);
    machine.poke(descriptor + 8, len);
    machine.poke(descriptor + 12, flags);
    machine.poke(descriptor + 14, next);
}
