//! AES-NI and `PCLMULQDQ` (SDM volume 2; the cipher itself is FIPS 197).
//!
//! Tables, made when the program is compiled from the field's arithmetic: what an instruction
//! gives must be the same on every host, also on one without these instructions.

use super::lanes::Lanes;

/// `a` times `x` in the field of 256 elements modulo x⁸ + x⁴ + x³ + x + 1.
const fn doubled(a: u8) -> u8 {
    (a << 1) ^ if a & 0x80 != 0 { 0x1B } else { 0 }
}

const fn product(mut a: u8, mut b: u8) -> u8 {
    let mut sum = 0;
    while b != 0 {
        if b & 1 != 0 {
            sum ^= a;
        }
        a = doubled(a);
        b >>= 1;
    }
    sum
}

/// The inverse in the field, and zero for zero: the 254th power.
const fn inverse(a: u8) -> u8 {
    let (mut result, mut power, mut left) = (1, a, 254);
    while left != 0 {
        if left & 1 != 0 {
            result = product(result, power);
        }
        power = product(power, power);
        left >>= 1;
    }
    result
}

/// `SubBytes` of each byte (FIPS 197, 5.1.1).
const SUBSTITUTE: [u8; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let b = inverse(byte as u8);
        table[byte] =
            b ^ b.rotate_left(1) ^ b.rotate_left(2) ^ b.rotate_left(3) ^ b.rotate_left(4) ^ 0x63;
        byte += 1;
    }
    table
};

const INVERSE_SUBSTITUTE: [u8; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        table[SUBSTITUTE[byte] as usize] = byte as u8;
        byte += 1;
    }
    table
};

/// What each byte, substituted, adds to its column if it stands in the first row and the column is
/// multiplied by a row of `factors`. Further rows add the same, rotated.
const fn columns(substitute: &[u8; 256], factors: [u8; 4]) -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let b = substitute[byte];
        table[byte] = u32::from_le_bytes([
            product(b, factors[0]),
            product(b, factors[1]),
            product(b, factors[2]),
            product(b, factors[3]),
        ]);
        byte += 1;
    }
    table
}

/// `SubBytes` and `MixColumns`.
static ENCRYPT: [u32; 256] = columns(&SUBSTITUTE, [2, 1, 1, 3]);
/// `InvSubBytes` and `InvMixColumns`.
static DECRYPT: [u32; 256] = columns(&INVERSE_SUBSTITUTE, [14, 9, 13, 11]);

/// The byte that `ShiftRows` brings to `row` of `column`: from `column + turn × row`.
fn shifted(state: u128, row: usize, column: usize, turn: usize) -> u8 {
    state.byte(4 * ((column + turn * row) % 4) + row)
}

const LEFT: usize = 1;
const RIGHT: usize = 3;

fn round(state: u128, key: u128, table: &[u32; 256], turn: usize) -> u128 {
    let mut result = 0;
    for column in 0..4 {
        let mut word = 0;
        for row in 0..4 {
            let byte = shifted(state, row, column, turn);
            word ^= table[usize::from(byte)].rotate_left(8 * row as u32);
        }
        result |= u128::from(word) << (32 * column);
    }
    result ^ key
}

fn last_round(state: u128, key: u128, substitute: &[u8; 256], turn: usize) -> u128 {
    let mut result = [0; 16];
    for (place, byte) in result.iter_mut().enumerate() {
        *byte = substitute[usize::from(shifted(state, place % 4, place / 4, turn))];
    }
    u128::from_le_bytes(result) ^ key
}

/// `AESENC`.
pub(super) fn encrypt(state: u128, key: u128) -> u128 {
    round(state, key, &ENCRYPT, LEFT)
}

/// `AESENCLAST`.
pub(super) fn encrypt_last(state: u128, key: u128) -> u128 {
    last_round(state, key, &SUBSTITUTE, LEFT)
}

/// `AESDEC`.
pub(super) fn decrypt(state: u128, key: u128) -> u128 {
    round(state, key, &DECRYPT, RIGHT)
}

/// `AESDECLAST`.
pub(super) fn decrypt_last(state: u128, key: u128) -> u128 {
    last_round(state, key, &INVERSE_SUBSTITUTE, RIGHT)
}

/// `AESIMC`: `InvMixColumns`.
pub(super) fn inverse_mix_columns(source: u128) -> u128 {
    let substituted = source.to_le_bytes().map(|byte| SUBSTITUTE[usize::from(byte)]);
    // Without `InvShiftRows`: each byte stays in its column.
    round(u128::from_le_bytes(substituted), 0, &DECRYPT, 0)
}

/// `AESKEYGENASSIST` with the round constant `constant`.
pub(super) fn key_assist(source: u128, constant: u8) -> u128 {
    let substituted = |word: u32| {
        u32::from_le_bytes(word.to_le_bytes().map(|byte| SUBSTITUTE[usize::from(byte)]))
    };
    let (x1, x3) = (substituted(source.double(1)), substituted(source.double(3)));
    let turned = |word: u32| u128::from(word.rotate_right(8) ^ u32::from(constant));
    u128::from(x1) | turned(x1) << 32 | u128::from(x3) << 64 | turned(x3) << 96
}

/// `PCLMULQDQ`: the product, without carries, of the quadwords that bits 0 and 4 of `select` name.
pub(super) fn carryless_product(destination: u128, source: u128, select: u8) -> u128 {
    let a = u128::from(destination.quad(usize::from(select & 1)));
    let mut b = source.quad(usize::from(select >> 4 & 1));
    // Multiples of `a` by the sixteen polynomials below x⁴.
    let mut multiples = [0; 16];
    for index in 1..16 {
        let half: u128 = multiples[index / 2];
        multiples[index] = (half << 1) ^ if index & 1 != 0 { a } else { 0 };
    }
    let mut product = 0;
    for _ in 0..16 {
        product = (product << 4) ^ multiples[(b >> 60) as usize];
        b <<= 4;
    }
    product
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FIPS 197, appendix B: one block.
    #[test]
    fn a_block_is_encrypted_and_decrypted_as_the_standard_says() {
        let bytes = |text: &str| {
            let byte = |i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).expect("hexadecimal");
            u128::from_le_bytes(std::array::from_fn(byte))
        };
        let constants = [1, 2, 4, 8, 16, 32, 64, 128, 27, 54];
        let mut keys = vec![bytes("2b7e151628aed2a6abf7158809cf4f3c")];
        for constant in constants {
            let last = keys[keys.len() - 1];
            let mut word = key_assist(last, constant).double(3);
            let mut key = 0;
            for column in 0..4 {
                word ^= last.double(column);
                key |= u128::from(word) << (32 * column);
            }
            keys.push(key);
        }
        assert_eq!(keys[10], bytes("d014f9a8c9ee2589e13f0cc8b6630ca6"));
        let plain = bytes("3243f6a8885a308d313198a2e0370734");
        let mut state = plain ^ keys[0];
        for key in &keys[1..10] {
            state = encrypt(state, *key);
        }
        state = encrypt_last(state, keys[10]);
        assert_eq!(state, bytes("3925841d02dc09fbdc118597196a0b32"));
        state ^= keys[10];
        for key in keys[1..10].iter().rev() {
            state = decrypt(state, inverse_mix_columns(*key));
        }
        assert_eq!(decrypt_last(state, keys[0]), plain);
    }

    #[test]
    fn a_carryless_product_takes_the_quadwords_that_are_named() {
        let (a, b) = (3_u128 | 5 << 64, 1 << 63 | 7_u128 << 64);
        assert_eq!(carryless_product(a, b, 0x00), 3 << 63);
        assert_eq!(carryless_product(a, b, 0x01), 5 << 63);
        // (x² + 1)(x² + x + 1) = x⁴ + x³ + x + 1.
        assert_eq!(carryless_product(a, b, 0x11), 0b11011);
        assert_eq!(carryless_product(a, b, 0x10), 0b1001);
    }
}
