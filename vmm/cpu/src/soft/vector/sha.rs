//! The SHA extensions (SDM volume 2; the functions are FIPS 180-4's).

use super::lanes::Lanes;

/// Four doublewords, the highest first, as the manual writes them.
const fn packed(words: [u32; 4]) -> u128 {
    (words[0] as u128) << 96
        | (words[1] as u128) << 64
        | (words[2] as u128) << 32
        | words[3] as u128
}

/// The doublewords of a register, the highest first.
fn words(value: u128) -> [u32; 4] {
    [value.double(3), value.double(2), value.double(1), value.double(0)]
}

fn choose(x: u32, y: u32, z: u32) -> u32 {
    (x & y) ^ (!x & z)
}

fn majority(x: u32, y: u32, z: u32) -> u32 {
    (x & y) ^ (x & z) ^ (y & z)
}

fn parity(x: u32, y: u32, z: u32) -> u32 {
    x ^ y ^ z
}

/// `SHA1RNDS4`: four rounds; `source` has the words, with E in the first.
pub(super) fn sha1_rounds(destination: u128, source: u128, function: u8) -> u128 {
    type Function = fn(u32, u32, u32) -> u32;
    let (f, k): (Function, u32) = match function & 3 {
        0 => (choose, 0x5A82_7999),
        1 => (parity, 0x6ED9_EBA1),
        2 => (majority, 0x8F1B_BCDC),
        _ => (parity, 0xCA62_C1D6),
    };
    let [mut a, mut b, mut c, mut d] = words(destination);
    let mut e = 0_u32;
    for word in words(source) {
        let next = f(b, c, d)
            .wrapping_add(a.rotate_left(5))
            .wrapping_add(word)
            .wrapping_add(e)
            .wrapping_add(k);
        (e, d, c, b, a) = (d, c, b.rotate_left(30), a, next);
    }
    packed([a, b, c, d])
}

/// `SHA1NEXTE`.
pub(super) fn sha1_next_e(destination: u128, source: u128) -> u128 {
    let [a, ..] = words(destination);
    let [w0, w1, w2, w3] = words(source);
    packed([w0.wrapping_add(a.rotate_left(30)), w1, w2, w3])
}

/// `SHA1MSG1`.
pub(super) fn sha1_message_1(destination: u128, source: u128) -> u128 {
    let [w0, w1, w2, w3] = words(destination);
    let [w4, w5, ..] = words(source);
    packed([w2 ^ w0, w3 ^ w1, w4 ^ w2, w5 ^ w3])
}

/// `SHA1MSG2`.
pub(super) fn sha1_message_2(destination: u128, source: u128) -> u128 {
    let [x0, x1, x2, x3] = words(destination);
    let [_, w13, w14, w15] = words(source);
    let w16 = (x0 ^ w13).rotate_left(1);
    let w17 = (x1 ^ w14).rotate_left(1);
    let w18 = (x2 ^ w15).rotate_left(1);
    let w19 = (x3 ^ w16).rotate_left(1);
    packed([w16, w17, w18, w19])
}

/// `SHA256RNDS2`: two rounds; `message`, XMM0, has the two words with their constants.
pub(super) fn sha256_rounds(destination: u128, source: u128, message: u128) -> u128 {
    let [mut c, mut d, mut g, mut h] = words(destination);
    let [mut a, mut b, mut e, mut f] = words(source);
    for word in [message.double(0), message.double(1)] {
        let sum_1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let sum_0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let first = choose(e, f, g).wrapping_add(sum_1).wrapping_add(word).wrapping_add(h);
        let second = majority(a, b, c).wrapping_add(sum_0);
        (h, g, f, e) = (g, f, e, first.wrapping_add(d));
        (d, c, b, a) = (c, b, a, first.wrapping_add(second));
    }
    packed([a, b, e, f])
}

fn sigma_0(x: u32) -> u32 {
    x.rotate_right(7) ^ x.rotate_right(18) ^ (x >> 3)
}

fn sigma_1(x: u32) -> u32 {
    x.rotate_right(17) ^ x.rotate_right(19) ^ (x >> 10)
}

/// `SHA256MSG1`.
pub(super) fn sha256_message_1(destination: u128, source: u128) -> u128 {
    let [w3, w2, w1, w0] = words(destination);
    let w4 = source.double(0);
    let next = |word: u32, after: u32| word.wrapping_add(sigma_0(after));
    packed([next(w3, w4), next(w2, w3), next(w1, w2), next(w0, w1)])
}

/// `SHA256MSG2`.
pub(super) fn sha256_message_2(destination: u128, source: u128) -> u128 {
    let [x3, x2, x1, x0] = words(destination);
    let [w15, w14, ..] = words(source);
    let w16 = x0.wrapping_add(sigma_1(w14));
    let w17 = x1.wrapping_add(sigma_1(w15));
    let w18 = x2.wrapping_add(sigma_1(w16));
    let w19 = x3.wrapping_add(sigma_1(w17));
    packed([w19, w18, w17, w16])
}

#[cfg(test)]
mod tests {
    use super::*;

    const K: [u32; 64] = [
        0x428A2F98, 0x71374491, 0xB5C0FBCF, 0xE9B5DBA5, 0x3956C25B, 0x59F111F1, 0x923F82A4,
        0xAB1C5ED5, 0xD807AA98, 0x12835B01, 0x243185BE, 0x550C7DC3, 0x72BE5D74, 0x80DEB1FE,
        0x9BDC06A7, 0xC19BF174, 0xE49B69C1, 0xEFBE4786, 0x0FC19DC6, 0x240CA1CC, 0x2DE92C6F,
        0x4A7484AA, 0x5CB0A9DC, 0x76F988DA, 0x983E5152, 0xA831C66D, 0xB00327C8, 0xBF597FC7,
        0xC6E00BF3, 0xD5A79147, 0x06CA6351, 0x14292967, 0x27B70A85, 0x2E1B2138, 0x4D2C6DFC,
        0x53380D13, 0x650A7354, 0x766A0ABB, 0x81C2C92E, 0x92722C85, 0xA2BFE8A1, 0xA81A664B,
        0xC24B8B70, 0xC76C51A3, 0xD192E819, 0xD6990624, 0xF40E3585, 0x106AA070, 0x19A4C116,
        0x1E376C08, 0x2748774C, 0x34B0BCB5, 0x391C0CB3, 0x4ED8AA4A, 0x5B9CCA4F, 0x682E6FF3,
        0x748F82EE, 0x78A5636F, 0x84C87814, 0x8CC70208, 0x90BEFFFA, 0xA4506CEB, 0xBEF9A3F7,
        0xC67178F2,
    ];

    /// "abc", padded to a block.
    fn block() -> [u32; 16] {
        let mut words = [0; 16];
        (words[0], words[15]) = (0x6162_6380, 24);
        words
    }

    /// A block's hash as a program computes it with these instructions.
    #[test]
    fn sha256_of_abc_is_the_standards() {
        let h = [
            0x6A09E667,
            0xBB67AE85,
            0x3C6EF372,
            0xA54FF53A,
            0x510E527F,
            0x9B05688C,
            0x1F83D9AB,
            0x5BE0CD19_u32,
        ];
        let reversed = |w: &[u32]| packed([w[3], w[2], w[1], w[0]]);
        let mut message: Vec<u128> = block().chunks(4).map(reversed).collect();
        for i in 4..16 {
            let first = sha256_message_1(message[i - 4], message[i - 3]);
            // W[t-7]: the three upper of one register and the lowest of the next.
            let older = message[i - 2] >> 32 | message[i - 1] << 96;
            let sum = (0..4).fold(0, |sum, n| {
                sum | u128::from(first.double(n).wrapping_add(older.double(n))) << (32 * n)
            });
            message.push(sha256_message_2(sum, message[i - 1]));
        }
        let (mut abef, mut cdgh) =
            (packed([h[0], h[1], h[4], h[5]]), packed([h[2], h[3], h[6], h[7]]));
        for pair in 0..32 {
            let words = message[pair / 2] >> (64 * (pair % 2));
            let add = |n: usize| u128::from(words.double(n).wrapping_add(K[2 * pair + n]));
            let next = sha256_rounds(cdgh, abef, add(0) | add(1) << 32);
            (cdgh, abef) = (abef, next);
        }
        let ([a, b, e, f], [c, d, g, last]) = (words(abef), words(cdgh));
        let sums: Vec<u32> =
            h.iter().zip([a, b, c, d, e, f, g, last]).map(|(h, x)| h.wrapping_add(x)).collect();
        let expected = [
            0xBA7816BF, 0x8F01CFEA, 0x414140DE, 0x5DAE2223, 0xB00361A3, 0x96177A9C, 0xB410FF61,
            0xF20015AD,
        ];
        assert_eq!(sums, expected);
    }

    #[test]
    fn sha1_of_abc_is_the_standards() {
        let h = [0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0_u32];
        let in_order = |w: &[u32]| packed([w[0], w[1], w[2], w[3]]);
        let mut message: Vec<u128> = block().chunks(4).map(in_order).collect();
        for i in 4..20 {
            let first = sha1_message_1(message[i - 4], message[i - 3]) ^ message[i - 2];
            message.push(sha1_message_2(first, message[i - 1]));
        }
        let mut state = packed([h[0], h[1], h[2], h[3]]);
        let mut before = 0;
        for (group, words) in message.iter().enumerate() {
            let with_e = if group == 0 {
                let e = u128::from(words.double(3).wrapping_add(h[4])) << 96;
                words & !(u128::from(u32::MAX) << 96) | e
            } else {
                sha1_next_e(before, *words)
            };
            before = state;
            state = sha1_rounds(state, with_e, (group / 5) as u8);
        }
        let e = words(before)[0].rotate_left(30);
        let [a, b, c, d] = words(state);
        let sums: Vec<u32> =
            h.iter().zip([a, b, c, d, e]).map(|(h, x)| h.wrapping_add(x)).collect();
        assert_eq!(sums, [0xA9993E36, 0x4706816A, 0xBA3E2571, 0x7850C26C, 0x9CD0D89D]);
    }
}
