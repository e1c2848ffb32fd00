//! `vmft fault`: something goes wrong on purpose.

use crate::api_client;
use crate::options::{OptionError, Pairs, parse_switch, parse_time};
use crate::terminal::say;
use anyhow::Result;
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use vmft_backup::fault::{Fault, FaultOrder};

/// Options of `vmft fault`.
#[derive(Debug, Args)]
pub struct FaultOptions {
    /// The side's --api-socket: a backup's, unless live=on
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
    /// What goes wrong at the guest's next point: a bit of its memory flips on this side alone (on a live
    /// side only with live=on), or a backup replays nothing for a while, but goes on receiving, or a live
    /// side's machine fails, as at a fault of vmft
    #[arg(value_name = "flip-bit=ADDRESS[,bit=0..7][,live=on] | hold-replay=TIME | fail=on")]
    fault: FaultOption,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FaultOption(pub FaultOrder);

/// A number, with `0x` in hexadecimal.
fn parse_number(text: &str) -> Result<u64, OptionError> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.map_err(|_| OptionError::Number(text.to_owned()))
}

impl FromStr for FaultOption {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let pairs = Pairs::parse(text, &["flip-bit", "bit", "live", "hold-replay", "fail"])?;
        if let Some(fail) = pairs.get("fail") {
            let alone = text.strip_prefix("fail=") == Some(fail);
            return match parse_switch(fail)? {
                true if alone => Ok(Self(FaultOrder { fault: Fault::Fail, live: true })),
                _ => Err(OptionError::Fault(text.to_owned())),
            };
        }
        let live = pairs.get("live").map_or(Ok(false), parse_switch)?;
        let fault = match (pairs.get("flip-bit"), pairs.get("hold-replay"), pairs.get("bit")) {
            (Some(address), None, bit) => {
                let bit = bit.map_or(Ok(0), parse_number)?;
                let bit = u8::try_from(bit).map_err(|_| OptionError::Number(bit.to_string()))?;
                Fault::FlipBit { address: parse_number(address)?, bit }
            }
            (None, Some(time), None) if !live => {
                let ms = u64::try_from(parse_time(time)?.as_millis());
                Fault::HoldReplay { ms: ms.map_err(|_| OptionError::Time(time.to_owned()))? }
            }
            _ => return Err(OptionError::Fault(text.to_owned())),
        };
        Ok(Self(FaultOrder { fault, live }))
    }
}

/// Plants a fault.
pub fn fault(options: &FaultOptions) -> Result<ExitCode> {
    let FaultOption(order) = options.fault;
    let planted = api_client::fault(&options.api_socket, order)?;
    say(&format!("at point {}: {}", planted.point, order.fault))?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_a_bit_or_a_while_or_an_end() {
        let parse = |text: &str| text.parse::<FaultOption>().map(|option| option.0);
        let flip =
            |address, bit, live| Ok(FaultOrder { fault: Fault::FlipBit { address, bit }, live });
        assert_eq!(parse("flip-bit=0x1000"), flip(0x1000, 0, false));
        assert_eq!(parse("flip-bit=4096,bit=7,live=on"), flip(4096, 7, true));
        let hold = Fault::HoldReplay { ms: 2_000 };
        assert_eq!(parse("hold-replay=2s"), Ok(FaultOrder { fault: hold, live: false }));
        assert_eq!(parse("fail=on"), Ok(FaultOrder { fault: Fault::Fail, live: true }));
        for wrong in [
            "",
            "flip-bit",
            "flip-bit=x",
            "bit=1",
            "flip-bit=1,bit=256",
            "hold-replay=1s,bit=0",
            "hold-replay=1s,live=on",
            "hold-replay=2",
            "fail=off",
            "fail=on,bit=1",
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
