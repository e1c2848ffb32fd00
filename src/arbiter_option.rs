//! `--arbiter`: who decides which side goes on.

use crate::options::{NbdExport, OptionError, Pairs, is_export_name, parse_switch};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use vmft_backup::arbiter::{EtcdPlace, ExposedMember, MAX_MEMBERS};
use vmft_backup::tell;
use vmft_logging_channel::transport::PeerAddress;

/// An etcd of `etcd=HOST:PORT,HOST:PORT,…,name=PAIR[,tls_dir=DIR][,insecure=on]`.
fn parse_etcd(text: &str) -> Result<EtcdPlace, OptionError> {
    let error = || OptionError::Members(text.to_owned());
    // The members are the only list: they go to the first word that is a key's.
    let keys = text
        .match_indices(',')
        .find(|(at, _)| text[at + 1..].split(',').next().is_some_and(|word| word.contains('=')));
    let (members, rest) = match keys {
        Some((at, _)) => (&text[..at], &text[at + 1..]),
        None => return Err(OptionError::Missing("name")),
    };
    let pairs = Pairs::parse(rest, &["name", "tls_dir", "insecure"])?;
    let name = pairs.need("name")?;
    if !is_export_name(name) {
        return Err(OptionError::PairName(name.to_owned()));
    }
    let insecure = pairs.get("insecure").map_or(Ok(false), parse_switch)?;
    let tls_dir = match pairs.get("tls_dir") {
        Some(_) => Some(PathBuf::from(pairs.need("tls_dir")?)),
        None => None,
    };
    let member = |member: &str| -> Result<PeerAddress, OptionError> {
        let address: PeerAddress = format!("tcp:{member}").parse().map_err(|_| error())?;
        Ok(PeerAddress { tls_dir: tls_dir.clone(), insecure, ..address })
    };
    let members = members.split(',').map(member).collect::<Result<Vec<_>, _>>()?;
    if members.len() > MAX_MEMBERS {
        return Err(error());
    }
    Ok(EtcdPlace { members, name: name.to_owned() })
}

/// Where an arbiter is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ArbiterPlace {
    /// In this directory.
    Directory(PathBuf),
    /// With this export of a disk's server.
    Export(NbdExport),
    /// In this etcd.
    Etcd(EtcdPlace),
}

impl ArbiterPlace {
    /// Makes sure that it may be asked as it is said, and says where that is without TLS across a network
    /// because its operator has said that it may be. Blocks.
    ///
    /// # Errors
    /// [`ExposedMember`]
    pub fn check(&self) -> Result<(), ExposedMember> {
        let Self::Etcd(etcd) = self else { return Ok(()) };
        etcd.check()?;
        if etcd.members.iter().any(PeerAddress::is_exposed) {
            tell!("{self} is insecure: whoever reaches it decides which side goes on");
        }
        Ok(())
    }
}

impl fmt::Display for ArbiterPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => path.display().fmt(f),
            Self::Export(export) => export.fmt(f),
            Self::Etcd(etcd) => etcd.fmt(f),
        }
    }
}

/// `--arbiter dir=PATH`, `--arbiter nbd=HOST:PORT/NAME,tls_dir=DIR`, `--arbiter
/// etcd=HOST:PORT,HOST:PORT,name=PAIR`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArbiterOption(pub ArbiterPlace);

impl FromStr for ArbiterOption {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        match text.split_once('=') {
            Some(("dir", path)) if !path.is_empty() => {
                Ok(Self(ArbiterPlace::Directory(path.into())))
            }
            Some(("nbd", _)) => {
                let pairs = Pairs::parse(text, &["nbd", "tls_dir"])?;
                let export = NbdExport::parse(pairs.need("nbd")?, pairs.get("tls_dir"))?;
                Ok(Self(ArbiterPlace::Export(export)))
            }
            Some(("etcd", etcd)) => parse_etcd(etcd).map(ArbiterPlace::Etcd).map(Self),
            _ => Err(OptionError::Arbiter(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arbiter_in_an_etcd_has_members_a_name_and_tls_unless_it_is_said() {
        let etcd = |text: &str| match text.parse::<ArbiterOption>().map(|it| it.0) {
            Ok(ArbiterPlace::Etcd(etcd)) => Ok(etcd),
            other => Err(other),
        };
        let local = etcd("etcd=127.0.0.1:2379,[::1]:2379,name=web").expect("good");
        assert_eq!(local.to_string(), "etcd=127.0.0.1:2379,[::1]:2379,name=web");
        assert!(local.check().is_ok());
        let away = "etcd=127.0.0.1:2379,192.0.2.1:2379,name=web";
        assert!(etcd(away).expect("good").check().is_err(), "without TLS");
        for said in [",insecure=on", ",tls_dir=a"] {
            assert!(etcd(&format!("{away}{said}")).expect("good").check().is_ok());
        }
        for wrong in [
            "etcd=",
            "etcd=127.0.0.1:1",
            "etcd=name=web",
            "etcd=127.0.0.1,name=web",
            "etcd=127.0.0.1:1,,name=web",
            "etcd=127.0.0.1:1,name=",
            "etcd=127.0.0.1:1,name=a/b",
            "etcd=127.0.0.1:1,name=a,tls_dir=",
            "etcd=127.0.0.1:1,name=a,insecure=yes",
            "etcd=127.0.0.1:1,name=a,name=b",
            "etcd=127.0.0.1:1,name=a,127.0.0.1:2",
            "etcd=tcp:127.0.0.1:1,name=a",
        ] {
            assert!(wrong.parse::<ArbiterOption>().is_err(), "{wrong}");
        }
        let many = ["127.0.0.1:1"; MAX_MEMBERS + 1].join(",");
        assert!(format!("etcd={many},name=a").parse::<ArbiterOption>().is_err());
    }
}
