//! Who may ask a page for something: the rules that keep other pages, and other hosts, out.
//!
//! A browser takes what it is told to anywhere, also to this host, in the name of any page that it shows. So
//! a request has to be addressed to this host by number or by the name `localhost`, or by a name that the
//! operator has said: a foreign name that was made to lead here (DNS rebinding) is refused. And what changes
//! something has to come from our own page, which alone knows the key, and be of a kind that no foreign page
//! may send without asking first.

use axum::http::{HeaderMap, StatusCode, header};
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use crate::options::{OptionError, Pairs, parse_switch};

/// `--listen ADDRESS:PORT[,insecure=on][,name=HOST]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenOption {
    /// Where to listen.
    pub address: SocketAddr,
    /// How readers may call this host, beside its numbers and `localhost`.
    pub name: Option<String>,
}

impl FromStr for ListenOption {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let (address, rest) = match text.split_once(',') {
            Some((address, rest)) => (address, Some(rest)),
            None => (text, None),
        };
        let address: SocketAddr =
            address.parse().map_err(|_| OptionError::Page(text.to_owned()))?;
        let pairs = match rest {
            None => Pairs::none(),
            Some(rest) => Pairs::parse(rest, &["insecure", "name"])?,
        };
        let insecure = pairs.get("insecure").map_or(Ok(false), parse_switch)?;
        if !address.ip().is_loopback() && !insecure {
            return Err(OptionError::PageExposed(text.to_owned()));
        }
        let name = pairs.get("name").map(str::to_ascii_lowercase);
        let is_name = |name: &String| {
            !name.is_empty()
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-.".contains(&byte))
        };
        if name.as_ref().is_some_and(|name| !is_name(name)) {
            return Err(OptionError::Page(text.to_owned()));
        }
        Ok(Self { address, name })
    }
}

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) code: StatusCode,
    pub(super) why: &'static str,
}

const fn refuse(code: StatusCode, why: &'static str) -> Refusal {
    Refusal { code, why }
}

/// The rules.
#[derive(Debug, Clone)]
pub(super) struct Door {
    name: Option<String>,
    /// Only the page knows it, and whoever was told the page's address.
    key: String,
    /// There are buttons: then the page itself is for those who know the key.
    has_buttons: bool,
}

/// The one value of a header.
fn only(headers: &HeaderMap, name: impl header::AsHeaderName) -> Option<&str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?.to_str().ok()?;
    values.next().is_none().then_some(value)
}

/// Compares without telling by its time how much was right.
fn is_same(one: &str, other: &str) -> bool {
    let differs = |(a, b): (u8, u8)| a ^ b;
    one.len() == other.len()
        && one.bytes().zip(other.bytes()).map(differs).fold(0, |a, b| a | b) == 0
}

impl Door {
    /// A door with this key.
    pub(super) fn new(name: Option<String>, key: String, has_buttons: bool) -> Self {
        Self { name, key, has_buttons }
    }

    fn is_ours(&self, authority: &str) -> bool {
        let host = match authority.rsplit_once(':') {
            // The last colon of a bare IPv6 address is in its brackets.
            Some((host, port)) if !port.ends_with(']') => {
                if port.parse::<u16>().is_err() {
                    return false;
                }
                host
            }
            _ => authority,
        };
        let number = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(inside) => inside.parse().map(IpAddr::V6).ok(),
            None => host.parse().map(IpAddr::V4).ok(),
        };
        let host = host.to_ascii_lowercase();
        number.is_some() || host == "localhost" || Some(host) == self.name
    }

    /// Any request.
    pub(super) fn check_any(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        match only(headers, header::HOST) {
            Some(host) if self.is_ours(host) => Ok(()),
            _ => Err(refuse(
                StatusCode::MISDIRECTED_REQUEST,
                "this page is not known by that name; ask by number, as localhost, or by the name= of \
                 --listen",
            )),
        }
    }

    /// A request for the page or for what it shows, with what stands behind the question mark.
    pub(super) fn check_look(&self, headers: &HeaderMap, query: &str) -> Result<(), Refusal> {
        self.check_any(headers)?;
        let key = query.split('&').find_map(|pair| pair.strip_prefix("key="));
        if self.has_buttons && !key.is_some_and(|key| is_same(key, &self.key)) {
            return Err(refuse(
                StatusCode::FORBIDDEN,
                "this page has buttons: its whole address, with the key, is where vmft was started",
            ));
        }
        Ok(())
    }

    /// A request that changes something.
    pub(super) fn check_act(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        self.check_any(headers)?;
        if !self.has_buttons {
            return Err(refuse(StatusCode::FORBIDDEN, "this page only shows; see --control"));
        }
        let host = only(headers, header::HOST).unwrap_or_default();
        let is_own = only(headers, header::ORIGIN)
            .and_then(|origin| origin.strip_prefix("http://"))
            .is_some_and(|origin| origin == host);
        if !is_own {
            return Err(refuse(StatusCode::FORBIDDEN, "that is for this program's own page"));
        }
        if !only(headers, "x-vmft-key").is_some_and(|key| is_same(key, &self.key)) {
            return Err(refuse(
                StatusCode::FORBIDDEN,
                "the key is not the right one: the page is of another process; load it again",
            ));
        }
        if only(headers, header::CONTENT_TYPE) != Some("application/json") {
            return Err(refuse(StatusCode::UNSUPPORTED_MEDIA_TYPE, "JSON is taken, and no other"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::{HeaderName, HeaderValue};

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &str)| {
            let value = HeaderValue::from_str(value).expect("a header");
            (HeaderName::from_static(name), value)
        };
        let mut headers = HeaderMap::new();
        for (name, value) in pairs.iter().map(pair) {
            headers.append(name, value);
        }
        headers
    }

    #[test]
    fn a_page_is_for_this_host_unless_the_operator_says_otherwise() {
        let parse = |text: &str| text.parse::<ListenOption>();
        assert!(parse("127.0.0.1:8080").is_ok() && parse("[::1]:0").is_ok());
        for exposed in ["0.0.0.0:8080", "10.0.0.1:80", "[::]:80", "0.0.0.0:1,insecure=off"] {
            assert!(matches!(parse(exposed), Err(OptionError::PageExposed(_))), "{exposed}");
        }
        let option = parse("10.0.0.1:80,insecure=on,name=Dash.Example").expect("it is said");
        assert_eq!(option.name.as_deref(), Some("dash.example"));
        for wrong in ["", "8080", "localhost:80", "127.0.0.1:1,x=on", "127.0.0.1:1,name=a/b"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_name_that_others_have_made_to_lead_here_is_refused() {
        let door = Door::new(Some("dash.example".to_owned()), "k".to_owned(), false);
        let is_let_in = |host: &str| door.check_look(&headers(&[("host", host)]), "").is_ok();
        for ours in [
            "127.0.0.1:8080",
            "localhost:8080",
            "LOCALHOST",
            "[::1]:8080",
            "[::1]",
            "10.1.2.3",
            "dash.example:80",
        ] {
            assert!(is_let_in(ours), "{ours}");
        }
        for foreign in [
            "evil.example",
            "evil.example:8080",
            "localhost.evil.example:8080",
            "127.0.0.1.evil.example",
            "localhost:8080:1",
            "localhost:x",
            "[::1",
            "::1",
            "",
        ] {
            assert!(!is_let_in(foreign), "{foreign}");
        }
        assert!(door.check_any(&headers(&[])).is_err());
        let twice = headers(&[("host", "localhost"), ("host", "localhost")]);
        assert!(door.check_any(&twice).is_err());
    }

    #[test]
    fn what_changes_something_comes_from_the_own_page_with_the_key() {
        let good = [
            ("host", "127.0.0.1:8080"),
            ("origin", "http://127.0.0.1:8080"),
            ("x-vmft-key", "0123"),
            ("content-type", "application/json"),
        ];
        let door = |has_buttons| Door::new(None, "0123".to_owned(), has_buttons);
        assert_eq!(door(true).check_act(&headers(&good)), Ok(()));
        assert!(door(false).check_act(&headers(&good)).is_err());
        for (at, wrong) in [
            (0, "evil.example"),
            (1, "http://evil.example"),
            (1, "http://127.0.0.1:8081"),
            (1, "https://127.0.0.1:8080"),
            (1, "null"),
            (2, "0124"),
            (2, "012"),
            (2, ""),
            (3, "text/plain"),
            (3, "application/x-www-form-urlencoded"),
        ] {
            let mut bad = good;
            bad[at].1 = wrong;
            assert!(door(true).check_act(&headers(&bad)).is_err(), "{wrong}");
        }
        for missing in 0..good.len() {
            let mut bad = good.to_vec();
            bad.remove(missing);
            assert!(door(true).check_act(&headers(&bad)).is_err(), "{missing}");
        }
    }

    #[test]
    fn a_page_with_buttons_is_for_those_who_know_its_address() {
        let host = headers(&[("host", "localhost")]);
        let door = Door::new(None, "0123".to_owned(), true);
        assert_eq!(door.check_look(&host, "key=0123"), Ok(()));
        for query in ["", "key=", "key=0", "key=0124", "akey=0123"] {
            assert!(door.check_look(&host, query).is_err(), "{query}");
        }
    }
}
