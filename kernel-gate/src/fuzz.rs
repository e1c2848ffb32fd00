//! Images gone bad: examined, or refused, within what they are worth.

use super::*;
use vmft_fuzzing::{Counting, Random, cases, damage, peak_of};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Cases of a quick run.
const CASES: u64 = 200;
/// How many bad images there are in a case.
const EACH: usize = 1000;

/// What examining an image of so many bytes may take: a name or a symbol is 24 bytes of it.
const fn worth(bytes: usize) -> usize {
    (64 << 10) + bytes * 64
}

fn good() -> Vec<Vec<u8>> {
    let code = [&[0x90; 40], RDTSC, &[RET]].concat();
    vec![
        sections(&[("first", &[RET; 9]), ("second", &code), ("third", &[RET])]),
        segment(&code, VOUCHER_LOCKSTEP),
        segment(&[0x90, RET], VOUCHER_LOCKSTEP),
        segment(&[0x90, RET], VOUCHER_NONE),
    ]
}

/// Something is wrong: anywhere, or in one of the fields of the headers.
fn alter(random: &mut Random, image: &mut Vec<u8>, others: &[Vec<u8>]) {
    if random.chance(40) {
        return damage(random, image, others);
    }
    for _ in 0..=random.below(3) {
        // At the beginning, and at the end, where section headers are.
        let at = random.index(0x200.min(image.len()));
        let at = if random.chance(50) { at } else { image.len() - 1 - at };
        let value = match random.below(4) {
            0 => u64::MAX,
            1 => random.below(image.len() as u64),
            2 => 1 << random.below(64),
            _ => random.next(),
        };
        let len = (*random.pick(&[1, 2, 4, 8])).min(image.len() - at);
        image[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
    }
}

#[test]
fn an_image_gone_bad_is_examined_or_refused() {
    let good = good();
    let mut passed = 0u64;
    cases(CASES, |mut random| {
        for _ in 0..EACH {
            let mut image = random.pick(&good).clone();
            alter(&mut random, &mut image, &good);
            let len = image.len();
            let (result, peak) = peak_of(|| {
                let _ = (stays_at_level_zero(&image), scan::scan(&image));
                let before = image.clone();
                let vouched = vouch(&mut image);
                assert!(vouched.is_ok() || image == before, "an image that was refused is changed");
                examine(&image)
            });
            assert!(peak <= worth(len), "{peak} bytes for {len}");
            match result {
                Ok(examination) => {
                    assert!(examination.bytes <= len as u64);
                    passed += 1;
                }
                Err(error) => {
                    let text = error.to_string();
                    assert!(text.len() < 1024 && !text.contains(char::is_control), "{text:?}");
                }
            }
        }
    });
    println!("{passed} passed");
}

/// An image with so many program headers like the one at `index`.
fn many(image: &[u8], index: usize, count: u16) -> Vec<u8> {
    let header = image[64 + 56 * index..][..56].to_vec();
    let mut file = image.to_vec();
    file[32..40].copy_from_slice(&(image.len() as u64).to_le_bytes());
    file[56..58].copy_from_slice(&count.to_le_bytes());
    file.extend(std::iter::repeat_n(header, count.into()).flatten());
    file
}

#[test]
fn code_that_many_headers_name_is_not_read_again_and_again() {
    let code = vec![0x90; 4096];
    let image = segment(&code, VOUCHER_LOCKSTEP);
    assert!(scan::scan(&many(&image, 0, 1)).is_ok());
    let error = scan::scan(&many(&image, 0, 1000)).unwrap_err();
    assert!(error.to_string().contains("over each other"), "{error}");
}

#[test]
fn notes_that_many_headers_name_are_not_read_again_and_again() {
    let image = segment(&[RET], VOUCHER_NONE);
    // Notes of nobody, which are looked through again for each header, and ours behind all of them.
    let nobodys = [&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &b"x\0\0\0"[..]].concat().repeat(300);
    let mut header = image[64 + 56..][..56].to_vec();
    let ours = header.clone();
    header[8..16].copy_from_slice(&(image.len() as u64).to_le_bytes());
    for field in [32, 40] {
        header[field..field + 8].copy_from_slice(&(nobodys.len() as u64).to_le_bytes());
    }
    let with = |count: u16| {
        let mut file = [&image[..], &nobodys].concat();
        let table = file.len() as u64;
        file[32..40].copy_from_slice(&table.to_le_bytes());
        file[56..58].copy_from_slice(&(count + 1).to_le_bytes());
        file.extend(std::iter::repeat_n(&header, count.into()).flatten());
        file.extend(&ours);
        file
    };
    assert!(note::find(&with(1), VOUCHER_NONE).is_some());
    assert_eq!(note::find(&with(1000), VOUCHER_NONE), None);
}

#[test]
fn a_function_is_named_without_what_a_terminal_would_do() {
    let name = format!("{}\u{1b}[2J", "long".repeat(50));
    let shown = forbidden(&sections(&[(&name, RDTSC)]));
    assert!(shown[1].contains("longlong") && shown[1].len() < 200, "{shown:?}");
    let shown = forbidden(&sections(&[("\u{1b}[2J", RDTSC)]));
    assert!(!shown[1].contains('\u{1b}'), "{shown:?}");
}
