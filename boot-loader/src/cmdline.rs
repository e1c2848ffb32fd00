//! Command lines put together.

/// `own` and then `words`, which win: a word of `own` that sets what one of `words` sets is left out.
pub fn before(own: &str, words: &str) -> String {
    let key = |word: &str| word.split('=').next().unwrap_or_default().replace('-', "_");
    let named = |own: &&str| words.split_whitespace().any(|word| key(word) == key(own));
    let own = own.split_whitespace().filter(|own| !named(own));
    // Those of the others are left as they are: what is quoted in them may have spaces of its own.
    let words = Some(words.trim()).filter(|words| !words.is_empty());
    own.chain(words).collect::<Vec<_>>().join(" ")
}

/// What a disk's own boot loader says, so that its guest's console is the one that this board has: the kernel
/// takes the last for the guest's programs.
pub fn on_this_console(words: &str) -> String {
    let last = words.split_whitespace().rev().find_map(|word| word.strip_prefix("console="));
    match last {
        Some(console) if console != "ttyS0" && !console.starts_with("ttyS0,") => {
            format!("{words} console=ttyS0")
        }
        _ => words.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_are_given_win_over_the_boards() {
        let words = before(
            "console=ttyS0 noapic panic=-1 nowatchdog",
            "console=tty7 panic=9 root=/dev/vda",
        );
        assert!(!words.contains("ttyS0") && !words.contains("panic=-1"), "{words}");
        assert!(words.starts_with("noapic ") && words.ends_with(" root=/dev/vda"), "{words}");
        assert_eq!(before("a b=1", ""), "a b=1");
        assert_eq!(before("a", "a"), "a");
        assert_eq!(before("tsc_early_khz=1", "tsc-early-khz=2"), "tsc-early-khz=2");
    }

    #[test]
    fn a_guest_from_a_disk_has_the_boards_console() {
        for (own, expected) in [
            ("ro quiet", "ro quiet"),
            ("console=ttyS0,115200", "console=ttyS0,115200"),
            ("console=ttyS0 console=tty0", "console=ttyS0 console=tty0 console=ttyS0"),
            ("console=ttyS01", "console=ttyS01 console=ttyS0"),
        ] {
            assert_eq!(on_this_console(own), expected);
        }
    }
}
