//! The x87 functions in which CPUs differ: near the host's results, and right to the last place.

use super::super::execute;
use super::machine::Machine;
use super::native::Page;
use super::values::Random;
use crate::state::X87State;
use iced_x86::{Decoder, DecoderOptions};

/// The condition code that tells the direction of rounding, which the last place decides.
const C1: u16 = 1 << 9;

const INSTRUCTIONS: [(&str, [u8; 2]); 8] = [
    ("fsin", [0xD9, 0xFE]),
    ("fcos", [0xD9, 0xFF]),
    ("fsincos", [0xD9, 0xFB]),
    ("fptan", [0xD9, 0xF2]),
    ("fpatan", [0xD9, 0xF3]),
    ("f2xm1", [0xD9, 0xF0]),
    ("fyl2x", [0xD9, 0xF1]),
    ("fyl2xp1", [0xD9, 0xF9]),
];

/// Sign and exponent, then significand.
type Parts = (u16, u64);

fn parts(register: &[u8; 10]) -> Parts {
    let exponent = u16::from_le_bytes([register[8], register[9]]);
    (exponent, u64::from_le_bytes(register[..8].try_into().expect("eight bytes")))
}

fn register((exponent, significand): Parts) -> [u8; 10] {
    let mut register = [0; 10];
    register[..8].copy_from_slice(&significand.to_le_bytes());
    register[8..].copy_from_slice(&exponent.to_le_bytes());
    register
}

/// How many places two numbers of the same sign are apart.
fn distance(a: &[u8; 10], b: &[u8; 10]) -> u128 {
    // Denormals have the places of the least normal numbers.
    let least_normal = |exponent: u16| if exponent & 0x7FFF == 0 { exponent | 1 } else { exponent };
    let place = |(exponent, significand): Parts| {
        (u128::from(least_normal(exponent)) << 63) + u128::from(significand)
    };
    place(parts(a)).abs_diff(place(parts(b)))
}

fn is_of_angle(name: &str) -> bool {
    matches!(name, "fsin" | "fcos" | "fsincos" | "fptan")
}

/// Whether a host that knows π to 66 bits reduces this angle without an error of its own.
fn is_exact_on_the_host(angle: &[u8; 10]) -> bool {
    let exponent = parts(angle).0 & 0x7FFF;
    !(0x3FFF..0x403E).contains(&exponent)
}

#[test]
fn transcendental_instructions_are_within_two_places_of_the_host_and_flag_alike() {
    let mut page = Page::new();
    for (name, bytes) in INSTRUCTIONS {
        page.fill(&bytes);
        let decoded = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
        let mut random = Random::new(u64::from(bytes[1]));
        for _ in 0..10_000 {
            let before = Machine { code: bytes.to_vec(), ..Machine::random(&mut random) };
            let (exponent, significand) = parts(&before.x87.registers[0]);
            if exponent & 0x7FFF <= 1 && significand == 1 << 63 {
                // The least normal number: whether the result underflows is a matter of its last place.
                continue;
            }
            let (mut here, mut there) = (before.clone(), before.clone());
            page.run(&mut there);
            assert_eq!(execute(&mut here, &decoded), Ok(()));
            // Which registers are full; whether the result is a denormal is a matter of its last place.
            let full = |tags: u16| (0..8).filter(|i| tags >> (2 * i) & 3 != 3).collect::<Vec<_>>();
            let state = |x87: &X87State| (x87.status & !C1, full(x87.tags), x87.control);
            let context =
                || format!("{name} of {:x?}: {:x?} for {:x?}", before.x87, here.x87, there.x87);
            assert_eq!(state(&here.x87), state(&there.x87), "{}", context());
            if is_of_angle(name) && !is_exact_on_the_host(&before.x87.registers[0]) {
                continue;
            }
            for (ours, host) in here.x87.registers.iter().zip(&there.x87.registers) {
                assert!(
                    distance(ours, host) <= 2,
                    "{:x?} for {:x?}: {}",
                    parts(ours),
                    parts(host),
                    context()
                );
            }
        }
    }
}

/// Instruction, ST(1), ST(0), and the result rounded to nearest: computed with 400 bits.
#[rustfmt::skip]
const KNOWN: &[(&str, Parts, Parts, Parts)] = &[
    ("fsin", (0x0000, 0x0000_0000_0000_0000), (0xBFFE, 0xD860_8FEF_CB91_CE37), (0xBFFE, 0xBF84_C089_F671_0778)),
    ("fsin", (0x0000, 0x0000_0000_0000_0000), (0x3FE1, 0xBB99_85ED_D721_0DFF), (0x3FE1, 0xBB99_85ED_D721_0DFB)),
    ("fsin", (0x0000, 0x0000_0000_0000_0000), (0x4001, 0x9413_B446_E6A1_6A3B), (0xBFFE, 0xFF13_7C07_ADA0_9A98)),
    ("fsin", (0x0000, 0x0000_0000_0000_0000), (0xC000, 0xEF29_3880_7814_E8A2), (0x3FFE, 0x8F8D_B00A_F58A_E703)),
    ("fsin", (0x0000, 0x0000_0000_0000_0000), (0xC01A, 0x8D0D_7F43_8B33_E968), (0xBFFE, 0xEA70_BFC3_D182_5368)),
    ("fsin", (0x0000, 0x0000_0000_0000_0000), (0x403D, 0xDD97_6D90_035B_7399), (0x3FFC, 0xC1BD_C234_62EE_D835)),
    ("fsin", (0x0000, 0x0000_0000_0000_0000), (0xC03B, 0x974E_4158_478C_281D), (0x3FFE, 0xDD63_35CC_A91A_EC8A)),
    ("fsin", (0x0000, 0x0000_0000_0000_0000), (0x3FFF, 0xC90F_DAA2_2168_C235), (0x3FFF, 0x8000_0000_0000_0000)),
    ("fsin", (0x0000, 0x0000_0000_0000_0000), (0x4000, 0xC90F_DAA2_2168_C235), (0xBFBE, 0xECE6_75D1_FC8F_8CBB)),
    ("fsin", (0x0000, 0x0000_0000_0000_0000), (0x4001, 0x96CB_E3F9_990E_91A8), (0xBFFF, 0x8000_0000_0000_0000)),
    ("fsin", (0x0000, 0x0000_0000_0000_0000), (0x4013, 0xBFBF_8850_3FA2_F219), (0xBFFF, 0x8000_0000_0000_0000)),
    ("fsin", (0x0000, 0x0000_0000_0000_0000), (0x402E, 0xB05F_CACB_3BF4_1430), (0x3FFE, 0xFFFF_FFFF_ECF7_0BC2)),
    ("fsin", (0x0000, 0x0000_0000_0000_0000), (0x3FFE, 0xC90F_DAA2_2168_C234), (0x3FFE, 0xB504_F333_F9DE_6484)),
    ("fsin", (0x0000, 0x0000_0000_0000_0000), (0x403D, 0xFFFF_FFFF_FFFF_FFFF), (0x3FFE, 0xDF32_7E11_2ABE_EF8F)),
    ("fcos", (0x0000, 0x0000_0000_0000_0000), (0x3FFF, 0xE608_E9AB_C30D_8B76), (0xBFFC, 0xE5CF_1605_4FFA_06DE)),
    ("fcos", (0x0000, 0x0000_0000_0000_0000), (0x3FD8, 0xCF08_AF25_9E30_691C), (0x3FFF, 0x8000_0000_0000_0000)),
    ("fcos", (0x0000, 0x0000_0000_0000_0000), (0x4003, 0x803A_2898_21DA_8978), (0xBFFE, 0xF2F8_2131_6593_3060)),
    ("fcos", (0x0000, 0x0000_0000_0000_0000), (0x4000, 0x9B94_E30C_C60A_3CAB), (0xBFFE, 0xC209_1159_006D_BC29)),
    ("fcos", (0x0000, 0x0000_0000_0000_0000), (0x4018, 0xA825_BA5D_4A0F_E75D), (0x3FFE, 0xF6D4_1586_D571_CCA0)),
    ("fcos", (0x0000, 0x0000_0000_0000_0000), (0x403B, 0xF871_E6CB_2E81_D66D), (0xBFFE, 0xE71F_142D_70D0_20EE)),
    ("fcos", (0x0000, 0x0000_0000_0000_0000), (0x403D, 0xFB88_474B_F770_C226), (0xBFFE, 0xE652_573B_6A20_D859)),
    ("fcos", (0x0000, 0x0000_0000_0000_0000), (0x3FFF, 0xC90F_DAA2_2168_C235), (0xBFBD, 0xECE6_75D1_FC8F_8CBB)),
    ("fcos", (0x0000, 0x0000_0000_0000_0000), (0x4000, 0xC90F_DAA2_2168_C235), (0xBFFF, 0x8000_0000_0000_0000)),
    ("fcos", (0x0000, 0x0000_0000_0000_0000), (0x4001, 0x96CB_E3F9_990E_91A8), (0x3FC0, 0xD8D6_6C2E_BEB5_D4C6)),
    ("fcos", (0x0000, 0x0000_0000_0000_0000), (0x4013, 0xBFBF_8850_3FA2_F219), (0xBFD1, 0xFD8A_9AE0_13A8_4A53)),
    ("fcos", (0x0000, 0x0000_0000_0000_0000), (0x402E, 0xB05F_CACB_3BF4_1430), (0xBFED, 0xC571_56E6_9CA1_AF94)),
    ("fcos", (0x0000, 0x0000_0000_0000_0000), (0x3FFE, 0xC90F_DAA2_2168_C234), (0x3FFE, 0xB504_F333_F9DE_6485)),
    ("fcos", (0x0000, 0x0000_0000_0000_0000), (0x403D, 0xFFFF_FFFF_FFFF_FFFF), (0x3FFD, 0xFAC0_35EC_4849_29C2)),
    ("fptan", (0x0000, 0x0000_0000_0000_0000), (0xBFFF, 0xAE3B_78C5_0585_A01C), (0xC001, 0x966C_BA8F_4ACD_1024)),
    ("fptan", (0x0000, 0x0000_0000_0000_0000), (0x3FDD, 0x92A6_5C32_EF90_1B93), (0x3FDD, 0x92A6_5C32_EF90_1B93)),
    ("fptan", (0x0000, 0x0000_0000_0000_0000), (0x4002, 0xA692_EF59_54F4_6A69), (0x3FFF, 0xC161_4E38_879C_E4C5)),
    ("fptan", (0x0000, 0x0000_0000_0000_0000), (0x4004, 0xD6C6_8CA5_9892_1396), (0x3FFD, 0x9704_2D17_6498_BD27)),
    ("fptan", (0x0000, 0x0000_0000_0000_0000), (0x401D, 0xAD7C_2735_4F59_6727), (0xBFFE, 0xC865_DFD6_8F00_E17C)),
    ("fptan", (0x0000, 0x0000_0000_0000_0000), (0xC03C, 0xA86B_E89F_B248_9191), (0x4007, 0xBF86_453E_8245_6102)),
    ("fptan", (0x0000, 0x0000_0000_0000_0000), (0xC03B, 0xDA32_9929_78F8_45F5), (0x3FFC, 0x807F_DD9A_2DBF_CF5F)),
    ("fptan", (0x0000, 0x0000_0000_0000_0000), (0x3FFF, 0xC90F_DAA2_2168_C235), (0xC040, 0x8A51_E04D_AABD_A35F)),
    ("fptan", (0x0000, 0x0000_0000_0000_0000), (0x4000, 0xC90F_DAA2_2168_C235), (0x3FBE, 0xECE6_75D1_FC8F_8CBB)),
    ("fptan", (0x0000, 0x0000_0000_0000_0000), (0x4001, 0x96CB_E3F9_990E_91A8), (0xC03D, 0x971E_224F_6C05_21C6)),
    ("fptan", (0x0000, 0x0000_0000_0000_0000), (0x4013, 0xBFBF_8850_3FA2_F219), (0x402C, 0x813D_BFC5_AB21_E438)),
    ("fptan", (0x0000, 0x0000_0000_0000_0000), (0x402E, 0xB05F_CACB_3BF4_1430), (0xC010, 0xA5F6_48B5_728D_5C36)),
    ("fptan", (0x0000, 0x0000_0000_0000_0000), (0x3FFE, 0xC90F_DAA2_2168_C234), (0x3FFE, 0xFFFF_FFFF_FFFF_FFFE)),
    ("fptan", (0x0000, 0x0000_0000_0000_0000), (0x403D, 0xFFFF_FFFF_FFFF_FFFF), (0x3FFF, 0xE3DE_9ED3_992F_3138)),
    ("fpatan", (0x3FFD, 0xFCD0_0FF4_4195_21FE), (0xBFFC, 0xB3BF_E89C_D84A_1D3A), (0x3FFF, 0xF4C8_4821_82BF_D4F4)),
    ("fpatan", (0xBFFC, 0xB02C_BDEE_5DBE_4409), (0x4000, 0x85FB_277B_73EC_28D0), (0xBFFB, 0xA7EE_C78A_ADAC_CCA1)),
    ("fpatan", (0x4001, 0xFA43_55B9_9FAB_A827), (0x3FFD, 0x9F7F_C59F_C177_F113), (0x3FFF, 0xC3F7_4CDD_B1EA_D6C5)),
    ("fpatan", (0xC002, 0xC199_782D_5829_6818), (0xBFFE, 0xBB3E_A93A_C68D_EB5D), (0xBFFF, 0xD0CA_3919_B5FB_3C4D)),
    ("fpatan", (0xBFFC, 0xA5DE_DD80_DC14_ED57), (0xBFFC, 0xFD3A_4B49_F21F_F5EB), (0xC000, 0xA3F2_C650_CD04_E31A)),
    ("fpatan", (0x3FFC, 0xC1A6_0DB4_573A_C59A), (0xC000, 0x92F8_1314_EB07_C30D), (0x4000, 0xC3CD_A75A_9188_ADD9)),
    ("fpatan", (0xBFFE, 0xD9EF_047C_EC98_3704), (0x4000, 0xD7CD_BA7C_4FFC_BF42), (0xBFFC, 0xFD3C_2376_678E_EF4D)),
    ("fpatan", (0xBFFE, 0xE63E_36C0_2D6F_2EFC), (0x3FFC, 0xD836_DF70_B89C_4E56), (0xBFFF, 0xAB8B_D3AE_3C9A_9F6C)),
    ("fpatan", (0xBFEA, 0xDC2D_2E69_2959_FEA3), (0x3FC9, 0xCCE2_12C5_FC98_5000), (0xBFFF, 0xC90F_DAA1_E5DA_C942)),
    ("fpatan", (0xC007, 0x9E61_0BBC_0825_C7CC), (0xC021, 0xA006_D806_D388_1A50), (0xC000, 0xC90F_DA92_4B94_FBE3)),
    ("fpatan", (0xBFFD, 0x8721_6A1E_2547_F19C), (0x4038, 0xBF2D_1C98_CD39_E158), (0xBFC3, 0xB4F3_4DEB_AB4D_CC49)),
    ("fpatan", (0x3FED, 0xFD9B_4110_216D_27A2), (0x4020, 0xF2C0_61AF_A161_D909), (0x3FCC, 0x85B9_4449_F3C2_0A6D)),
    ("fpatan", (0xC027, 0x959B_EC0B_1B4C_24C2), (0xBFFA, 0x8785_CBA9_2634_F16F), (0xBFFF, 0xC90F_DAA2_216C_61CB)),
    ("fpatan", (0xC02F, 0x9212_EBAD_4B78_DC3D), (0x3FFD, 0xC2D7_43B8_F9DB_A1DB), (0xBFFF, 0xC90F_DAA2_2168_9786)),
    ("f2xm1", (0x0000, 0x0000_0000_0000_0000), (0xBFFC, 0xDD60_6BAB_B057_C162), (0xBFFC, 0x8E80_C3B2_8486_9EBD)),
    ("f2xm1", (0x0000, 0x0000_0000_0000_0000), (0xBFFB, 0xA540_3AA3_4627_3141), (0xBFFA, 0xDECC_3FA3_13A1_5093)),
    ("f2xm1", (0x0000, 0x0000_0000_0000_0000), (0xBFFC, 0x92C0_B87C_E6E0_53F7), (0xBFFB, 0xC1AA_11D2_3B5D_50E7)),
    ("f2xm1", (0x0000, 0x0000_0000_0000_0000), (0xBFF9, 0xFE83_7CFB_D272_3248), (0xBFF9, 0xAE87_870F_97AB_BAFB)),
    ("f2xm1", (0x0000, 0x0000_0000_0000_0000), (0x3FFD, 0xF7F4_59DA_A080_C6A5), (0x3FFD, 0xCC3B_C498_E27B_7975)),
    ("f2xm1", (0x0000, 0x0000_0000_0000_0000), (0xBFFC, 0x8B68_DAD6_2E1C_5D3A), (0xBFFB, 0xB86C_9537_AF75_4BB9)),
    ("f2xm1", (0x0000, 0x0000_0000_0000_0000), (0xBFE3, 0xE419_3297_83E2_C328), (0xBFE3, 0x9E1B_1488_421E_5C61)),
    ("f2xm1", (0x0000, 0x0000_0000_0000_0000), (0xBFEB, 0xE49C_6346_1027_E5D3), (0xBFEB, 0x9E75_FD8D_A384_12FC)),
    ("f2xm1", (0x0000, 0x0000_0000_0000_0000), (0x3FD2, 0xA721_25C9_C277_AF32), (0x3FD1, 0xE7B0_CF12_2F52_2C10)),
    ("f2xm1", (0x0000, 0x0000_0000_0000_0000), (0xBFD3, 0xBE2A_EEF0_D5D1_CBD0), (0xBFD3, 0x83D0_7020_DDD0_6128)),
    ("fyl2x", (0x3FFE, 0xED08_80D5_94A6_300C), (0x3FFF, 0xF907_B3C6_F4F6_717C), (0x3FFE, 0xE397_FA4A_5982_8E17)),
    ("fyl2x", (0xBFFE, 0xA308_1D15_ABF0_CA69), (0x3FFD, 0xE309_28C8_8C07_985B), (0x3FFE, 0xBF45_D0E6_E08A_54C1)),
    ("fyl2x", (0xC001, 0xA30E_5B70_590E_F594), (0x4000, 0xC00B_70A6_D111_EB37), (0xC002, 0x813F_0AF6_7AAC_8A0C)),
    ("fyl2x", (0x4002, 0xEEF8_EBCF_DEB2_80E6), (0x3FFF, 0xF60F_03EB_599C_8F1C), (0x4002, 0xE151_2D3D_C67B_8D22)),
    ("fyl2x", (0x4000, 0xFD77_5A06_8782_D4D5), (0x4000, 0xAACB_A0F3_F4DE_438F), (0x4001, 0xB378_5136_DD2F_5202)),
    ("fyl2x", (0xC002, 0xD880_A235_4869_650E), (0x3FFE, 0xAE56_F6A0_D62C_BF25), (0x4001, 0xEFFD_64E1_20E7_6929)),
    ("fyl2x", (0xC002, 0xCFD6_9DFA_4D7B_8661), (0x26EE, 0xCEF2_A96E_2BFC_D686), (0x400F, 0xA2C9_94F9_4CF8_E349)),
    ("fyl2x", (0xC000, 0xD337_093B_9FC3_2BB5), (0x3F7D, 0x947B_A2C3_3212_C44F), (0x4007, 0xD629_6E5F_F9BC_48DB)),
    ("fyl2x", (0x3FFD, 0xBC5C_E9EB_FC89_3150), (0x33F9, 0xD7CD_7255_C24D_A336), (0xC009, 0x8D83_732C_F4A5_0AD9)),
    ("fyl2x", (0x3FFD, 0xFBE6_C918_513D_E781), (0x39CC, 0xF226_D353_0DDC_50FB), (0xC008, 0xC315_FFF9_DEC2_51CB)),
    ("fyl2x", (0xBFFC, 0xACF0_D6E2_771F_E0AC), (0x3FFF, 0x8000_0000_0000_0001), (0xBFBD, 0xF980_34B1_D4A2_B3BA)),
    ("fyl2x", (0xBFFD, 0xACDD_DA1B_002B_4B4C), (0x3FFE, 0xFFFF_FFFF_FFFF_FFFF), (0x3FBD, 0xF964_D012_9A12_8E36)),
    ("fyl2xp1", (0x4002, 0xEA6A_5585_B058_D2EE), (0xBFFB, 0xB47C_4437_DB19_4B90), (0xBFFF, 0xF999_2EA3_0706_7675)),
    ("fyl2xp1", (0xC000, 0xA5CB_C757_1846_3B8A), (0xBFFC, 0x849D_AEEA_F6E0_FF05), (0x3FFE, 0x84B3_6F24_4C4C_6898)),
    ("fyl2xp1", (0xBFFE, 0x9088_4E86_D18A_A866), (0xBFFC, 0xCA5A_CED8_F37B_7AFB), (0x3FFC, 0xB7A1_59EE_E892_8BB6)),
    ("fyl2xp1", (0xC001, 0x9230_BDFD_77AC_435F), (0xBFFB, 0xC82E_88EE_D020_1A41), (0x3FFE, 0xAD8C_854A_F18C_036B)),
    ("fyl2xp1", (0x3FFD, 0x8BA0_5B57_9BCD_DBA3), (0xBFFA, 0xBD0F_5C96_9059_129E), (0xBFF9, 0x984E_DEA5_F08C_217D)),
    ("fyl2xp1", (0x3FFE, 0xD092_0611_5350_05D3), (0x3FFD, 0xD413_CCCF_E779_9211), (0x3FFD, 0xD092_0611_5350_05D3)),
    ("fyl2xp1", (0xBFFD, 0xBD62_B4C9_4A9F_6396), (0xBFE3, 0xB741_6A12_6DE0_1C19), (0x3FE2, 0xC396_1AF3_C385_888F)),
    ("fyl2xp1", (0xBFFD, 0xFD90_C560_BDB3_E4FA), (0xBFCB, 0xED6F_7A73_F60D_3626), (0x3FCB, 0xA9A5_0C50_3713_9D6F)),
    ("fyl2xp1", (0xBFFC, 0xFDFC_C5DC_F1F7_0EFB), (0xBFC1, 0xB52E_D522_4046_02D0), (0x3FC0, 0x81AB_1A1C_371C_144F)),
    ("fyl2xp1", (0xBFFD, 0x8F99_F5F7_0616_1D01), (0xBFC2, 0xA4A8_B382_EDF6_A199), (0x3FC1, 0x8540_E74E_0072_B373)),
    ("fyl2xp1", (0x3FFC, 0xB239_CC4A_D3A9_8330), (0xBFEA, 0xA584_6708_3ED9_1BB9), (0xBFE8, 0xA63E_B1F8_705A_6CE9)),
    ("fyl2xp1", (0x3FFE, 0xBCB5_2450_EF6C_BFC5), (0xBF9C, 0xC7B8_6A32_8856_2827), (0xBF9C, 0xD465_5EFE_EAB1_E63E)),
];

#[test]
fn transcendental_results_are_rounded_right() {
    for &(name, second, first, expected) in KNOWN {
        let (_, bytes) =
            INSTRUCTIONS.iter().find(|(other, _)| *other == name).expect("a known instruction");
        let decoded = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        let mut machine = Machine::default();
        machine.x87.registers[..2].copy_from_slice(&[register(first), register(second)]);
        super::super::x87::settle_loaded(&mut machine.x87, |physical| physical > 1);
        assert_eq!(execute(&mut machine, &decoded), Ok(()));
        // FPTAN has pushed one; the instructions of two operands have popped.
        let result = machine.x87.registers[usize::from(name == "fptan")];
        assert_eq!(parts(&result), expected, "{name} of {first:x?} and {second:x?}");
    }
}
