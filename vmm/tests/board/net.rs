//! The network device, driven as Linux's `virtio_net` does, and as nobody should.

use crate::driver::{DRIVER_OK, Driver, EVENT_INDEX, INDIRECT, NEEDS_RESET, NETWORK};
use crate::machine::Machine;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmft_log::entry::{Arrival, MAX_PACKET, Packet, PacketOffload};
use vmft_vmm::board::{DeliveryError, Effect};
use vmft_vmm::devices::virtio::{DeviceFault, DeviceName, QueueFault};

const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const HOST_TSO4: u64 = 1 << 11;
const MERGEABLE: u64 = 1 << 15;
const ALL: u64 = CSUM | GUEST_CSUM | GUEST_TSO4 | HOST_TSO4 | MERGEABLE;

const HEADER: usize = 12;
const RECEIVE_BUFFERS: u64 = 0x30_0000;
const TRANSMIT_BUFFER: u64 = 0x38_0000;

struct Nic {
    machine: Machine,
    receive: Driver,
    transmit: Driver,
    /// Buffers given to the device so far: each is a place of its own for a while.
    offered: u64,
}

impl Nic {
    fn start(features: u64) -> Self {
        let mut machine = Machine::new();
        let [receive, transmit] = Driver::start_two(&mut machine, NETWORK, features);
        Self { machine, receive, transmit, offered: 0 }
    }

    /// Gives the device `count` buffers of `len` bytes.
    fn offer(&mut self, count: u64, len: u32) {
        for _ in 0..count {
            let buffer = (RECEIVE_BUFFERS + self.offered % 64 * 0x2000, len);
            self.offered += 1;
            self.receive.add(&self.machine, &[], &[buffer]);
        }
        self.receive.kick(&mut self.machine);
    }

    fn deliver(&mut self, packets: &[Packet]) -> Result<(), DeliveryError> {
        self.machine.board.deliver(self.machine.now, &Arrival::Packets(packets.to_vec()))
    }

    /// Everything received so far: for each packet the header and the frame.
    fn received(&mut self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut packets = Vec::new();
        while let Some(mut bytes) = self.next_buffer() {
            let buffers = u16::from_le_bytes([bytes[10], bytes[11]]);
            for _ in 1..buffers {
                bytes.extend(self.next_buffer().expect("all buffers of a packet are used"));
            }
            let frame = bytes.split_off(HEADER);
            packets.push((bytes, frame));
        }
        packets
    }

    fn next_buffer(&mut self) -> Option<Vec<u8>> {
        let (head, len) = self.receive.next_used(&self.machine)?;
        let address: u64 = self.machine.peek(self.receive.descriptors + 16 * u64::from(head));
        Some(self.machine.peek_bytes(address, len as usize))
    }

    /// Sends a packet in two buffers; returns what leaves the machine.
    fn send(&mut self, header: [u8; HEADER], frame: &[u8]) -> Vec<Effect> {
        self.machine.poke_bytes(TRANSMIT_BUFFER, &header);
        self.machine.poke_bytes(TRANSMIT_BUFFER + 0x100, frame);
        let buffers =
            [(TRANSMIT_BUFFER, HEADER as u32), (TRANSMIT_BUFFER + 0x100, frame.len() as u32)];
        let used = if frame.is_empty() { &buffers[..1] } else { &buffers };
        self.transmit.submit(&mut self.machine, used, &[]);
        self.machine.effects()
    }

    fn assert_stopped(&mut self, fault: QueueFault) {
        let device = DeviceName::Network;
        assert_eq!(self.machine.board.take_faults(), [DeviceFault { device, fault }]);
        assert_ne!(self.receive.status(&mut self.machine) & NEEDS_RESET, 0);
        self.machine.save_and_restore();
        self.receive.restart_two(&mut self.transmit, &mut self.machine, ALL);
        assert_eq!(self.send([0; HEADER], &[0; 60]).len(), 1, "it works again after a reset");
    }
}

fn plain(len: usize, byte: u8) -> Packet {
    Packet { offload: PacketOffload::default(), frame: vec![byte; len] }
}

/// 3,000 bytes of TCP over IPv4, to be cut into segments of 1,000.
fn large() -> Packet {
    let mut frame = vec![0; 12];
    frame.extend([8, 0, 0x45, 0]);
    frame.extend(3_040u16.to_be_bytes());
    frame.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0, 80, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 0, 0, 0, 0, 0, 0]);
    frame.extend((0..3_000).map(|index| index as u8));
    let offload = PacketOffload {
        flags: 1,
        gso_type: 1,
        header_len: 54,
        segment_size: 1_000,
        checksum_start: 34,
        checksum_offset: 16,
    };
    Packet { offload, frame }
}

fn header(offload: PacketOffload) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    (header[0], header[1]) = (offload.flags, offload.gso_type);
    let PacketOffload { header_len, segment_size, checksum_start, checksum_offset, .. } = offload;
    for (place, word) in header[2..10].chunks_exact_mut(2).zip([
        header_len,
        segment_size,
        checksum_start,
        checksum_offset,
    ]) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    header
}

#[test]
fn the_guest_finds_a_network_card_with_its_address_and_a_link() {
    let mut nic = Nic::start(ALL);
    assert_eq!(nic.machine.load::<6>(nic.receive.device), [2, 0, 0, 0, 0, 7]);
    assert_eq!(nic.machine.load::<2>(nic.receive.device + 6), [1, 0]);
    let offered = nic.receive.offered(&mut nic.machine);
    assert_eq!(offered & ALL, ALL);
    assert_eq!(offered & 1 << 17, 0, "no control queue");
}

#[test]
fn a_group_of_packets_makes_one_interrupt() {
    let mut nic = Nic::start(ALL);
    nic.offer(8, 1_526);
    nic.deliver(&[plain(60, 1), plain(1_514, 2), plain(700, 3)]).unwrap();
    assert_eq!(nic.machine.take_interrupt(), Some(0x30 + 9));
    assert_eq!(nic.receive.interrupt_status(&mut nic.machine), 1);
    assert_eq!(nic.machine.take_interrupt(), None);
    let frames: Vec<Vec<u8>> = nic.received().into_iter().map(|(_, frame)| frame).collect();
    assert_eq!(frames, [vec![1; 60], vec![2; 1_514], vec![3; 700]]);
}

#[test]
fn a_large_packet_fills_several_buffers_with_its_offload_in_front() {
    let mut nic = Nic::start(ALL);
    nic.offer(8, 1_024);
    nic.deliver(&[large()]).unwrap();
    let received = nic.received();
    let mut wanted = header(large().offload);
    wanted[10] = 3;
    assert_eq!(received, [(wanted.to_vec(), large().frame)]);
}

#[test]
fn a_driver_without_offloads_gets_finished_packets() {
    let mut nic = Nic::start(MERGEABLE);
    nic.offer(8, 1_526);
    nic.deliver(&[large()]).unwrap();
    let received = nic.received();
    assert_eq!(received.len(), 3);
    for (header, frame) in received {
        assert_eq!(header[..10], [0; 10]);
        assert_eq!(frame.len(), 1_054);
    }
}

#[test]
fn packets_wait_for_buffers_and_no_more_come_meanwhile() {
    let mut nic = Nic::start(ALL | EVENT_INDEX);
    nic.offer(2, 1_526);
    nic.deliver(&[plain(60, 1), plain(2_000, 2), plain(60, 3)]).unwrap();
    assert_eq!(nic.received().len(), 1, "one buffer is too few for the second");
    assert!(!nic.machine.board.network_has_room());
    assert_eq!(nic.deliver(&[plain(60, 4)]), Err(DeliveryError::Packets));
    nic.machine.save_and_restore();
    nic.offer(2, 1_526);
    let frames: Vec<usize> = nic.received().iter().map(|(_, frame)| frame.len()).collect();
    assert_eq!(frames, [2_000, 60]);
    assert!(nic.machine.board.network_has_room());
    nic.deliver(&[plain(60, 4)]).unwrap();
}

#[test]
fn packets_for_a_driver_that_is_not_there_are_lost() {
    let mut machine = Machine::new();
    let arrival = Arrival::Packets(vec![plain(60, 1)]);
    machine.board.deliver(machine.now, &arrival).unwrap();
    assert!(machine.board.network_has_room());
    let mut nic = Nic::start(ALL);
    nic.deliver(&[plain(60, 1)]).unwrap();
    nic.receive.restart_two(&mut nic.transmit, &mut nic.machine, ALL);
    nic.offer(2, 1_526);
    assert!(nic.received().is_empty(), "a reset forgets what waited");
}

#[test]
fn a_packet_leaves_with_what_is_left_to_do_and_its_buffer_is_used_at_once() {
    let mut nic = Nic::start(ALL);
    let effects = nic.send(header(large().offload), &large().frame);
    assert_eq!(effects, [Effect::Packet(large())]);
    assert_eq!(nic.transmit.next_used(&nic.machine), Some((0, 0)));
}

#[test]
fn a_packet_nobody_can_send_is_lost_and_the_next_one_leaves() {
    let mut nic = Nic::start(ALL);
    let bad = PacketOffload { segment_size: 0, ..large().offload };
    assert!(nic.send(header(bad), &large().frame).is_empty());
    let outside = PacketOffload { checksum_start: 60_000, ..large().offload };
    assert!(nic.send(header(outside), &large().frame).is_empty());
    assert!(nic.send([0; HEADER], &[0; 13]).is_empty());
    assert_eq!(nic.send([0; HEADER], &[0; 60]), [Effect::Packet(plain(60, 0))]);
    assert!(nic.machine.board.take_faults().is_empty());
}

#[test]
fn chains_that_are_no_packets_stop_the_device() {
    let mut nic = Nic::start(ALL);
    nic.transmit.submit(&mut nic.machine, &[(TRANSMIT_BUFFER, 11)], &[]);
    nic.assert_stopped(QueueFault::ShortChain { queue: 1, head: 0 });
    let writable = [(TRANSMIT_BUFFER, 100)];
    nic.transmit.submit(&mut nic.machine, &[(TRANSMIT_BUFFER, 100)], &writable);
    nic.assert_stopped(QueueFault::ShortChain { queue: 1, head: 2 });
    let long = (HEADER + MAX_PACKET + 1) as u32;
    nic.transmit.submit(&mut nic.machine, &[(TRANSMIT_BUFFER, long)], &[]);
    nic.assert_stopped(QueueFault::LongChain { queue: 1, head: 2 });
    nic.offer(1, 11);
    nic.deliver(&[plain(60, 1)]).unwrap();
    nic.assert_stopped(QueueFault::ShortChain { queue: 0, head: 0 });
    let outside = [(0xE000_4000, 2_000)];
    nic.receive.submit(&mut nic.machine, &[], &outside);
    nic.deliver(&[plain(60, 1)]).unwrap();
    nic.assert_stopped(QueueFault::Buffer { queue: 0, head: 0, address: 0xE000_4000 });
}

#[test]
fn the_guests_address_is_learned_and_survives_a_restore_and_a_reset() {
    let mut nic = Nic::start(ALL);
    let mut arp = vec![0xFF; 6];
    arp.extend([2, 0, 0, 0, 0, 7, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 7]);
    arp.extend([192, 168, 1, 9, 0, 0, 0, 0, 0, 0, 192, 168, 1, 1]);
    nic.send([0; HEADER], &arp);
    nic.machine.save_and_restore();
    nic.receive.restart_two(&mut nic.transmit, &mut nic.machine, ALL);
    let addresses = nic.machine.board.network_addresses().unwrap();
    assert_eq!(addresses.ipv4, [std::net::Ipv4Addr::new(192, 168, 1, 9)]);
}

/// What a guest, or the network, does next.
#[derive(Debug, Clone)]
enum Step {
    Describe(bool, u16, (u64, u32, u16, u16)),
    Head(bool, u16, u16),
    Available(bool, u16),
    Kick(bool),
    Bytes(u64, [u8; 12]),
    Restart(u64),
    Arrive(Vec<(PacketOffload, usize)>),
    SaveAndRestore,
}

fn offload() -> impl Strategy<Value = PacketOffload> {
    let start = prop_oneof![4 => Just(34u16), 1 => any::<u16>()];
    (0u8..3, 0u8..6, 0u16..2_000, start, prop_oneof![4 => Just(16u16), 1 => any::<u16>()]).prop_map(
        |(flags, gso_type, segment_size, checksum_start, checksum_offset)| PacketOffload {
            flags,
            gso_type,
            header_len: 54,
            segment_size,
            checksum_start,
            checksum_offset,
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    let address = prop_oneof![
        8 => 0x20_0000u64..0x40_0000,
        // The rings of both queues.
        3 => 0x17_8000u64..0x17_B000,
        3 => 0x27_8000u64..0x27_B000,
        1 => any::<u64>(),
    ];
    let len =
        prop_oneof![2 => Just(12u32), 6 => 0u32..4_096, 1 => 60_000u32..70_000, 1 => any::<u32>()];
    let flags = prop_oneof![10 => 0u16..4, 2 => 4u16..8, 1 => any::<u16>()];
    let next = prop_oneof![10 => 0u16..16, 1 => any::<u16>()];
    let descriptor = (address.clone(), len, flags, next);
    let packets = prop::collection::vec((offload(), 0usize..4_000), 1..5);
    prop_oneof![
        8 => (any::<bool>(), 0u16..16, descriptor)
            .prop_map(|(queue, index, fields)| Step::Describe(queue, index, fields)),
        4 => (any::<bool>(), 0u16..16, 0u16..17).prop_map(|(queue, slot, head)| Step::Head(queue, slot, head)),
        4 => (any::<bool>(), 0u16..20).prop_map(|(queue, ahead)| Step::Available(queue, ahead)),
        6 => any::<bool>().prop_map(Step::Kick),
        3 => (0x20_0000u64..0x40_0000, any::<[u8; 12]>()).prop_map(|(at, bytes)| Step::Bytes(at, bytes)),
        1 => any::<u64>().prop_map(Step::Restart),
        5 => packets.prop_map(Step::Arrive),
        1 => Just(Step::SaveAndRestore),
    ]
}

/// Does the steps; returns the packets that left.
fn run(nic: &mut Nic, steps: &[Step], restored: bool) -> Vec<Effect> {
    let mut left = Vec::new();
    for step in steps {
        if restored {
            nic.machine.save_and_restore();
        }
        let driver = |queue: bool, nic: &Nic| {
            if queue { nic.transmit.clone() } else { nic.receive.clone() }
        };
        match step {
            Step::Describe(queue, index, (address, len, flags, next)) => {
                let driver = driver(*queue, nic);
                driver.write_descriptor(&nic.machine, *index, (*address, *len), *flags, *next);
            }
            Step::Head(queue, slot, head) => {
                let available = driver(*queue, nic).available;
                nic.machine.poke(available + 4 + 2 * u64::from(*slot), *head);
            }
            Step::Available(queue, ahead) => {
                let available = driver(*queue, nic).available;
                let index: u16 = nic.machine.peek(available + 2);
                nic.machine.poke(available + 2, index.wrapping_add(*ahead));
            }
            Step::Kick(queue) => driver(*queue, nic).kick(&mut nic.machine),
            Step::Bytes(at, bytes) => nic.machine.poke_bytes(*at, bytes),
            Step::Restart(features) => {
                let features = features & (ALL | EVENT_INDEX | INDIRECT);
                nic.receive.restart_two(&mut nic.transmit, &mut nic.machine, features);
            }
            Step::Arrive(packets) => {
                let packet = |(offload, len): &(PacketOffload, usize)| {
                    let mut frame = large().frame;
                    frame.truncate(*len);
                    Packet { offload: *offload, frame }
                };
                let packets: Vec<Packet> = packets.iter().map(packet).collect();
                let had_room = nic.machine.board.network_has_room();
                assert_eq!(nic.deliver(&packets).is_ok(), had_room);
            }
            Step::SaveAndRestore => nic.machine.save_and_restore(),
        }
        left.extend(nic.machine.effects());
    }
    left
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 192,
        failure_persistence: None,
        rng_seed: proptest::test_runner::RngSeed::Fixed(0x6E65_7421),
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_ring_contents_and_no_packets_break_the_device(
        steps in prop::collection::vec(step(), 1..200),
    ) {
        let mut nic = Nic::start(ALL | EVENT_INDEX | INDIRECT);
        let left = run(&mut nic, &steps, false);
        let good = |effect: &Effect| match effect {
            Effect::Packet(packet) => packet.frame.len() <= MAX_PACKET,
            _ => false,
        };
        prop_assert!(left.iter().all(good));
        nic.machine.save_and_restore();
        // Whatever happened, the device serves a driver that starts over.
        nic.receive.restart_two(&mut nic.transmit, &mut nic.machine, ALL);
        prop_assert_eq!(nic.receive.status(&mut nic.machine), DRIVER_OK);
        nic.machine.board.take_faults();
        prop_assert_eq!(nic.send([0; HEADER], &[9; 60]), [Effect::Packet(plain(60, 9))]);
        nic.offer(1, 1_526);
        nic.deliver(&[plain(60, 1)]).unwrap();
        prop_assert_eq!(nic.received().len(), 1);
    }

    #[test]
    fn equal_devices_stay_equal_whether_or_not_one_is_restored(
        steps in prop::collection::vec(step(), 1..100),
    ) {
        let run = |restored: bool| {
            let mut nic = Nic::start(ALL | EVENT_INDEX | INDIRECT);
            let left = run(&mut nic, &steps, restored);
            let mut memory = vec![0; 0x60_0000];
            nic.machine.ram.memory().read_slice(&mut memory, GuestAddress(0)).unwrap();
            (nic.machine.board.save(), memory, left)
        };
        prop_assert!(run(false) == run(true));
    }
}
