//! Values of command-line options: Cloud Hypervisor's conventions, which users know.
//!
//! Comma-separated `key=value`, `on|off`, sizes as `512M` or `4G`.

use crate::machine_options::OnErrorChoice;
use crate::protection_options::DiskTimeoutOption;
use crate::seed::SeedFiles;
use clap::ValueEnum;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use vmft_backup::arbiter::MAX_MEMBERS;
use vmft_backup::epoch::IntervalError;
use vmft_backup::lag::LagError;
use vmft_cpu::memory::{MAX_MEMORY, MIN_MEMORY};
use vmft_cpu::{CpuCount, CpuCountError};
use vmft_logging_channel::transport::PeerAddress;
use vmft_vmm::world::console::ConsoleTarget;
use vmft_vmm::world::{DiskPolicy, HostCache};

/// Why an option's value is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// No `key=value`.
    #[error("`{0}` is no key=value")]
    NoPair(String),
    /// A key the option does not have.
    #[error("unknown key `{key}`; known are {known}")]
    UnknownKey {
        /// The key.
        key: String,
        /// The keys it has.
        known: String,
    },
    /// A key twice.
    #[error("`{0}` is given twice")]
    Repeated(String),
    /// A key that must be there.
    #[error("`{0}=` is missing")]
    Missing(&'static str),
    /// No size.
    #[error("`{0}` is no size such as 512M or 4G")]
    Size(String),
    /// A size no guest can have.
    #[error("memory of {0} bytes: at least 64M, at most 4G, in whole pages of 4K")]
    Memory(u64),
    /// Neither on nor off.
    #[error("`{0}` is neither on nor off")]
    Switch(String),
    /// No way to use the host's cache.
    #[error("`{0}` is neither none nor writeback")]
    Cache(String),
    /// No format of a disk.
    #[error("disks of format `{0}` cannot be used; the only format is raw")]
    Format(String),
    /// No number.
    #[error("`{0}` is no number")]
    Number(String),
    /// A number of CPUs that no guest has.
    #[error(transparent)]
    Cpus(#[from] CpuCountError),
    /// No way to protect a guest.
    #[error("`{0}` is none of lockstep, checkpoint, checkpoint,interval=25ms")]
    Protection(String),
    /// No word for a disk whose storage fails.
    #[error("`{0}` is none of failover, stop, report")]
    OnError(String),
    /// No time for a disk's request.
    #[error("`{0}` is no time such as 30s that a disk may take: from 100ms to 3600s")]
    DiskTimeout(String),
    /// No time between two questions.
    #[error("`{0}` is no time such as 500ms between two looks at a side: from 100ms to 60s")]
    WatchInterval(String),
    /// No bound for a lag.
    #[error("`{0}` is no bound such as 200ms, 200ms,then=slow, 1s,then=unprotect, 1s,then=stop")]
    Lag(String),
    /// A bound that no lag can have.
    #[error(transparent)]
    LagBound(#[from] LagError),
    /// No time.
    #[error("`{0}` is no time such as 25ms or 1s")]
    Time(String),
    /// A time between epochs that none can have.
    #[error(transparent)]
    Interval(#[from] IntervalError),
    /// No place for the console.
    #[error("`{0}` is none of tty, null, file=PATH, socket=PATH")]
    Serial(String),
    /// No network.
    #[error("`{0}` names none or several of tap=NAME, tap-fd=NUMBER, socket=PATH")]
    Net(String),
    /// No fault.
    #[error("`{0}` is none of flip-bit=ADDRESS, flip-bit=ADDRESS,bit=0..7,live=on, hold-replay=2s")]
    Fault(String),
    /// No network address.
    #[error("`{0}` is no Ethernet address of one station, such as 52:54:00:12:34:56")]
    Mac(String),
    /// No address for metrics.
    #[error("`{0}` is no address such as 127.0.0.1:9100")]
    Metrics(String),
    /// Metrics would be for everybody.
    #[error("`{0}` can be reached by other hosts: listen at 127.0.0.1, or add insecure=on")]
    MetricsExposed(String),
    /// No address for a page.
    #[error(
        "`{0}` is no place for a page such as 127.0.0.1:8080 or 10.0.0.1:8080,insecure=on,name=HOST"
    )]
    Page(String),
    /// A page would be for everybody.
    #[error("`{0}` can be reached by other hosts: listen at 127.0.0.1, or add insecure=on")]
    PageExposed(String),
    /// No arbiter.
    #[error(
        "`{0}` is no arbiter; give dir=PATH on storage that both hosts share, nbd=HOST:PORT/NAME of a \
         `vmft disk serve`, or etcd=HOST:PORT,HOST:PORT,…,name=PAIR"
    )]
    Arbiter(String),
    /// No members of an etcd.
    #[error(
        "`{0}` names no members of an etcd; write etcd=HOST:PORT,HOST:PORT,…,name=PAIR, with 1 to \
         {MAX_MEMBERS} of them"
    )]
    Members(String),
    /// Not what a pair is called in an etcd.
    #[error("`{0}` is no name of a pair: letters, digits, dots and dashes, at most 64")]
    PairName(String),
    /// No export of a server.
    #[error(
        "`{0}` is no export; write [tls:]HOST:PORT/NAME, tcp:HOST:PORT/NAME or unix:SOCKET/NAME"
    )]
    Export(String),
    /// Nothing that can be served.
    #[error("`{0}` is no export; write NAME=FILE, with a name of letters, digits, dots and dashes")]
    Served(String),
    /// A disk of which each side has a copy, and that nobody writes.
    #[error(
        "mirror=on is for disks that the guest writes: of one that it only reads, make copies by hand"
    )]
    MirrorReadOnly,
    /// A key that goes with images only.
    #[error("`{0}=` goes with path=; for an export its server says it")]
    NotOfExport(&'static str),
}

/// The `key=value` pairs of one option.
pub(crate) struct Pairs<'a> {
    pairs: Vec<(&'a str, &'a str)>,
}

impl<'a> Pairs<'a> {
    pub(crate) fn parse(text: &'a str, known: &[&str]) -> Result<Self, OptionError> {
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        for part in text.split(',') {
            let (key, value) =
                part.split_once('=').ok_or_else(|| OptionError::NoPair(part.to_owned()))?;
            if !known.contains(&key) {
                let known = known.join(", ");
                return Err(OptionError::UnknownKey { key: key.to_owned(), known });
            }
            if pairs.iter().any(|(other, _)| *other == key) {
                return Err(OptionError::Repeated(key.to_owned()));
            }
            pairs.push((key, value));
        }
        Ok(Self { pairs })
    }

    /// Where none are given.
    pub(crate) const fn none() -> Self {
        Self { pairs: Vec::new() }
    }

    pub(crate) fn get(&self, key: &str) -> Option<&'a str> {
        self.pairs.iter().find(|(other, _)| *other == key).map(|(_, value)| *value)
    }

    /// The value of a key that must be there.
    ///
    /// # Errors
    /// [`OptionError::Missing`]
    pub fn need(&self, key: &'static str) -> Result<&'a str, OptionError> {
        self.get(key).filter(|value| !value.is_empty()).ok_or(OptionError::Missing(key))
    }
}

fn parse_size(text: &str) -> Result<u64, OptionError> {
    let error = || OptionError::Size(text.to_owned());
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| error())?;
    number.checked_mul(1 << shift).ok_or_else(error)
}

/// A size: `4G`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SizeOption(pub u64);

impl FromStr for SizeOption {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        parse_size(text).map(Self)
    }
}

pub(crate) fn parse_time(text: &str) -> Result<Duration, OptionError> {
    let error = || OptionError::Time(text.to_owned());
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 1),
        None => (text.strip_suffix('s').ok_or_else(error)?, 1000),
    };
    let number: u64 = number.parse().map_err(|_| error())?;
    number.checked_mul(unit).map(Duration::from_millis).ok_or_else(error)
}

pub(crate) fn parse_switch(text: &str) -> Result<bool, OptionError> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(OptionError::Switch(text.to_owned())),
    }
}

pub(crate) fn parse_cache(text: &str) -> Result<HostCache, OptionError> {
    match text {
        "none" => Ok(HostCache::None),
        "writeback" => Ok(HostCache::WriteBack),
        _ => Err(OptionError::Cache(text.to_owned())),
    }
}

/// `--memory size=256M`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryOption {
    /// Bytes.
    pub size: u64,
}

impl FromStr for MemoryOption {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let size = parse_size(Pairs::parse(text, &["size"])?.need("size")?)?;
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&size) || !size.is_multiple_of(4096) {
            return Err(OptionError::Memory(size));
        }
        Ok(Self { size })
    }
}

/// `--cpus boot=2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpusOption(pub CpuCount);

impl FromStr for CpusOption {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let boot = Pairs::parse(text, &["boot"])?.need("boot")?;
        let number: u64 = boot.parse().map_err(|_| OptionError::Number(boot.to_owned()))?;
        Ok(Self(number.try_into()?))
    }
}

/// Where a disk is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskPlace {
    /// In this file, or on this device.
    Image(PathBuf),
    /// On a server.
    Export(NbdExport),
    /// Made of these files, and never written.
    Seed(SeedFiles),
}

impl DiskPlace {
    fn parse(pairs: &Pairs<'_>) -> Result<Self, OptionError> {
        match (pairs.get("path"), pairs.get("nbd")) {
            (None, Some(_)) => {
                if let Some(key) =
                    ["cache", "format", "mirror"].into_iter().find(|key| pairs.get(key).is_some())
                {
                    return Err(OptionError::NotOfExport(key));
                }
                NbdExport::parse(pairs.need("nbd")?, pairs.get("tls_dir")).map(Self::Export)
            }
            (Some(_), Some(_)) => Err(OptionError::Repeated("path= or nbd=".to_owned())),
            _ if pairs.get("tls_dir").is_some() => Err(OptionError::Missing("nbd")),
            _ => Ok(Self::Image(pairs.need("path")?.into())),
        }
    }
}

/// Disks as they are given, and behind them the one that is made of a seed.
pub fn disks_and_seed(disks: &[DiskOption], seed: Option<&SeedFiles>) -> Vec<DiskOption> {
    let seed = seed.map(|files| DiskOption {
        read_only: true,
        is_raw: true,
        ..DiskOption::at(DiskPlace::Seed(files.clone()))
    });
    disks.iter().cloned().chain(seed).collect()
}

/// An export of a server of disks: `[tls:]HOST:PORT/NAME`, `tcp:HOST:PORT/NAME` or `unix:SOCKET/NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdExport {
    /// Where the server is, and with which certificates it is spoken to.
    pub address: PeerAddress,
    /// The export's name.
    pub name: String,
}

impl NbdExport {
    pub(crate) fn parse(text: &str, tls_dir: Option<&str>) -> Result<Self, OptionError> {
        let error = || OptionError::Export(text.to_owned());
        let (server, name) = text.rsplit_once('/').ok_or_else(error)?;
        if !is_export_name(name) {
            return Err(error());
        }
        let has_scheme = ["tls:", "tcp:", "unix:"].iter().any(|scheme| server.starts_with(scheme));
        let mut address = if has_scheme { server.to_owned() } else { format!("tls:{server}") };
        if let Some(dir) = tls_dir {
            if !address.starts_with("tls:") {
                return Err(OptionError::Missing("nbd=tls:HOST:PORT/NAME"));
            }
            address.push_str(",tls_dir=");
            address.push_str(dir);
        }
        let address = address.parse().map_err(|_| error())?;
        Ok(Self { address, name: name.to_owned() })
    }
}

impl fmt::Display for NbdExport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = PeerAddress { tls_dir: None, ..self.address.clone() }.to_string();
        let address = match address.strip_prefix("tcp:") {
            Some(place) if self.address.tls_dir.is_some() => format!("tls:{place}"),
            _ => address,
        };
        write!(f, "nbd={address}/{}", self.name)
    }
}

/// True for what can be the name of an export: words that go through shells and command lines as they are.
pub fn is_export_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    !name.is_empty() && name.len() <= 64 && !name.starts_with('-') && name.bytes().all(plain)
}

/// `--disk path=IMAGE,readonly=on,cache=none,format=raw,on-error=stop,timeout=10s` or `--disk
/// nbd=HOST:PORT/NAME,readonly=on,tls_dir=DIR`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskOption {
    /// Where it is.
    pub place: DiskPlace,
    /// The guest may not write.
    pub read_only: bool,
    /// Whether the host's cache has a part in it; else as the command has it.
    pub cache: Option<HostCache>,
    /// The operator says that it is a raw disk, whatever it looks like.
    pub is_raw: bool,
    /// What happens when its storage fails; else as the side has it.
    pub on_error: Option<OnErrorChoice>,
    /// A request that takes longer is said to hang; else as the side has it.
    pub timeout: Option<DiskTimeoutOption>,
    /// Each side of a pair has a copy of its own.
    pub mirror: Option<MirrorOption>,
}

/// What is said of a disk of which each side has a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MirrorOption {
    /// A copy that is not there is made with so many bytes.
    pub size: Option<u64>,
    /// The guest begins on it, whatever it is worth.
    pub is_forced: bool,
}

impl MirrorOption {
    fn parse(pairs: &Pairs<'_>) -> Result<Option<Self>, OptionError> {
        let size = pairs.get("size").map(parse_size).transpose()?;
        let force = pairs.get("force").map(parse_switch).transpose()?;
        if pairs.get("mirror").map_or(Ok(false), parse_switch)? {
            return Ok(Some(Self { size, is_forced: force.unwrap_or(false) }));
        }
        match (size, force) {
            (None, None) => Ok(None),
            _ => Err(OptionError::Missing("mirror=on, without which there is no size= and force")),
        }
    }
}

impl DiskOption {
    /// The disk there, and nothing more said of it.
    pub const fn at(place: DiskPlace) -> Self {
        let (read_only, is_raw) = (false, false);
        let (on_error, timeout, mirror) = (None, None, None);
        Self { place, read_only, cache: None, is_raw, on_error, timeout, mirror }
    }

    /// How it deals with storage that fails, on a side that deals with it so.
    pub fn policy(&self, side: DiskPolicy) -> DiskPolicy {
        DiskPolicy {
            on_error: self.on_error.map_or(side.on_error, Into::into),
            timeout: self.timeout.map_or(side.timeout, |timeout| timeout.0),
        }
    }
}

impl FromStr for DiskOption {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let known = [
            "path", "nbd", "readonly", "cache", "format", "tls_dir", "on-error", "timeout",
            "mirror", "size", "force",
        ];
        let pairs = Pairs::parse(text, &known)?;
        let mirror = MirrorOption::parse(&pairs)?;
        let read_only = pairs.get("readonly").map_or(Ok(false), parse_switch)?;
        if mirror.is_some() && read_only {
            return Err(OptionError::MirrorReadOnly);
        }
        let is_raw = match pairs.get("format") {
            None => false,
            Some("raw") => true,
            Some(other) => return Err(OptionError::Format(other.to_owned())),
        };
        Ok(Self {
            place: DiskPlace::parse(&pairs)?,
            read_only,
            mirror,
            cache: pairs.get("cache").map(parse_cache).transpose()?,
            is_raw,
            on_error: pairs.get("on-error").map(parse_on_error).transpose()?,
            timeout: pairs.get("timeout").map(str::parse).transpose()?,
        })
    }
}

fn parse_on_error(text: &str) -> Result<OnErrorChoice, OptionError> {
    let ignore_case = false;
    OnErrorChoice::from_str(text, ignore_case).map_err(|_| OptionError::OnError(text.to_owned()))
}

/// `--serial tty|null|file=PATH|socket=PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SerialOption(pub ConsoleTarget);

impl FromStr for SerialOption {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let target = match text.split_once('=') {
            None if text == "tty" => ConsoleTarget::Tty,
            None if text == "null" => ConsoleTarget::Null,
            Some(("file", path)) if !path.is_empty() => ConsoleTarget::File(path.into()),
            Some(("socket", path)) if !path.is_empty() => ConsoleTarget::Socket(path.into()),
            _ => return Err(OptionError::Serial(text.to_owned())),
        };
        Ok(Self(target))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arbiter_option::ArbiterOption;
    use vmft_vmm::world::OnError;

    #[test]
    fn sizes_have_binary_suffixes_and_bounds() {
        let size = |text: &str| text.parse::<MemoryOption>().map(|option| option.size);
        assert_eq!(size("size=256M"), Ok(256 << 20));
        assert_eq!(size("size=4G"), Ok(4 << 30));
        assert_eq!(size("size=65536K"), Ok(64 << 20));
        assert_eq!(size("size=63M"), Err(OptionError::Memory(63 << 20)));
        assert_eq!(size("size=1x"), Err(OptionError::Size("1x".into())));
        assert_eq!(size("256M"), Err(OptionError::NoPair("256M".into())));
    }

    #[test]
    fn a_guest_has_one_to_four_cpus() {
        let parse = |text: &str| text.parse::<CpusOption>().map(|CpusOption(count)| count.get());
        assert_eq!((parse("boot=1"), parse("boot=2"), parse("boot=4")), (Ok(1), Ok(2), Ok(4)));
        for wrong in [0, 5, 300] {
            let error = parse(&format!("boot={wrong}")).expect_err("no guest has so many");
            assert_eq!(error.to_string(), format!("{wrong} guest CPUs: a guest has 1 to 4"));
        }
        assert_eq!(parse("boot=two"), Err(OptionError::Number("two".into())));
    }

    #[test]
    fn a_disk_has_a_path_and_may_be_read_only() {
        let image = |path: &str| DiskPlace::Image(path.into());
        let disk = "path=a.img,readonly=on".parse::<DiskOption>();
        let option = DiskOption { read_only: true, ..DiskOption::at(image("a.img")) };
        assert_eq!(disk, Ok(option));
        let cache = |text: &str| text.parse::<DiskOption>().map(|disk| disk.cache);
        assert_eq!(cache("path=a,cache=none"), Ok(Some(HostCache::None)));
        assert_eq!(cache("path=a,cache=writeback"), Ok(Some(HostCache::WriteBack)));
        assert_eq!(cache("path=a,cache=on"), Err(OptionError::Cache("on".to_owned())));
        let raw = "path=a.img,format=raw".parse::<DiskOption>();
        let option = DiskOption { is_raw: true, ..DiskOption::at(image("a.img")) };
        assert_eq!(raw, Ok(option));
        let other = "path=a.img,format=qcow2".parse::<DiskOption>();
        assert_eq!(other, Err(OptionError::Format("qcow2".into())));
        let own = "path=a.img,on-error=stop,timeout=10s".parse::<DiskOption>().expect("good");
        let side = DiskPolicy::default();
        let timeout = Duration::from_secs(10);
        assert_eq!(own.policy(side), DiskPolicy { on_error: OnError::Stop, timeout });
        assert_eq!(DiskOption::at(image("a.img")).policy(side), side);
        let wrong = |text: &str| text.parse::<DiskOption>().map(|_| ());
        assert_eq!(wrong("path=a,on-error=die"), Err(OptionError::OnError("die".into())));
        assert_eq!(wrong("path=a,timeout=1ms"), Err(OptionError::DiskTimeout("1ms".into())));
        assert_eq!("readonly=on".parse::<DiskOption>(), Err(OptionError::Missing("path")));
        assert_eq!("path=".parse::<DiskOption>(), Err(OptionError::Missing("path")));
        assert!("path=a,path=b".parse::<DiskOption>().is_err());
        assert!("path=a,size=3".parse::<DiskOption>().is_err());
        let mirror = |text: &str| text.parse::<DiskOption>().map(|disk| disk.mirror);
        let plain = MirrorOption { size: None, is_forced: false };
        assert_eq!(mirror("path=a,mirror=on"), Ok(Some(plain)));
        assert_eq!(mirror("path=a,mirror=off"), Ok(None));
        let all = MirrorOption { size: Some(20 << 30), is_forced: true };
        assert_eq!(mirror("path=a,mirror=on,size=20G,force=on"), Ok(Some(all)));
        for text in ["path=a,force=on", "path=a,mirror=off,size=1G", "path=a,mirror=yes"] {
            assert!(mirror(text).is_err(), "{text}");
        }
        assert_eq!(mirror("path=a,mirror=on,readonly=on"), Err(OptionError::MirrorReadOnly));
        let export = mirror("nbd=tcp:h:1/a,mirror=on");
        assert_eq!(export, Err(OptionError::NotOfExport("mirror")));
    }

    #[test]
    fn a_disk_or_an_arbiter_may_be_on_a_server_with_tls_unless_it_is_said() {
        let export = |text: &str| match text.parse::<DiskOption>().map(|disk| disk.place) {
            Ok(DiskPlace::Export(export)) => Ok(export.to_string()),
            other => Err(other),
        };
        for (text, shown) in [
            ("nbd=disks:10809/web", "nbd=tls:disks:10809/web"),
            ("nbd=tls:disks:10809/web,tls_dir=a", "nbd=tls:disks:10809/web"),
            ("nbd=tcp:127.0.0.1:1/web,readonly=on", "nbd=tcp:127.0.0.1:1/web"),
            ("nbd=unix:/run/disks/web", "nbd=unix:/run/disks/web"),
        ] {
            assert_eq!(export(text), Ok(shown.to_owned()), "{text}");
        }
        let arbiter =
            "nbd=disks:1/web,tls_dir=a".parse::<ArbiterOption>().map(|it| it.0.to_string());
        assert_eq!(arbiter, Ok("nbd=tls:disks:1/web".to_owned()));
        for wrong in [
            "nbd=disks:1",
            "nbd=disks/web",
            "nbd=disks:1/",
            "nbd=disks:1/a b",
            "nbd=disks:1/web,path=a",
            "nbd=disks:1/web,cache=none",
            "nbd=tcp:disks:1/web,tls_dir=a",
            "path=a,tls_dir=b",
        ] {
            assert!(wrong.parse::<DiskOption>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_console_goes_to_one_of_four_places() {
        assert_eq!("tty".parse(), Ok(SerialOption(ConsoleTarget::Tty)));
        assert_eq!("file=a".parse(), Ok(SerialOption(ConsoleTarget::File("a".into()))));
        assert!("file=".parse::<SerialOption>().is_err());
        assert!("pty".parse::<SerialOption>().is_err());
    }
}
