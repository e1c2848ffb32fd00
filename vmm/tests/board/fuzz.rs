//! Everything that a guest and the world can do to a board, at random: nothing breaks it, and a
//! board that was saved and restored on the way does the same.
//!
//! `VMFT_FUZZ_CASES` sets how many cases there are; a failure names its seed, and `VMFT_FUZZ_SEED`
//! begins there.

use crate::driver::{Driver, ENTROPY, EVENT_INDEX, FIRST_DISK, INDIRECT, NETWORK, SECOND_DISK};
use crate::machine::{Machine, completion};
use std::ops::{Deref, DerefMut};
use vm_memory::{Bytes, GuestAddress};
use vmft_cpu::PortWidth;
use vmft_cpu::memory::MIN_MEMORY;
use vmft_fuzzing::{Random, cases};
use vmft_log::entry::{Arrival, Packet, PacketOffload, RequestId};
use vmft_log::point::VirtualTime;
use vmft_vmm::board::{DiskOperation, Effect};

/// Cases of a quick run, and steps of a case.
const CASES: u64 = 400;
const STEPS: u64 = 400;

/// Ports that something answers at, first and last.
const PORTS: &[(u16, u16)] = &[
    (0x20, 0x21),
    (0xA0, 0xA1),
    (0x4D0, 0x4D1),
    (0x40, 0x43),
    (0x61, 0x64),
    (0x70, 0x71),
    (0x3F8, 0x3FF),
    (0x5A0, 0x5A4),
    (0x600, 0x60B),
    (0xCF8, 0xCFF),
];
const SLOTS: &[u8] = &[0, FIRST_DISK, SECOND_DISK, NETWORK, ENTROPY];
/// Where the windows of the slots are after power-on, and how long each is.
const WINDOWS: u64 = 0xE000_0000;
const WINDOW: u64 = 0x4000;
/// Where the drivers' rings and buffers are.
const RINGS: u64 = 0x10_0000;
const RINGS_END: u64 = 0x24_0000;

/// The numbers of a case, as what a board is given.
pub struct Numbers(pub Random);

impl Deref for Numbers {
    type Target = Random;

    fn deref(&self) -> &Random {
        &self.0
    }
}

impl DerefMut for Numbers {
    fn deref_mut(&mut self) -> &mut Random {
        &mut self.0
    }
}

impl Numbers {
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        *self.0.pick(from)
    }

    fn width(&mut self) -> PortWidth {
        self.pick(&[PortWidth::Byte, PortWidth::Word, PortWidth::Long])
    }

    /// A number that is often small, or nearly what a field can hold.
    fn value(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(16),
            1 => 1 << self.below(64),
            2 => u64::MAX >> self.below(64),
            3 => RINGS + self.below(RINGS_END - RINGS),
            4 => MIN_MEMORY.wrapping_add(self.below(64)).wrapping_sub(32),
            _ => self.next(),
        }
    }

    fn at_most(&mut self, most: u64) -> Vec<u8> {
        let count = self.index(most as usize + 1);
        self.bytes(count)
    }
}

/// One thing done to the board; what the guest sees of it.
pub fn step(machine: &mut Machine, numbers: &mut Numbers) -> u64 {
    match numbers.below(16) {
        0..=3 => access_port(machine, numbers),
        4..=5 => access_config(machine, numbers),
        6..=8 => access_window(machine, numbers),
        9..=10 => scribble(machine, numbers),
        11 => {
            // Notifies a queue: the windows are alike in all devices.
            let slot = numbers.pick(SLOTS);
            let base = u64::from(machine.config_read(slot, 0x10, PortWidth::Long) & !0xF);
            let queue = numbers.below(4);
            let at = base + numbers.pick(&[0x1000, 0x2000, 0x3000]) + 4 * queue;
            machine.store(at, &(queue as u16).to_le_bytes());
            0
        }
        12 => {
            machine.now = VirtualTime::from_ns(machine.now.as_ns() + time(numbers));
            machine.board.advance(machine.now);
            machine.board.next_timer().map_or(0, VirtualTime::as_ns)
        }
        13 => machine.take_interrupt().map_or(0, u64::from),
        14 => answer(machine, numbers),
        _ => arrive(machine, numbers),
    }
}

/// From nanoseconds to years.
fn time(numbers: &mut Numbers) -> u64 {
    let bits = 1 + numbers.below(54);
    numbers.below(1 << bits)
}

fn access_port(machine: &mut Machine, numbers: &mut Numbers) -> u64 {
    let (first, last) = numbers.pick(PORTS);
    let port = match numbers.below(20) {
        0 => numbers.next() as u16,
        _ => first + numbers.below(u64::from(last - first) + 1) as u16,
    };
    let width = numbers.width();
    if numbers.below(2) == 0 {
        return machine.board.port_read(machine.now, port, width).into();
    }
    machine.board.port_write(machine.now, port, width, numbers.value() as u32);
    0
}

fn access_config(machine: &mut Machine, numbers: &mut Numbers) -> u64 {
    let slot = if numbers.below(8) == 0 { numbers.below(32) as u8 } else { numbers.pick(SLOTS) };
    let (offset, width) = (numbers.next() as u8, numbers.width());
    if numbers.below(3) > 0 {
        return machine.config_read(slot, offset, width).into();
    }
    let offset =
        if numbers.below(2) == 0 { numbers.pick(&[4, 6, 0x10, 0x14, 0x3C]) } else { offset };
    machine.config_write(slot, offset, width, numbers.value() as u32);
    0
}

fn access_window(machine: &mut Machine, numbers: &mut Numbers) -> u64 {
    let slot = u64::from(numbers.pick(SLOTS));
    let offset = match numbers.below(3) {
        0 => numbers.below(WINDOW),
        // The common configuration, where most is.
        _ => numbers.below(0x40),
    };
    let offset = if numbers.below(4) == 0 { offset } else { offset & !3 };
    let address = WINDOWS + slot * WINDOW + offset;
    let mut data = numbers.value().to_le_bytes();
    let len = match numbers.below(4) {
        0 => 1 + numbers.below(8) as usize,
        _ => numbers.pick(&[1, 2, 4]),
    };
    if numbers.below(2) == 0 {
        machine.board.memory_write(machine.now, address, &data[..len]);
        return 0;
    }
    machine.board.memory_read(machine.now, address, &mut data[..len]);
    u64::from_le_bytes(data)
}

/// Something into a ring, or into what its descriptors name.
fn scribble(machine: &mut Machine, numbers: &mut Numbers) -> u64 {
    let slot = u64::from(numbers.pick(SLOTS));
    let part = numbers.pick(&[0x0, 0x1000, 0x2000, 0x10_0000, 0x10_1000]);
    let at = RINGS + slot * 0x4000 + part + 2 * numbers.below(136);
    match numbers.below(3) {
        // A descriptor: address, length, flags, next.
        0 => {
            let at = at & !15;
            machine.poke(at, numbers.value());
            machine.poke(at + 8, numbers.value() as u32);
            machine.poke(at + 12, numbers.below(9) as u16);
            machine.poke(at + 14, numbers.below(18) as u16);
        }
        1 => machine.poke(at, numbers.below(40) as u16),
        _ => machine.poke(at, numbers.value() as u16),
    }
    0
}

/// Ends the first request outside, well or badly.
fn answer(machine: &mut Machine, numbers: &mut Numbers) -> u64 {
    let Some(effect) = machine.board.outstanding().into_iter().next() else { return 0 };
    let status = numbers.below(4) as u8;
    let arrival = match effect {
        Effect::Disk { disk, request, operation: DiskOperation::Read { len, .. } } => {
            let len = if status == 0 { len as usize } else { 0 };
            completion(disk, request.0, status, &vec![0x5A; len])
        }
        Effect::Disk { disk, request, .. } => completion(disk, request.0, status, &[]),
        Effect::Entropy { request, len } => {
            Arrival::Entropy { request, data: vec![0x5A; len as usize] }
        }
        Effect::Console(_) | Effect::Packet(_) => unreachable!("never outstanding"),
    };
    machine.board.deliver(machine.now, &arrival).unwrap();
    1
}

/// Something arrives that may fit or not, as from a damaged log.
fn arrive(machine: &mut Machine, numbers: &mut Numbers) -> u64 {
    let arrival = match numbers.below(6) {
        0 | 1 => Arrival::ConsoleInput(numbers.at_most(40)),
        2 | 3 => {
            let packet = |frame| Packet { offload: PacketOffload::default(), frame };
            let count = 1 + numbers.below(4);
            Arrival::Packets((0..count).map(|_| packet(numbers.at_most(1600))).collect())
        }
        4 => {
            let data = numbers.at_most(600);
            completion(numbers.below(4) as u8, numbers.below(8), numbers.next() as u8, &data)
        }
        _ => {
            let request = RequestId(numbers.below(8));
            Arrival::Entropy { request, data: numbers.at_most(300) }
        }
    };
    machine.board.deliver(machine.now, &arrival).is_ok().into()
}

/// The board after a case: what it is, what the guest saw, what left it, what is in the rings.
fn case(
    random: Random,
    restored: bool,
) -> (vmft_vmm::board::BoardState, Vec<u64>, Vec<Effect>, Vec<u8>) {
    let mut numbers = Numbers(random);
    let mut machine = Machine::new();
    if numbers.below(4) > 0 {
        for slot in [FIRST_DISK, SECOND_DISK, ENTROPY] {
            Driver::start(&mut machine, slot, EVENT_INDEX | INDIRECT);
        }
        Driver::start_two(&mut machine, NETWORK, numbers.next());
    }
    let (mut seen, mut effects) = (Vec::new(), Vec::new());
    for _ in 0..STEPS {
        seen.push(step(&mut machine, &mut numbers));
        effects.extend(machine.effects());
        if machine.board.reset_requested() {
            machine.board.reset();
        }
        machine.board.take_faults();
        if restored && seen.len() % 16 == 0 {
            machine.save_and_restore();
        }
    }
    let mut rings = vec![0; (RINGS_END - RINGS) as usize];
    machine.ram.memory().read_slice(&mut rings, GuestAddress(RINGS)).unwrap();
    (machine.board.save(), seen, effects, rings)
}

#[test]
fn nothing_done_to_a_board_breaks_it() {
    cases(CASES, |random| {
        assert!(
            case(random.clone(), false) == case(random, true),
            "a restored board does otherwise"
        );
    });
}
