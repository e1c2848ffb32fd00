//! The loadable parts of an ELF `vmlinux`.

use super::{BootError, HIGH_MEMORY_START};
use object::LittleEndian;
use object::elf::{EM_X86_64, ET_DYN, ET_EXEC, FileHeader64, PT_INTERP, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};

/// One piece of the kernel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment<'a> {
    /// Physical address.
    pub(super) address: u64,
    /// What the file has of it; the rest is zero.
    pub(super) data: &'a [u8],
    /// First address beyond it, the zero part included.
    end: u64,
}

/// What is to be loaded, checked.
#[derive(Debug)]
pub(super) struct Program<'a> {
    segments: Vec<Segment<'a>>,
    entry: u64,
}

impl<'a> Program<'a> {
    /// Reads and checks the headers of `file`.
    pub(super) fn parse(file: &'a [u8]) -> Result<Self, BootError> {
        check_ident(file)?;
        let invalid = |reason: String| BootError::InvalidElf { reason };
        let header = FileHeader64::<LittleEndian>::parse(file)
            .map_err(|error| invalid(error.to_string()))?;
        if header.e_machine.get(LittleEndian) != EM_X86_64 {
            return Err(BootError::NotAKernel { looks_like: "an ELF file for another CPU" });
        }
        if ![ET_EXEC, ET_DYN].contains(&header.e_type.get(LittleEndian)) {
            return Err(BootError::NotAKernel { looks_like: "an ELF object file or core dump" });
        }
        let headers = header
            .program_headers(LittleEndian, file)
            .map_err(|error| invalid(error.to_string()))?;
        if headers.iter().any(|header| header.p_type(LittleEndian) == PT_INTERP) {
            return Err(BootError::NotAKernel { looks_like: "an ordinary program" });
        }
        let segments = headers
            .iter()
            .filter(|header| header.p_type(LittleEndian) == PT_LOAD)
            .filter(|header| header.p_memsz(LittleEndian) != 0)
            .map(|header| segment(file, header))
            .collect::<Result<Vec<_>, _>>()?;
        // Each byte of the file is loaded once: headers that name the same again would be copied for ever.
        let loaded = segments.iter().map(|segment| segment.data.len() as u64).sum::<u64>();
        if loaded > file.len() as u64 {
            return Err(invalid("its segments lie over each other in the file".to_owned()));
        }
        let entry = header.e_entry.get(LittleEndian);
        if !segments.iter().any(|segment| (segment.address..segment.end).contains(&entry)) {
            return Err(invalid(format!("its entry {entry:#x} is in none of its segments")));
        }
        Ok(Self { segments, entry })
    }

    /// The pieces, in file order.
    pub(super) fn segments(&self) -> &[Segment<'a>] {
        &self.segments
    }

    /// First address beyond all pieces.
    pub(super) fn end(&self) -> u64 {
        self.segments.iter().map(|segment| segment.end).max().unwrap_or(0)
    }

    /// Physical address of the first instruction.
    pub(super) fn entry(&self) -> u64 {
        self.entry
    }
}

/// Refuses other kinds of ELF by name before the parser calls them invalid.
fn check_ident(file: &[u8]) -> Result<(), BootError> {
    if !file.starts_with(b"\x7FELF") {
        return Err(BootError::InvalidElf { reason: "the payload is no ELF image".to_owned() });
    }
    match (file.get(4), file.get(5)) {
        (Some(1), _) => Err(BootError::NotAKernel { looks_like: "a 32-bit ELF file" }),
        (_, Some(2)) => Err(BootError::NotAKernel { looks_like: "an ELF file for another CPU" }),
        _ => Ok(()),
    }
}

fn segment<'a>(
    file: &'a [u8],
    header: &object::elf::ProgramHeader64<LittleEndian>,
) -> Result<Segment<'a>, BootError> {
    let address = header.p_paddr(LittleEndian);
    let (offset, in_file) = header.file_range(LittleEndian);
    let in_memory = header.p_memsz(LittleEndian);
    let invalid = |what: &str| BootError::InvalidElf {
        reason: format!("its segment at {address:#x} {what}"),
    };
    if address < HIGH_MEMORY_START {
        return Err(invalid("lies below 1 MiB, where the boot parameters are"));
    }
    if in_file > in_memory {
        return Err(invalid("has more bytes in the file than in memory"));
    }
    let end = address.checked_add(in_memory).ok_or_else(|| invalid("wraps around"))?;
    let data = header.data(LittleEndian, file).map_err(|()| BootError::Truncated {
        part: "a segment",
        needed: offset.saturating_add(in_file),
        len: file.len() as u64,
    })?;
    Ok(Segment { address, data, end })
}
