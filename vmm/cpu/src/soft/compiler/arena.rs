//! Memory for code: written at one address, executed at another.

use std::ffi::c_int;
use std::io;
use std::ptr::{NonNull, null_mut};

/// Code lies at multiples of this.
const ALIGNMENT: usize = 16;

/// One mapping, which is unmapped at the end.
#[derive(Debug)]
struct Mapping {
    address: NonNull<u8>,
    len: usize,
}

impl Mapping {
    fn new(file: &impl std::os::fd::AsRawFd, len: usize, protection: c_int) -> io::Result<Self> {
        // SAFETY: a new mapping wherever the kernel likes; nothing else is there.
        let address = unsafe {
            libc::mmap(null_mut(), len, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { address, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`, with this length, and nothing refers to it any more:
        // all access goes through the arena, which is being dropped.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.len) };
    }
}

/// A piece of memory mapped twice. What is in it is known by its offset.
#[derive(Debug)]
pub(super) struct Arena {
    writable: Mapping,
    executable: Mapping,
    used: usize,
    /// Something was written since code was last entered.
    changed: bool,
}

// SAFETY: the mappings belong to the arena alone, and are the same in every thread.
unsafe impl Send for Arena {}

impl Arena {
    /// An empty one of so many bytes, rounded up to pages.
    ///
    /// # Errors
    /// Of the host, which may forbid memory that is executed.
    pub(super) fn new(len: usize) -> io::Result<Self> {
        use std::os::fd::{FromRawFd, OwnedFd};
        let len = len.next_multiple_of(4096);
        // SAFETY: the name is a string that ends with a zero; no other memory is involved.
        let descriptor = unsafe { libc::memfd_create(c"vmft-code".as_ptr(), libc::MFD_CLOEXEC) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new, and nobody else has it.
        let file = unsafe { OwnedFd::from_raw_fd(descriptor) };
        nix::unistd::ftruncate(&file, len as i64)?;
        Ok(Self {
            writable: Mapping::new(&file, len, libc::PROT_READ | libc::PROT_WRITE)?,
            executable: Mapping::new(&file, len, libc::PROT_READ | libc::PROT_EXEC)?,
            used: 0,
            changed: false,
        })
    }

    /// Adds code: its offset. `None` if there is no room.
    pub(super) fn add(&mut self, code: &[u8]) -> Option<u32> {
        let offset = self.used;
        let end = offset.checked_add(code.len())?;
        if end > self.writable.len {
            return None;
        }
        self.write(offset, code);
        self.used = end.next_multiple_of(ALIGNMENT);
        u32::try_from(offset).ok()
    }

    /// The offset that [`Self::add`] would give next.
    pub(super) fn next(&self) -> usize {
        self.used
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.writable.len, "code lies within the arena");
        // SAFETY: the target lies within the writable mapping, as asserted, and the source is no part
        // of it, since no reference to it is ever made. No code runs: that would borrow the arena.
        unsafe {
            let target = self.writable.address.as_ptr().add(offset);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len());
        }
        self.changed = true;
    }

    /// Overwrites bytes of code that was added.
    pub(super) fn patch(&mut self, offset: u32, bytes: &[u8]) {
        assert!(offset as usize + bytes.len() <= self.used, "a patch lies within code");
        self.write(offset as usize, bytes);
    }

    /// Overwrites the distance of the jump that has it at `offset`.
    pub(super) fn patch_jump(&mut self, offset: u32, target: u32) {
        let distance = i64::from(target) - (i64::from(offset) + 4);
        let distance = i32::try_from(distance).expect("the arena is less than 2 GiB");
        self.patch(offset, &distance.to_le_bytes());
    }

    /// True if code was written since this was last asked.
    pub(super) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Where code at `offset` is executed.
    pub(super) fn address(&self, offset: u32) -> *const u8 {
        assert!((offset as usize) < self.used, "there is code");
        // SAFETY: `used` is at most the length of the mapping.
        unsafe { self.executable.address.as_ptr().add(offset as usize) }
    }

    /// Forgets all code from `offset` on.
    pub(super) fn truncate(&mut self, offset: usize) {
        self.used = self.used.min(offset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_code_can_be_written_where_it_is_executed() {
        let mut arena = Arena::new(8192).expect("the host lets memory be executed");
        arena.add(&[0xC3]).expect("there is room");
        let maps = std::fs::read_to_string("/proc/self/maps").expect("there are maps");
        let mut kinds = std::collections::BTreeSet::new();
        for map in maps.lines().filter(|line| line.contains("vmft-code")) {
            kinds.extend(map.split_whitespace().nth(1));
        }
        assert_eq!(kinds.into_iter().collect::<Vec<_>>(), ["r-xs", "rw-s"]);
    }
}
