//! Which code is at which physical address: what returns and indirect jumps ask.

use std::mem::offset_of;

/// A physical address folded at this bit gives its place.
pub(super) const FOLD: u8 = 11;
/// Places, less one.
pub(super) const MASK: i32 = 65535;
pub(super) const KEY: i32 = offset_of!(Place, key) as i32;
pub(super) const CODE: i32 = offset_of!(Place, code) as i32;

/// Compiled code reads these.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Place {
    /// The physical address, or [`NOWHERE`].
    key: u64,
    /// Where its code is executed.
    code: u64,
}

const NOWHERE: u64 = u64::MAX;
const NO_PLACE: Place = Place { key: NOWHERE, code: 0 };

const _: () = assert!(size_of::<Place>() == 16);

/// One place for each of some addresses.
#[derive(Debug)]
pub(super) struct Table {
    places: Box<[Place]>,
}

impl Table {
    pub(super) fn new() -> Self {
        Self { places: vec![NO_PLACE; MASK as usize + 1].into() }
    }

    fn place(&mut self, physical: u64) -> &mut Place {
        &mut self.places[(physical ^ (physical >> FOLD)) as usize & MASK as usize]
    }

    pub(super) fn insert(&mut self, physical: u64, code: *const u8) {
        *self.place(physical) = Place { key: physical, code: code as u64 };
    }

    pub(super) fn remove(&mut self, physical: u64) {
        let place = self.place(physical);
        if place.key == physical {
            *place = NO_PLACE;
        }
    }

    pub(super) fn clear(&mut self) {
        self.places.fill(NO_PLACE);
    }

    pub(super) fn as_ptr(&self) -> *const u8 {
        self.places.as_ptr().cast()
    }
}
