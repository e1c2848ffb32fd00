//! What comes from the outside world: checked whole, then applied.

use super::{Board, CLOCK_LINE, DiskOperation, Effect, SERIAL_LINE};
use crate::devices::virtio::block::completed::{CompletedWrites, WriteCount};
use crate::devices::virtio::block::{Block, DiskStatus};
use crate::devices::virtio::net::addresses::Addresses;
use crate::devices::virtio::{DeviceContext, DeviceName, VirtioPci};
use vmft_log::entry::{Arrival, Packet, RequestId};
use vmft_log::point::VirtualTime;

/// An arrival that fits nothing the devices have asked for: the log is not of this machine,
/// or is damaged. The board is unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DeliveryError {
    /// The machine has no such device.
    #[error("there is no {0}")]
    NoDevice(DeviceName),
    /// The device has no such request on its way.
    #[error("{device} waits for no request {}", request.0)]
    NoRequest {
        /// Which device.
        device: DeviceName,
        /// Which request.
        request: RequestId,
    },
    /// The data is not as long as the request wants.
    #[error("request {} of {device} wants {wanted} bytes, but {given} came", request.0)]
    WrongLength {
        /// Which device.
        device: DeviceName,
        /// Which request.
        request: RequestId,
        /// Bytes wanted.
        wanted: usize,
        /// Bytes that came.
        given: usize,
    },
    /// There is no such virtio-blk status.
    #[error("request {} of {device} ended with the unknown status {status}", request.0)]
    UnknownStatus {
        /// Which device.
        device: DeviceName,
        /// Which request.
        request: RequestId,
        /// The status byte.
        status: u8,
    },
    /// More console input than [`Board::console_input_room`] allows.
    #[error("{given} bytes of console input came, but there is room for {room}")]
    ConsoleInput {
        /// Bytes that came.
        given: usize,
        /// Bytes allowed.
        room: usize,
    },
    /// Packets came although [`Board::network_has_room`] said otherwise.
    #[error("packets came before there was room for them")]
    Packets,
    /// Clock corrections concern the machine's clock, not its devices.
    #[error("a clock correction is not for the board")]
    ClockSync,
}

impl Board {
    /// True if a group of packets may come.
    pub fn network_has_room(&self) -> bool {
        self.functions.net.as_ref().is_some_and(|net| net.device().has_room())
    }

    /// The addresses the guest was seen to use on the network; `None` without a network.
    pub fn network_addresses(&self) -> Option<&Addresses> {
        self.functions.net.as_ref().map(|net| net.device().addresses())
    }

    /// Applies an arrival: data into guest memory, used ring, interrupt.
    ///
    /// # Errors
    /// [`DeliveryError`] if it fits no request; nothing is changed.
    pub fn deliver(&mut self, now: VirtualTime, arrival: &Arrival) -> Result<(), DeliveryError> {
        match arrival {
            Arrival::ClockSync { .. } => Err(DeliveryError::ClockSync),
            Arrival::ConsoleInput(bytes) => self.deliver_input(now, bytes),
            Arrival::WallClock { time } => {
                self.advance(now);
                self.clock.tell(now, *time);
                self.interrupts.set_line(CLOCK_LINE, self.clock.line());
                self.update_next_timer();
                Ok(())
            }
            Arrival::Entropy { request, data } => self.deliver_entropy(now, *request, data),
            Arrival::Packets(packets) => self.deliver_packets(now, packets),
            Arrival::DiskCompletion { disk, request, status, data } => {
                let device = DeviceName::Disk(*disk);
                let status = DiskStatus::from_byte(*status).ok_or(DeliveryError::UnknownStatus {
                    device,
                    request: *request,
                    status: *status,
                });
                self.deliver_disk(now, *disk, *request, status?, data)
            }
        }
    }

    /// Bytes of console input that can be delivered now; more must wait outside.
    pub fn console_input_room(&self) -> usize {
        self.serial.input_room()
    }

    /// The requests on their way, as the effects that sent them out, by device and in order.
    /// After a failover they are to be sent out again, since their completions were not logged.
    pub fn outstanding(&self) -> Vec<Effect> {
        let disks = (0u8..).zip(&self.functions.disks).flat_map(|(disk, device)| {
            device.device().requests().issued().map(move |request| Effect::Disk {
                disk,
                request: request.id,
                operation: request.operation.clone(),
            })
        });
        let entropy = self.functions.entropy.iter().flat_map(|device| {
            let effect = |request: &crate::devices::virtio::entropy::Request| Effect::Entropy {
                request: request.id,
                len: request.len,
            };
            device.device().requests().map(effect)
        });
        disks.chain(entropy).collect()
    }

    /// From now on the disks keep the writes they have completed, until a flush has covered them.
    pub fn keep_completed_writes(&mut self) {
        for disk in &mut self.functions.disks {
            disk.device_mut().keep_completed();
        }
    }

    /// How many writes each disk has completed.
    pub fn write_counts(&self) -> Vec<WriteCount> {
        let count = |disk: &VirtioPci<Block>| disk.device().requests().completed();
        self.functions.disks.iter().map(count).collect()
    }

    /// The completed writes of each disk that no flush has covered, but for the first ones that are `known`.
    pub fn completed_writes(&self, known: &[WriteCount]) -> Vec<CompletedWrites> {
        let since = |(number, disk): (usize, &VirtioPci<Block>)| {
            let known = known.get(number).copied().unwrap_or_default();
            disk.device().requests().completed_since(known)
        };
        self.functions.disks.iter().enumerate().map(since).collect()
    }

    fn deliver_input(&mut self, now: VirtualTime, bytes: &[u8]) -> Result<(), DeliveryError> {
        let (given, room) = (bytes.len(), self.console_input_room());
        if given > room {
            return Err(DeliveryError::ConsoleInput { given, room });
        }
        self.advance(now);
        self.serial.receive(bytes);
        self.interrupts.set_line(SERIAL_LINE, self.serial.line());
        Ok(())
    }

    fn deliver_disk(
        &mut self,
        now: VirtualTime,
        disk: u8,
        request: RequestId,
        status: DiskStatus,
        data: &[u8],
    ) -> Result<(), DeliveryError> {
        let device = DeviceName::Disk(disk);
        let index = usize::from(disk);
        let block = self.functions.disks.get(index).ok_or(DeliveryError::NoDevice(device))?;
        let found = block.device().requests().find(request);
        let found = found.ok_or(DeliveryError::NoRequest { device, request })?;
        let wanted = match &found.operation {
            DiskOperation::Read { len, .. } if status == DiskStatus::Ok => *len as usize,
            _ => 0,
        };
        check_length(device, request, wanted, data)?;
        self.advance(now);
        let Self { ram, functions, effects, faults, .. } = self;
        let mut around = DeviceContext { memory: ram.memory(), effects, faults };
        functions.disks[index].with_queues(&mut around, |block, access| {
            block.complete(request, status, data, access)
        });
        self.update_pci_lines();
        Ok(())
    }

    fn deliver_packets(
        &mut self,
        now: VirtualTime,
        packets: &[Packet],
    ) -> Result<(), DeliveryError> {
        if self.functions.net.is_none() {
            return Err(DeliveryError::NoDevice(DeviceName::Network));
        }
        if !self.network_has_room() {
            return Err(DeliveryError::Packets);
        }
        self.advance(now);
        let Self { ram, functions, effects, faults, .. } = self;
        let mut around = DeviceContext { memory: ram.memory(), effects, faults };
        if let Some(net) = &mut functions.net {
            net.with_queues(&mut around, |net, access| net.receive(packets, access));
        }
        self.update_pci_lines();
        Ok(())
    }

    fn deliver_entropy(
        &mut self,
        now: VirtualTime,
        request: RequestId,
        data: &[u8],
    ) -> Result<(), DeliveryError> {
        let device = DeviceName::Entropy;
        let source = self.functions.entropy.as_ref().ok_or(DeliveryError::NoDevice(device))?;
        let found = source.device().find(request);
        let found = found.ok_or(DeliveryError::NoRequest { device, request })?;
        check_length(device, request, found.len as usize, data)?;
        self.advance(now);
        let Self { ram, functions, effects, faults, .. } = self;
        let mut around = DeviceContext { memory: ram.memory(), effects, faults };
        if let Some(source) = &mut functions.entropy {
            source
                .with_queues(&mut around, |source, access| source.complete(request, data, access));
        }
        self.update_pci_lines();
        Ok(())
    }
}

fn check_length(
    device: DeviceName,
    request: RequestId,
    wanted: usize,
    data: &[u8],
) -> Result<(), DeliveryError> {
    let given = data.len();
    if given == wanted {
        Ok(())
    } else {
        Err(DeliveryError::WrongLength { device, request, wanted, given })
    }
}
