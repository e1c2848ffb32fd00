//! Mutual TLS: both sides prove that their certificate was made together with the other's.
//!
//! A side's directory has `ca.pem` (who is trusted), `cert.pem` and `key.pem` (who it is).
//! [`create_tls_directories`] makes one for each side of a pair. Every certificate bears the
//! same name, because either side may become primary and listen, on any host.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The name in every certificate.
const SIDE_NAME: &str = "vmft-side";

/// The sides that [`create_tls_directories`] makes a directory for.
pub const TLS_SIDES: [&str; 2] = ["primary", "backup"];

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
    /// The certificates do not fit together.
    #[error("the certificates in {} cannot be used: {problem}", dir.display())]
    Unusable {
        /// The directory.
        dir: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A directory or file cannot be made. Existing ones are never overwritten.
    #[error("creating {}", path.display())]
    Create {
        /// Which one.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// A certificate cannot be made.
    #[error("making a certificate")]
    Certificate(#[from] rcgen::Error),
}

pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// What a side's directory holds.
struct Credentials {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

fn load(dir: &Path) -> Result<Credentials, TlsError> {
    let certificates = |name: &str| {
        let path = dir.join(name);
        CertificateDer::pem_file_iter(&path)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|error| TlsError::File { path, problem: error.to_string() })
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates("ca.pem")? {
        roots.add(certificate).map_err(|error| unusable(dir, error))?;
    }
    let path = dir.join("key.pem");
    let key = PrivateKeyDer::from_pem_file(&path)
        .map_err(|error| TlsError::File { path, problem: error.to_string() })?;
    Ok(Credentials { roots: Arc::new(roots), chain: certificates("cert.pem")?, key })
}

fn unusable(dir: &Path, problem: impl ToString) -> TlsError {
    TlsError::Unusable { dir: dir.to_owned(), problem: problem.to_string() }
}

/// The configuration of a side that listens, from its directory.
pub(super) fn server_config(dir: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let Credentials { roots, chain, key } = load(dir)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
        .build()
        .map_err(|error| unusable(dir, error))?;
    ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .and_then(|builder| {
            builder.with_client_cert_verifier(verifier).with_single_cert(chain, key)
        })
        .map(Arc::new)
        .map_err(|error| unusable(dir, error))
}

/// The configuration of a side that connects, from its directory.
pub(super) fn client_config(dir: &Path) -> Result<Arc<ClientConfig>, TlsError> {
    let Credentials { roots, chain, key } = load(dir)?;
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

/// Makes `DIR/primary` and `DIR/backup`, each with `ca.pem`, `cert.pem` and `key.pem`, for use as
/// `tls_dir`. The key that signs them is not kept: for other sides, make new directories.
///
/// # Errors
/// [`TlsError`]; existing files are not touched.
pub fn create_tls_directories(dir: &Path) -> Result<(), TlsError> {
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    authority.distinguished_name.push(DnType::CommonName, "vmft pair");
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    for side in TLS_SIDES {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![SIDE_NAME.to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, format!("vmft {side}"));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &authority)?;
        let side = dir.join(side);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&side)
            .map_err(|source| TlsError::Create { path: side.clone(), source })?;
        create_file(&side.join("ca.pem"), &authority.pem())?;
        create_file(&side.join("cert.pem"), &certificate.pem())?;
        create_file(&side.join("key.pem"), &key.serialize_pem())?;
    }
    Ok(())
}

fn create_file(path: &Path, content: &str) -> Result<(), TlsError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(content.as_bytes()))
        .map_err(|source| TlsError::Create { path: path.to_owned(), source })
}
