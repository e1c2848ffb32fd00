//! Access to guest memory through host pointers: the one place of the engine that needs
//! `unsafe`.
//!
//! [`Ram`] knows where the guest's memory lies in the host and reads and writes it by physical
//! address, checked. The methods of [`Cpu`] here are the fast path of loads and stores by linear
//! address; what the TLB's fast tags do not allow goes to the slow path (`linear`).

use super::cpu::Cpu;
use super::event::Trap;
use super::flags::Int;
use super::tlb::PAGE_MASK;
use crate::memory::{GuestRam, PAGE_SIZE};
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// One contiguous piece of guest memory in the host.
#[derive(Debug, Clone, Copy)]
struct Piece {
    /// First physical address.
    start: u64,
    /// Length in bytes, a whole number of pages.
    len: u64,
    /// Host address of the first byte.
    host: u64,
}

/// The guest's memory by physical address.
#[derive(Debug)]
pub(super) struct Ram {
    pieces: Vec<Piece>,
    /// Keeps the mappings alive.
    guest: GuestRam,
}

impl Ram {
    /// The memory behind `guest`.
    pub(super) fn new(guest: GuestRam) -> Self {
        let pieces = guest
            .ranges()
            .into_iter()
            .map(|(start, len)| {
                let host = guest
                    .memory()
                    .get_host_address(GuestAddress(start.0))
                    .expect("a range of memory is mapped");
                Piece { start: start.0, len, host: host as u64 }
            })
            .collect();
        Self { pieces, guest }
    }

    /// The memory as the rest of the machine sees it.
    pub(super) fn guest(&self) -> &GuestRam {
        &self.guest
    }

    /// The host address of physical page `frame`, if it is memory.
    pub(super) fn host_page(&self, frame: u64) -> Option<u64> {
        debug_assert!(frame.is_multiple_of(PAGE_SIZE));
        self.pieces
            .iter()
            .find(|piece| frame.wrapping_sub(piece.start) < piece.len)
            .map(|piece| piece.host + (frame - piece.start))
    }

    /// The host address of `len` bytes at `physical`, if they are memory within one page.
    fn host_bytes(&self, physical: u64, len: usize) -> Option<*mut u8> {
        let offset = physical & !PAGE_MASK;
        assert!(offset + len as u64 <= PAGE_SIZE, "physical accesses stay within a page");
        self.host_page(physical & PAGE_MASK).map(|host| (host + offset) as *mut u8)
    }

    /// Copies bytes within one page out of memory; false if it is not memory.
    pub(super) fn read(&self, physical: u64, into: &mut [u8]) -> bool {
        let Some(host) = self.host_bytes(physical, into.len()) else { return false };
        // SAFETY: `host_bytes` found `into.len()` bytes inside a mapping that `self.guest`
        // keeps alive, and no Rust reference to guest memory exists anywhere.
        unsafe { std::ptr::copy_nonoverlapping(host, into.as_mut_ptr(), into.len()) };
        true
    }

    /// Copies bytes into memory within one page; false if it is not memory. The caller keeps
    /// the record of written pages.
    pub(super) fn write(&mut self, physical: u64, bytes: &[u8]) -> bool {
        let Some(host) = self.host_bytes(physical, bytes.len()) else { return false };
        // SAFETY: as in `read`; the mapping is writable.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), host, bytes.len()) };
        true
    }

    /// Reads an aligned page-table entry; all ones if it is not memory.
    pub(super) fn read_entry(&self, physical: u64) -> u64 {
        let mut bytes = [0xFF; 8];
        self.read(physical, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Moves `len` bytes between two places, each within one page, as a loop of `width`-byte
    /// loads and stores upwards would. False, and nothing done, if either is not memory.
    pub(super) fn move_up(&mut self, from: u64, to: u64, len: usize, width: usize) -> bool {
        let (Some(source), Some(target)) = (self.host_bytes(from, len), self.host_bytes(to, len))
        else {
            return false;
        };
        let distance = (target as u64).wrapping_sub(source as u64);
        if distance == 0 || distance >= len as u64 {
            // SAFETY: `host_bytes` proved both ranges; `copy` allows overlap. The target does
            // not begin inside the source, so upwards and at once are the same.
            unsafe { std::ptr::copy(source, target, len) };
            return true;
        }
        let mut element = [0u8; 8];
        for offset in (0..len).step_by(width) {
            let size = width.min(len - offset);
            // SAFETY: `offset + size <= len`, within both proved ranges; `element` is ours.
            unsafe {
                std::ptr::copy_nonoverlapping(source.add(offset), element.as_mut_ptr(), size);
                std::ptr::copy_nonoverlapping(element.as_ptr(), target.add(offset), size);
            }
        }
        true
    }

    /// Fills `len` bytes within one page with copies of a `width`-byte value. False, and nothing
    /// done, if it is not memory.
    pub(super) fn fill(&mut self, to: u64, len: usize, width: usize, value: u64) -> bool {
        let Some(target) = self.host_bytes(to, len) else { return false };
        let bytes = value.to_le_bytes();
        if bytes[..width].iter().all(|byte| *byte == bytes[0]) {
            // SAFETY: `host_bytes` proved the range.
            unsafe { std::ptr::write_bytes(target, bytes[0], len) };
            return true;
        }
        for offset in (0..len).step_by(width) {
            let size = width.min(len - offset);
            // SAFETY: `offset + size <= len`, within the proved range.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target.add(offset), size) };
        }
        true
    }
}

impl Cpu {
    /// Loads a `T` from a linear address with the current privilege, zero-extended.
    #[inline(always)]
    pub(super) fn load<T: Int>(&mut self, address: u64) -> Result<u64, Trap> {
        let entry = self.tlb.entry(self.view, address);
        let last = address.wrapping_add(T::BYTES as u64 - 1);
        if entry.read == last & PAGE_MASK {
            let host = address.wrapping_add(entry.addend) as *const T;
            // SAFETY: the tag is compared with the page of the last byte, in the slot of the
            // page of the first; a page's tag is only ever in its own slot, so both bytes lie in
            // the tagged page. A tag is set by `Tlb::insert` alone, with the host address of
            // that page as found by `Ram::host_page`, and guest memory is never unmapped or
            // moved while `self.ram` lives.
            return Ok(unsafe { host.read_unaligned() }.wide());
        }
        self.load_slow(address, T::BYTES)
    }

    /// Loads a `T` that the same instruction is going to store to: faults as a store would.
    #[inline(always)]
    pub(super) fn load_for_update<T: Int>(&mut self, address: u64) -> Result<u64, Trap> {
        let entry = self.tlb.entry(self.view, address);
        let last = address.wrapping_add(T::BYTES as u64 - 1);
        if entry.write == last & PAGE_MASK {
            let host = address.wrapping_add(entry.addend) as *const T;
            // SAFETY: as in `load`; the write tag equals the read tag where it is set.
            return Ok(unsafe { host.read_unaligned() }.wide());
        }
        self.load_for_update_slow(address, T::BYTES)
    }

    /// Stores the low bytes of `value` as a `T` to a linear address with the current privilege.
    #[inline(always)]
    pub(super) fn store<T: Int>(&mut self, address: u64, value: u64) -> Result<(), Trap> {
        let entry = self.tlb.entry(self.view, address);
        let last = address.wrapping_add(T::BYTES as u64 - 1);
        if entry.write == last & PAGE_MASK {
            let host = address.wrapping_add(entry.addend) as *mut T;
            // SAFETY: as in `load`; the mapping is writable. The page is marked as written and
            // holds no decoded code, as `Cpu::translate` saw to before it set the tag.
            unsafe { host.write_unaligned(T::narrow(value)) };
            return Ok(());
        }
        self.store_slow(address, T::BYTES, value)
    }

    /// Loads bytes within the fast path's reach; false if the slow path is needed.
    #[inline]
    pub(super) fn load_bytes_fast(&self, address: u64, into: &mut [u8]) -> bool {
        let entry = self.tlb.entry(self.view, address);
        let room = PAGE_SIZE - (address & !PAGE_MASK);
        if entry.read != address & PAGE_MASK || into.len() as u64 > room {
            return false;
        }
        let host = address.wrapping_add(entry.addend) as *const u8;
        // SAFETY: as in `load`; the bytes end within the tagged page.
        unsafe { std::ptr::copy_nonoverlapping(host, into.as_mut_ptr(), into.len()) };
        true
    }

    /// Stores bytes within the fast path's reach; false if the slow path is needed.
    #[inline]
    pub(super) fn store_bytes_fast(&mut self, address: u64, bytes: &[u8]) -> bool {
        let entry = self.tlb.entry(self.view, address);
        let room = PAGE_SIZE - (address & !PAGE_MASK);
        if entry.write != address & PAGE_MASK || bytes.len() as u64 > room {
            return false;
        }
        let host = address.wrapping_add(entry.addend) as *mut u8;
        // SAFETY: as in `store`; the bytes end within the tagged page.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), host, bytes.len()) };
        true
    }
}
