//! The menu of systemd-boot: files in `loader/entries` (the UAPI group's boot loader specification, type 1),
//! and `loader/loader.conf`, which says which of them is the default.
//!
//! Unified kernel images (type 2) are programs for EFI firmware, and are not booted.

use crate::BootDiskError;
use crate::menu::{Loader, MAX_TEXT, MenuEntry, Named};
use crate::version;
use crate::volume::FileSystem;
use std::cmp::Ordering;
use std::collections::BTreeMap;

/// Most entries of a menu.
const MAX_ENTRIES: usize = 64;

/// One entry, as it stands in its file.
#[derive(Debug, Default)]
struct Entry {
    /// The file's name, without its ending and count of tries.
    id: String,
    /// It was tried as often as it might be.
    is_bad: bool,
    fields: BTreeMap<String, Vec<String>>,
}

impl Entry {
    fn parse(name: &str, text: &str) -> Self {
        let stem = name.strip_suffix(".conf").unwrap_or(name);
        // `+LEFT` or `+LEFT-DONE`: how often it may still be tried.
        let (id, left) = match stem.rsplit_once('+') {
            Some((id, tries)) if tries.starts_with(|c: char| c.is_ascii_digit()) => {
                (id, tries.split('-').next())
            }
            _ => (stem, None),
        };
        let is_bad = left.is_some_and(|left| left.bytes().all(|digit| digit == b'0'));
        let mut entry = Self { id: id.to_owned(), is_bad, fields: BTreeMap::new() };
        for line in text.lines().map(str::trim) {
            if line.starts_with('#') {
                continue;
            }
            if let Some((key, value)) = line.split_once(char::is_whitespace) {
                let values = entry.fields.entry(key.to_owned()).or_default();
                values.push(value.trim().to_owned());
            }
        }
        entry
    }

    fn first(&self, key: &str) -> Option<&str> {
        self.fields.get(key).and_then(|values| values.first()).map(String::as_str)
    }

    fn all(&self, key: &str) -> Vec<String> {
        self.fields.get(key).cloned().unwrap_or_default()
    }

    fn is_bootable(&self) -> bool {
        let fits = self.first("architecture").is_none_or(|name| name.eq_ignore_ascii_case("x64"));
        fits && self.first("linux").is_some()
    }

    fn title(&self) -> String {
        let title = self.first("title").unwrap_or(&self.id);
        match self.first("version") {
            Some(version) if !title.contains(version) => format!("{title} ({version})"),
            _ => title.to_owned(),
        }
    }

    /// The order of the menu, the first first.
    fn order(&self, other: &Self) -> Ordering {
        let by_version = |first: &str, second: &str| version::compare(second, first);
        let key = |entry: &Self| entry.first("sort-key").map(str::to_owned);
        let of = |entry: &Self, field| entry.first(field).unwrap_or_default().to_owned();
        let by_key = match (key(self), key(other)) {
            (Some(first), Some(second)) => first
                .cmp(&second)
                .then_with(|| of(self, "machine-id").cmp(&of(other, "machine-id")))
                .then_with(|| by_version(&of(self, "version"), &of(other, "version"))),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => Ordering::Equal,
        };
        let by_name = || by_version(&self.id, &other.id);
        self.is_bad.cmp(&other.is_bad).then(by_key).then_with(by_name)
    }
}

/// The entries in `base` of a volume in the order of its menu, the default first; none if it has no
/// such menu. GRUB, which has its own use of these files, puts `variables` into them.
pub(crate) fn entries(
    index: usize,
    files: &FileSystem,
    base: &str,
    variables: &BTreeMap<String, String>,
) -> Result<Vec<MenuEntry>, BootDiskError> {
    let mut found = Vec::new();
    let directory = format!("{base}/loader/entries");
    let names = files.list(&directory).into_iter().filter(|name| name.ends_with(".conf"));
    for name in names.take(MAX_ENTRIES) {
        let path = format!("{directory}/{name}");
        if let Some(text) = files.read(&path, "a boot entry", MAX_TEXT)? {
            let entry = Entry::parse(&name, &String::from_utf8_lossy(&text));
            if entry.is_bootable() {
                found.push(entry);
            }
        }
    }
    found.sort_by(Entry::order);
    let config = files.read(
        &format!("{base}/loader/loader.conf"),
        "a boot loader's configuration",
        MAX_TEXT,
    )?;
    let config = String::from_utf8_lossy(&config.unwrap_or_default()).into_owned();
    let default = config.lines().find_map(|line| line.trim().strip_prefix("default"));
    if let Some(pattern) = default.filter(|rest| rest.starts_with(char::is_whitespace)) {
        let pattern = pattern.trim();
        let named = |entry: &Entry| {
            matches(pattern, &format!("{}.conf", entry.id)) || matches(pattern, &entry.id)
        };
        if let Some(at) = found.iter().position(named) {
            let default = found.remove(at);
            found.insert(0, default);
        }
    }
    let make = |(number, entry): (usize, Entry)| MenuEntry {
        loader: Loader::Entries,
        number: number.to_string(),
        names: vec![entry.id.clone(), format!("{}.conf", entry.id), entry.title()],
        title: entry.title(),
        kernel: entry.first("linux").unwrap_or_default().to_owned(),
        initramfs: entry.all("initrd").iter().flat_map(|paths| words(paths, variables)).collect(),
        options: entry
            .all("options")
            .iter()
            .flat_map(|it| words(it, variables))
            .collect::<Vec<_>>()
            .join(" "),
        from: Named { volume: index, uuid: None },
    };
    Ok(found.into_iter().enumerate().map(make).collect())
}

/// The words of a line, with the variables that GRUB puts into it.
fn words(line: &str, variables: &BTreeMap<String, String>) -> Vec<String> {
    let value = |word: &str| match word.strip_prefix('$') {
        Some(name) => variables.get(name).cloned().unwrap_or_default(),
        None => word.to_owned(),
    };
    line.split_whitespace().map(value).filter(|word| !word.is_empty()).collect()
}

/// Whether `pattern`, which may have `*` and `?` in it, stands for `name`.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    // Where the last `*` was, and how much of the name it stands for.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == '?' || *c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => {
                let Some((at, taken)) = star else { return false };
                star = Some((at, taken + 1));
                (p, n) = (at + 1, taken + 1);
            }
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_stand_for_names() {
        for (pattern, name, is) in [
            ("debian-*", "debian-6.1.conf", true),
            ("*", "", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("*-6.1*", "debian-6.1.0-18", true),
            ("debian", "debian-6.1", false),
        ] {
            assert_eq!(matches(pattern, name), is, "{pattern} {name}");
        }
    }

    #[test]
    fn entries_are_sorted_as_the_specification_says_and_bad_ones_come_last() {
        let entry = |name: &str, text: &str| Entry::parse(name, text);
        let mut entries = [
            entry("old.conf", "linux /a\nversion 6.1\nsort-key debian"),
            entry("zzz+0-3.conf", "linux /a\nversion 9\nsort-key debian"),
            entry("none.conf", "linux /a"),
            entry(
                "new+2.conf",
                "# a comment\ntitle Debian\nlinux /a\nversion 6.12\nsort-key debian",
            ),
        ];
        entries.sort_by(Entry::order);
        let ids: Vec<_> = entries.iter().map(|entry| entry.id.as_str()).collect();
        assert_eq!(ids, ["new", "old", "none", "zzz"]);
        assert_eq!(entries[0].title(), "Debian (6.12)");
    }
}
