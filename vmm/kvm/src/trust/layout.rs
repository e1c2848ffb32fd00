//! Where things are in a probe guest, and the tables the CPU wants: descriptors, handlers,
//! page tables. Pure bytes; [`super::lab`] puts them into memory.
//!
//! ```text
//!  0x1000 GDT        0x2000 IDT       0x3000 TSS       0x4000 handlers
//!  0x6000 exception stack top         0x7000 CPL 0 stack top
//!  0x8000 PML4       0x9000 PDPT      0xA000 PD        0xB000 PT (the first 2 MiB)
//! 0x10000 code      0x13000 LSTAR    0x15000 CPL 3 stack top
//! 0x20000 data, 32 pages, a memory slot of its own
//! ```

use std::ops::Range;

/// Where the descriptor table is.
pub const GDT: u64 = 0x1000;
/// Where the interrupt table is.
pub const IDT: u64 = 0x2000;
/// Where the task state is.
pub const TSS: u64 = 0x3000;
/// Where the handlers of exceptions are.
pub const HANDLERS: u64 = 0x4000;
/// The top of the stack on which exceptions are delivered.
pub const EXCEPTION_STACK: u64 = 0x6000;
/// The top of the stack at CPL 0.
pub const KERNEL_STACK: u64 = 0x7000;
/// Page tables, level 4.
pub const PML4: u64 = 0x8000;
/// Page tables, level 3.
pub const PDPT: u64 = 0x9000;
/// Page tables, level 2.
pub const PD: u64 = 0xA000;
/// Page tables, level 1.
pub const PT: u64 = 0xB000;
/// Where a program is loaded.
pub const CODE: u64 = 0x1_0000;
/// Where `SYSCALL` leads.
pub const SYSCALL_ENTRY: u64 = 0x1_3000;
/// The top of the stack at CPL 3.
pub const USER_STACK: u64 = 0x1_5000;
/// Pages that a program may write.
pub const DATA: u64 = 0x2_0000;
/// Pages of [`DATA`].
pub const DATA_PAGES: u32 = 32;
/// All of the guest's memory.
pub const MEMORY: u64 = DATA + DATA_PAGES as u64 * PAGE;
/// Bytes of a page.
pub const PAGE: u64 = 0x1000;
/// An address that no page table maps.
pub const UNMAPPED: u64 = 0x40_0000;

/// Code at CPL 0.
pub const KERNEL_CS: u16 = 0x08;
/// Data at CPL 0.
pub const KERNEL_SS: u16 = 0x10;
/// Base of the selectors `SYSRET` would load.
pub const SYSRET_BASE: u16 = 0x18;
/// Data at CPL 3.
pub const USER_SS: u16 = 0x23;
/// Code at CPL 3.
pub const USER_CS: u16 = 0x2B;
/// The task state.
pub const TSS_SELECTOR: u16 = 0x30;

/// The last byte of the descriptor table.
pub const GDT_LIMIT: u16 = 8 * 8 - 1;
/// The last byte of the interrupt table.
pub const IDT_LIMIT: u16 = 16 * VECTORS as u16 - 1;
/// The task state, and port permissions for the first 256 ports.
pub const TSS_LIMIT: u16 = TASK_STATE + 32;
const TASK_STATE: u16 = 104;

/// Exceptions, all of which have a handler.
const VECTORS: u64 = 32;
/// Bytes of a handler: `HLT` and a jump to itself.
const HANDLER_BYTES: u64 = 4;

/// Which handler an instruction pointer after its `HLT` belongs to.
pub fn handler_at(rip: u64) -> Option<u8> {
    let handlers: Range<u64> = HANDLERS..HANDLERS + VECTORS * HANDLER_BYTES;
    let at = rip.checked_sub(1)?;
    (handlers.contains(&at) && at % HANDLER_BYTES == 0)
        .then(|| u8::try_from((at - HANDLERS) / HANDLER_BYTES).expect("there are 32 handlers"))
}

/// Whether an instruction pointer is in the handler of `vector`, before or behind its `HLT`.
pub fn is_in_handler(rip: u64, vector: u8) -> bool {
    let start = HANDLERS + u64::from(vector) * HANDLER_BYTES;
    (start..start + HANDLER_BYTES).contains(&rip)
}

/// Whether the CPU pushes an error code for this exception (SDM 3A, table 7-1).
pub fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

/// Every table, with the address it belongs at.
pub fn tables() -> Vec<(u64, Vec<u8>)> {
    vec![
        (GDT, words(&descriptors())),
        (IDT, words(&gates())),
        (TSS, task_state()),
        (HANDLERS, [0xF4, 0xEB, 0xFD, 0x90].repeat(VECTORS as usize)),
        (PML4, words(&[PDPT | PRESENT_WRITABLE_USER])),
        (PDPT, words(&[PD | PRESENT_WRITABLE_USER])),
        (PD, words(&[PT | PRESENT_WRITABLE_USER])),
        (
            PT,
            words(&(0..512).map(|page| (page * PAGE) | PRESENT_WRITABLE_USER).collect::<Vec<_>>()),
        ),
        (SYSCALL_ENTRY, vec![0xF4, 0xEB, 0xFD]),
    ]
}

/// The entry of the IDT for `vector`, leading to `handler` at CPL 0.
pub fn gate(handler: u64) -> [u64; 2] {
    // Interrupt gate, present, reachable from CPL 3 by INT n as well.
    let low = (handler & 0xFFFF)
        | u64::from(KERNEL_CS) << 16
        | 0xEE00 << 32
        | (handler >> 16 & 0xFFFF) << 48;
    [low, handler >> 32]
}

/// Where the gate of `vector` is.
pub fn gate_address(vector: u8) -> u64 {
    IDT + u64::from(vector) * 16
}

const PRESENT_WRITABLE_USER: u64 = 0b111;

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Flat segments: null, kernel code and data, (32-bit user code), user data and code, the TSS.
fn descriptors() -> [u64; 8] {
    let task = u64::from(TSS_LIMIT) | (TSS & 0xFF_FFFF) << 16 | 0x8B << 40 | (TSS >> 24) << 56;
    [
        0,
        0x00AF_9B00_0000_FFFF,
        0x00CF_9300_0000_FFFF,
        0x00CF_FB00_0000_FFFF,
        0x00CF_F300_0000_FFFF,
        0x00AF_FB00_0000_FFFF,
        task,
        TSS >> 32,
    ]
}

fn gates() -> Vec<u64> {
    (0..VECTORS).flat_map(|vector| gate(HANDLERS + vector * HANDLER_BYTES)).collect()
}

fn task_state() -> Vec<u8> {
    let mut task = vec![0; usize::from(TSS_LIMIT) + 1];
    task[4..12].copy_from_slice(&EXCEPTION_STACK.to_le_bytes());
    // IOPL 3 alone allows ports to CPL 3; a KVM in software may look only here.
    task[102..104].copy_from_slice(&TASK_STATE.to_le_bytes());
    task[usize::from(TSS_LIMIT)] = 0xFF;
    task
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_do_not_overlap_and_lie_in_memory() {
        let mut tables = tables();
        tables.sort();
        for pair in tables.windows(2) {
            assert!(pair[0].0 + pair[0].1.len() as u64 <= pair[1].0, "{:#x}", pair[0].0);
        }
        assert!(tables.iter().all(|(at, bytes)| at + (bytes.len() as u64) <= DATA));
    }

    #[test]
    fn a_halted_handler_is_known_by_its_address() {
        assert_eq!(handler_at(HANDLERS + 1), Some(0));
        assert_eq!(handler_at(HANDLERS + 14 * 4 + 1), Some(14));
        assert_eq!(handler_at(HANDLERS + 14 * 4 + 2), None);
        assert_eq!(handler_at(HANDLERS + 32 * 4 + 1), None);
        assert_eq!(handler_at(CODE + 1), None);
    }
}
