//! The menu of GRUB: what its configuration makes of itself, as far as menus depend on it.
//!
//! The configuration is run with GRUB's own variables, those of `grubenv`, and files of its own
//! volume. What has to do with screens, keys and modules has no effect. `next_entry`
//! (`grub-reboot`) has none either: GRUB forgets it by writing to the disk, and nothing is written
//! here.

use crate::BootDiskError;
use crate::entries;
use crate::menu::{Loader, MAX_TEXT, MenuEntry, Named, find};
use crate::script::{Part, Statement, Word, parse};
use crate::volume::FileSystem;
use std::collections::BTreeMap;

/// Where the configuration may be: on the root's file system, or on one for `/boot`.
const PLACES: [&str; 4] = ["/boot/grub", "/grub", "/boot/grub2", "/grub2"];
/// Most statements that are run: a menu of a hundred kernels has some thousands.
const MAX_STEPS: u32 = 200_000;
/// Most bytes of all values of variables.
const MAX_VALUES: usize = 1 << 20;
/// Most entries of a menu, with the menus under it.
const MAX_ENTRIES: usize = 256;
/// Most configurations that one leads to another.
const MAX_SOURCES: u32 = 16;
/// What GRUB says of itself, and configurations ask.
const OWN: [(&str, &str); 10] = [
    ("feature_menuentry_id", "y"),
    ("feature_menuentry_options", "y"),
    ("feature_timeout_style", "y"),
    ("feature_default_font_path", "y"),
    ("feature_platform_search_hint", "y"),
    ("feature_all_video_module", "y"),
    ("feature_200_final", "y"),
    ("feature_chainloader_bpb", "y"),
    ("grub_cpu", "x86_64"),
    ("grub_platform", "efi"),
];
/// Options of `menuentry` that have a value.
const WITH_VALUE: [&str; 4] = ["--class", "--users", "--hotkey", "--source"];

/// A menu, or an entry of it, that was declared.
#[derive(Debug)]
struct Declared {
    title: String,
    id: Option<String>,
    what: What,
}

#[derive(Debug)]
enum What {
    Entry(Vec<Statement>),
    Menu(Vec<Declared>),
    /// An entry from a file of its own.
    File(Box<MenuEntry>),
}

struct Run<'a> {
    index: usize,
    files: &'a FileSystem,
    prefix: &'static str,
    variables: BTreeMap<String, String>,
    steps: u32,
    sources: u32,
    entries: usize,
    /// What an entry named last.
    kernel: Option<(String, String)>,
    initramfs: Vec<String>,
    searched: Option<String>,
}

/// The menu of a volume that has GRUB's configuration, and its default.
pub(crate) fn menu(
    index: usize,
    files: &FileSystem,
) -> Result<Option<(Vec<MenuEntry>, usize)>, BootDiskError> {
    for prefix in PLACES {
        let path = format!("{prefix}/grub.cfg");
        let Some(text) = files.read(&path, "GRUB's configuration", MAX_TEXT)? else { continue };
        let mut run = Run::new(index, files, prefix);
        let mut declared = Vec::new();
        run.statements(&parse(&String::from_utf8_lossy(&text)), &mut declared)?;
        let default = run.variables.get("default").cloned().unwrap_or_default();
        let mut entries = Vec::new();
        run.flatten(&declared, "", &[], &mut entries)?;
        if entries.is_empty() {
            continue;
        }
        let default =
            chosen(&declared, &default).and_then(|number| find(&entries, &number)).unwrap_or(0);
        return Ok(Some((entries, default)));
    }
    Ok(None)
}

/// The number of the entry that `default` means: numbers, titles or names, with `>` between those
/// of a menu and of what is in it. The first of a menu, where a menu is meant.
fn chosen(declared: &[Declared], default: &str) -> Option<String> {
    let (mut here, mut number) = (declared, String::new());
    let mut parts = default.split('>');
    loop {
        let part = parts.next().unwrap_or("0");
        let is = |entry: &Declared| entry.title == part || entry.id.as_deref() == Some(part);
        let at = part.parse().ok().or_else(|| here.iter().position(is))?;
        let entry = here.get(at)?;
        number = format!("{number}{at}");
        match &entry.what {
            What::Entry(_) | What::File(_) => return Some(number),
            What::Menu(inner) => (here, number) = (inner, format!("{number}>")),
        }
    }
}

impl<'a> Run<'a> {
    fn new(index: usize, files: &'a FileSystem, prefix: &'static str) -> Self {
        let own = OWN.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let mut variables: BTreeMap<_, _> = own.collect();
        variables.insert("prefix".to_owned(), prefix.to_owned());
        Self {
            index,
            files,
            prefix,
            variables,
            steps: MAX_STEPS,
            sources: MAX_SOURCES,
            entries: MAX_ENTRIES,
            kernel: None,
            initramfs: Vec::new(),
            searched: None,
        }
    }

    fn set(&mut self, name: &str, value: &str) {
        let all: usize = self.variables.iter().map(|(name, value)| name.len() + value.len()).sum();
        if all + name.len() + value.len() <= MAX_VALUES {
            self.variables.insert(name.to_owned(), value.to_owned());
        }
    }

    fn value(&self, name: &str) -> &str {
        self.variables.get(name).map_or("", String::as_str)
    }

    /// The words that a word becomes.
    fn expand(&self, word: &Word) -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        let mut open = false;
        let put = |words: &mut Vec<String>, open: &mut bool, text: &str| {
            if !*open {
                words.push(String::new());
                *open = true;
            }
            words.last_mut().expect("one is open").push_str(text);
        };
        for part in word {
            match part {
                Part::Text(text) => put(&mut words, &mut open, text),
                Part::Variable { name, is_quoted: true } => {
                    put(&mut words, &mut open, self.value(name));
                }
                Part::Variable { name, is_quoted: false } => {
                    for (index, text) in self.value(name).split_whitespace().enumerate() {
                        open &= index == 0;
                        put(&mut words, &mut open, text);
                    }
                }
            }
        }
        words
    }

    /// Runs statements, and says whether the last of them was well.
    fn statements(
        &mut self,
        all: &[Statement],
        menu: &mut Vec<Declared>,
    ) -> Result<bool, BootDiskError> {
        let mut well = true;
        for statement in all {
            let Some(steps) = self.steps.checked_sub(1) else { return Ok(false) };
            self.steps = steps;
            well = match statement {
                Statement::If { branches, otherwise } => {
                    let mut taken = otherwise;
                    for (condition, body) in branches {
                        if self.statements(condition, menu)? {
                            taken = body;
                            break;
                        }
                    }
                    self.statements(taken, menu)?
                }
                Statement::Command { words, block } => {
                    let words: Vec<String> =
                        words.iter().flat_map(|word| self.expand(word)).collect();
                    self.command(&words, block.as_deref(), menu)?
                }
            };
        }
        Ok(well)
    }

    fn command(
        &mut self,
        words: &[String],
        block: Option<&[Statement]>,
        menu: &mut Vec<Declared>,
    ) -> Result<bool, BootDiskError> {
        let [command, arguments @ ..] = words else { return Ok(true) };
        match command.as_str() {
            "!" => return Ok(!self.command(arguments, block, menu)?),
            "[" | "test" => return Ok(self.test(arguments)),
            "true" | "insmod" | "export" => {}
            "set" => {
                if let Some((name, value)) = arguments.first().and_then(|it| it.split_once('=')) {
                    self.set(name, value);
                }
            }
            "load_env" => self.load_env(arguments)?,
            "search" | "search.fs_uuid" => self.search(command, arguments),
            "source" | "." | "configfile" => return self.source(arguments, menu),
            "blscfg" => self.files_entries(menu)?,
            "menuentry" | "submenu" => {
                self.declare(command == "submenu", arguments, block, menu)?
            }
            "linux" | "linux16" | "linuxefi" => {
                if let [kernel, options @ ..] = arguments {
                    self.kernel = Some((without_device(kernel), options.join(" ")));
                    self.initramfs.clear();
                }
            }
            "initrd" | "initrd16" | "initrdefi" => {
                self.initramfs = arguments.iter().map(|path| without_device(path)).collect();
            }
            other => {
                let Some((name, value)) = other.split_once('=') else { return Ok(false) };
                self.set(name, value);
            }
        }
        Ok(true)
    }

    /// `grubenv`: lines of names and values.
    fn load_env(&mut self, arguments: &[String]) -> Result<(), BootDiskError> {
        let named = match arguments {
            [flag, path, ..] if flag == "-f" || flag == "--file" => without_device(path),
            _ => format!("{}/grubenv", self.prefix),
        };
        let text = self.files.read(&named, "GRUB's environment", MAX_TEXT)?.unwrap_or_default();
        for line in String::from_utf8_lossy(&text).lines() {
            if let Some((name, value)) = line.split_once('=')
                && !line.starts_with('#')
                && name != "next_entry"
            {
                self.set(name, value);
            }
        }
        Ok(())
    }

    /// Which file system has what comes.
    fn search(&mut self, command: &str, arguments: &[String]) {
        let by_uuid = command.ends_with(".fs_uuid")
            || arguments.iter().any(|word| word == "--fs-uuid" || word == "-u");
        if by_uuid {
            self.searched = arguments.iter().find(|word| !word.starts_with("--")).cloned();
        }
    }

    fn source(
        &mut self,
        arguments: &[String],
        menu: &mut Vec<Declared>,
    ) -> Result<bool, BootDiskError> {
        let Some(sources) = self.sources.checked_sub(1) else { return Ok(false) };
        self.sources = sources;
        let Some(path) = arguments.first().map(|path| without_device(path)) else {
            return Ok(false);
        };
        match self.files.read(&path, "GRUB's configuration", MAX_TEXT)? {
            Some(text) => self.statements(&parse(&String::from_utf8_lossy(&text)), menu),
            None => Ok(false),
        }
    }

    fn files_entries(&mut self, menu: &mut Vec<Declared>) -> Result<(), BootDiskError> {
        let base = if self.prefix.starts_with("/boot/") { "/boot" } else { "" };
        for entry in entries::entries(self.index, self.files, base, &self.variables)? {
            let Some(left) = self.entries.checked_sub(1) else { return Ok(()) };
            self.entries = left;
            let entry = MenuEntry { loader: Loader::Grub, ..entry };
            let (title, id) = (entry.title.clone(), entry.names.first().cloned());
            menu.push(Declared { title, id, what: What::File(Box::new(entry)) });
        }
        Ok(())
    }

    fn declare(
        &mut self,
        is_menu: bool,
        arguments: &[String],
        block: Option<&[Statement]>,
        menu: &mut Vec<Declared>,
    ) -> Result<(), BootDiskError> {
        let Some(left) = self.entries.checked_sub(1) else { return Ok(()) };
        self.entries = left;
        let (mut title, mut id) = (None, None);
        let mut words = arguments.iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--id" => id = words.next().cloned(),
                option if WITH_VALUE.contains(&option) => {
                    words.next();
                }
                option if option.starts_with("--") => {
                    id = option.strip_prefix("--id=").map(str::to_owned).or(id);
                }
                _ => title = title.or(Some(word.clone())),
            }
        }
        let block = block.unwrap_or_default();
        let what = if is_menu {
            let mut inner = Vec::new();
            self.statements(block, &mut inner)?;
            What::Menu(inner)
        } else {
            What::Entry(block.to_vec())
        };
        menu.push(Declared { title: title.unwrap_or_default(), id, what });
        Ok(())
    }

    fn test(&self, arguments: &[String]) -> bool {
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let words = words.strip_suffix(&["]"]).unwrap_or(&words);
        let all = |words: &[&str]| words.split(|word| *word == "-a").all(|it| self.holds(it));
        words.split(|word| *word == "-o").any(all)
    }

    fn holds(&self, words: &[&str]) -> bool {
        match words {
            ["!", rest @ ..] => !self.holds(rest),
            [text] => !text.is_empty(),
            ["-n", text] => !text.is_empty(),
            ["-z", text] => text.is_empty(),
            ["-e" | "-f" | "-s", path] => self.files.has(&without_device(path)),
            [first, "=" | "==", second] => first == second,
            [first, "!=", second] => first != second,
            [first, how, second] => {
                let (Ok(first), Ok(second)) = (first.parse::<i64>(), second.parse::<i64>()) else {
                    return false;
                };
                match *how {
                    "-eq" => first == second,
                    "-ne" => first != second,
                    "-lt" => first < second,
                    "-le" => first <= second,
                    "-gt" => first > second,
                    "-ge" => first >= second,
                    _ => false,
                }
            }
            _ => false,
        }
    }

    /// Makes entries of what was declared: an entry's statements are run with the variables as they
    /// are at the end.
    fn flatten(
        &mut self,
        declared: &[Declared],
        above: &str,
        names: &[String],
        entries: &mut Vec<MenuEntry>,
    ) -> Result<(), BootDiskError> {
        for (at, Declared { title, id, what }) in declared.iter().enumerate() {
            let number = format!("{above}{at}");
            let under = |name: &String| format!("{}{name}", names.join(""));
            let called: Vec<String> = std::iter::once(title).chain(id).map(under).collect();
            match what {
                What::Menu(inner) => {
                    let names = [names, &[format!("{}>", id.as_ref().unwrap_or(title))]].concat();
                    self.flatten(inner, &format!("{number}>"), &names, entries)?;
                }
                What::File(entry) => {
                    let names = [called, entry.names.clone()].concat();
                    entries.push(MenuEntry { number, names, ..(**entry).clone() });
                }
                What::Entry(block) => {
                    (self.kernel, self.initramfs, self.searched) = (None, Vec::new(), None);
                    let kept = self.variables.clone();
                    self.statements(block, &mut Vec::new())?;
                    self.variables = kept;
                    // Others start a firmware's set-up, or another boot loader.
                    let Some((kernel, options)) = self.kernel.take() else { continue };
                    entries.push(MenuEntry {
                        loader: Loader::Grub,
                        number,
                        names: [called, vec![title.clone()], id.iter().cloned().collect()].concat(),
                        title: title.clone(),
                        kernel,
                        initramfs: std::mem::take(&mut self.initramfs),
                        options,
                        from: Named { volume: self.index, uuid: self.searched.take() },
                    });
                }
            }
        }
        Ok(())
    }
}

/// A path without the device in front of it: `(hd0,gpt1)/vmlinuz`, or `($root)/vmlinuz`.
fn without_device(path: &str) -> String {
    let rest = path.strip_prefix('(').and_then(|rest| rest.split_once(')'));
    rest.map_or(path, |(_, rest)| rest).to_owned()
}
