//! A guest of a hundred bytes: programs the timer, and prints a dot at every tick.

/// Where the probe is loaded and entered.
const BASE: u64 = 16 << 20;
/// Where its interrupt table lies, from [`BASE`].
const TABLE: usize = 0x1000;
/// The timer's vector once the interrupt controller is set up.
const TIMER_VECTOR: usize = 0x20;
/// The boot protocol's code segment.
const BOOT_CS: u16 = 0x10;

/// Sets up the interrupt controller (vectors from 0x20, only line 0 open) and the timer (100 Hz),
/// loads the table's address, and enters the loop.
const START: &[u8] = &[
    0xB0, 0x11, 0xE6, 0x20, // mov al, 0x11; out 0x20, al
    0xB0, 0x20, 0xE6, 0x21, // mov al, 0x20; out 0x21, al
    0xB0, 0x04, 0xE6, 0x21, // mov al, 4; out 0x21, al
    0xB0, 0x01, 0xE6, 0x21, // mov al, 1; out 0x21, al
    0xB0, 0xFE, 0xE6, 0x21, // mov al, 0xfe; out 0x21, al
    0xB0, 0x34, 0xE6, 0x43, // mov al, 0x34; out 0x43, al
    0xB0, 0x9C, 0xE6, 0x40, // mov al, 0x9c; out 0x40, al
    0xB0, 0x2E, 0xE6, 0x40, // mov al, 0x2e; out 0x40, al
    0x0F, 0x01, 0x1C, 0x25, 0x00, 0x0F, 0x00, 0x01, // lidt [0x1000f00]
    0x66, 0xBA, 0xF8, 0x03, // mov dx, 0x3f8
    0xFB, // sti
    0xF4, // hlt
    0xB0, b'.', 0xEE, // mov al, '.'; out dx, al
    0xEB, 0xFA, // jmp to the hlt
];

/// The timer's handler: says that the interrupt is done, and returns.
const HANDLER: &[u8] = &[
    0x50, 0xB0, 0x20, 0xE6, 0x20, 0x58, // push rax; mov al, 0x20; out 0x20, al; pop rax
    0x48, 0xCF, // iretq
];

/// Where the handler lies, from [`BASE`].
const HANDLER_AT: usize = 0x100;
/// Where the operand of LIDT lies, from [`BASE`].
const TABLE_POINTER: usize = 0xF00;

/// The probe as an ELF kernel.
pub fn kernel() -> Vec<u8> {
    let mut image = vec![0; TABLE + (TIMER_VECTOR + 1) * 16];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, START);
    put(HANDLER_AT, HANDLER);
    let limit = u16::try_from((TIMER_VECTOR + 1) * 16 - 1).unwrap();
    put(TABLE_POINTER, &limit.to_le_bytes());
    put(TABLE_POINTER + 2, &(BASE + TABLE as u64).to_le_bytes());
    let handler = BASE + HANDLER_AT as u64;
    let handler = handler.to_le_bytes();
    let gate = TABLE + TIMER_VECTOR * 16;
    put(gate, &handler[0..2]);
    put(gate + 2, &BOOT_CS.to_le_bytes());
    put(gate + 4, &[0, 0x8E]);
    put(gate + 6, &handler[2..8]);
    elf(&image)
}

/// An ELF executable of one segment.
fn elf(image: &[u8]) -> Vec<u8> {
    let mut file = vec![0x7F, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut half = |value: u16| file.extend(value.to_le_bytes());
    half(2); // an executable
    half(62); // for x86-64
    file.extend(1u32.to_le_bytes());
    for word in [BASE, 64, 0] {
        file.extend(word.to_le_bytes()); // entry, program headers, section headers
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes()); // to be loaded
    file.extend(7u32.to_le_bytes());
    let len = image.len() as u64;
    for word in [0x1000, BASE, BASE, len, len, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    file.resize(0x1000, 0);
    file.extend(image);
    file
}
