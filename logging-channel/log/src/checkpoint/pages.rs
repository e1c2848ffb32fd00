//! Pages on the wire: which, and their bytes, each in the shortest of several forms.
//!
//! ```text
//! count varint · (gap varint · encoding byte · length varint for Lz4 and Changed) × count · bytes …
//! ```

use super::{MAX_BATCH_PAGES, PAGE_BYTES, Page, PageNumber, ZERO_PAGE};
use crate::wire::{Cursor, DecodeError, put_varint};
use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// How the bytes of one page are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PageEncoding {
    /// No bytes: all are zero.
    Zero = 0,
    /// The bytes.
    Raw = 1,
    /// An LZ4 block of the bytes.
    Lz4 = 2,
    /// An LZ4 block of the exclusive-or of the bytes and those the receiver has.
    Changed = 3,
}

impl PageEncoding {
    fn from_byte(tag: u8) -> Result<Self, DecodeError> {
        [Self::Zero, Self::Raw, Self::Lz4, Self::Changed]
            .into_iter()
            .find(|encoding| *encoding as u8 == tag)
            .ok_or(DecodeError::Tag { what: "page encoding", tag })
    }

    const fn has_length(self) -> bool {
        matches!(self, Self::Lz4 | Self::Changed)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Packed {
    number: PageNumber,
    encoding: PageEncoding,
    len: usize,
}

/// Up to [`MAX_BATCH_PAGES`] pages in ascending order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PageBatch {
    pages: Vec<Packed>,
    bytes: Vec<u8>,
}

impl PageBatch {
    /// How many pages it carries.
    #[expect(clippy::len_without_is_empty, reason = "a batch that is sent is never empty")]
    pub const fn len(&self) -> usize {
        self.pages.len()
    }

    /// Bytes of the packed pages, without their numbers.
    pub const fn packed_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The pages it carries, and how.
    pub fn pages(&self) -> impl Iterator<Item = (PageNumber, PageEncoding)> {
        self.pages.iter().map(|packed| (packed.number, packed.encoding))
    }

    pub(super) const fn is_full(&self) -> bool {
        self.pages.len() == MAX_BATCH_PAGES
    }

    fn push(&mut self, number: PageNumber, encoding: PageEncoding, bytes: &[u8]) {
        self.pages.push(Packed { number, encoding, len: bytes.len() });
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn encode(&self, mut out: Vec<u8>) -> Vec<u8> {
        put_varint(&mut out, self.pages.len() as u64);
        let mut end = 0;
        for Packed { number, encoding, len } in &self.pages {
            put_varint(&mut out, number.0 - end);
            end = number.0 + 1;
            out.push(*encoding as u8);
            if encoding.has_length() {
                put_varint(&mut out, *len as u64);
            }
        }
        out.extend_from_slice(&self.bytes);
        out
    }

    pub(super) fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(payload);
        let count = cursor.bounded("page count", MAX_BATCH_PAGES as u64)?;
        let (mut pages, mut end, mut total) = (Vec::new(), 0u64, 0);
        for _ in 0..count {
            let gap = cursor.varint("page number")?;
            let out_of_range = DecodeError::Rule("page number is out of range");
            let number = end.checked_add(gap).ok_or(out_of_range.clone())?;
            end = number.checked_add(1).ok_or(out_of_range)?;
            let encoding = PageEncoding::from_byte(cursor.byte("page encoding")?)?;
            let len = match encoding {
                PageEncoding::Zero => 0,
                PageEncoding::Raw => PAGE_BYTES,
                PageEncoding::Lz4 | PageEncoding::Changed => {
                    usize::try_from(cursor.bounded("packed page", PAGE_BYTES as u64)?)
                        .expect("at most a page")
                }
            };
            total += len;
            pages.push(Packed { number: PageNumber(number), encoding, len });
        }
        let bytes = cursor.take_rest().to_vec();
        if pages.is_empty() || bytes.len() != total {
            return Err(DecodeError::Rule("page data does not fit the page numbers"));
        }
        Ok(Self { pages, bytes })
    }

    /// The pages, still packed, one after the other.
    pub(super) fn packed(&self) -> impl Iterator<Item = PackedPage<'_>> {
        let mut rest = self.bytes.as_slice();
        self.pages.iter().map(move |packed| {
            let (bytes, behind) = rest.split_at(packed.len);
            rest = behind;
            PackedPage { packed: *packed, bytes }
        })
    }
}

/// One page of a batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct PackedPage<'a> {
    packed: Packed,
    bytes: &'a [u8],
}

impl PackedPage<'_> {
    pub(super) const fn number(&self) -> PageNumber {
        self.packed.number
    }

    pub(super) const fn encoding(&self) -> PageEncoding {
        self.packed.encoding
    }

    /// Its bytes, for a receiver that has `had`.
    pub(super) fn unpack(&self, had: &Page) -> Result<Page, DecodeError> {
        let mut page = ZERO_PAGE;
        match self.packed.encoding {
            PageEncoding::Zero => {}
            PageEncoding::Raw => page.copy_from_slice(self.bytes),
            PageEncoding::Lz4 | PageEncoding::Changed => {
                if decompress_into(self.bytes, &mut page).ok() != Some(PAGE_BYTES) {
                    return Err(DecodeError::Compression);
                }
            }
        }
        if self.packed.encoding == PageEncoding::Changed {
            exclusive_or(&mut page, had);
        }
        Ok(page)
    }
}

fn exclusive_or(page: &mut Page, other: &Page) {
    for (byte, other) in page.iter_mut().zip(other) {
        *byte ^= other;
    }
}

/// An exclusive-or that packs this small is taken without trying anything else.
const SMALL_CHANGE: usize = PAGE_BYTES / 4;

/// Packs pages for a receiver, and remembers what the receiver has of them.
///
/// Only pages given with `remember` are remembered, up to the budget: the first pass over a
/// machine's memory is not worth it, what changes again and again is.
pub struct PageEncoder {
    /// Pages the receiver has, as they were sent last.
    sent: BTreeMap<PageNumber, Box<Page>>,
    budget: usize,
    /// Pages that are zero on the other side unless named here; `None` if nothing is known.
    nonzero: Option<BTreeSet<PageNumber>>,
    table: CompressTable,
    plain: Vec<u8>,
    changed: Vec<u8>,
}

impl fmt::Debug for PageEncoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let remembered = self.sent.len();
        f.debug_struct("PageEncoder").field("remembered", &remembered).finish_non_exhaustive()
    }
}

impl PageEncoder {
    /// For a receiver whose memory is zero.
    pub fn for_zeroes(budget: usize) -> Self {
        Self { nonzero: Some(BTreeSet::new()), ..Self::for_earlier(budget) }
    }

    /// For a receiver whose memory is the machine's at an earlier point. Remembers up to `budget`
    /// pages.
    pub fn for_earlier(budget: usize) -> Self {
        let scratch = vec![0; get_maximum_output_size(PAGE_BYTES)];
        Self {
            sent: BTreeMap::new(),
            budget,
            nonzero: None,
            table: CompressTable::default(),
            plain: scratch.clone(),
            changed: scratch,
        }
    }

    /// Pages remembered.
    pub fn remembered(&self) -> usize {
        self.sent.len()
    }

    /// Forgets what was remembered: what was sent may not have arrived.
    pub fn forget(&mut self) {
        self.sent.clear();
        self.nonzero = None;
    }

    /// Adds a page to the batch; false if the receiver has it as it is, and nothing was added.
    pub(super) fn add(
        &mut self,
        batch: &mut PageBatch,
        number: PageNumber,
        page: &Page,
        remember: bool,
    ) -> bool {
        let zero = *page == ZERO_PAGE;
        if let Some(nonzero) = &mut self.nonzero {
            let was_zero = !nonzero.contains(&number);
            if zero && was_zero {
                return false;
            }
            if zero {
                nonzero.remove(&number)
            } else {
                nonzero.insert(number)
            };
        }
        let room = self.sent.len() < self.budget;
        let had = self.sent.get_mut(&number);
        if had.as_ref().is_some_and(|had| ***had == *page) {
            return false;
        }
        if zero {
            batch.push(number, PageEncoding::Zero, &[]);
        } else {
            let packed = |input: &Page, out: &mut [u8], table: &mut CompressTable| {
                compress_into_with_table(input, out, table).expect("the buffer takes any page")
            };
            let changed_len = had.as_ref().map_or(PAGE_BYTES, |had| {
                let mut difference = *page;
                exclusive_or(&mut difference, had);
                packed(&difference, &mut self.changed, &mut self.table)
            });
            let plain_len = if changed_len <= SMALL_CHANGE {
                PAGE_BYTES
            } else {
                packed(page, &mut self.plain, &mut self.table)
            };
            if plain_len.min(changed_len) >= PAGE_BYTES {
                batch.push(number, PageEncoding::Raw, page);
            } else if changed_len <= plain_len {
                batch.push(number, PageEncoding::Changed, &self.changed[..changed_len]);
            } else {
                batch.push(number, PageEncoding::Lz4, &self.plain[..plain_len]);
            }
        }
        match had {
            Some(had) => **had = *page,
            None if remember && room => {
                self.sent.insert(number, Box::new(*page));
            }
            None => {}
        }
        true
    }
}
