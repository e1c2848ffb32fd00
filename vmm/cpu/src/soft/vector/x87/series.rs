//! The functions themselves, on [`Wide`] numbers: sine and cosine, arctangent, logarithm,
//! exponential. Relative errors stay below 2⁻¹¹⁰, far inside half a place of 64 bits.

use super::wide::Wide;
use std::cmp::Ordering;

/// ln 2.
const LN_2: Wide = Wide::constant(-1, 0xB172_17F7_D1CF_79AB_C9E3_B398_03F2_F6AF);
/// log₂ e.
const LOG2_E: Wide = Wide::constant(0, 0xB8AA_3B29_5C17_F0BB_BE87_FED0_691D_3E89);
/// π.
pub(super) const PI: Wide = Wide::constant(1, 0xC90F_DAA2_2168_C234_C4C6_628B_80DC_1CD1);
/// π/2.
pub(super) const HALF_PI: Wide = PI.scaled(-1);
/// π/4.
pub(super) const QUARTER_PI: Wide = PI.scaled(-2);

/// The first 256 bits of 2/π after the point, most significant word first.
const TWO_OVER_PI: [u64; 4] =
    [0xA2F9_836E_4E44_1529, 0xFC27_57D1_F534_DDC0, 0xDB62_9599_3C43_9041, 0xFE51_63AB_DEBB_C561];

/// atan(i/16) for i from 1.
const ARCTANGENTS: [Wide; 16] = [
    Wide::constant(-5, 0xFFAA_DDB9_67EF_4E36_CB27_92DC_0E2E_0D51),
    Wide::constant(-4, 0xFEAD_D4D5_617B_6E32_C897_989F_3E88_8EF8),
    Wide::constant(-3, 0xBDCB_DA5E_72D8_1134_7B0B_4F88_1C9C_7488),
    Wide::constant(-3, 0xFADB_AFC9_6406_EB15_6DC7_9EF5_F7A2_17E6),
    Wide::constant(-2, 0x9B13_B9B8_3F5E_5E69_C5AB_B498_D27A_F328),
    Wide::constant(-2, 0xB7B0_CA0F_26F7_8473_8AA3_2122_DCFE_4483),
    Wide::constant(-2, 0xD327_761E_611F_E5B6_427C_95E9_001E_7136),
    Wide::constant(-2, 0xED63_382B_0DDA_7B45_6FE4_45EC_BC3A_8D03),
    Wide::constant(-1, 0x832B_F4A6_D986_7E2A_4B6A_09CB_61A5_15C1),
    Wide::constant(-1, 0x8F00_5D5E_F7F5_9F9B_5C83_5E16_65C4_3748),
    Wide::constant(-1, 0x9A2F_80E6_71BD_DA20_4226_F8E2_204F_F3BD),
    Wide::constant(-1, 0xA4BC_7D19_34F7_0924_19A8_7F2A_457D_AC9F),
    Wide::constant(-1, 0xAEAC_4C38_B4D8_C080_1472_5E2F_3E52_070A),
    Wide::constant(-1, 0xB805_3E2B_C231_9E73_CB2D_A552_10A4_443D),
    Wide::constant(-1, 0xC0CE_85B8_AC52_6640_89DD_62C4_6E92_FA25),
    Wide::constant(-1, 0xC90F_DAA2_2168_C234_C4C6_628B_80DC_1CD1),
];

/// `x - quadrant·π/2`, at most π/4 in magnitude, and the quadrant modulo four.
///
/// The reduction is by π to 256 bits, not by the 66 bits that Intel's units use: the results
/// are right to the last place for every argument below 2⁶³.
pub(super) fn reduce(x: Wide) -> (Wide, u8) {
    if x.exponent < -1 {
        return (x, 0);
    }
    let (fraction, whole) = times_two_over_pi((x.significand >> 64) as u64, x.exponent as u32);
    // Beyond one half the next quadrant is nearer.
    let beyond = fraction[0] >> 63 != 0;
    let fraction = if beyond { negated(fraction) } else { fraction };
    let quadrant = whole.wrapping_add(u8::from(beyond)) & 3;
    let part = normalised(fraction);
    let rest = Wide { negative: beyond != x.negative, ..part.mul(HALF_PI) };
    (rest, if x.negative { quadrant.wrapping_neg() & 3 } else { quadrant })
}

/// `digits/2⁶³ · 2^exponent · 2/π`: the fraction as 320 bits, most significant word first, and the
/// low two bits of the whole part. The exponent is -1 (as `u32`) to 62.
fn times_two_over_pi(digits: u64, exponent: u32) -> ([u64; 5], u8) {
    let mut product = [0_u64; 5];
    let mut carry = 0_u128;
    for i in (0..4).rev() {
        let step = u128::from(digits) * u128::from(TWO_OVER_PI[i]) + carry;
        product[i + 1] = step as u64;
        carry = step >> 64;
    }
    product[0] = carry as u64;
    // The whole part is the top `exponent + 1` bits.
    let bits = exponent.wrapping_add(1);
    let whole = if bits == 0 { 0 } else { (product[0] >> (64 - bits)) as u8 & 3 };
    let fraction = std::array::from_fn(|i| {
        let next = product.get(i + 1).copied().unwrap_or(0);
        product[i] << bits | if bits == 0 { 0 } else { next >> (64 - bits) }
    });
    (fraction, whole)
}

/// One minus the fraction.
fn negated(fraction: [u64; 5]) -> [u64; 5] {
    let mut result = fraction.map(|word| !word);
    for word in result.iter_mut().rev() {
        let (sum, carry) = word.overflowing_add(1);
        *word = sum;
        if !carry {
            break;
        }
    }
    result
}

/// The fraction's leading 128 bits as a number.
fn normalised(fraction: [u64; 5]) -> Wide {
    let Some(first) = fraction.iter().position(|&word| word != 0) else { return Wide::ZERO };
    let word = |i: usize| fraction.get(first + i).copied().unwrap_or(0);
    let shift = word(0).leading_zeros();
    let top = u128::from(word(0)) << 64 | u128::from(word(1));
    let significand = top << shift | u128::from(word(2)).checked_shr(64 - shift).unwrap_or(0);
    Wide { negative: false, exponent: -1 - 64 * first as i32 - shift as i32, significand }
}

/// sin x for |x| ≤ π/4.
pub(super) fn sine(x: Wide) -> Wide {
    let square = x.mul(x);
    // x(1 - x²/(2·3)(1 - x²/(4·5)(1 - …))).
    let inner = (1..=15).rev().fold(Wide::ONE, |inner, k| {
        Wide::ONE.sub(square.mul(inner).div_small(2 * k * (2 * k + 1)))
    });
    x.mul(inner)
}

/// cos x for |x| ≤ π/4.
pub(super) fn cosine(x: Wide) -> Wide {
    let square = x.mul(x);
    (1..=16)
        .rev()
        .fold(Wide::ONE, |inner, k| Wide::ONE.sub(square.mul(inner).div_small((2 * k - 1) * 2 * k)))
}

/// atan(y/x) for positive numbers with y ≤ x.
pub(super) fn arctangent_of_ratio(y: Wide, x: Wide) -> Wide {
    let ratio = y.div(x);
    // The nearest sixteenth c; atan t = atan c + atan((t - c)/(1 + tc)).
    let nearest = match ratio.exponent {
        exponent @ -5..=0 => ((ratio.significand >> (122 - exponent)) as u32).div_ceil(2),
        _ => 0,
    };
    if nearest == 0 {
        return arctangent_near_zero(ratio);
    }
    let centre = Wide::integer(nearest as i32).scaled(-4);
    let rest = ratio.sub(centre).div(Wide::ONE.add(ratio.mul(centre)));
    ARCTANGENTS[nearest as usize - 1].add(arctangent_near_zero(rest))
}

/// atan t for |t| ≤ 1/32: the power series.
fn arctangent_near_zero(t: Wide) -> Wide {
    let square = t.mul(t);
    let inner = (0..=13)
        .rev()
        .fold(Wide::ZERO, |inner, k| Wide::ONE.div_small(2 * k + 1).sub(square.mul(inner)));
    t.mul(inner)
}

/// 2·atanh s for |s| below 0.18.
fn twice_inverse_hyperbolic_tangent(s: Wide) -> Wide {
    let square = s.mul(s);
    let inner = (0..=27)
        .rev()
        .fold(Wide::ZERO, |inner, k| Wide::ONE.div_small(2 * k + 1).add(square.mul(inner)));
    s.mul(inner).scaled(1)
}

/// log₂ x for a positive x.
pub(super) fn logarithm(x: Wide) -> Wide {
    /// √2, to say which power of two is nearer.
    const ROOT_2: u128 = 0xB504_F333_F9DE_6484_597D_89B3_754A_BE9F;
    let power = x.exponent + i32::from(x.significand > ROOT_2);
    let near_one = x.scaled(-power);
    let s = near_one.sub(Wide::ONE).div(near_one.add(Wide::ONE));
    Wide::integer(power).add(twice_inverse_hyperbolic_tangent(s).mul(LOG2_E))
}

/// log₂(1 + x) for x above -1.
pub(super) fn logarithm_of_one_plus(x: Wide) -> Wide {
    // Near zero the sum would lose what matters.
    if x.compare_magnitude(Wide::ONE.scaled(-2)) == Ordering::Greater {
        return logarithm(Wide::ONE.add(x));
    }
    let s = x.div(Wide::integer(2).add(x));
    twice_inverse_hyperbolic_tangent(s).mul(LOG2_E)
}

/// 2^x - 1 for |x| ≤ 1.
pub(super) fn exponential_minus_one(x: Wide) -> Wide {
    let z = x.mul(LN_2);
    // z(1 + z/2(1 + z/3(1 + …))).
    let inner = (2..=34).rev().fold(Wide::ONE, |inner, k| Wide::ONE.add(z.mul(inner).div_small(k)));
    z.mul(inner)
}
