//! Event logs with anything in them: what is no record is named, and what still is one is shown.

use super::read::read_from;
use super::tests::{primary, takeover};
use super::*;
use vmft_fuzzing::{Random, cases, change, damage, peak_of};

/// Cases of a quick run.
const CASES: u64 = 300;
/// Memory that a byte of a file may cost, and what there is besides.
const EACH_BYTE: usize = 200;
const BESIDES: usize = 1 << 20;

/// Lines whose values are changed, or bytes that are damaged.
fn gone_bad(random: &mut Random, good: &[u8]) -> Vec<u8> {
    let mut bytes = good.to_vec();
    if random.chance(80) {
        let lines: Vec<&[u8]> = good.split_inclusive(|byte| *byte == b'\n').collect();
        bytes.clear();
        for line in lines {
            let mut value = serde_json::from_slice(line).unwrap();
            if random.chance(20) {
                change(random, &mut value);
            }
            bytes.extend(serde_json::to_vec(&value).unwrap());
            bytes.push(b'\n');
        }
    } else {
        damage(random, &mut bytes, &[]);
    }
    bytes
}

#[test]
fn a_log_gone_bad_is_refused_with_its_line_or_told() {
    let good = [primary("b").text, takeover("b").text].concat();
    let (mut refused, mut told) = (0u64, 0u64);
    cases(CASES, |mut random| {
        let bytes = gone_bad(&mut random, &good);
        let (shown, peak) = peak_of(|| {
            let lives = read_from(bytes.as_slice(), Path::new("log"))?;
            let story = Story::of(&lives);
            Ok::<_, ReadError>((text::write(&story, true).unwrap(), svg::draw(&story).unwrap()))
        });
        match shown {
            Ok((text, picture)) => {
                told += 1;
                assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
                assert!(picture.ends_with("</svg>\n"));
                assert!(!picture.contains("NaN") && !picture.contains("inf'"), "{picture}");
            }
            Err(error) => {
                refused += 1;
                let said = error.to_string();
                assert!(said.contains("line ") || said.contains("empty"), "{said}");
            }
        }
        assert!(peak <= bytes.len() * EACH_BYTE + BESIDES, "{peak} bytes for {}", bytes.len());
    });
    println!("{refused} refused, {told} told");
}
