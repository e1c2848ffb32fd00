//! `--net`: where the guest's network device is connected.

use crate::options::{OptionError, Pairs, parse_switch};
use crate::remedy::Remedy;
use anyhow::{Context, Result, bail};
use std::io::Read;
use std::str::FromStr;
use std::sync::Arc;
use vmft_vmm::board::NetConfig;
use vmft_vmm::devices::virtio::net::addresses::MacAddress;
use vmft_vmm::world::net::{NetError, NetPort, NetTarget};

/// `--net tap=NAME`, `--net socket=PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetOption {
    /// Where it is connected.
    pub target: NetTarget,
    /// The guest's address; else one nobody else is likely to have.
    pub mac: Option<MacAddress>,
    /// Whether the guest may leave work to the outside world.
    pub offloads: Option<bool>,
}

impl FromStr for NetOption {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let pairs = Pairs::parse(text, &["tap", "tap-fd", "socket", "mac", "offloads"])?;
        let target = match (pairs.get("tap"), pairs.get("tap-fd"), pairs.get("socket")) {
            (Some(name), None, None) if !name.is_empty() => NetTarget::Tap(name.to_owned()),
            (None, Some(number), None) => NetTarget::TapFd(
                number.parse().map_err(|_| OptionError::Number(number.to_owned()))?,
            ),
            (None, None, Some(path)) if !path.is_empty() => NetTarget::Socket(path.into()),
            _ => return Err(OptionError::Net(text.to_owned())),
        };
        let mac = pairs.get("mac").map(str::parse).transpose();
        let mac =
            mac.map_err(|error: vmft_vmm::devices::virtio::net::addresses::NoMacAddress| {
                OptionError::Mac(error.0)
            })?;
        let offloads = pairs.get("offloads").map(parse_switch).transpose()?;
        Ok(Self { target, mac, offloads })
    }
}

impl NetOption {
    /// The device of a new machine.
    pub fn config(&self) -> Result<NetConfig> {
        let mac = match self.mac {
            Some(mac) => mac,
            None => fresh_mac()?,
        };
        Ok(NetConfig { mac, offloads: self.offloads.unwrap_or(true) })
    }

    /// A saved machine's device must be as asked for.
    pub fn check(option: Option<&Self>, saved: Option<&NetConfig>) -> Result<()> {
        match (option, saved) {
            (None, None) => Ok(()),
            (None, Some(_)) => {
                bail!("the machine has a network; say with --net where it is connected")
            }
            (Some(_), None) => bail!("the machine was saved without a network; leave --net out"),
            (Some(option), Some(saved)) => {
                if let Some(mac) = option.mac.filter(|mac| *mac != saved.mac) {
                    bail!(
                        "the machine's network address is {}, not {mac}; leave mac= out",
                        saved.mac
                    );
                }
                if option.offloads.is_some_and(|offloads| offloads != saved.offloads) {
                    let state = if saved.offloads { "on" } else { "off" };
                    bail!("the machine was saved with offloads={state}; leave offloads= out");
                }
                Ok(())
            }
        }
    }

    /// The port of a side that only follows for now: it is looked at, and not opened.
    pub fn port_of_follower(option: Option<&Self>) -> Result<Option<Arc<NetPort>>> {
        let Some(option) = option else { return Ok(None) };
        let port = NetPort::new(option.target.clone())?;
        remedied(port.check())?;
        Ok(Some(Arc::new(port)))
    }

    /// The open port of a machine that is about to run here.
    pub fn port_of_machine(
        option: Option<&Self>,
        config: Option<&NetConfig>,
    ) -> Result<Option<Arc<NetPort>>> {
        let (Some(option), Some(config)) = (option, config) else { return Ok(None) };
        let port = NetPort::new(option.target.clone())?;
        remedied(port.open(config.offloads))?;
        Ok(Some(Arc::new(port)))
    }
}

/// An error, with what to do about it.
fn remedied(result: Result<(), NetError>) -> Result<()> {
    result.map_err(|error| {
        let remedy = match &error {
            NetError::NoDevice(name) => format!(
                "make it with `ip tuntap add dev {name} mode tap` and \
                 `ip link set {name} up master BRIDGE`"
            ),
            NetError::InUse(_) => "give each side on a host a TAP device of its own".to_owned(),
            NetError::Open { target: NetTarget::Socket(_), .. } => {
                "start who listens there first, for instance `passt --socket PATH`".to_owned()
            }
            NetError::Open { .. } => {
                "this user must be allowed to: make the device with `ip tuntap add … user USER`, \
                 or use `passt` with --net socket=PATH"
                    .to_owned()
            }
            _ => "--net takes tap=NAME, tap-fd=NUMBER or socket=PATH".to_owned(),
        };
        anyhow::anyhow!("{:#}; {remedy}", anyhow::Error::from(error))
    })
}

/// A locally administered address of random bits.
fn fresh_mac() -> Result<MacAddress> {
    let mut bytes = [0; 6];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("reading random bytes")
        .remedy(|| "give the network's address with mac=")?;
    bytes[0] = bytes[0] & !1 | 2;
    Ok(MacAddress(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_a_tap_device_or_a_socket() {
        let option = |text: &str| text.parse::<NetOption>();
        let tap = option("tap=tap0,mac=52:54:00:00:00:01").unwrap();
        assert_eq!(tap.target, NetTarget::Tap("tap0".to_owned()));
        assert_eq!(tap.config().unwrap().mac, MacAddress([0x52, 0x54, 0, 0, 0, 1]));
        assert!(tap.config().unwrap().offloads);
        let socket = option("socket=/run/a.sock,offloads=off").unwrap();
        assert_eq!(socket.target, NetTarget::Socket("/run/a.sock".into()));
        assert!(!socket.config().unwrap().offloads);
        assert_eq!(option("tap-fd=3").unwrap().target, NetTarget::TapFd(3));
        for bad in ["tap=", "tap=a,socket=b", "mac=52:54:00:00:00:01", "tap-fd=x", "tap=a,mac=x"] {
            assert!(option(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_address_that_is_made_up_is_a_stations() {
        let option: NetOption = "tap=tap0".parse().unwrap();
        let mac = option.config().unwrap().mac;
        assert!(mac.is_station() && mac.0[0] & 2 == 2, "{mac}");
    }

    #[test]
    fn a_saved_machine_keeps_its_network() {
        let option: NetOption = "tap=tap0".parse().unwrap();
        let other: NetOption = "tap=tap0,mac=52:54:00:00:00:01".parse().unwrap();
        let saved = option.config().unwrap();
        assert!(NetOption::check(None, None).is_ok());
        assert!(NetOption::check(Some(&option), Some(&saved)).is_ok());
        for (option, saved) in
            [(None, Some(&saved)), (Some(&option), None), (Some(&other), Some(&saved))]
        {
            assert!(NetOption::check(option, saved).is_err());
        }
    }
}
