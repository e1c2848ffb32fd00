//! The receiver's end of a checkpoint stream.

use super::{
    CheckpointEnd, CheckpointHeader, CheckpointPiece, CheckpointSink, Digester, MAX_PASSES,
    MAX_STATE, PageBatch, PageEncoding, PageNumber, PieceKind, SinkRefusal, ZERO_PAGE,
};
use crate::entry::LogPosition;
use crate::wire::DecodeError;

/// Why a checkpoint stream is refused. The receiver stays without a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointError {
    /// A piece that has no place here.
    #[error("{found} inside a checkpoint, {expected} was due")]
    Unexpected {
        /// What came.
        found: String,
        /// What was due.
        expected: PieceKind,
    },
    /// There is more state than a machine may have, or than the header said.
    #[error("checkpoint carries more than {limit} bytes of state")]
    StateOverrun {
        /// The most there may be.
        limit: u64,
    },
    /// A page outside memory.
    #[error("page {:#x} of the checkpoint is out of range", page.0)]
    Page {
        /// Its number.
        page: PageNumber,
    },
    /// The same memory was sent again and again.
    #[error("checkpoint sends {pages} pages of a memory of at most {limit}")]
    Endless {
        /// Pages sent.
        pages: u64,
        /// Pages of memory there may be.
        limit: u64,
    },
    /// The packed pages are damaged.
    #[error("pages of the checkpoint cannot be unpacked")]
    Pages(#[source] DecodeError),
    /// The number of pages, the length of the state, or the digest does not agree.
    #[error("checkpoint is damaged: {found:?}, announced {announced:?}")]
    Digest {
        /// What was received.
        found: CheckpointEnd,
        /// What the sender says.
        announced: CheckpointEnd,
    },
    /// The receiving memory would not take it.
    #[error("the machine does not take the checkpoint: {0}")]
    Sink(SinkRefusal),
}

/// A checkpoint that arrived whole. Its memory is in the sink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompleteCheckpoint {
    /// Where the guest was, and where the log goes on.
    pub position: LogPosition,
    /// The part of the state that never changes, as the source gave it.
    pub fixed: Vec<u8>,
    /// The rest of the state, as the source gave it.
    pub state: Vec<u8>,
    /// How many pages were sent.
    pub pages: u64,
}

/// Puts a checkpoint together from its pieces.
#[derive(Debug, Default)]
pub struct CheckpointReader {
    progress: Option<Progress>,
}

#[derive(Debug)]
struct Progress {
    header: CheckpointHeader,
    fixed: Vec<u8>,
    state: Vec<u8>,
    digester: Digester,
}

impl CheckpointReader {
    /// A reader that waits for the header.
    pub fn new() -> Self {
        Self::default()
    }

    /// Pages received so far.
    pub fn pages(&self) -> u64 {
        self.progress.as_ref().map_or(0, |progress| progress.digester.pages)
    }

    /// Takes the next piece. Returns the checkpoint when it is complete; the reader is then as new.
    ///
    /// # Errors
    /// [`CheckpointError`]; the reader is then as new, and what the sink holds is worthless.
    pub fn handle_piece(
        &mut self,
        piece: CheckpointPiece,
        sink: &mut dyn CheckpointSink,
    ) -> Result<Option<CompleteCheckpoint>, CheckpointError> {
        let Some(mut progress) = self.progress.take() else {
            let CheckpointPiece::Header(header) = piece else {
                let expected = PieceKind::Header;
                return Err(CheckpointError::Unexpected {
                    found: piece.kind().to_string(),
                    expected,
                });
            };
            sink.begin(&header).map_err(CheckpointError::Sink)?;
            let digester = Digester::new(&header);
            let (fixed, state) = (Vec::new(), Vec::new());
            self.progress = Some(Progress { header, fixed, state, digester });
            return Ok(None);
        };
        match piece {
            CheckpointPiece::State(chunk) => progress.add_state(&chunk)?,
            CheckpointPiece::Pages(batch) if progress.takes_pages() => {
                progress.add_pages(&batch, sink)?;
            }
            CheckpointPiece::End(announced) if progress.fixed_is_whole() => {
                return progress.finish(announced).map(Some);
            }
            other => {
                let expected = progress.expected();
                return Err(CheckpointError::Unexpected {
                    found: other.kind().to_string(),
                    expected,
                });
            }
        }
        self.progress = Some(progress);
        Ok(None)
    }
}

impl Progress {
    fn fixed_is_whole(&self) -> bool {
        self.fixed.len() as u64 == self.header.fixed_len
    }

    /// Between the two parts of the state.
    fn takes_pages(&self) -> bool {
        self.fixed_is_whole() && self.state.is_empty()
    }

    fn expected(&self) -> PieceKind {
        match self.takes_pages() {
            true => PieceKind::Pages,
            false => PieceKind::State,
        }
    }

    fn add_state(&mut self, chunk: &[u8]) -> Result<(), CheckpointError> {
        let (part, limit) = if self.fixed_is_whole() {
            (&mut self.state, MAX_STATE)
        } else {
            (&mut self.fixed, self.header.fixed_len)
        };
        if (part.len() + chunk.len()) as u64 > limit {
            return Err(CheckpointError::StateOverrun { limit });
        }
        self.digester.state(chunk);
        part.extend_from_slice(chunk);
        Ok(())
    }

    fn add_pages(
        &mut self,
        batch: &PageBatch,
        sink: &mut dyn CheckpointSink,
    ) -> Result<(), CheckpointError> {
        let limit = self.header.page_limit;
        let most = limit.0.saturating_mul(MAX_PASSES);
        for page in batch.packed() {
            let number = page.number();
            if number >= limit {
                return Err(CheckpointError::Page { page: number });
            }
            if self.digester.pages >= most {
                let pages = self.digester.pages + 1;
                return Err(CheckpointError::Endless { pages, limit: limit.0 });
            }
            let mut had = ZERO_PAGE;
            if page.encoding() == PageEncoding::Changed {
                sink.read(number, &mut had).map_err(CheckpointError::Sink)?;
            }
            let data = page.unpack(&had).map_err(CheckpointError::Pages)?;
            self.digester.page(number, &data);
            sink.page(number, &data).map_err(CheckpointError::Sink)?;
        }
        Ok(())
    }

    fn finish(self, announced: CheckpointEnd) -> Result<CompleteCheckpoint, CheckpointError> {
        let Self { header: _, fixed, state, digester } = self;
        let found = digester.end(announced.position, state.len() as u64);
        if found != announced {
            return Err(CheckpointError::Digest { found, announced });
        }
        let CheckpointEnd { position, state_len: _, pages, digest: _ } = found;
        Ok(CompleteCheckpoint { position, fixed, state, pages })
    }
}
