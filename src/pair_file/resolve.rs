//! What a file says, as options of a command; and what is in force then.

use super::{PairFile, PairFileError, Side, Value, Words};
use crate::commands::backup::StandbyOptions;
use crate::commands::primary::PrimaryOptions;
use clap::error::{ContextKind, ContextValue};
use clap::{Args, Command};
use std::fmt;
use toml::Spanned;

/// Where a value comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// This line of the file.
    Line(usize),
    /// The command line.
    CommandLine,
    /// The program.
    Default,
}

/// An option, as a command line has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Its long name, without dashes.
    pub flag: String,
    /// Its values; none for one that takes none.
    pub values: Vec<String>,
    /// Where it comes from.
    pub origin: Origin,
}

impl Setting {
    fn words(&self) -> impl Iterator<Item = String> {
        let flag = format!("--{}", self.flag);
        let several = self.flag == "join";
        let mut words = Vec::new();
        if self.values.is_empty() || several {
            words.push(flag.clone());
        }
        for value in &self.values {
            match several {
                true => words.push(value.clone()),
                // One word, so that a value may begin with a dash.
                false => words.push(format!("{flag}={value}")),
            }
        }
        words.into_iter()
    }
}

/// Everything that is in force for one command.
#[derive(Debug, Clone)]
pub struct InForce {
    /// The options, in the order of the command's help.
    pub settings: Vec<Setting>,
}

/// The options of a command, and where they come from.
#[derive(Debug)]
pub struct Options<T> {
    /// As the command takes them.
    pub options: T,
    /// As a command line has them.
    pub words: Vec<String>,
    /// What is in force.
    pub in_force: InForce,
}

impl fmt::Display for InForce {
    /// A line an option: its name, its value, where it comes from.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for setting in &self.settings {
            let value = match setting.values.as_slice() {
                [] => "on".to_owned(),
                values => values.join(" "),
            };
            let origin = match setting.origin {
                Origin::Line(line) => format!("line {line}"),
                Origin::CommandLine => "command line".to_owned(),
                Origin::Default => "default".to_owned(),
            };
            writeln!(f, "  --{:18} {value:44} {origin}", setting.flag)?;
        }
        Ok(())
    }
}

/// Collects options of a file.
struct Settings<'a> {
    file: &'a PairFile,
    settings: Vec<Setting>,
}

impl Settings<'_> {
    fn add(&mut self, flag: &str, values: Vec<String>, at: usize) {
        let origin = Origin::Line(self.file.line(at));
        self.settings.retain(|setting| setting.flag != flag);
        self.settings.push(Setting { flag: flag.to_owned(), values, origin });
    }

    /// A value as it is on a command line.
    fn value<T: fmt::Display>(&mut self, flag: &str, value: &Value<T>) {
        self.value_with(flag, "", value);
    }

    /// The same, behind `prefix` if it does not begin so itself.
    fn value_with<T: fmt::Display>(&mut self, flag: &str, prefix: &str, value: &Value<T>) {
        if let Some(value) = value {
            let text = value.get_ref().to_string();
            let text = if text.starts_with(prefix) { text } else { format!("{prefix}{text}") };
            self.add(flag, vec![text], value.span().start);
        }
    }

    fn switch(&mut self, flag: &str, value: &Value<bool>) {
        if let Some(value) = value.as_ref().filter(|value| *value.get_ref()) {
            self.add(flag, Vec::new(), value.span().start);
        }
    }

    fn several(&mut self, flag: &str, words: &Value<Words>) {
        if let Some(words) = words {
            self.add(flag, words.get_ref().all().to_vec(), words.span().start);
        }
    }

    /// An address, with the pair's certificates where it names none.
    fn address(&self, address: &str) -> String {
        match &self.file.contents.pair.tls_dir {
            Some(dir) if address.starts_with("tls:") && !address.contains(",tls_dir=") => {
                format!("{address},tls_dir={}", dir.get_ref())
            }
            _ => address.to_owned(),
        }
    }

    /// What both commands have.
    fn of_side(&mut self, name: &str, side: &Side) {
        let contents = &self.file.contents;
        self.several("disk", &contents.guest.disk);
        self.value_with("memory", "size=", &contents.guest.memory);
        self.value("engine", &contents.guest.engine);
        self.value("points", &contents.guest.points);
        let pair = &contents.pair;
        self.value("arbiter", &pair.arbiter);
        self.value("protect", &pair.protect);
        self.value("suspect-after", &pair.suspect_after);
        self.value("max-lag", &pair.max_lag);
        self.value("bound-replay", &pair.bound_replay);
        self.switch("insecure", &pair.insecure);
        self.value("backups", &pair.backups);
        let address = side.address.as_ref().expect("each side has one");
        for side in [&contents.every_side, side] {
            self.several("disk", &side.disk);
            self.value("arbiter", &side.arbiter);
            self.value("net", &side.net);
            self.value("serial", &side.serial);
            self.value("clock", &side.clock);
            self.value("on-error", &side.on_error);
            self.value("disk-timeout", &side.disk_timeout);
            self.value("api-socket", &side.api_socket);
            self.value("metrics-listen", &side.metrics_listen);
            self.value("event-log", &side.event_log);
            self.value("user", &side.user);
            self.value("sandbox", &side.sandbox);
        }
        let listen = side.listen.as_ref().or(contents.every_side.listen.as_ref());
        let (listen, at) = match listen {
            Some(listen) => (self.address(listen.get_ref()), listen.span().start),
            None => (self.address(&everywhere(address.get_ref())), address.span().start),
        };
        self.add("listen", vec![listen], at);
        self.add("name", vec![name.to_owned()], address.span().start);
    }
}

/// Where a side listens whose address has the name of its host: at its port, on all addresses, since many a
/// host knows its own name as one of its loopback addresses. A number or a socket is taken as it is.
fn everywhere(address: &str) -> String {
    let (place, rest) = match address.split_once(',') {
        Some((place, rest)) => (place, format!(",{rest}")),
        None => (address, String::new()),
    };
    let parts = place.split_once(':').and_then(|(scheme, place)| {
        let (host, port) = place.rsplit_once(':')?;
        Some((scheme, host, port))
    });
    match parts {
        Some((scheme @ ("tls" | "tcp"), host, port))
            if host != "localhost"
                && !host.starts_with('[')
                && host.parse::<std::net::Ipv4Addr>().is_err() =>
        {
            format!("{scheme}:0.0.0.0:{port}{rest}")
        }
        _ => address.to_owned(),
    }
}

/// The options of `vmft primary` for a side.
///
/// # Errors
/// [`PairFileError`], with the line.
pub fn primary(
    file: &PairFile,
    name: &str,
    more: &[String],
) -> Result<Options<PrimaryOptions>, PairFileError> {
    let side = file.side(name)?;
    let mut settings = Settings { file, settings: Vec::new() };
    let guest = &file.contents.guest;
    settings.value("kernel", &guest.kernel);
    settings.switch("lockstep-kernel", &guest.lockstep_kernel);
    settings.value("initramfs", &guest.initramfs);
    settings.value("cmdline", &guest.cmdline);
    settings.value_with("cpus", "boot=", &guest.cpus);
    settings.of_side(name, side);
    match &file.contents.pair.wait_for_backup {
        Some(wait) if *wait.get_ref() => {}
        wait => {
            let origin = wait
                .as_ref()
                .map_or(Origin::Default, |wait| Origin::Line(file.line(wait.span().start)));
            let (flag, values) = ("no-wait".to_owned(), Vec::new());
            settings.settings.push(Setting { flag, values, origin });
        }
    }
    parse(file, settings.settings, more)
}

/// The options of `vmft standby` for a side.
///
/// # Errors
/// [`PairFileError`], with the line.
pub fn standby(
    file: &PairFile,
    name: &str,
    more: &[String],
) -> Result<Options<StandbyOptions>, PairFileError> {
    let side = file.side(name)?;
    let mut settings = Settings { file, settings: Vec::new() };
    settings.of_side(name, side);
    let others: Vec<&Spanned<String>> = file
        .contents
        .sides
        .iter()
        .filter(|(other, _)| *other != name)
        .filter_map(|(_, other)| other.address.as_ref())
        .collect();
    let Some(first) = others.first() else {
        let at = side.address.as_ref().map_or(0, |address| address.span().start);
        return Err(file.wrong(at, "this is the only side: a pair has two or more"));
    };
    let at = first.span().start;
    let addresses = others.iter().map(|address| settings.address(address.get_ref())).collect();
    settings.add("join", addresses, at);
    parse(file, settings.settings, more)
}

/// The name of the option that a word is, if it is one.
fn flag_of(word: &str) -> Option<&str> {
    let name = word.strip_prefix("--")?;
    Some(name.split('=').next().unwrap_or(name))
}

fn parse<T: Args + clap::FromArgMatches>(
    file: &PairFile,
    mut settings: Vec<Setting>,
    more: &[String],
) -> Result<Options<T>, PairFileError> {
    // What the command line says takes the place of what the file says.
    settings
        .retain(|setting| !more.iter().any(|word| flag_of(word) == Some(setting.flag.as_str())));
    let command = T::augment_args(Command::new("vmft").no_binary_name(true));
    let words: Vec<String> =
        settings.iter().flat_map(Setting::words).chain(more.iter().cloned()).collect();
    let wrong = |error: &clap::Error| explained(file, &settings, error);
    let matches = command.clone().try_get_matches_from(&words).map_err(|error| wrong(&error))?;
    let options = T::from_arg_matches(&matches).map_err(|error| wrong(&error))?;
    let in_force = InForce { settings: in_force(&command, &matches, &settings) };
    Ok(Options { options, words, in_force })
}

/// What clap says, with the line of the file where there is one.
fn explained(file: &PairFile, settings: &[Setting], error: &clap::Error) -> PairFileError {
    let text = error.to_string();
    let text = text.split("\n\nUsage:").next().unwrap_or_default();
    let text = text.split("\n\nFor more").next().unwrap_or_default();
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let named = error.context().filter_map(|(kind, value)| match (kind, value) {
        (ContextKind::InvalidArg | ContextKind::PriorArg, ContextValue::String(name)) => {
            Some(name.as_str())
        }
        (ContextKind::InvalidArg | ContextKind::PriorArg, ContextValue::Strings(names)) => {
            names.first().map(String::as_str)
        }
        _ => None,
    });
    let lines = named.filter_map(|name| {
        let flag = flag_of(name.split([' ', '[']).next()?)?;
        match settings.iter().find(|setting| setting.flag == flag)?.origin {
            Origin::Line(line) => Some(line),
            Origin::CommandLine | Origin::Default => None,
        }
    });
    match lines.min() {
        Some(line) => PairFileError::Line {
            path: file.path().to_owned(),
            line,
            text: crate::remedy::one_line(text),
        },
        None => PairFileError::CommandLine(crate::remedy::one_line(text)),
    }
}

/// Each option that has a value, in the order of the command's help.
fn in_force(command: &Command, matches: &clap::ArgMatches, settings: &[Setting]) -> Vec<Setting> {
    use clap::parser::ValueSource;
    let mut all = Vec::new();
    for argument in command.get_arguments() {
        let (Some(flag), id) = (argument.get_long(), argument.get_id().as_str()) else { continue };
        let origin = match matches.value_source(id) {
            None => continue,
            Some(ValueSource::DefaultValue) => Origin::Default,
            Some(_) => settings
                .iter()
                .find(|setting| setting.flag == flag)
                .map_or(Origin::CommandLine, |setting| setting.origin),
        };
        let takes_values = argument.get_action().takes_values();
        // A switch that is off is not in force.
        if !takes_values && origin == Origin::Default && !matches.get_flag(id) {
            continue;
        }
        let raw = matches.get_raw(id).filter(|_| takes_values);
        let values = raw.into_iter().flatten().map(|value| value.to_string_lossy().into_owned());
        all.push(Setting { flag: flag.to_owned(), values: values.collect(), origin });
    }
    all
}
