//! Values of the options that say how a guest is protected, and within which bounds.

use crate::options::{OptionError, Pairs, parse_time};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;
use vmft_backup::epoch::{Interval, Protection};
use vmft_backup::lag::{LagBound, LagPolicy};

/// `--protect lockstep|checkpoint[,interval=25ms]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProtectOption(pub Protection);

impl ProtectOption {
    /// The option as it is given on a command line.
    pub fn arguments(self) -> [String; 2] {
        let value = match self.0 {
            Protection::Lockstep => "lockstep".to_owned(),
            Protection::Checkpoint(interval) => {
                format!("checkpoint,interval={}ms", interval.get().as_millis())
            }
        };
        ["--protect".to_owned(), value]
    }
}

impl FromStr for ProtectOption {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let (mode, rest) = match text.split_once(',') {
            Some((mode, rest)) => (mode, Some(rest)),
            None => (text, None),
        };
        match (mode, rest) {
            ("lockstep", None) => Ok(Self(Protection::Lockstep)),
            ("checkpoint", None) => Ok(Self(Protection::Checkpoint(Interval::default()))),
            ("checkpoint", Some(rest)) => {
                let interval = Pairs::parse(rest, &["interval"])?.need("interval")?;
                let interval = parse_time(interval)?.try_into()?;
                Ok(Self(Protection::Checkpoint(interval)))
            }
            _ => Err(OptionError::Protection(text.to_owned())),
        }
    }
}

/// `--interval 50ms`, of checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpochIntervalOption(pub Interval);

impl FromStr for EpochIntervalOption {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        Ok(Self(parse_time(text)?.try_into()?))
    }
}

/// `--bound-replay 200ms`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeOption(pub Duration);

impl FromStr for TimeOption {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        parse_time(text).map(Self)
    }
}

/// `--disk-timeout 30s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskTimeoutOption(pub Duration);

/// What a disk's request may take. Busy disks take tenths of a second.
const DISK_TIMEOUTS: RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(3600);

impl FromStr for DiskTimeoutOption {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let time = parse_time(text)?;
        if DISK_TIMEOUTS.contains(&time) {
            return Ok(Self(time));
        }
        Err(OptionError::DiskTimeout(text.to_owned()))
    }
}

/// `--max-lag 200ms[,then=slow|unprotect|stop]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LagOption(pub LagBound);

impl FromStr for LagOption {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let (limit, policy) = match text.split_once(',') {
            None => (text, LagPolicy::Slow),
            Some((limit, rest)) => match Pairs::parse(rest, &["then"])?.need("then")? {
                "slow" => (limit, LagPolicy::Slow),
                "unprotect" => (limit, LagPolicy::Unprotect),
                "stop" => (limit, LagPolicy::Stop),
                _ => return Err(OptionError::Lag(text.to_owned())),
            },
        };
        Ok(Self(LagBound::new(parse_time(limit)?, policy)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_protected_in_lockstep_or_by_checkpoints_of_some_interval() {
        let parse = |text: &str| text.parse::<ProtectOption>().map(|option| option.0);
        let every = |ms| Interval::try_from(Duration::from_millis(ms)).map(Protection::Checkpoint);
        assert_eq!(parse("lockstep"), Ok(Protection::Lockstep));
        assert_eq!(parse("checkpoint"), Ok(every(25).expect("the default")));
        assert_eq!(parse("checkpoint,interval=50ms"), Ok(every(50).expect("within the bounds")));
        assert_eq!(parse("checkpoint,interval=1s"), Ok(every(1000).expect("the longest")));
        for text in ["lockstep", "checkpoint,interval=50ms"] {
            let option: ProtectOption = text.parse().expect("as above");
            assert_eq!(option.arguments(), ["--protect", text]);
        }
        for wrong in ["", "remus", "lockstep,interval=5ms", "checkpoint,", "checkpoint,interval=5"]
        {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
        let error = parse("checkpoint,interval=1ms").expect_err("too short").to_string();
        assert!(error.contains("at least 2 ms"), "{error}");
    }

    #[test]
    fn a_disk_has_a_tenth_of_a_second_and_up_to_an_hour() {
        let parse = |text: &str| text.parse::<DiskTimeoutOption>().map(|option| option.0);
        assert_eq!(parse("100ms"), Ok(Duration::from_millis(100)));
        assert_eq!(parse("30s"), Ok(Duration::from_secs(30)));
        for wrong in ["", "0s", "99ms", "3601s", "30"] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_lag_has_a_bound_and_something_that_happens_beyond_it() {
        let parse = |text: &str| text.parse::<LagOption>().map(|option| option.0);
        let bound = |ms, policy| {
            Ok(LagBound::new(Duration::from_millis(ms), policy).expect("within the bounds"))
        };
        assert_eq!(parse("200ms"), bound(200, LagPolicy::Slow));
        assert_eq!(parse("200ms,then=slow"), bound(200, LagPolicy::Slow));
        assert_eq!(parse("1s,then=unprotect"), bound(1000, LagPolicy::Unprotect));
        assert_eq!(parse("1s,then=stop"), bound(1000, LagPolicy::Stop));
        for wrong in ["", "1s,then=halt", "1s,stop", "200", "10ms", "2000s"] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
