//! Where a peer is: `tcp:HOST:PORT`, `tls:HOST:PORT` for an authenticated channel, `unix:PATH` on one
//! machine.
//!
//! **Invariant.** Without TLS, nothing but this machine's own addresses is listened at or connected
//! to, unless the operator has said that it may be ([`PeerAddress::insecure`]): [`PeerAddress::resolve`]
//! is the only way to an address that a socket takes.

use super::TransportError;
use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

/// The certificates of a side whose operator names none: a directory of this name in the place for
/// the user's configuration (`$XDG_CONFIG_HOME`, else `~/.config`).
pub const DEFAULT_TLS_DIR: &str = "vmft/tls";

/// A peer's address, or the address to listen at.
///
/// ```
/// use vmft_logging_channel::transport::PeerAddress;
///
/// let address: PeerAddress = "tls:backup.example:7400,tls_dir=/etc/vmft/primary".parse()?;
/// assert_eq!(address.to_string(), "tls:backup.example:7400,tls_dir=/etc/vmft/primary");
/// # Ok::<(), vmft_logging_channel::transport::InvalidAddress>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAddress {
    /// Where it is.
    pub place: Place,
    /// The directory with `ca.pem`, `cert.pem`, `key.pem` and `revoked.pem` of this side. Without one
    /// the channel is neither authenticated nor encrypted.
    pub tls_dir: Option<PathBuf>,
    /// The operator has said that the channel may leave this machine without TLS.
    pub insecure: bool,
}

/// Where a socket is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A TCP port.
    Tcp {
        /// A name or an IP address; IPv6 addresses in brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

/// A place looked up: what a socket takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Resolved {
    /// At least one address.
    Tcp(Vec<SocketAddr>),
    Unix(PathBuf),
}

/// A text that is no peer's address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no peer address ({problem}): write tls:HOST:PORT, tcp:HOST:PORT or unix:PATH, with \
     ,tls_dir=DIR for other certificates than the user's own"
)]
pub struct InvalidAddress {
    text: String,
    problem: &'static str,
}

impl FromStr for PeerAddress {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = |problem| InvalidAddress { text: text.to_owned(), problem };
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err(invalid("the path is missing")),
                path => Ok(Self::at(Place::Unix(path.into()))),
            };
        }
        let (scheme, rest) = text.split_once(':').unwrap_or((text, ""));
        if !["tcp", "tls"].contains(&scheme) {
            return Err(invalid("it begins with none of tls:, tcp:, unix:"));
        }
        let (place, options) = match rest.split_once(',') {
            Some((place, options)) => (place, Some(options)),
            None => (rest, None),
        };
        let (host, port) = place.rsplit_once(':').ok_or(invalid("the port is missing"))?;
        let bracketed = host.starts_with('[') && host.ends_with(']');
        if host.is_empty() || (host.contains(':') && !bracketed) {
            return Err(invalid("the host is missing, or an IPv6 address without brackets"));
        }
        let port = port.parse().map_err(|_| invalid("the port is not a number up to 65535"))?;
        let tls_dir = match options.map(|options| options.split_once('=')) {
            None if scheme == "tcp" => None,
            None => Some(default_tls_dir().ok_or(invalid("without $HOME, tls_dir= is needed"))?),
            Some(Some(("tls_dir", dir))) if !dir.is_empty() => Some(PathBuf::from(dir)),
            Some(_) => return Err(invalid("the only option is tls_dir=DIR")),
        };
        Ok(Self { tls_dir, ..Self::tcp(host, port) })
    }
}

fn default_tls_dir() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let configuration = set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config")))?;
    Some(configuration.join(DEFAULT_TLS_DIR))
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match (&self.place, &self.tls_dir) {
            (Place::Unix(_), _) => "unix",
            (Place::Tcp { .. }, Some(_)) => "tls",
            (Place::Tcp { .. }, None) => "tcp",
        };
        write!(f, "{scheme}:{}", self.place)?;
        match &self.tls_dir {
            Some(dir) => write!(f, ",tls_dir={}", dir.display()),
            None => Ok(()),
        }
    }
}

impl PeerAddress {
    const fn at(place: Place) -> Self {
        Self { place, tls_dir: None, insecure: false }
    }

    /// A TCP port, without TLS.
    pub fn tcp(host: impl Into<String>, port: u16) -> Self {
        Self::at(Place::Tcp { host: host.into(), port })
    }

    /// Makes sure that the address may be used as it is. A name that cannot be looked up now is looked
    /// up again when it is used. Blocks.
    ///
    /// # Errors
    /// [`TransportError::Exposed`].
    pub fn check(&self) -> Result<(), TransportError> {
        match self.resolve() {
            Err(exposed @ TransportError::Exposed { .. }) => Err(exposed),
            _ => Ok(()),
        }
    }

    /// True if the channel leaves this machine without TLS, as its operator has said it may. Blocks.
    pub fn is_exposed(&self) -> bool {
        let closed = Self { insecure: false, ..self.clone() };
        self.insecure && closed.check().is_err()
    }

    /// Looks the host up, and makes sure that what was found may be used. Blocks.
    pub(super) fn resolve(&self) -> Result<Resolved, TransportError> {
        let (host, port) = match &self.place {
            Place::Unix(path) => return Ok(Resolved::Unix(path.clone())),
            Place::Tcp { host, port } => (host, port),
        };
        let found: Vec<SocketAddr> = format!("{host}:{port}").to_socket_addrs()?.collect();
        if found.is_empty() {
            return Err(io::Error::other("the host has no address").into());
        }
        // One that is not this machine's is enough: which of them a socket takes is not ours to choose.
        let away = found.iter().find(|found| !found.ip().to_canonical().is_loopback());
        match away {
            Some(found) if self.tls_dir.is_none() && !self.insecure => {
                Err(TransportError::Exposed { address: self.clone(), found: found.ip() })
            }
            _ => Ok(Resolved::Tcp(found)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_says_what_is_wrong_with_it() {
        for (text, problem) in [
            ("host:1", "it begins with none of tls:, tcp:, unix:"),
            ("tcp", "the port is missing"),
            ("tcp:host", "the port is missing"),
            ("tls:host", "the port is missing"),
            ("unix:", "the path is missing"),
            ("tcp::1", "the host is missing, or an IPv6 address without brackets"),
            ("tcp:::1:7400", "the host is missing, or an IPv6 address without brackets"),
            ("tcp:host:70000", "the port is not a number up to 65535"),
            ("tcp:host:1,tls=x", "the only option is tls_dir=DIR"),
            ("tcp:host:1,tls_dir=", "the only option is tls_dir=DIR"),
        ] {
            let error = text.parse::<PeerAddress>().expect_err(text);
            assert_eq!(error.problem, problem, "{text}");
        }
    }

    #[test]
    fn an_ipv6_address_goes_in_brackets() {
        let address: PeerAddress = "tcp:[::1]:7400".parse().expect("an address");
        let numeric = vec!["[::1]:7400".parse().expect("numeric")];
        assert_eq!(address.resolve().expect("loopback"), Resolved::Tcp(numeric));
    }

    #[test]
    fn with_tls_there_is_always_a_directory() {
        let named: PeerAddress = "tcp:host:1,tls_dir=a".parse().expect("an address");
        assert_eq!(named, "tls:host:1,tls_dir=a".parse().expect("an address"));
        let default: PeerAddress = "tls:host:1".parse().expect("an address");
        assert!(default.tls_dir.expect("one").ends_with(DEFAULT_TLS_DIR));
    }

    #[test]
    fn without_tls_only_this_machines_addresses_are_used() {
        for text in [
            "tcp:0.0.0.0:0",
            "tcp:[::]:0",
            "tcp:[::ffff:0.0.0.0]:0",
            "tcp:[::ffff:192.0.2.1]:1",
            "tcp:192.0.2.1:1",
            "tcp:[2001:db8::1]:1",
            "tcp:[fe80::1]:1",
        ] {
            let mut address: PeerAddress = text.parse().expect(text);
            let refused = address.check().expect_err(text);
            assert!(matches!(refused, TransportError::Exposed { .. }), "{text}: {refused}");
            let remedy = refused.to_string();
            assert!(remedy.contains("vmft keys") && remedy.contains("--insecure"), "{remedy}");
            assert!(!address.is_exposed());
            address.insecure = true;
            address.check().expect("said");
            assert!(address.is_exposed());
            address.tls_dir = Some("somewhere".into());
            address.insecure = false;
            address.check().expect("with TLS");
        }
        let here =
            ["tcp:127.0.0.1:1", "tcp:127.9.9.9:1", "tcp:[::1]:1", "tcp:[::ffff:127.0.0.1]:1"];
        for text in here.into_iter().chain(["tcp:localhost:1", "unix:/run/vmft/log"]) {
            let address: PeerAddress = text.parse().expect(text);
            address.check().expect(text);
        }
    }
}
