//! The linear addresses both sides use: the host process maps them for the native runs, the
//! guest's page tables map them for the engine. Nothing here knows how either does it.
//!
//! ```text
//! CODE  2 pages  read, execute   the snippet, HLT around it
//! EXIT  1 page   read            where a snippet ends; execution there stops the case
//! DATA  4 pages  read, write     )
//! CONST 1 page   read            ) with nothing mapped before, between CONST and TAIL, and after
//! TAIL  1 page   read, write     )
//! ```

/// Bytes in a page.
pub const PAGE: u64 = 4096;

/// Where snippets are assembled. Below 2 GiB, so that 32-bit addressing reaches everything.
pub const CODE: u64 = 0x2000_0000;
/// Bytes of code.
pub const CODE_LEN: usize = 2 * PAGE as usize;

/// Where every snippet goes when it is done.
pub const EXIT: u64 = 0x2000_3000;

/// Where a snippet of 32-bit code goes when it is done; the host goes on to [`EXIT`] in 64-bit code.
pub const EXIT_32: u64 = EXIT + 0x40;

/// Where the writable data begins.
pub const DATA: u64 = 0x2001_0000;
/// Bytes of writable data before [`CONST`].
pub const DATA_LEN: u64 = 4 * PAGE;

/// The read-only page, right after the writable data.
pub const CONST: u64 = DATA + DATA_LEN;

/// A writable page with nothing on either side.
pub const TAIL: u64 = 0x2001_8000;

/// Bytes of data on one side: DATA, CONST and TAIL, in this order.
pub const MEMORY_LEN: usize = (DATA_LEN + 2 * PAGE) as usize;

/// Base of GS on both sides. FS is the host's thread pointer and is left alone.
pub const GS_BASE: u64 = DATA + 0x1230;

/// The host's selectors for 64-bit user code and data, mirrored by the guest's GDT.
pub const USER_CODE: u16 = 0x33;
/// The host's selector for 32-bit user code.
pub const USER_CODE_32: u16 = 0x23;
/// See [`USER_CODE`].
pub const USER_DATA: u16 = 0x2b;

/// What surrounds a snippet: HLT, a fault in user mode.
pub const CODE_FILL: u8 = 0xF4;

/// Where a data address lies in the flat copy of the memory, if `len` bytes from it on do.
pub fn memory_offset(address: u64, len: usize) -> Option<usize> {
    let end = address.checked_add(len as u64)?;
    if address >= DATA && end <= CONST + PAGE {
        usize::try_from(address - DATA).ok()
    } else if address >= TAIL && end <= TAIL + PAGE {
        usize::try_from(address - TAIL + DATA_LEN + PAGE).ok()
    } else {
        None
    }
}

/// The address of an offset into the flat copy of the memory.
pub fn memory_address(offset: usize) -> u64 {
    let offset = offset as u64;
    if offset < DATA_LEN + PAGE { DATA + offset } else { TAIL + offset - DATA_LEN - PAGE }
}
