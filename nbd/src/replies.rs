//! What a client reads: whole replies, simple ones and those in chunks.

use crate::connection::NegotiationError;
use crate::wire::{
    CHUNK_DATA, CHUNK_DONE, CHUNK_ERROR, CHUNK_HOLE, CHUNK_NONE, EIO, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC, WireError,
};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Where a read begins, and how many bytes it is of.
pub(crate) type Extent = (u64, u32);

/// Reads the whole reply to one request: its cookie, and what it brings or the error. `asked` knows
/// of each cookie what was asked: a read, or something that is answered without data.
pub(crate) async fn read_reply(
    reader: &mut (impl AsyncRead + Unpin),
    asked: impl Fn(u64) -> Result<Option<Extent>, WireError>,
) -> Result<(u64, Result<Vec<u8>, u32>), NegotiationError> {
    match reader.read_u32().await? {
        SIMPLE_REPLY_MAGIC => {
            let error = reader.read_u32().await?;
            let cookie = reader.read_u64().await?;
            let mut data = Vec::new();
            if let Some((_, len)) = asked(cookie)?
                && error == 0
            {
                data.resize(len as usize, 0);
                reader.read_exact(&mut data).await?;
            }
            Ok((cookie, if error == 0 { Ok(data) } else { Err(error) }))
        }
        STRUCTURED_REPLY_MAGIC => {
            let mut content = Content::default();
            loop {
                let (flags, kind) = (reader.read_u16().await?, reader.read_u16().await?);
                let (cookie, len) = (reader.read_u64().await?, reader.read_u32().await?);
                read_chunk(reader, &mut content, asked(cookie)?, kind, len).await?;
                if flags & CHUNK_DONE != 0 {
                    return Ok((cookie, content.end(asked(cookie)?)));
                }
                if reader.read_u32().await? != STRUCTURED_REPLY_MAGIC {
                    return Err(WireError::Magic("a chunk of a reply").into());
                }
            }
        }
        _ => Err(WireError::Magic("a reply").into()),
    }
}

/// What the chunks of a reply have brought.
#[derive(Debug, Default)]
struct Content {
    data: Vec<u8>,
    /// Bytes of it that some chunk was about.
    filled: u64,
    error: Option<u32>,
}

impl Content {
    fn end(self, asked: Option<Extent>) -> Result<Vec<u8>, u32> {
        match (self.error, asked) {
            (Some(error), _) => Err(error),
            // A server that leaves part of a read out has not read it.
            (None, Some((_, len))) if self.filled != u64::from(len) => Err(EIO),
            (None, _) => Ok(self.data),
        }
    }

    /// The place for `len` bytes at `offset` of the export.
    fn place(
        &mut self,
        asked: Option<Extent>,
        offset: u64,
        len: u32,
    ) -> Result<&mut [u8], WireError> {
        let wrong = WireError::Length("data of a reply");
        let (start, wanted) = asked.ok_or(wrong.clone())?;
        self.data.resize(wanted as usize, 0);
        let from = offset.checked_sub(start).ok_or(wrong.clone())?;
        let to = from.checked_add(len.into()).filter(|to| *to <= wanted.into()).ok_or(wrong)?;
        self.filled += u64::from(len);
        Ok(&mut self.data[from as usize..to as usize])
    }
}

async fn read_chunk(
    reader: &mut (impl AsyncRead + Unpin),
    content: &mut Content,
    asked: Option<Extent>,
    kind: u16,
    len: u32,
) -> Result<(), NegotiationError> {
    let wrong = WireError::Length("a chunk of a reply");
    match kind {
        CHUNK_NONE if len == 0 => Ok(()),
        CHUNK_DATA if len > 8 => {
            let offset = reader.read_u64().await?;
            let place = content.place(asked, offset, len - 8)?;
            reader.read_exact(place).await?;
            Ok(())
        }
        CHUNK_HOLE if len == 12 => {
            let (offset, hole) = (reader.read_u64().await?, reader.read_u32().await?);
            content.place(asked, offset, hole)?.fill(0);
            Ok(())
        }
        kind if kind & CHUNK_ERROR != 0 && (6..=1 << 16).contains(&len) => {
            let error = reader.read_u32().await?;
            let mut rest = vec![0; len as usize - 4];
            reader.read_exact(&mut rest).await?;
            // An error that is none would be taken for success.
            content.error = Some(if error == 0 { EIO } else { error });
            Ok(())
        }
        _ => Err(wrong.into()),
    }
}
