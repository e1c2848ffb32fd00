//! The order of versions in names, by which a menu puts the newest first.

use std::cmp::Ordering;

/// Compares two names as versions: numbers in them as numbers, `~` before everything (the UAPI group's
/// version format specification, in short).
pub(crate) fn compare(first: &str, second: &str) -> Ordering {
    let (mut a, mut b) = (first.as_bytes(), second.as_bytes());
    loop {
        let (digits_a, digits_b) = (take(&mut a, false), take(&mut b, false));
        let order = rank(digits_a).cmp(&rank(digits_b));
        if order != Ordering::Equal {
            return order;
        }
        if a.is_empty() && b.is_empty() {
            return Ordering::Equal;
        }
        let (digits_a, digits_b) = (take(&mut a, true), take(&mut b, true));
        let order = number(digits_a).cmp(&number(digits_b));
        if order != Ordering::Equal {
            return order;
        }
    }
}

/// Takes what is, or is not, made of digits.
fn take<'a>(bytes: &mut &'a [u8], digits: bool) -> &'a [u8] {
    let end = bytes.iter().position(|byte| byte.is_ascii_digit() != digits).unwrap_or(bytes.len());
    let (taken, rest) = bytes.split_at(end);
    *bytes = rest;
    taken
}

/// What is not a number: `~` comes before the end, the end before all else.
fn rank(text: &[u8]) -> Vec<u16> {
    let rank = |byte: &u8| if *byte == b'~' { 0 } else { u16::from(*byte) + 2 };
    text.iter().map(rank).chain([1]).collect()
}

/// A number of any length: its length without zeros in front, then its digits.
fn number(digits: &[u8]) -> (usize, &[u8]) {
    let start = digits.iter().position(|digit| *digit != b'0').unwrap_or(digits.len());
    (digits.len() - start, &digits[start..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_in_the_order_that_people_expect() {
        let sorted = ["6.1.0~rc1", "6.1.0", "6.1.0-9", "6.1.0-10", "6.9", "6.12", "7"];
        for pair in sorted.windows(2) {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(compare(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
        assert_eq!(compare("a-01", "a-1"), Ordering::Equal);
    }
}
