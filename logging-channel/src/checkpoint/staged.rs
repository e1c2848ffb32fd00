//! A sink that changes nothing until its owner says so.

use super::{CheckpointHeader, CheckpointSink, MemoryBase, Page, PageNumber, SinkRefusal};
use std::collections::BTreeMap;

/// Memory that a stream of changes starts from.
pub trait PageBase {
    /// The first page number that the memory lies wholly below.
    fn page_limit(&self) -> PageNumber;
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
}

impl<B: PageBase> StagedPages<B> {
    /// Nothing yet, over `base`.
    pub const fn new(base: B) -> Self {
        Self { base, pages: BTreeMap::new() }
    }

    /// The changed pages, in ascending order.
    pub fn into_pages(self) -> impl Iterator<Item = (PageNumber, Box<Page>)> {
        self.pages.into_iter()
    }
}

impl<B: PageBase> CheckpointSink for StagedPages<B> {
    fn begin(&mut self, header: &CheckpointHeader) -> Result<(), SinkRefusal> {
        if header.base != MemoryBase::Earlier || header.page_limit != self.base.page_limit() {
            return Err(SinkRefusal("it is not a change of this machine".to_owned()));
        }
        self.pages.clear();
        Ok(())
    }

    fn page(&mut self, number: PageNumber, data: &Page) -> Result<(), SinkRefusal> {
        match self.pages.get_mut(&number) {
            Some(page) => **page = *data,
            None => {
                // Refused here, so that what is staged can be taken over without a failure.
                let mut there = [0; super::PAGE_BYTES];
                self.base.read(number, &mut there)?;
                self.pages.insert(number, Box::new(*data));
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
