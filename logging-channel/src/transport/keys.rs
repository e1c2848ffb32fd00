//! The certificates of a pair: an authority, and any number of sides that it certifies.
//!
//! ```text
//! DIR/authority/   ca.pem  ca-key.pem  issued  revoked.pem      stays where it was made
//! DIR/NAME/        ca.pem  cert.pem  key.pem  revoked.pem       goes to the host of that side
//! ```
//! `issued` is the authority's book: its name, then a line for each certificate it has made. From it the
//! list of revoked ones is made anew, for every side. Files are put in place whole; keys are their
//! owner's alone, and nothing that exists is overwritten but by its successor.

use super::clock;
use super::tls::{CA_FILE, CERTIFICATE_FILE, Date, KEY_FILE, REVOKED_FILE, SIDE_NAME, provider};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SerialNumber,
};
use std::fmt::{self, Write as _};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use time::OffsetDateTime;

const AUTHORITY: &str = "authority";
const AUTHORITY_KEY_FILE: &str = "ca-key.pem";
const BOOK_FILE: &str = "issued";
const BOOK_FIRST_WORD: &str = "vmft-keys-1";

/// The sides of a simple pair, for [`create_tls_directories`].
pub const TLS_SIDES: [&str; 2] = ["primary", "backup"];

const DAY: u64 = 86_400;
/// How long a side's certificate is valid unless something else is said, in days.
pub const DEFAULT_DAYS: u32 = 365;
/// How long an authority lasts, and the longest that a certificate may be valid, in days: ten years.
pub const MAX_DAYS: u32 = 3650;
/// Certificates are valid from so many seconds before they are made: hosts' clocks differ.
const LEEWAY: u64 = DAY;
/// Longest name of a side, in bytes.
const MAX_NAME: usize = 64;

/// Why certificates could not be made or revoked.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// A directory or file cannot be made or read.
    #[error("{what} {}", path.display())]
    File {
        /// What was being done.
        what: &'static str,
        /// Which one.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// The authority's book makes no sense.
    #[error("line {line} of {} cannot be read", path.display())]
    Book {
        /// The book.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
    },
    /// A certificate cannot be made.
    #[error("making a certificate")]
    Certificate(#[from] rcgen::Error),
    /// There is a side of that name, or was one.
    #[error("there is a side {0} already; each has a name of its own, also after its end")]
    Exists(SideName),
    /// There is no side of that name.
    #[error("there is no side {0}")]
    Unknown(SideName),
    /// The side was revoked.
    #[error("the side {0} was revoked, and stays so; add one of another name")]
    Revoked(SideName),
}

/// The name of a side: of its directory, and in its certificate.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SideName(String);

/// A text that names no side.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no name of a side: 1 to {MAX_NAME} letters, digits, dots and dashes, a letter or digit first, and not `{AUTHORITY}`"
)]
pub struct InvalidSideName(String);

impl FromStr for SideName {
    type Err = InvalidSideName;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let good = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
        let first = name.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !first || name.len() > MAX_NAME || !name.chars().all(good) || name == AUTHORITY {
            return Err(InvalidSideName(name.chars().take(MAX_NAME).collect()));
        }
        Ok(Self(name.to_owned()))
    }
}

impl fmt::Display for SideName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A certificate that the authority has made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// Its number, in hexadecimal.
    serial: String,
    /// Whose it is.
    pub side: SideName,
    /// When it expires.
    pub expires: Date,
    /// When it was revoked, if it was.
    pub revoked: Option<Date>,
}

impl Issued {
    fn line(&self) -> String {
        let Self { serial, side, expires, revoked } = self;
        let revoked = revoked.map_or_else(|| "-".to_owned(), |date| date.0.to_string());
        format!("{serial} {side} {} {revoked}", expires.0)
    }

    fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split(' ').collect();
        let [serial, side, expires, revoked] = words[..] else { return None };
        let date = |text: &str| text.parse().ok().map(Date);
        let revoked = if revoked == "-" { None } else { Some(date(revoked)?) };
        let is_serial = serial.len() == 32 && serial.bytes().all(|b| b.is_ascii_hexdigit());
        let serial = is_serial.then(|| serial.to_owned())?;
        Some(Self { serial, side: side.parse().ok()?, expires: date(expires)?, revoked })
    }

    fn serial_number(&self) -> SerialNumber {
        let number = u128::from_str_radix(&self.serial, 16).expect("32 hexadecimal digits");
        SerialNumber::from_slice(&number.to_be_bytes())
    }
}

/// The certificates of a pair, in a directory.
#[derive(Debug)]
pub struct KeyStore {
    dir: PathBuf,
    /// Names the authority.
    authority: String,
    key: KeyPair,
    issued: Vec<Issued>,
}

fn file_error<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> KeysError + 'a {
    move |source| KeysError::File { what, path: path.to_owned(), source }
}

/// 16 random bytes, in hexadecimal; as a number, positive and not zero.
fn fresh_number() -> String {
    let mut bytes = [0; 16];
    provider().secure_random.fill(&mut bytes).expect("the host has randomness");
    bytes[0] = bytes[0] & 0x7F | 0x40;
    format!("{:032x}", u128::from_be_bytes(bytes))
}

fn moment(seconds: u64) -> OffsetDateTime {
    i64::try_from(seconds)
        .ok()
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

impl KeyStore {
    /// Opens the directory, or makes a new authority there.
    ///
    /// # Errors
    /// [`KeysError`].
    pub fn open_or_create(dir: &Path) -> Result<Self, KeysError> {
        if dir.join(AUTHORITY).exists() { Self::open(dir) } else { Self::create(dir) }
    }

    /// Opens the directory of an authority there is.
    ///
    /// # Errors
    /// [`KeysError`].
    pub fn open(dir: &Path) -> Result<Self, KeysError> {
        let place = dir.join(AUTHORITY);
        let read = |name: &str| {
            let path = place.join(name);
            fs::read_to_string(&path).map_err(file_error("reading", &path))
        };
        let key = KeyPair::from_pem(&read(AUTHORITY_KEY_FILE)?)?;
        let book = read(BOOK_FILE)?;
        let path = place.join(BOOK_FILE);
        let damaged = |line| KeysError::Book { path: path.clone(), line };
        let mut lines = book.lines();
        let authority = match lines.next().and_then(|first| first.split_once(' ')) {
            Some((BOOK_FIRST_WORD, authority)) => authority.to_owned(),
            _ => return Err(damaged(1)),
        };
        let numbered = (2..).zip(lines);
        let issued = numbered.map(|(line, text)| Issued::parse(text).ok_or_else(|| damaged(line)));
        let issued = issued.collect::<Result<_, _>>()?;
        Ok(Self { dir: dir.to_owned(), authority, key, issued })
    }

    fn create(dir: &Path) -> Result<Self, KeysError> {
        let (authority, key) = (fresh_number(), KeyPair::generate()?);
        let store = Self { dir: dir.to_owned(), authority, key, issued: Vec::new() };
        let place = dir.join(AUTHORITY);
        make_directory(dir, true)?;
        make_directory(&place, false)?;
        let certificate = store.authority_params().self_signed(&store.key)?;
        new_file(&place.join(CA_FILE), &certificate.pem())?;
        new_file(&place.join(AUTHORITY_KEY_FILE), &store.key.serialize_pem())?;
        store.write_book()?;
        Ok(store)
    }

    fn authority_params(&self) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        // Certificates name their issuer: no two authorities have the same name.
        params.distinguished_name.push(DnType::CommonName, format!("vmft {}", self.authority));
        let now = clock::today().as_secs();
        params.not_before = moment(now.saturating_sub(LEEWAY));
        params.not_after = moment(now + u64::from(MAX_DAYS) * DAY);
        params
    }

    /// Certifies a key for a side. The certificate is in the book when it exists.
    fn certify(
        &mut self,
        side: &SideName,
        key: &KeyPair,
        days: u32,
    ) -> Result<Certificate, KeysError> {
        let mut params = CertificateParams::new(vec![SIDE_NAME.to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, format!("vmft {side}"));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let now = clock::today().as_secs();
        let expires = now + u64::from(days.min(MAX_DAYS)) * DAY;
        params.not_before = moment(now.saturating_sub(LEEWAY));
        params.not_after = moment(expires);
        let issued = Issued {
            serial: fresh_number(),
            side: side.clone(),
            expires: Date(expires),
            revoked: None,
        };
        params.serial_number = Some(issued.serial_number());
        let authority = self.authority_params();
        let certificate = params.signed_by(key, &Issuer::from_params(&authority, &self.key))?;
        self.issued.push(issued);
        self.write_book()?;
        Ok(certificate)
    }

    /// Makes a directory with a key and a certificate for a new side.
    ///
    /// # Errors
    /// [`KeysError`]; existing files are not touched.
    pub fn add(&mut self, side: &SideName, days: u32) -> Result<PathBuf, KeysError> {
        let place = self.place(side);
        if self.newest(side).is_some() || place.exists() {
            return Err(KeysError::Exists(side.clone()));
        }
        let key = KeyPair::generate()?;
        let certificate = self.certify(side, &key, days)?;
        let authority = self.dir.join(AUTHORITY).join(CA_FILE);
        let authority =
            fs::read_to_string(&authority).map_err(file_error("reading", &authority))?;
        make_directory(&place, false)?;
        new_file(&place.join(KEY_FILE), &key.serialize_pem())?;
        new_file(&place.join(CERTIFICATE_FILE), &certificate.pem())?;
        new_file(&place.join(CA_FILE), &authority)?;
        new_file(&place.join(REVOKED_FILE), &self.revocation_list()?)?;
        Ok(place)
    }

    /// Certifies a side's key again, from today. Its older certificates are good until they expire, so
    /// that there is time to carry the new one to its host.
    ///
    /// # Errors
    /// [`KeysError`].
    pub fn renew(&mut self, side: &SideName, days: u32) -> Result<PathBuf, KeysError> {
        self.living(side)?;
        let place = self.place(side);
        let path = place.join(KEY_FILE);
        let key = fs::read_to_string(&path).map_err(file_error("reading", &path))?;
        let certificate = self.certify(side, &KeyPair::from_pem(&key)?, days)?;
        replace_file(&place.join(CERTIFICATE_FILE), &certificate.pem())?;
        Ok(place.join(CERTIFICATE_FILE))
    }

    /// Revokes all certificates of a side, and tells the directories of all sides.
    ///
    /// # Errors
    /// [`KeysError`].
    pub fn revoke(&mut self, side: &SideName) -> Result<(), KeysError> {
        self.living(side)?;
        let now = Date(clock::today().as_secs());
        for issued in self.issued.iter_mut().filter(|issued| issued.side == *side) {
            issued.revoked = Some(now);
        }
        self.write_book()?;
        let list = self.revocation_list()?;
        for side in self.sides() {
            let place = self.place(&side.side);
            // One that was moved to its host is not here any more.
            if place.exists() {
                replace_file(&place.join(REVOKED_FILE), &list)?;
            }
        }
        Ok(())
    }

    /// The newest certificate of each side.
    pub fn sides(&self) -> Vec<&Issued> {
        let newest = |index: usize, issued: &Issued| {
            self.issued[index + 1..].iter().all(|later| later.side != issued.side)
        };
        let all = self.issued.iter().enumerate();
        all.filter(|(index, issued)| newest(*index, issued)).map(|(_, issued)| issued).collect()
    }

    fn newest(&self, side: &SideName) -> Option<&Issued> {
        self.issued.iter().rev().find(|issued| issued.side == *side)
    }

    fn living(&self, side: &SideName) -> Result<(), KeysError> {
        match self.newest(side) {
            None => Err(KeysError::Unknown(side.clone())),
            Some(Issued { revoked: Some(_), .. }) => Err(KeysError::Revoked(side.clone())),
            Some(_) => Ok(()),
        }
    }

    /// A side's directory.
    pub fn place(&self, side: &SideName) -> PathBuf {
        self.dir.join(&side.0)
    }

    /// The list of what is revoked, signed. Each has a higher number than those before.
    fn revocation_list(&self) -> Result<String, KeysError> {
        let revoked = self.issued.iter().filter_map(|issued| {
            Some(RevokedCertParams {
                serial_number: issued.serial_number(),
                revocation_time: moment(issued.revoked?.0),
                reason_code: None,
                invalidity_date: None,
            })
        });
        let now = clock::today().as_secs();
        let revoked_certs: Vec<_> = revoked.collect();
        let params = CertificateRevocationListParams {
            this_update: moment(now.saturating_sub(LEEWAY)),
            next_update: moment(now + u64::from(MAX_DAYS) * DAY),
            crl_number: SerialNumber::from(revoked_certs.len() as u64 + 1),
            issuing_distribution_point: None,
            revoked_certs,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let authority = self.authority_params();
        Ok(params.signed_by(&Issuer::from_params(&authority, &self.key))?.pem()?)
    }

    fn write_book(&self) -> Result<(), KeysError> {
        let place = self.dir.join(AUTHORITY);
        let mut text = format!("{BOOK_FIRST_WORD} {}\n", self.authority);
        for issued in &self.issued {
            writeln!(text, "{}", issued.line()).expect("a text takes what is written to it");
        }
        replace_file(&place.join(BOOK_FILE), &text)?;
        replace_file(&place.join(REVOKED_FILE), &self.revocation_list()?)
    }
}

/// Makes `DIR/primary` and `DIR/backup`, for use as `tls_dir`.
///
/// # Errors
/// [`KeysError`]; existing files are not touched.
pub fn create_tls_directories(dir: &Path) -> Result<(), KeysError> {
    let mut store = KeyStore::open_or_create(dir)?;
    for side in TLS_SIDES {
        store.add(&side.parse().expect("a good name"), DEFAULT_DAYS)?;
    }
    Ok(())
}

fn make_directory(path: &Path, may_exist: bool) -> Result<(), KeysError> {
    let made = DirBuilder::new().recursive(may_exist).mode(0o700).create(path);
    made.map_err(file_error("creating", path))
}

fn write_to(mut file: File, content: &str) -> io::Result<()> {
    file.write_all(content.as_bytes())?;
    file.sync_all()
}

fn new_file(path: &Path, content: &str) -> Result<(), KeysError> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|file| write_to(file, content)).map_err(file_error("creating", path))
}

/// Puts a file in the place of another, whole.
fn replace_file(path: &Path, content: &str) -> Result<(), KeysError> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(format!(".new-{}", std::process::id()));
    let fresh = PathBuf::from(fresh);
    new_file(&fresh, content)?;
    fs::rename(&fresh, path).map_err(file_error("replacing", path))
}
