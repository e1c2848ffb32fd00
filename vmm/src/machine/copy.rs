//! What must differ between machines that were restored from one snapshot: the numbers that the guest's
//! kernel draws. Both would draw the same ones, for keys of sessions among others, until their kernels mix in
//! something else: up to a minute.
//!
//! The way that hypervisors agree on, ACPI's VM generation ID, is not known to every kernel: Debian's for
//! clouds is built without it, and a guest with `acpi=off` would not find it. A virtio entropy device does not
//! help: what it gives is mixed in at once, and used a minute later. So the machine does here what the
//! kernel's `add_vmfork_randomness` does: fresh bytes go into the pool and into the key of the generator, and
//! the generator's generation is counted up, by which every CPU's own key and every batch of numbers in reserve
//! is given up at the next draw. The kernel's variables are found by the table of names in its memory, and
//! touched only where version and sizes are known.
//!
//! It is done before the machine runs, so it is part of the state that a log or a backup begins with.

use super::Machine;
use crate::boot::Symbols;
use vm_memory::{Bytes, GuestAddress};
use vmft_cpu::memory::GuestRam;

/// Fresh random bytes: half for the generator's key, half for the pool.
pub const FRESH_BYTES: usize = 64;

/// Kernels whose generator looks like this (`drivers/char/random.c`), as major and minor version.
const KNOWN: std::ops::RangeInclusive<(u32, u32)> = (5, 18)..=(6, 1);
const KEY_BYTES: usize = 32;
/// `base_crng`: the key, the moment of its birth, the generation, the lock.
const GENERATION: u64 = 40;
const LOCK: u64 = 48;
const CRNG_SIZE: u64 = 56;
/// `input_pool`: the state of a BLAKE2s hash, which begins with its chaining value; a lock; a count.
const POOL_SIZE: u64 = 128;
/// The generation of a CPU's key that is to be renewed.
const NO_GENERATION: u64 = u64::MAX;

/// Why a restored guest draws the numbers that every other copy draws.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CopyError {
    /// No table of names was found, or a name is missing.
    #[error("its kernel's random number generator cannot be found")]
    NotFound,
    /// The generator may look otherwise.
    #[error("its kernel is of a version whose random number generator is not known")]
    Version,
    /// The snapshot was taken in the moment in which the key is replaced.
    #[error("its kernel was just using the generator's key")]
    Busy,
}

/// `6.1` of `Linux version 6.1.0-57-cloud-amd64 (…`.
fn version(ram: &GuestRam, banner: GuestAddress) -> Option<(u32, u32)> {
    let mut text = [0; 32];
    ram.memory().read_slice(&mut text, banner).ok()?;
    let text = std::str::from_utf8(text.strip_prefix(b"Linux version ")?).ok()?;
    let mut numbers = text.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn stir(ram: &GuestRam, fresh: &[u8; FRESH_BYTES]) -> Result<(), CopyError> {
    let symbols = Symbols::find(ram).ok_or(CopyError::NotFound)?;
    let get = |name| symbols.get(name).ok_or(CopyError::NotFound);
    let (crng, pool, banner) = (get("base_crng")?, get("input_pool")?, get("linux_banner")?);
    let known = version(ram, banner.address).is_some_and(|version| KNOWN.contains(&version));
    if !known || crng.size != CRNG_SIZE || pool.size != POOL_SIZE {
        return Err(CopyError::Version);
    }
    let memory = ram.memory();
    let outside = |_| CopyError::NotFound;
    let field = |offset| GuestAddress(crng.address.0 + offset);
    let mut lock = [0; 4];
    memory.read_slice(&mut lock, field(LOCK)).map_err(outside)?;
    if lock != [0; 4] {
        return Err(CopyError::Busy);
    }
    let (for_key, for_pool) = fresh.split_at(KEY_BYTES);
    for (address, fresh) in [(crng.address, for_key), (pool.address, for_pool)] {
        let mut bytes = [0; KEY_BYTES];
        memory.read_slice(&mut bytes, address).map_err(outside)?;
        bytes.iter_mut().zip(fresh).for_each(|(byte, fresh)| *byte ^= fresh);
        memory.write_slice(&bytes, address).map_err(outside)?;
    }
    let generation: u64 = memory.read_obj(field(GENERATION)).map_err(outside)?;
    let next = match generation.wrapping_add(1) {
        NO_GENERATION => 0,
        next => next,
    };
    memory.write_obj(next, field(GENERATION)).map_err(outside)
}

impl Machine {
    /// Makes the guest draw other random numbers than any other machine restored from the same state.
    /// `fresh` has never been used before. The machine must not have run since it was restored.
    ///
    /// # Errors
    /// [`CopyError`]: the guest is as it was.
    pub fn become_a_copy(&mut self, fresh: &[u8; FRESH_BYTES]) -> Result<(), CopyError> {
        stir(self.engine.ram(), fresh)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::symbol_tables::{kernel, tables};
    use vmft_cpu::memory::MIN_MEMORY;

    const MAP: u64 = 0xFFFF_FFFF_8000_0000;
    const CRNG: u64 = 40 << 20;
    const POOL: u64 = CRNG + CRNG_SIZE;
    const BANNER: u64 = POOL + POOL_SIZE;

    fn guest(banner: &str, pool_size: u64) -> GuestRam {
        let ram = GuestRam::new(MIN_MEMORY).expect("memory");
        let names = kernel(&[
            ("base_crng", MAP + CRNG),
            ("input_pool", MAP + POOL),
            ("linux_banner", MAP + POOL + pool_size),
            ("last", MAP + BANNER + 512),
        ]);
        let write = |bytes: &[u8], at| ram.memory().write_slice(bytes, GuestAddress(at));
        write(&tables(&names), 18 << 20).expect("in range");
        write(banner.as_bytes(), POOL + pool_size).expect("in range");
        write(&7u64.to_le_bytes(), CRNG + GENERATION).expect("in range");
        ram
    }

    fn read<const N: usize>(ram: &GuestRam, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        ram.memory().read_slice(&mut bytes, GuestAddress(at)).expect("in range");
        bytes
    }

    const DEBIAN: &str = "Linux version 6.1.0-57-cloud-amd64 (debian-kernel@lists.debian.org)";

    #[test]
    fn key_and_pool_have_fresh_bytes_and_every_key_made_of_it_is_given_up() {
        let [one, two] = [1u8, 2].map(|byte| {
            let ram = guest(DEBIAN, POOL_SIZE);
            assert_eq!(stir(&ram, &[byte; FRESH_BYTES]), Ok(()));
            assert_eq!(read::<8>(&ram, CRNG + GENERATION), 8u64.to_le_bytes());
            (read::<32>(&ram, CRNG), read::<32>(&ram, POOL))
        });
        assert_eq!(one, ([1; 32], [1; 32]));
        assert_eq!(two, ([2; 32], [2; 32]));
    }

    #[test]
    fn a_generator_that_is_in_use_or_may_look_otherwise_is_not_touched() {
        let busy = guest(DEBIAN, POOL_SIZE);
        busy.memory().write_obj(1u32, GuestAddress(CRNG + LOCK)).expect("in range");
        let none = GuestRam::new(MIN_MEMORY).expect("memory");
        for (ram, expected) in [
            (busy, CopyError::Busy),
            (guest("Linux version 6.12.3 (gcc)", POOL_SIZE), CopyError::Version),
            (guest("Linux version 5.10.0-8 (gcc)", POOL_SIZE), CopyError::Version),
            (guest("Plan 9", POOL_SIZE), CopyError::Version),
            (guest(DEBIAN, POOL_SIZE + 8), CopyError::Version),
            (none, CopyError::NotFound),
        ] {
            assert_eq!(stir(&ram, &[1; FRESH_BYTES]), Err(expected));
            assert_eq!(read::<32>(&ram, CRNG), [0; 32]);
            assert_eq!(read::<32>(&ram, POOL), [0; 32]);
        }
    }
}
