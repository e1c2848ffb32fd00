//! An etcd of three members on this host, with addresses of its own.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use tempfile::TempDir;
use vmft_backup::arbiter::EtcdPlace;
use vmft_logging_channel::transport::PeerAddress;

pub const MEMBERS: usize = 3;
const CLIENTS: u16 = 2379;
const PEERS: u16 = 2380;

/// How many there have been in this process.
static STARTED: AtomicU32 = AtomicU32::new(0);

/// Debian's etcd (`etcd-server`), or none: then whoever uses it fails.
pub struct Cluster {
    hosts: Vec<String>,
    members: Vec<Child>,
    directory: TempDir,
    has_tls: bool,
}

impl Cluster {
    /// Starts all members, and waits until they answer.
    pub fn start() -> Self {
        Self::start_with(false)
    }

    /// The same, with members that speak to nobody without a certificate of their authority.
    pub fn start_with_tls() -> Self {
        Self::start_with(true)
    }

    fn start_with(has_tls: bool) -> Self {
        // Addresses of the loopback network that nobody else takes, so that no port has to be found free.
        let number = STARTED.fetch_add(1, Ordering::Relaxed) + 1;
        let pid = std::process::id();
        let host = |member: usize| {
            let last = number as usize * MEMBERS + member;
            format!("127.{}.{}.{last}", 64 + (pid >> 8) % 128, pid % 256)
        };
        let hosts = (0..MEMBERS).map(host).collect();
        let directory = tempfile::tempdir().unwrap();
        let mut cluster = Self { hosts, members: Vec::new(), directory, has_tls };
        if has_tls {
            // The last one is not who it says.
            certify(&cluster.tls_dir(), &cluster.hosts[..MEMBERS - 1]);
        }
        cluster.members = (0..MEMBERS).map(|member| cluster.spawn(member)).collect();
        cluster.members.iter_mut().for_each(wait_ready);
        cluster
    }

    /// The certificates, if there are any.
    pub fn tls_dir(&self) -> PathBuf {
        self.directory.path().join("tls")
    }

    fn spawn(&self, member: usize) -> Child {
        let url = |host: &String, port| {
            let scheme = if self.has_tls && port == CLIENTS { "https" } else { "http" };
            format!("{scheme}://{host}:{port}")
        };
        let file =
            |option: &str, name| format!("--{option}={}", self.tls_dir().join(name).display());
        let tls = [
            "--client-cert-auth".to_owned(),
            file("trusted-ca-file", "ca.pem"),
            file("cert-file", "cert.pem"),
            file("key-file", "key.pem"),
        ];
        let peer = |(member, host): (usize, &String)| format!("m{member}={}", url(host, PEERS));
        let peers: Vec<_> = self.hosts.iter().enumerate().map(peer).collect();
        let host = &self.hosts[member];
        // It ends with the test, however that ends.
        let spawned = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "etcd"])
            .arg(format!("--name=m{member}"))
            .arg(format!("--data-dir={}", self.directory.path().join(member.to_string()).display()))
            .arg(format!("--listen-client-urls={}", url(host, CLIENTS)))
            .arg(format!("--advertise-client-urls={}", url(host, CLIENTS)))
            .arg(format!("--listen-peer-urls={}", url(host, PEERS)))
            .arg(format!("--initial-advertise-peer-urls={}", url(host, PEERS)))
            .arg(format!("--initial-cluster={}", peers.join(",")))
            .args(["--heartbeat-interval=50", "--election-timeout=1000"])
            .args(if self.has_tls { &tls[..] } else { &[] })
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        spawned.unwrap_or_else(|error| {
            panic!("there is no etcd here ({error}): Debian's package is etcd-server")
        })
    }

    /// Where a pair of this name has its arbiter.
    pub fn place(&self, name: &str) -> EtcdPlace {
        let member = |host| PeerAddress {
            tls_dir: self.has_tls.then(|| self.tls_dir()),
            ..PeerAddress::tcp(host, CLIENTS)
        };
        EtcdPlace { members: self.hosts.iter().map(member).collect(), name: name.to_owned() }
    }

    pub fn signal(&self, member: usize, signal: Signal) {
        let pid = i32::try_from(self.members[member].id()).unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
    }

    /// The member dies.
    pub fn kill(&mut self, member: usize) {
        self.members[member].kill().unwrap();
        self.members[member].wait().unwrap();
    }

    /// Starts members again that have died.
    pub fn start_again(&mut self, members: impl IntoIterator<Item = usize> + Clone) {
        for member in members.clone() {
            self.members[member] = self.spawn(member);
        }
        for member in members {
            wait_ready(&mut self.members[member]);
        }
    }

    /// Asks a member as an operator does; what it answers.
    pub fn post(&self, member: usize, path: &str, body: &str) -> String {
        let url = format!("http://{}:{CLIENTS}{path}", self.hosts[member]);
        let output = Command::new("curl").args(["-sS", &url, "-d", body]).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{said} {}", String::from_utf8_lossy(&output.stderr));
        said
    }

    /// An operator removes the pair called `web`: `vmft/web/` to `vmft/web0`, in base64.
    pub fn remove_web(&self) {
        let range = r#"{"key":"dm1mdC93ZWIv","range_end":"dm1mdC93ZWIw"}"#;
        assert!(self.post(0, "/v3/kv/deleterange", range).contains("deleted"));
    }
}

/// Makes an authority, and a certificate of it that is good for all members and for their clients.
fn certify(directory: &Path, hosts: &[String]) {
    let (authority_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = authority.self_signed(&authority_key).unwrap();
    let mut params = CertificateParams::new(hosts).unwrap();
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let issuer = Issuer::from_params(&authority, &authority_key);
    let certificate = params.signed_by(&key, &issuer).unwrap();
    std::fs::create_dir(directory).unwrap();
    let files =
        [("ca.pem", root.pem()), ("cert.pem", certificate.pem()), ("key.pem", key.serialize_pem())];
    for (name, content) in files {
        std::fs::write(directory.join(name), content).unwrap();
    }
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(directory.join("key.pem"), private).unwrap();
}

/// Waits until it has a leader, and answers. Whatever it says afterwards is read, so that it can be said.
fn wait_ready(member: &mut Child) {
    let mut lines = BufReader::new(member.stderr.take().unwrap()).lines().map_while(Result::ok);
    let said: Vec<_> =
        lines.by_ref().take_while(|line| !line.contains("ready to serve client")).collect();
    let Some(_) = lines.next() else { panic!("etcd does not begin: {}", said.join("\n")) };
    std::thread::spawn(move || lines.for_each(drop));
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for member in &mut self.members {
            // One that has ended needs no killing.
            let _ = member.kill();
            let _ = member.wait();
        }
    }
}
