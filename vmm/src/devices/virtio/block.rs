//! The virtio block device (specification §5.2): one queue, reads, writes, flushes and the
//! device's ID.
//!
//! A request is parsed and, for a write, copied at the exit that announces it; [`requests`]
//! decides when it goes out. What needs no disk (a bad request, the ID) is answered at once.
//!
//! The guest is told limits that keep one request below a megabyte. The device takes no
//! further requests from the queue while [`requests::MAX_IN_FLIGHT`] of them, or
//! [`requests::MAX_IN_FLIGHT_BYTES`], are on their way; completions make it go on.

pub mod completed;
pub mod requests;

use super::queue::{Chain, QueueAccess, QueueFault, Segment, total_len};
use super::{DeviceKind, DeviceName, VirtioDevice};
use crate::board::{DiskOperation, Effect};
use crate::devices::InvalidState;
use completed::{CompletedWrite, CompletedWrites, KeepLimit};
use requests::{Request, Requests, RequestsState};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vmft_cpu::memory::GuestMemoryMmap;
use vmft_log::entry::RequestId;

/// The unit in which the guest addresses the disk, in bytes.
pub const SECTOR_SIZE: u64 = 512;
/// Longest serial number in bytes.
pub const SERIAL_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;

/// Most segments of one request.
const SEGMENTS_MAX: u32 = 126;
/// Largest segment in bytes; Linux needs a page at least.
const SEGMENT_SIZE_MAX: u32 = 8192;
/// Most data bytes of one request.
pub const MAX_REQUEST_BYTES: u64 = SEGMENTS_MAX as u64 * SEGMENT_SIZE_MAX as u64;

/// Room for a request of the most segments, its header and its status.
const QUEUE_SIZE: u16 = 256;
const QUEUE: usize = 0;
const HEADER_LEN: u64 = 16;
/// `struct virtio_blk_config` up to and including the write-cache byte and its padding.
const CONFIG_LEN: usize = 36;

const STATUS_OK: u8 = VIRTIO_BLK_S_OK as u8;
const STATUS_IO_ERROR: u8 = VIRTIO_BLK_S_IOERR as u8;
const STATUS_UNSUPPORTED: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// How a request ended in the outside world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskStatus {
    /// It was done.
    Ok,
    /// It was not.
    IoError,
    /// The disk cannot do it.
    Unsupported,
}

impl DiskStatus {
    /// The virtio-blk status byte.
    pub const fn byte(self) -> u8 {
        match self {
            Self::Ok => STATUS_OK,
            Self::IoError => STATUS_IO_ERROR,
            Self::Unsupported => STATUS_UNSUPPORTED,
        }
    }

    /// The status a byte stands for, if any.
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            STATUS_OK => Some(Self::Ok),
            STATUS_IO_ERROR => Some(Self::IoError),
            STATUS_UNSUPPORTED => Some(Self::Unsupported),
            _ => None,
        }
    }
}

/// One disk.
#[derive(Debug, Clone)]
pub struct Block {
    number: u8,
    sectors: u64,
    read_only: bool,
    serial: [u8; SERIAL_LEN],
    config_space: [u8; CONFIG_LEN],
    keep_limit: KeepLimit,
    requests: Requests,
}

/// What a parsed request comes to.
enum Outcome {
    /// It goes to the disk.
    Submit(DiskOperation),
    /// It is answered here.
    Answer(DiskStatus),
}

impl Block {
    /// Disk `number` of the machine with `sectors` sectors; a serial number longer than
    /// [`SERIAL_LEN`] bytes is cut.
    pub fn new(
        number: u8,
        sectors: u64,
        read_only: bool,
        serial: &str,
        keep_limit: KeepLimit,
    ) -> Self {
        let mut config_space = [0; CONFIG_LEN];
        config_space[0..8].copy_from_slice(&sectors.to_le_bytes());
        config_space[8..12].copy_from_slice(&SEGMENT_SIZE_MAX.to_le_bytes());
        config_space[12..16].copy_from_slice(&SEGMENTS_MAX.to_le_bytes());
        config_space[20..24].copy_from_slice(&(SECTOR_SIZE as u32).to_le_bytes());
        let mut padded = [0; SERIAL_LEN];
        for (to, from) in padded.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let requests = Requests::new(keep_limit);
        Self { number, sectors, read_only, serial: padded, config_space, keep_limit, requests }
    }

    /// The requests on their way.
    pub fn requests(&self) -> &Requests {
        &self.requests
    }

    /// From now on the writes that were completed are kept until a flush has covered them.
    pub fn keep_completed(&mut self) {
        self.requests.keep_completed();
    }

    /// The data of the completed writes of a restored device.
    ///
    /// # Errors
    /// [`InvalidState`] if they are not those it has counted.
    pub fn restore_completed(&mut self, writes: &CompletedWrites) -> Result<(), InvalidState> {
        let (read_only, sectors) = (self.read_only, self.sectors);
        let on_disk = |CompletedWrite { offset, data }: &CompletedWrite| {
            !read_only
                && offset.is_multiple_of(SECTOR_SIZE)
                && offset_of(sectors, offset / SECTOR_SIZE, data.len() as u64).is_some()
        };
        self.requests.restore_completed(writes, on_disk)
    }

    /// A request has ended: `data` is what was read, `status` how it went. The caller has
    /// checked with [`Requests::find`] that there is such a request and that the data fits.
    ///
    /// # Errors
    /// What is wrong with the queue.
    pub fn complete(
        &mut self,
        request: RequestId,
        status: DiskStatus,
        data: &[u8],
        access: &mut QueueAccess<'_>,
    ) -> Result<(), QueueFault> {
        let ended = self.requests.remove(request, status == DiskStatus::Ok);
        self.issue(access);
        self.flush_if_due(access);
        if let Some(Request { head, buffers, status: place, abandoned: false, .. }) = ended {
            access.write(&buffers, 0, data);
            answer(access, head, place, data.len() as u32, status)?;
        }
        self.take_requests(access)
    }

    /// Takes what the driver made available, as far as there is room.
    fn take_requests(&mut self, access: &mut QueueAccess<'_>) -> Result<(), QueueFault> {
        loop {
            while self.requests.have_room() {
                let Some(chain) = access.next_chain(QUEUE)? else { break };
                self.take_request(&chain, access)?;
            }
            // Without room, a completion comes here again; no notification is needed.
            if !self.requests.have_room() || !access.ask_for_notification(QUEUE)? {
                return Ok(());
            }
        }
    }

    fn take_request(
        &mut self,
        chain: &Chain,
        access: &mut QueueAccess<'_>,
    ) -> Result<(), QueueFault> {
        let short = QueueFault::ShortChain { queue: QUEUE, head: chain.head };
        if total_len(&chain.readable) < HEADER_LEN {
            return Err(short);
        }
        let (buffers, place) = split_status(&chain.writable).ok_or(short)?;
        let header = access.read(&chain.readable, 0, HEADER_LEN as usize);
        let mut kind = [0; 4];
        let mut sector = [0; 8];
        kind.copy_from_slice(&header[0..4]);
        sector.copy_from_slice(&header[8..16]);
        let sector = u64::from_le_bytes(sector);
        let outcome = match u32::from_le_bytes(kind) {
            VIRTIO_BLK_T_IN => self.parse_read(sector, &buffers),
            VIRTIO_BLK_T_OUT => self.parse_write(sector, chain, access),
            // What a flush of the device's own could not make durable, this one would not cover.
            VIRTIO_BLK_T_FLUSH if self.requests.take_doubt() => {
                Outcome::Answer(DiskStatus::IoError)
            }
            VIRTIO_BLK_T_FLUSH => Outcome::Submit(DiskOperation::Flush),
            VIRTIO_BLK_T_GET_ID => {
                access.write(&buffers, 0, &self.serial);
                let written = total_len(&buffers).min(SERIAL_LEN as u64) as u32;
                return answer(access, chain.head, place, written, DiskStatus::Ok);
            }
            _ => Outcome::Answer(DiskStatus::Unsupported),
        };
        match outcome {
            Outcome::Submit(operation) => {
                self.requests.add(chain.head, buffers, place, operation);
                self.issue(access);
                Ok(())
            }
            Outcome::Answer(status) => answer(access, chain.head, place, 0, status),
        }
    }

    fn parse_read(&self, sector: u64, buffers: &[Segment]) -> Outcome {
        let len = total_len(buffers);
        match self.offset(sector, len) {
            Some(offset) => Outcome::Submit(DiskOperation::Read { offset, len: len as u32 }),
            None => Outcome::Answer(DiskStatus::IoError),
        }
    }

    fn parse_write(&self, sector: u64, chain: &Chain, access: &QueueAccess<'_>) -> Outcome {
        let len = total_len(&chain.readable) - HEADER_LEN;
        match self.offset(sector, len) {
            Some(offset) if !self.read_only => {
                let data = access.read(&chain.readable, HEADER_LEN, len as usize);
                Outcome::Submit(DiskOperation::Write { offset, data })
            }
            _ => Outcome::Answer(DiskStatus::IoError),
        }
    }

    /// Where on the disk a transfer begins, if the whole of it is on the disk and it is a
    /// whole number of sectors within the limits.
    fn offset(&self, sector: u64, len: u64) -> Option<u64> {
        offset_of(self.sectors, sector, len)
    }

    /// Sends out every request that nothing holds back any more.
    fn issue(&mut self, access: &mut QueueAccess<'_>) {
        let disk = self.number;
        self.requests.issue(|request, operation| {
            let operation = operation.clone();
            access.effects().push(Effect::Disk { disk, request, operation });
        });
    }

    /// Asks for a flush that nobody in the guest waits for, if much is completed that no flush has covered.
    fn flush_if_due(&mut self, access: &mut QueueAccess<'_>) {
        if let Some(request) = self.requests.add_own_flush() {
            let (disk, operation) = (self.number, DiskOperation::Flush);
            access.effects().push(Effect::Disk { disk, request, operation });
        }
    }
}

/// Where on a disk of so many sectors a transfer begins, if it is one that a request can make.
fn offset_of(sectors: u64, sector: u64, len: u64) -> Option<u64> {
    let whole = len > 0 && len.is_multiple_of(SECTOR_SIZE) && len <= MAX_REQUEST_BYTES;
    let end = sector.checked_add(len / SECTOR_SIZE)?;
    (whole && end <= sectors).then(|| sector * SECTOR_SIZE)
}

/// Puts a status into its place and gives the chain back.
fn answer(
    access: &mut QueueAccess<'_>,
    head: u16,
    place: u64,
    data_len: u32,
    status: DiskStatus,
) -> Result<(), QueueFault> {
    access.write(&[Segment { address: place, len: 1 }], 0, &[status.byte()]);
    access.put_used(QUEUE, head, data_len + 1)
}

/// Parts the last writable byte, which takes the status, from the data before it.
fn split_status(writable: &[Segment]) -> Option<(Vec<Segment>, u64)> {
    let (last, before) = writable.split_last()?;
    let mut data = before.to_vec();
    if last.len > 1 {
        data.push(Segment { len: last.len - 1, ..*last });
    }
    Some((data, last.address + u64::from(last.len) - 1))
}

impl VirtioDevice for Block {
    type State = RequestsState;

    fn kind(&self) -> DeviceKind {
        // Mass storage controller, other.
        DeviceKind { virtio_type: VIRTIO_ID_BLOCK as u16, pci_class: 0x01_8000 }
    }

    fn name(&self) -> DeviceName {
        DeviceName::Disk(self.number)
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH;
        always | if self.read_only { 1 << VIRTIO_BLK_F_RO } else { 0 }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn config_space(&self) -> &[u8] {
        &self.config_space
    }

    fn notify(&mut self, _: usize, access: &mut QueueAccess<'_>) -> Result<(), QueueFault> {
        self.take_requests(access)
    }

    fn abandon(&mut self) {
        self.requests.abandon();
    }

    fn save(&self) -> RequestsState {
        self.requests.save()
    }

    fn restore(
        &mut self,
        state: &RequestsState,
        queue_sizes: &[u16],
        stopped: bool,
        memory: &GuestMemoryMmap,
    ) -> Result<(), InvalidState> {
        let heads = if stopped { 0 } else { queue_sizes[QUEUE] };
        let on_disk = |operation: &DiskOperation| match operation {
            DiskOperation::Flush => true,
            DiskOperation::Read { offset, len } => {
                offset.is_multiple_of(SECTOR_SIZE)
                    && self.offset(offset / SECTOR_SIZE, u64::from(*len)).is_some()
            }
            DiskOperation::Write { offset, data } => {
                !self.read_only
                    && offset.is_multiple_of(SECTOR_SIZE)
                    && self.offset(offset / SECTOR_SIZE, data.len() as u64).is_some()
            }
        };
        self.requests = Requests::restore(state, self.keep_limit, heads, memory, on_disk)?;
        Ok(())
    }
}
