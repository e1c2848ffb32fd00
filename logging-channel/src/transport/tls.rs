//! Mutual TLS: both sides prove that the same authority has certified them, and has not revoked it.
//!
//! A side's directory has `ca.pem` (who is trusted), `cert.pem` and `key.pem` (who it is), and
//! `revoked.pem` (who is trusted no more). [`super::KeyStore`] makes one for each side. Every certificate
//! bears the same name for TLS, because any side may become primary and listen, on any host.
//!
//! The files are read again when they have changed: a certificate that was renewed, or a list that
//! grew, counts from the next connection on.

use super::clock;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, Error as RustlsError, RootCertStore,
    ServerConfig,
};
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmft_threads::Mutex;

/// The name in every certificate.
pub(super) const SIDE_NAME: &str = "vmft-side";

/// The files of a side's directory.
pub(super) const CA_FILE: &str = "ca.pem";
pub(super) const CERTIFICATE_FILE: &str = "cert.pem";
pub(super) const KEY_FILE: &str = "key.pem";
pub(super) const REVOKED_FILE: &str = "revoked.pem";

/// Why TLS could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file of the directory cannot be read or is no PEM file.
    #[error("reading {}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Others than its owner may read the key.
    #[error("{} may be read by others (mode {mode:o}): chmod 600 it, and renew the key if they did", path.display())]
    OpenKey {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// This side's own certificate is no longer valid.
    #[error("the certificate in {} has expired on {since}: `vmft keys renew` makes another", dir.display())]
    Expired {
        /// The directory.
        dir: PathBuf,
        /// Since when.
        since: Date,
    },
    /// This side's own certificate was revoked.
    #[error("the certificate in {} was revoked", dir.display())]
    Revoked {
        /// The directory.
        dir: PathBuf,
    },
    /// The certificates do not fit together.
    #[error("the certificates in {} cannot be used: {problem}", dir.display())]
    Unusable {
        /// The directory.
        dir: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

/// A peer with whom there is no channel because of a certificate that was good once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateRefusal {
    /// The peer's has expired.
    #[error("the peer's certificate has expired{}: renew it with `vmft keys renew`", on(.since))]
    Expired {
        /// Since when, if that is known.
        since: Option<Date>,
    },
    /// The peer's was revoked.
    #[error("the peer's certificate was revoked")]
    Revoked,
    /// The peer takes this side's for expired.
    #[error(
        "the peer takes this side's certificate for expired: compare the hosts' clocks, or renew it with `vmft keys renew`"
    )]
    OursExpired,
    /// The peer knows this side's as revoked.
    #[error("the peer knows this side's certificate as revoked")]
    OursRevoked,
}

fn on(since: &Option<Date>) -> String {
    since.map_or_else(String::new, |since| format!(" on {since}"))
}

impl CertificateRefusal {
    /// What an error of a connection says about certificates, if it does.
    pub(super) fn of(error: &io::Error) -> Option<Self> {
        let error = error.get_ref()?.downcast_ref::<RustlsError>()?;
        Some(match error {
            RustlsError::InvalidCertificate(CertificateError::ExpiredContext {
                not_after, ..
            }) => Self::Expired { since: Some(Date(not_after.as_secs())) },
            RustlsError::InvalidCertificate(CertificateError::Expired) => {
                Self::Expired { since: None }
            }
            RustlsError::InvalidCertificate(CertificateError::Revoked) => Self::Revoked,
            RustlsError::AlertReceived(AlertDescription::CertificateExpired) => Self::OursExpired,
            RustlsError::AlertReceived(AlertDescription::CertificateRevoked) => Self::OursRevoked,
            _ => return None,
        })
    }

    /// True if it is the peer's certificate that is at fault, not this side's.
    pub const fn is_of_the_peer(&self) -> bool {
        matches!(self, Self::Expired { .. } | Self::Revoked)
    }
}

/// A day and a time, in seconds since 1970, in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Date(pub u64);

impl fmt::Display for Date {
    /// As `2027-03-31 12:00 UTC`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, minutes) = (self.0 / 86_400, self.0 % 86_400 / 60);
        // Civil date from a count of days, in years that begin in March (Hinnant's algorithm).
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        let year = year_of_era + era * 400 + u64::from(month <= 2);
        write!(f, "{year:04}-{month:02}-{day:02} {:02}:{:02} UTC", minutes / 60, minutes % 60)
    }
}

pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// What a side's directory holds.
struct Credentials {
    roots: Arc<RootCertStore>,
    revoked: Vec<CertificateRevocationListDer<'static>>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

fn file_error(path: &Path, problem: impl ToString) -> TlsError {
    TlsError::File { path: path.to_owned(), problem: problem.to_string() }
}

fn pem_file<T: PemObject>(path: &Path) -> Result<Vec<T>, TlsError> {
    let items = T::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match items.map_err(|error| file_error(path, error))? {
        items if items.is_empty() => Err(file_error(path, "there is nothing in it")),
        items => Ok(items),
    }
}

fn roots(dir: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in pem_file(&dir.join(CA_FILE))? {
        roots.add(certificate).map_err(|error| unusable(dir, error))?;
    }
    Ok(Arc::new(roots))
}

fn private_key(dir: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let path = dir.join(KEY_FILE);
    let mode = fs::metadata(&path).map_err(|error| file_error(&path, error))?.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(TlsError::OpenKey { path, mode });
    }
    PrivateKeyDer::from_pem_file(&path).map_err(|error| file_error(&path, error))
}

fn load(dir: &Path) -> Result<Credentials, TlsError> {
    let (roots, key) = (roots(dir)?, private_key(dir)?);
    let credentials = Credentials {
        roots,
        revoked: pem_file(&dir.join(REVOKED_FILE))?,
        chain: pem_file(&dir.join(CERTIFICATE_FILE))?,
        key,
    };
    credentials.check_own(dir, clock::today())?;
    Ok(credentials)
}

fn unusable(dir: &Path, problem: impl ToString) -> TlsError {
    TlsError::Unusable { dir: dir.to_owned(), problem: problem.to_string() }
}

impl Credentials {
    fn verifier(&self, dir: &Path) -> Result<Arc<WebPkiServerVerifier>, TlsError> {
        WebPkiServerVerifier::builder_with_provider(Arc::clone(&self.roots), provider())
            .with_crls(self.revoked.iter().cloned())
            .build()
            .map_err(|error| unusable(dir, error))
    }

    /// Looks at this side's own certificate as its peers will.
    fn check_own(&self, dir: &Path, now: UnixTime) -> Result<(), TlsError> {
        let (own, between) = self.chain.split_first().expect("a file with something in it");
        let verified = self.verifier(dir)?.verify_server_cert(own, between, &side_name(), &[], now);
        let dir = dir.to_owned();
        match verified {
            Ok(_) => Ok(()),
            Err(RustlsError::InvalidCertificate(CertificateError::ExpiredContext {
                not_after,
                ..
            })) => Err(TlsError::Expired { dir, since: Date(not_after.as_secs()) }),
            Err(RustlsError::InvalidCertificate(CertificateError::Revoked)) => {
                Err(TlsError::Revoked { dir })
            }
            Err(other) => Err(unusable(&dir, other)),
        }
    }
}

/// The configuration of a side that listens, from its directory.
fn server_config(dir: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let Credentials { roots, revoked, chain, key } = load(dir)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
        .with_crls(revoked)
        .build()
        .map_err(|error| unusable(dir, error))?;
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .and_then(|builder| {
            builder.with_client_cert_verifier(verifier).with_single_cert(chain, key)
        });
    let mut config = config.map_err(|error| unusable(dir, error))?;
    // A ticket would let a side in again without another look at its certificate.
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// The configuration of a side that connects, from its directory.
pub(super) fn client_config(dir: &Path) -> Result<Arc<ClientConfig>, TlsError> {
    let credentials = load(dir)?;
    let verifier = credentials.verifier(dir)?;
    let Credentials { chain, key, .. } = credentials;
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .and_then(|builder| {
            builder.with_webpki_verifier(verifier).with_client_auth_cert(chain, key)
        })
        .map(Arc::new)
        .map_err(|error| unusable(dir, error))
}

/// The configuration of a client of somebody else's service, by `ca.pem`, `cert.pem` and `key.pem` of a
/// directory: certificates of the service's own authority, which nobody here revokes.
pub(super) fn service_config(dir: &Path) -> Result<Arc<ClientConfig>, TlsError> {
    let (roots, key) = (roots(dir)?, private_key(dir)?);
    let chain = pem_file(&dir.join(CERTIFICATE_FILE))?;
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .and_then(|builder| builder.with_root_certificates(roots).with_client_auth_cert(chain, key))
        .map(Arc::new)
        .map_err(|error| unusable(dir, error))
}

/// The name a connecting side expects.
pub(super) fn side_name() -> ServerName<'static> {
    ServerName::try_from(SIDE_NAME).expect("a good DNS name")
}

/// How a file is told from what it was before: device, inode, length, time of change.
type Stamp = [(u64, u64, u64, i64, i64); 4];

fn stamp(dir: &Path) -> Result<Stamp, TlsError> {
    let mut stamp = Stamp::default();
    for (place, name) in stamp.iter_mut().zip([CA_FILE, CERTIFICATE_FILE, KEY_FILE, REVOKED_FILE]) {
        let path = dir.join(name);
        let found = fs::metadata(&path).map_err(|error| file_error(&path, error))?;
        *place = (found.dev(), found.ino(), found.len(), found.mtime(), found.mtime_nsec());
    }
    Ok(stamp)
}

/// Who a listening side is, and whom it trusts, as its directory says now.
#[derive(Debug)]
pub struct ServerIdentity {
    dir: PathBuf,
    read: Mutex<(Stamp, Arc<ServerConfig>)>,
}

impl ServerIdentity {
    /// Reads the directory.
    pub(super) fn load(dir: &Path) -> Result<Arc<Self>, TlsError> {
        let read = Mutex::new((stamp(dir)?, server_config(dir)?));
        Ok(Arc::new(Self { dir: dir.to_owned(), read }))
    }

    /// What the directory says now. One that cannot be read any more trusts nobody.
    ///
    /// # Errors
    /// [`TlsError`]
    ///
    /// # Panics
    /// If another thread has panicked in here.
    pub fn config(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let now = stamp(&self.dir)?;
        let mut read = self.read.lock();
        if read.0 != now {
            *read = (now, server_config(&self.dir)?);
        }
        Ok(Arc::clone(&read.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn an_expired_certificate_says_since_when_and_what_to_do() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        super::super::create_tls_directories(dir.path()).expect("made");
        let side = dir.path().join("backup");
        let credentials = load(&side).expect("good today");
        let in_days = |days: u64| {
            UnixTime::since_unix_epoch(Duration::from_secs(
                clock::today().as_secs() + days * 86_400,
            ))
        };
        credentials.check_own(&side, in_days(364)).expect("good for a year");
        let expired = credentials.check_own(&side, in_days(366)).expect_err("over");
        let TlsError::Expired { since, .. } = &expired else { panic!("{expired}") };
        let text = expired.to_string();
        assert!(text.contains(&since.to_string()) && text.contains("vmft keys renew"), "{text}");
    }

    #[test]
    fn what_a_peer_says_of_certificates_is_told_in_words() {
        let moment = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let (time, not_after) = (moment(951_782_400), moment(951_782_399));
        let expired = CertificateError::ExpiredContext { time, not_after };
        for (error, text) in [
            (
                RustlsError::InvalidCertificate(expired),
                "the peer's certificate has expired on 2000-02-28 23:59 UTC: renew it with `vmft keys \
                 renew`",
            ),
            (
                RustlsError::InvalidCertificate(CertificateError::Revoked),
                "the peer's certificate was revoked",
            ),
            (
                RustlsError::AlertReceived(AlertDescription::CertificateRevoked),
                "the peer knows this side's certificate as revoked",
            ),
        ] {
            let error = io::Error::new(io::ErrorKind::InvalidData, error);
            let refusal = CertificateRefusal::of(&error).expect("about certificates");
            assert_eq!(refusal.to_string(), text);
        }
        assert_eq!(CertificateRefusal::of(&io::Error::other("something else")), None);
    }

    #[test]
    fn dates_are_written_as_people_read_them() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00 UTC"),
            (951_782_399, "2000-02-28 23:59 UTC"),
            (951_782_400, "2000-02-29 00:00 UTC"),
            (1_798_761_599, "2026-12-31 23:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00 UTC"),
        ] {
            assert_eq!(Date(seconds).to_string(), text);
        }
    }
}
