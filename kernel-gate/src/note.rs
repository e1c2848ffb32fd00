//! The note: owner and type of it, and where it lies in an image.

use object::LittleEndian;
use object::elf::{FileHeader64, PT_NOTE};
use object::read::elf::{FileHeader, ProgramHeader};

/// Owner of the ELF note that vouches for a kernel.
pub const VOUCHER_NAME: &[u8] = b"vmft";
/// Type of the note of a kernel that nobody has examined yet.
pub const VOUCHER_NONE: u32 = 0;
/// Type of the note of a kernel that can be followed on any engine; it has no contents.
pub const VOUCHER_LOCKSTEP: u32 = 1;
/// Type of the note of a kernel that has no user space; it has no contents.
pub const VOUCHER_LEVEL_ZERO: u32 = 2;

/// Offset in `file` of the type of our note, if a program header leads to one of type `kind`.
pub(crate) fn find(file: &[u8], kind: u32) -> Option<usize> {
    let header = FileHeader64::<LittleEndian>::parse(file).ok()?;
    // Headers that name the same notes again and again would be read for ever.
    let mut left = file.len() as u64;
    for program in header.program_headers(LittleEndian, file).ok()? {
        if program.p_type(LittleEndian) == PT_NOTE {
            left = left.checked_sub(program.p_filesz(LittleEndian))?;
        }
        let Ok(Some(mut notes)) = program.notes(LittleEndian, file) else { continue };
        while let Ok(Some(note)) = notes.next() {
            if note.name() == VOUCHER_NAME && note.n_type(LittleEndian).0 == kind {
                // The name follows the header, whose last word is the type.
                let name = note.name().as_ptr().addr() - file.as_ptr().addr();
                return name.checked_sub(4);
            }
        }
    }
    None
}
