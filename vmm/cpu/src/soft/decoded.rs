//! The instructions of the general path, which their ops name by number.
//!
//! Ops are neither copied nor cloned, and live in their block. So a number is in use exactly as
//! long as its op is: when a block is forgotten, the numbers of its ops are given back here.

use super::generic::Decoded;

/// Decoded instructions by number.
#[derive(Debug, Default)]
pub(super) struct DecodedInstructions {
    places: Vec<Decoded>,
    free: Vec<u32>,
}

impl DecodedInstructions {
    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// The instruction with this number.
    #[inline(always)]
    pub(super) fn get(&self, number: u32) -> Decoded {
        self.places[number as usize]
    }

    /// Keeps an instruction: its number.
    pub(super) fn insert(&mut self, decoded: Decoded) -> u32 {
        if let Some(number) = self.free.pop() {
            self.places[number as usize] = decoded;
            return number;
        }
        self.places.push(decoded);
        (self.places.len() - 1) as u32
    }

    /// Gives back the number of an op that is gone.
    pub(super) fn remove(&mut self, number: u32) {
        self.free.push(number);
    }
}
