//! Where a peer is: `tcp:HOST:PORT`, with `,tls_dir=DIR` for an authenticated channel.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

/// A peer's address, or the address to listen at.
///
/// ```
/// use vmft_logging_channel::transport::PeerAddress;
///
/// let address: PeerAddress = "tcp:backup.example:7400,tls_dir=/etc/vmft/primary".parse()?;
/// assert_eq!(address.to_string(), "tcp:backup.example:7400,tls_dir=/etc/vmft/primary");
/// # Ok::<(), vmft_logging_channel::transport::InvalidAddress>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAddress {
    /// A name or an IP address; IPv6 addresses in brackets.
    pub host: String,
    /// The TCP port.
    pub port: u16,
    /// The directory with `ca.pem`, `cert.pem` and `key.pem` of this side. Without one the
    /// channel is neither authenticated nor encrypted.
    pub tls_dir: Option<PathBuf>,
}

/// A text that is no peer's address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no peer address ({problem}): write tcp:HOST:PORT or tcp:HOST:PORT,tls_dir=DIR"
)]
pub struct InvalidAddress {
    text: String,
    problem: &'static str,
}

impl FromStr for PeerAddress {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = |problem| InvalidAddress { text: text.to_owned(), problem };
        let rest = text.strip_prefix("tcp:").ok_or(invalid("it does not begin with tcp:"))?;
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
            None => None,
            Some(Some(("tls_dir", dir))) if !dir.is_empty() => Some(PathBuf::from(dir)),
            Some(_) => return Err(invalid("the only option is tls_dir=DIR")),
        };
        Ok(Self { host: host.to_owned(), port, tls_dir })
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tcp:{}:{}", self.host, self.port)?;
        match &self.tls_dir {
            Some(dir) => write!(f, ",tls_dir={}", dir.display()),
            None => Ok(()),
        }
    }
}

impl PeerAddress {
    /// Looks the host up; there is at least one address. Blocks.
    pub(super) fn resolve(&self) -> std::io::Result<Vec<SocketAddr>> {
        let found: Vec<SocketAddr> =
            format!("{}:{}", self.host, self.port).to_socket_addrs()?.collect();
        if found.is_empty() {
            return Err(std::io::Error::other("the host has no address"));
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_says_what_is_wrong_with_it() {
        for (text, problem) in [
            ("host:1", "it does not begin with tcp:"),
            ("tcp:host", "the port is missing"),
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
        assert_eq!(address.resolve().expect("numeric"), ["[::1]:7400".parse().expect("numeric")]);
    }
}
