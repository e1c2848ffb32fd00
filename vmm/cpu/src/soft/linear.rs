//! The slow path of memory accesses: translation, page crossings, devices, decoded code.

use super::cpu::{Cpu, is_canonical};
use super::event::{BusRequest, Event, Flow, Trap};
use super::exception::Exception;
use super::flags::Int;
use super::mmu::Intent;
use super::tlb::{PAGE_MASK, View};
use crate::memory::{PAGE_SIZE, PageNumber};

/// Where the bytes of one access lie: at most two pieces, split at the page boundary.
#[derive(Debug, Clone, Copy)]
struct Place {
    first: u64,
    first_len: usize,
    second: u64,
}

impl Cpu {
    #[cold]
    #[inline(never)]
    pub(super) fn load_slow(&mut self, address: u64, len: usize) -> Result<u64, Trap> {
        self.load_integer(address, len, Intent::Read)
    }

    #[cold]
    #[inline(never)]
    pub(super) fn load_for_update_slow(&mut self, address: u64, len: usize) -> Result<u64, Trap> {
        self.load_integer(address, len, Intent::Write)
    }

    fn load_integer(&mut self, address: u64, len: usize, intent: Intent) -> Result<u64, Trap> {
        self.check_alignment(address, len)?;
        let mut bytes = [0; 8];
        let place = self.locate(address, len, intent, self.cpl == 3)?;
        self.read_place(place, &mut bytes[..len])?;
        Ok(u64::from_le_bytes(bytes))
    }

    #[cold]
    #[inline(never)]
    pub(super) fn store_slow(&mut self, address: u64, len: usize, value: u64) -> Flow {
        self.check_alignment(address, len)?;
        let place = self.locate(address, len, Intent::Write, self.cpl == 3)?;
        self.write_place(place, &value.to_le_bytes()[..len])
    }

    /// Loads any number of bytes up to a page, all or nothing.
    pub(super) fn load_bytes(&mut self, address: u64, into: &mut [u8]) -> Flow {
        if self.load_bytes_fast(address, into) {
            return Ok(());
        }
        let place = self.locate(address, into.len(), Intent::Read, self.cpl == 3)?;
        self.read_place(place, into)
    }

    /// Stores any number of bytes up to a page, all or nothing.
    pub(super) fn store_bytes(&mut self, address: u64, bytes: &[u8]) -> Flow {
        if self.store_bytes_fast(address, bytes) {
            return Ok(());
        }
        let place = self.locate(address, bytes.len(), Intent::Write, self.cpl == 3)?;
        self.write_place(place, bytes)
    }

    /// As [`Self::store_bytes`], with the rights of a user or of the supervisor.
    pub(super) fn store_bytes_as(&mut self, address: u64, bytes: &[u8], user: bool) -> Flow {
        let place = self.locate(address, bytes.len(), Intent::Write, user)?;
        self.write_place(place, bytes)
    }

    /// Faults as a store of `len` bytes would, without storing.
    pub(super) fn probe_store(&mut self, address: u64, len: usize) -> Flow {
        self.find_place(address, len, Intent::Write, self.cpl == 3).map(|_| ())
    }

    /// Loads with supervisor rights, as the CPU reads its own tables.
    pub(super) fn load_system<T: Int>(&mut self, address: u64) -> Result<u64, Trap> {
        let mut bytes = [0; 8];
        let place = self.locate(address, T::BYTES, Intent::Read, false)?;
        self.read_place(place, &mut bytes[..T::BYTES])?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Stores with supervisor rights, as the CPU writes its own tables.
    pub(super) fn store_system<T: Int>(&mut self, address: u64, value: u64) -> Flow {
        let place = self.locate(address, T::BYTES, Intent::Write, false)?;
        self.write_place(place, &value.to_le_bytes()[..T::BYTES])
    }

    fn check_alignment(&mut self, address: u64, len: usize) -> Flow {
        if self.checks_alignment() && !address.is_multiple_of(len as u64) {
            return Err(self.raise(Exception::AlignmentCheck));
        }
        Ok(())
    }

    /// Where an access goes, which watchpoints take note of.
    fn locate(
        &mut self,
        address: u64,
        len: usize,
        intent: Intent,
        user: bool,
    ) -> Result<Place, Trap> {
        let place = self.find_place(address, len, intent, user)?;
        if self.breakpoints.on_memory {
            self.note_access(address, len, intent);
        }
        Ok(place)
    }

    /// `len` is at most a page.
    fn find_place(
        &mut self,
        address: u64,
        len: usize,
        intent: Intent,
        user: bool,
    ) -> Result<Place, Trap> {
        let last = address.wrapping_add(len as u64 - 1);
        if !is_canonical(address) || !is_canonical(last) {
            self.event = Event::NonCanonical;
            return Err(Trap);
        }
        let room = (PAGE_SIZE - (address & !PAGE_MASK)) as usize;
        let first = self.translate(address, intent, user)?;
        if len <= room {
            return Ok(Place { first, first_len: len, second: 0 });
        }
        if self.trial.is_some() {
            // Code leaves what lies in two pages.
            return Err(Trap);
        }
        let second = self.translate(last & PAGE_MASK, intent, user)?;
        Ok(Place { first, first_len: room, second })
    }

    /// The physical address behind a canonical linear one; from the TLB or by a walk.
    pub(super) fn translate(
        &mut self,
        address: u64,
        intent: Intent,
        user: bool,
    ) -> Result<u64, Trap> {
        let page = address & PAGE_MASK;
        let write = intent == Intent::Write;
        let view = View::of(user);
        if self.trial.is_some() {
            return self
                .hit_on_trial(view, page, write)
                .map(|frame| frame | (address & !PAGE_MASK));
        }
        let frame = match self.tlb.lookup(view, page, write) {
            Some(frame) => frame,
            None => {
                let mapping = self.walk(address, intent, user)?;
                let Some(host) = self.ram.host_page(mapping.frame) else {
                    return Ok(mapping.frame | (address & !PAGE_MASK));
                };
                self.tlb.insert(view, page, mapping, host);
                mapping.frame
            }
        };
        if write {
            let number = PageNumber::containing(frame);
            if !self.code.has_code(number) {
                self.ram.guest().tracker().mark_page(number);
                self.tlb.allow_fast_writes(view, page);
            }
        }
        Ok(frame | (address & !PAGE_MASK))
    }

    fn read_place(&mut self, place: Place, into: &mut [u8]) -> Flow {
        let (first, second) = into.split_at_mut(place.first_len);
        self.read_physical(place.first, first)?;
        if second.is_empty() { Ok(()) } else { self.read_physical(place.second, second) }
    }

    fn read_physical(&mut self, physical: u64, into: &mut [u8]) -> Flow {
        if self.ram.read(physical, into) {
            return Ok(());
        }
        let mut address = physical;
        for part in into.chunks_mut(8) {
            let len = part.len();
            let value = self.bus(BusRequest::MemoryRead { address, len: len as u8 })?;
            part.copy_from_slice(&value.to_le_bytes()[..len]);
            address += len as u64;
        }
        Ok(())
    }

    fn write_place(&mut self, place: Place, bytes: &[u8]) -> Flow {
        let (first, second) = bytes.split_at(place.first_len);
        let hit = self.code.hits(place.first, first.len())
            || (!second.is_empty() && self.code.hits(place.second, second.len()));
        if hit && !self.restart.code_writes {
            self.event = Event::CodeWrite;
            return Err(Trap);
        }
        self.write_physical(place.first, first)?;
        if second.is_empty() { Ok(()) } else { self.write_physical(place.second, second) }
    }

    fn write_physical(&mut self, physical: u64, bytes: &[u8]) -> Flow {
        if let Some(trial) = &mut self.trial {
            trial.note_write(&self.ram, physical, bytes.len());
        }
        if self.ram.write(physical, bytes) {
            let page = PageNumber::containing(physical);
            self.ram.guest().tracker().mark_page(page);
            if self.code.hits(physical, bytes.len()) {
                self.stale.push(page);
            }
            return Ok(());
        }
        let mut address = physical;
        for part in bytes.chunks(8) {
            let mut padded = [0; 8];
            padded[..part.len()].copy_from_slice(part);
            let value = u64::from_le_bytes(padded);
            self.bus(BusRequest::MemoryWrite { address, len: part.len() as u8, value })?;
            address += part.len() as u64;
        }
        Ok(())
    }
}
