//! A board with memory, driven as a CPU would.

use vm_memory::{ByteValued, Bytes as _, GuestAddress};
use vmft_cpu::memory::{GuestRam, MIN_MEMORY};
use vmft_cpu::{CpuCount, PortWidth};
use vmft_log::entry::{Arrival, RequestId};
use vmft_log::point::VirtualTime;
use vmft_vmm::board::{
    Board, BoardConfig, Bytes, DiskConfig, DiskOperation, Effect, NetConfig, UnixSeconds,
};
use vmft_vmm::devices::virtio::net::addresses::MacAddress;

/// Bytes of each test disk.
pub const DISK_BYTES: u64 = 16 << 20;

pub struct Machine {
    pub board: Board,
    pub ram: GuestRam,
    pub now: VirtualTime,
}

/// Two disks, the second read-only, an entropy device and a network device.
pub fn config() -> BoardConfig {
    let disk = |serial: &str, read_only| DiskConfig {
        capacity: Bytes(DISK_BYTES),
        read_only,
        serial: serial.to_owned(),
    };
    BoardConfig {
        memory: Bytes(MIN_MEMORY),
        clock_base: UnixSeconds(1_700_000_000),
        disks: vec![disk("first", false), disk("second", true)],
        entropy: true,
        net: Some(NetConfig { mac: MacAddress([2, 0, 0, 0, 0, 7]), offloads: true }),
        cpus: CpuCount::ONE,
    }
}

impl Machine {
    pub fn new() -> Self {
        let ram = GuestRam::new(MIN_MEMORY).unwrap();
        let board = Board::new(&config(), &ram).unwrap();
        let mut machine = Self { board, ram, now: VirtualTime::ZERO };
        machine.initialise_interrupts();
        machine
    }

    /// As Linux's `init_8259A`, with every line unmasked; vectors 0x30 to 0x3F.
    fn initialise_interrupts(&mut self) {
        for (command, words) in [(0x20, [0x30, 0x04, 0x01]), (0xA0, [0x38, 0x02, 0x01])] {
            self.out8(command, 0x11);
            for word in words {
                self.out8(command + 1, word);
            }
        }
    }

    pub fn out8(&mut self, port: u16, value: u8) {
        self.board.port_write(self.now, port, PortWidth::Byte, value.into());
    }

    pub fn in8(&mut self, port: u16) -> u8 {
        self.board.port_read(self.now, port, PortWidth::Byte) as u8
    }

    pub fn out32(&mut self, port: u16, value: u32) {
        self.board.port_write(self.now, port, PortWidth::Long, value);
    }

    pub fn in32(&mut self, port: u16) -> u32 {
        self.board.port_read(self.now, port, PortWidth::Long)
    }

    /// Points the configuration ports at a register and returns the data port of its byte.
    fn select(&mut self, slot: u8, offset: u8) -> u16 {
        self.out32(0xCF8, 0x8000_0000 | u32::from(slot) << 11 | u32::from(offset & 0xFC));
        0xCFC + u16::from(offset & 3)
    }

    pub fn config_read(&mut self, slot: u8, offset: u8, width: PortWidth) -> u32 {
        let port = self.select(slot, offset);
        self.board.port_read(self.now, port, width)
    }

    pub fn config_write(&mut self, slot: u8, offset: u8, width: PortWidth, value: u32) {
        let port = self.select(slot, offset);
        self.board.port_write(self.now, port, width, value);
    }

    pub fn load<const N: usize>(&mut self, address: u64) -> [u8; N] {
        let mut data = [0; N];
        self.board.memory_read(self.now, address, &mut data);
        data
    }

    pub fn store(&mut self, address: u64, data: &[u8]) {
        self.board.memory_write(self.now, address, data);
    }

    pub fn poke<T: ByteValued>(&self, address: u64, value: T) {
        self.ram.memory().write_obj(value, GuestAddress(address)).unwrap();
    }

    pub fn peek<T: ByteValued>(&self, address: u64) -> T {
        self.ram.memory().read_obj(GuestAddress(address)).unwrap()
    }

    pub fn poke_bytes(&self, address: u64, bytes: &[u8]) {
        self.ram.memory().write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn peek_bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// The vector the CPU would take now, with the ends of interrupt a handler sends.
    pub fn take_interrupt(&mut self) -> Option<u8> {
        if !self.board.interrupt_pending() {
            return None;
        }
        let vector = self.board.acknowledge_interrupt().0;
        if vector >= 0x38 {
            self.out8(0xA0, 0x20);
        }
        self.out8(0x20, 0x20);
        Some(vector)
    }

    pub fn effects(&mut self) -> Vec<Effect> {
        self.board.effects().collect()
    }

    /// Ends a disk request.
    pub fn complete(&mut self, disk: u8, request: u64, status: u8, data: &[u8]) {
        let arrival = completion(disk, request, status, data);
        self.board.deliver(self.now, &arrival).unwrap();
    }

    /// Goes on in a restored copy, over the same memory.
    pub fn save_and_restore(&mut self) {
        let state = self.board.save();
        self.board = Board::restore(&config(), &self.ram, &state).unwrap();
        assert_eq!(self.board.save(), state);
    }
}

pub fn completion(disk: u8, request: u64, status: u8, data: &[u8]) -> Arrival {
    Arrival::DiskCompletion { disk, request: RequestId(request), status, data: data.to_vec() }
}

pub fn disk_effect(disk: u8, request: u64, operation: DiskOperation) -> Effect {
    Effect::Disk { disk, request: RequestId(request), operation }
}
