//! Random programs that seldom fault: their addresses are in registers that nothing writes, so that what
//! is compiled goes on and on.

use super::random::SLOT;

/// Registers that instructions write: guest registers with a home of their own, and without.
const WRITTEN: [u8; 9] = [0, 1, 2, 8, 9, 12, 13, 14, 15];

/// Instructions with ModRM: what comes before REX, opcode, bytes of the immediate, and whether the
/// register field is part of the opcode, as which number.
type Form<'a> = (&'a [u8], &'a [u8], usize, Option<u8>);

const INTEGER: &[Form<'_>] = &[
    (&[], &[0x00], 0, None),
    (&[], &[0x01], 0, None),
    (&[], &[0x03], 0, None),
    (&[], &[0x0B], 0, None),
    (&[], &[0x11], 0, None),
    (&[], &[0x13], 0, None),
    (&[], &[0x19], 0, None),
    (&[], &[0x1B], 0, None),
    (&[], &[0x21], 0, None),
    (&[], &[0x2B], 0, None),
    (&[], &[0x31], 0, None),
    (&[], &[0x39], 0, None),
    (&[], &[0x3A], 0, None),
    (&[], &[0x3B], 0, None),
    (&[], &[0x69], 4, None),
    (&[], &[0x6B], 1, None),
    (&[], &[0x80], 1, Some(0)),
    (&[], &[0x81], 4, Some(5)),
    (&[], &[0x83], 1, Some(7)),
    (&[], &[0x83], 1, Some(2)),
    (&[], &[0x83], 1, Some(4)),
    (&[], &[0x84], 0, None),
    (&[], &[0x85], 0, None),
    (&[], &[0x86], 0, None),
    (&[], &[0x87], 0, None),
    (&[], &[0x88], 0, None),
    (&[], &[0x89], 0, None),
    (&[], &[0x8A], 0, None),
    (&[], &[0x8B], 0, None),
    (&[], &[0x8D], 0, None),
    (&[], &[0xC0], 1, Some(4)),
    (&[], &[0xC1], 1, Some(0)),
    (&[], &[0xC1], 1, Some(1)),
    (&[], &[0xC1], 1, Some(4)),
    (&[], &[0xC1], 1, Some(5)),
    (&[], &[0xC1], 1, Some(7)),
    (&[], &[0xC6], 1, Some(0)),
    (&[], &[0xC7], 4, Some(0)),
    (&[], &[0xD1], 0, Some(4)),
    (&[], &[0xD1], 0, Some(5)),
    (&[], &[0xD1], 0, Some(0)),
    (&[], &[0xD3], 0, Some(4)),
    (&[], &[0xD3], 0, Some(5)),
    (&[], &[0xD3], 0, Some(7)),
    (&[], &[0xD3], 0, Some(1)),
    (&[], &[0xF6], 1, Some(0)),
    (&[], &[0xF7], 4, Some(0)),
    (&[], &[0xF7], 0, Some(2)),
    (&[], &[0xF7], 0, Some(3)),
    (&[], &[0xF7], 0, Some(4)),
    (&[], &[0xF7], 0, Some(5)),
    (&[], &[0xF7], 0, Some(6)),
    (&[], &[0xF7], 0, Some(7)),
    (&[], &[0xFE], 0, Some(1)),
    (&[], &[0xFF], 0, Some(0)),
    (&[], &[0xFF], 0, Some(1)),
    (&[], &[0x63], 0, None),
    (&[], &[0x0F, 0xA3], 0, None),
    (&[], &[0x0F, 0xAF], 0, None),
    (&[], &[0x0F, 0xB0], 0, None),
    (&[], &[0x0F, 0xB1], 0, None),
    (&[], &[0x0F, 0xB6], 0, None),
    (&[], &[0x0F, 0xB7], 0, None),
    (&[], &[0x0F, 0xBA], 1, Some(4)),
    (&[], &[0x0F, 0xBA], 1, Some(5)),
    (&[], &[0x0F, 0xBA], 1, Some(6)),
    (&[], &[0x0F, 0xBA], 1, Some(7)),
    (&[], &[0x0F, 0xBC], 0, None),
    (&[], &[0x0F, 0xBD], 0, None),
    (&[], &[0x0F, 0xBE], 0, None),
    (&[], &[0x0F, 0xBF], 0, None),
    (&[], &[0x0F, 0xC1], 0, None),
    (&[0xF3], &[0x0F, 0xB8], 0, None),
    (&[0xF2], &[0x0F, 0x38, 0xF1], 0, None),
    (&[], &[0x0F, 0xC3], 0, None),
];

const VECTOR: &[Form<'_>] = &[
    (&[], &[0x0F, 0x10], 0, None),
    (&[], &[0x0F, 0x11], 0, None),
    (&[], &[0x0F, 0x28], 0, None),
    (&[], &[0x0F, 0x29], 0, None),
    (&[0x66], &[0x0F, 0x6F], 0, None),
    (&[0xF3], &[0x0F, 0x7F], 0, None),
    (&[0x66], &[0x0F, 0x6E], 0, None),
    (&[0x66], &[0x0F, 0x7E], 0, None),
    (&[0xF3], &[0x0F, 0x7E], 0, None),
    (&[0xF2], &[0x0F, 0x10], 0, None),
    (&[0xF2], &[0x0F, 0x11], 0, None),
    (&[0xF2], &[0x0F, 0x58], 0, None),
    (&[0xF2], &[0x0F, 0x59], 0, None),
    (&[0xF2], &[0x0F, 0x5E], 0, None),
    (&[0xF2], &[0x0F, 0x51], 0, None),
    (&[0xF2], &[0x0F, 0x5D], 0, None),
    (&[], &[0x0F, 0x58], 0, None),
    (&[], &[0x0F, 0x5C], 0, None),
    (&[0x66], &[0x0F, 0x59], 0, None),
    (&[0xF2], &[0x0F, 0x2A], 0, None),
    (&[0xF2], &[0x0F, 0x2C], 0, None),
    (&[0xF3], &[0x0F, 0x2D], 0, None),
    (&[0xF2], &[0x0F, 0x5A], 0, None),
    (&[0x66], &[0x0F, 0x2E], 0, None),
    (&[], &[0x0F, 0x2F], 0, None),
    (&[0x66], &[0x0F, 0xEF], 0, None),
    (&[0x66], &[0x0F, 0xDB], 0, None),
    (&[0x66], &[0x0F, 0xFE], 0, None),
    (&[0x66], &[0x0F, 0x74], 0, None),
    (&[0x66], &[0x0F, 0x60], 0, None),
    (&[0x66], &[0x0F, 0x70], 1, None),
    (&[], &[0x0F, 0xC6], 1, None),
    (&[0xF2], &[0x0F, 0xC2], 1, None),
    (&[0x66], &[0x0F, 0x38, 0x00], 0, None),
    (&[0x66], &[0x0F, 0x38, 0x17], 0, None),
    (&[0x66], &[0x0F, 0x3A, 0x16], 1, None),
    (&[0x66], &[0x0F, 0x3A, 0x22], 1, None),
    (&[0x66], &[0x0F, 0x3A, 0x0B], 1, None),
    (&[0x66], &[0x0F, 0xE7], 0, None),
    (&[], &[0x0F, 0x12], 0, None),
    (&[0x66], &[0x0F, 0x16], 0, None),
];

/// ModRM, SIB and displacement of a memory operand, and the bits of REX for it.
fn memory(seed: [u8; 4], aligned: bool) -> (u8, Vec<u8>, &'static [u8]) {
    let [which, scale, disp, _] = seed;
    let disp = if aligned { disp & 0xF0 } else { disp };
    let scaled = scale & 0xC0;
    let none: &[u8] = &[];
    match which % 10 {
        0 => (0, vec![0x43, disp], none),
        1 => (0, vec![0x46, disp], none),
        2 => (0, vec![0x45, disp], none),
        3 => (0, vec![0x44, scaled | 0x3B, disp], none),
        4 => (1, vec![0x43, disp], none),
        5 => (2, vec![0x44, scaled | 0x13, disp], none),
        6 => (3, vec![0x44, scaled | 0x13, disp], none),
        7 => (0, vec![0x44, 0x24, disp], none),
        8 => (0, vec![0x04, 0x25, disp, 0x01, 0x30, 0x00], none),
        _ => (0, vec![0x04, 0x25, disp & 0x7F, 0, 0, 0], &[0x65]),
    }
}

fn with_modrm(form: Form<'_>, seed: [u8; 12], vector: bool) -> Vec<u8> {
    let (prefix, opcode, immediate, extension) = form;
    let one = WRITTEN[usize::from(seed[2]) % WRITTEN.len()];
    let other = WRITTEN[usize::from(seed[3]) % WRITTEN.len()];
    let reg = extension.unwrap_or(one);
    let (mut rex, bytes, segment) = if seed[4] % 8 < 3 || opcode == [0x0F, 0xA3] {
        (other >> 3, vec![0xC0 | (other & 7)], &[][..])
    } else {
        memory([seed[5], seed[6], seed[7], 0], vector && !seed[6].is_multiple_of(8))
    };
    rex |= (reg >> 3) << 2;
    let mut code = segment.to_vec();
    if prefix.is_empty() && !vector && seed[8].is_multiple_of(8) && immediate != 4 {
        code.push(0x66);
    }
    if !vector && prefix.is_empty() && seed[8] % 16 == 1 && bytes[0] & 0xC0 != 0xC0 {
        // LOCK: often not allowed.
        code.push(0xF0);
    }
    code.extend(prefix);
    // Byte registers are never AH to DH.
    code.push(0x40 | rex | (seed[8] & 0x80) >> 4);
    code.extend(opcode);
    code.push(bytes[0] | (reg & 7) << 3);
    code.extend(&bytes[1..]);
    code.extend(&seed[8..8 + immediate]);
    code
}

/// One instruction or a few.
fn instruction(seed: [u8; 12]) -> Vec<u8> {
    let condition = seed[2] & 15;
    let register = WRITTEN[usize::from(seed[3]) % WRITTEN.len()];
    let rex = 0x40 | register >> 3;
    match seed[0] % 32 {
        // PUSHFQ; POP RAX
        0 => vec![0x9C, 0x58],
        1..=14 => with_modrm(INTEGER[usize::from(seed[1]) % INTEGER.len()], seed, false),
        15..=21 => with_modrm(VECTOR[usize::from(seed[1]) % VECTOR.len()], seed, true),
        // CMOVcc, SETcc.
        22 => {
            let mut code = with_modrm((&[], &[0x0F, 0xAF], 0, None), seed, false);
            // IMUL's operands are CMOVcc's.
            let at = code.windows(2).position(|pair| pair == [0x0F, 0xAF]).unwrap_or(0);
            code[at + 1] = 0x40 | condition;
            code
        }
        23 => vec![rex, 0x0F, 0x90 | condition, 0xC0 | (register & 7)],
        // Jcc over the next byte or two, which may be anything's.
        24 => vec![0x70 | condition, 2, 0x90, 0x90],
        25 => vec![0x0F, 0x80 | condition, 1, 0, 0, 0, 0xF8],
        // PUSH and POP of different registers.
        26 => vec![rex, 0x50 | (register & 7), 0x58],
        27 => vec![0x6A, seed[4], rex, 0x58 | (register & 7)],
        // CALL over a return; LEA RAX, [RIP - 1] and an indirect call would need the address.
        28 => vec![0xE8, 3, 0, 0, 0, 0xEB, 4, 0x90, 0x48, 0xFF, 0xC0, 0xC3],
        // A division that seldom faults: XOR EDX, EDX; OR ECX, 1; DIV or IDIV ECX or RCX.
        29 => vec![0x31, 0xD2, 0x83, 0xC9, 1, 0x40 | seed[4] & 8, 0xF7, 0xF1 | (seed[4] & 1) << 3],
        30 => [&[0x48, 0x98][..], &[0x98], &[0x99], &[0x48, 0x99], &[0x66, 0x99], &[0x66, 0x98]]
            [usize::from(seed[4]) % 6]
            .to_vec(),
        // What is not compiled.
        _ => [
            &[0x9F][..],
            &[0xF8],
            &[0xF5],
            &[0x9E],
            &[0x86, 0xE0],
            &[0xD8, 0xC1],
            // CLI; TEST AH, 0x41; OR AH, 0x13; MOV DH, 0x77; MOVZX EDX, AH; CMP CH, DL
            &[0xFA],
            &[0xF6, 0xC4, 0x41],
            &[0x80, 0xCC, 0x13],
            &[0xB6, 0x77],
            &[0x0F, 0xB6, 0xD4],
            &[0x38, 0xD5],
            // CMPXCHG16B [RBX]; BTS [RBX], RDI; BT [R11], EDI; BTR [RBP + 8], RDI
            &[0x48, 0x0F, 0xC7, 0x0B],
            &[0x48, 0x0F, 0xAB, 0x3B],
            &[0x41, 0x0F, 0xA3, 0x3B],
            &[0x48, 0x0F, 0xB3, 0x7D, 0x08],
        ][usize::from(seed[4]) % 16]
            .to_vec(),
    }
}

/// A program that repeats itself.
pub(super) fn program(seeds: &[[u8; 12]]) -> Vec<u8> {
    // MOV EDI, 16; MOV R10D, 32; LEA R11, [RBX + 256]
    let mut code = vec![0xBF, 0x10, 0, 0, 0, 0x41, 0xBA, 0x20, 0, 0, 0];
    code.extend([0x4C, 0x8D, 0x9B, 0, 1, 0, 0]);
    let begin = code.len() as i32;
    code.extend(seeds.iter().flat_map(|seed| instruction(*seed)));
    while !code.len().is_multiple_of(SLOT) {
        code.push(0x90);
    }
    code.push(0xE9);
    let distance = begin - (code.len() as i32 + 4);
    code.extend(distance.to_le_bytes());
    code
}
