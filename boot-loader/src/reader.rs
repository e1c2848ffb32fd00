//! Reading a disk, with a bound on all of it.

use crate::BootDiskError;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::rc::Rc;

/// A disk that can be read.
pub trait Source: fmt::Debug {
    /// Its size in bytes.
    fn size(&self) -> u64;

    /// Fills `data` from `offset` on. Never asked for what lies behind the end.
    ///
    /// # Errors
    /// The storage's.
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;
}

/// So much is read at a time: a kernel lies on a disk in long pieces.
const PIECE: u64 = 256 << 10;
/// So many pieces are kept: file systems go back and forth between their tables and their data.
const KEPT: usize = 32;
/// So much may be read of a disk: kernel and initramfs several times, and the tables of a large file system.
const MAX_READ: u64 = 4 << 30;
/// So often may it be asked for something: each step that a file system leads on asks.
const MAX_ASKED: u64 = 16 << 20;

/// A piece, and where it begins.
type Piece = (u64, Rc<[u8]>);

/// A disk, and how much more may be read of it.
#[derive(Debug)]
pub(crate) struct Reader {
    source: Rc<dyn Source>,
    /// The last used first.
    kept: RefCell<VecDeque<Piece>>,
    left: RefCell<Allowance>,
}

#[derive(Debug)]
struct Allowance {
    bytes: u64,
    asked: u64,
    /// Nothing more is read.
    is_spent: bool,
    /// The storage's own error, which a file system may have taken for one of its own.
    failed: Option<io::Error>,
}

impl Reader {
    pub(crate) fn new(source: Rc<dyn Source>) -> Rc<Self> {
        let left = Allowance { bytes: MAX_READ, asked: MAX_ASKED, is_spent: false, failed: None };
        Rc::new(Self { source, kept: RefCell::default(), left: RefCell::new(left) })
    }

    pub(crate) fn size(&self) -> u64 {
        self.source.size()
    }

    /// Fills `data` from `offset` on.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(data.len() as u64).filter(|end| *end <= self.size());
        if end.is_none() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "behind the disk's end"));
        }
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            let begin = at - at % PIECE;
            let piece = self.piece(begin)?;
            let from = usize::try_from(at - begin).expect("within a piece");
            let len = rest.len().min(piece.len() - from);
            rest[..len].copy_from_slice(&piece[from..from + len]);
            rest = &mut rest[len..];
            at += len as u64;
        }
        Ok(())
    }

    fn piece(&self, begin: u64) -> io::Result<Rc<[u8]>> {
        let mut kept = self.kept.borrow_mut();
        let spent = || io::Error::other("too much has been read of this disk");
        {
            let mut left = self.left.borrow_mut();
            left.asked = left.asked.saturating_sub(1);
            left.is_spent |= left.asked == 0;
            if left.is_spent {
                return Err(spent());
            }
        }
        if let Some(index) = kept.iter().position(|(at, _)| *at == begin) {
            let piece = kept.remove(index).expect("just found");
            let bytes = Rc::clone(&piece.1);
            kept.push_front(piece);
            return Ok(bytes);
        }
        let len = PIECE.min(self.size() - begin);
        let mut left = self.left.borrow_mut();
        left.is_spent |= left.bytes < len;
        if left.is_spent {
            return Err(spent());
        }
        left.bytes -= len;
        let mut bytes = vec![0; usize::try_from(len).expect("a piece is small")];
        if let Err(error) = self.source.read(begin, &mut bytes) {
            let told = io::Error::new(error.kind(), error.to_string());
            left.failed.get_or_insert(error);
            return Err(told);
        }
        let bytes: Rc<[u8]> = bytes.into();
        kept.truncate(KEPT - 1);
        kept.push_front((begin, Rc::clone(&bytes)));
        Ok(bytes)
    }

    /// What went wrong with the disk itself, whatever a file system made of it.
    pub(crate) fn check(&self) -> Result<(), BootDiskError> {
        let mut left = self.left.borrow_mut();
        match left.failed.take() {
            Some(error) => Err(BootDiskError::Io(error)),
            None if left.is_spent => Err(BootDiskError::Endless(MAX_READ >> 20)),
            None => Ok(()),
        }
    }
}

/// A part of a disk: what a file system is on.
#[derive(Debug, Clone)]
pub(crate) struct Extent {
    pub(crate) reader: Rc<Reader>,
    pub(crate) start: u64,
    pub(crate) len: u64,
}

impl Extent {
    /// Fills `data` from `offset` of the part on.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(data.len() as u64).filter(|end| *end <= self.len);
        match end {
            Some(_) => self.reader.read(self.start + offset, data),
            None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "behind the volume's end")),
        }
    }

    /// So many bytes at `offset`; none where there are not so many.
    pub(crate) fn bytes<const N: usize>(&self, offset: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes).ok().map(|()| bytes)
    }
}
