//! A sink that changes nothing until its owner says so.

use super::{CheckpointHeader, CheckpointSink, MemoryBase, Page, PageNumber, SinkRefusal};
use std::collections::BTreeMap;

/// Memory that a stream of changes starts from.
pub trait PageBase {
    /// The first page number that the memory lies wholly below.
    fn page_limit(&self) -> PageNumber;
    /// True if there is such a page.
    fn has(&self, number: PageNumber) -> bool;
    /// Copies a page.
    ///
    /// # Errors
    /// [`SinkRefusal`] if there is no such page.
    fn read(&self, number: PageNumber, data: &mut Page) -> Result<(), SinkRefusal>;
}

/// The pages of a stream of changes ([`MemoryBase::Earlier`]), beside the memory they change. When
/// the stream is complete its owner takes them over; when it is not, nothing has happened. Holds
/// each page once, so no more than the memory has.
#[derive(Debug)]
pub struct StagedPages<B> {
    base: B,
    pages: BTreeMap<PageNumber, Box<Page>>,
    /// Room for pages to come, from streams before: taking it from the host again would cost more than
    /// copying.
    spare: Vec<Box<Page>>,
}

/// Most pages of which the room is kept: 64 MiB.
const MOST_SPARE: usize = 16 << 10;

impl<B: PageBase> StagedPages<B> {
    /// Nothing yet, over `base`.
    pub const fn new(base: B) -> Self {
        Self { base, pages: BTreeMap::new(), spare: Vec::new() }
    }

    /// The changed pages, in ascending order.
    pub fn pages(&self) -> impl Iterator<Item = (PageNumber, &Page)> {
        self.pages.iter().map(|(number, page)| (*number, &**page))
    }

    /// Forgets them: they have been taken over, or are worth nothing.
    pub fn clear(&mut self) {
        let room = MOST_SPARE - self.spare.len();
        self.spare.extend(std::mem::take(&mut self.pages).into_values().take(room));
    }
}

impl<B: PageBase> CheckpointSink for StagedPages<B> {
    fn begin(&mut self, header: &CheckpointHeader) -> Result<(), SinkRefusal> {
        if header.base != MemoryBase::Earlier || header.page_limit != self.base.page_limit() {
            return Err(SinkRefusal("it is not a change of this machine".to_owned()));
        }
        self.clear();
        Ok(())
    }

    fn page(&mut self, number: PageNumber, data: &Page) -> Result<(), SinkRefusal> {
        match self.pages.get_mut(&number) {
            Some(page) => **page = *data,
            None => {
                // Refused here, so that what is staged can be taken over without a failure.
                if !self.base.has(number) {
                    return Err(SinkRefusal(format!("there is no page {}", number.0)));
                }
                let page = match self.spare.pop() {
                    Some(mut page) => {
                        *page = *data;
                        page
                    }
                    None => Box::new(*data),
                };
                self.pages.insert(number, page);
            }
        }
        Ok(())
    }

    fn read(&self, number: PageNumber, data: &mut Page) -> Result<(), SinkRefusal> {
        match self.pages.get(&number) {
            Some(page) => {
                *data = **page;
                Ok(())
            }
            None => self.base.read(number, data),
        }
    }
}
