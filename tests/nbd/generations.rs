//! Who may write to an export: what its server takes, whatever its clients believe.

use crate::server::{LIMIT, Server, run, succeed};
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use vmft_backup::arbiter::{
    Arbiter, ArbiterError, Call, Candidate, RemoteArbiter, RemoteError, Verdict,
};
use vmft_log::entry::{EntrySequence, Generation};
use vmft_nbd::rustls::ClientConfig;
use vmft_nbd::rustls::pki_types::ServerName;
use vmft_nbd::wire::EPERM;
use vmft_nbd::{ByteStream, Client, ClientError, Connect, Control, Request};

const SIZE: u64 = 1 << 20;

#[derive(Debug, Clone)]
struct At(PathBuf);

impl Connect for At {
    async fn connect(&self) -> io::Result<Box<dyn ByteStream>> {
        Ok(Box::new(tokio::net::UnixStream::connect(&self.0).await?))
    }

    fn tls(&self) -> io::Result<Option<(Arc<ClientConfig>, ServerName<'static>)>> {
        Ok(None)
    }
}

fn at(server: &Server) -> At {
    At(server.directory.path().join("disks"))
}

fn control(server: &Server) -> Control {
    Control::start(at(server), LIMIT).unwrap()
}

fn candidate(id: &str) -> Candidate {
    Candidate { id: id.into(), host: "here".into(), pid: 1, role: "primary".into() }
}

fn new_pair(server: &Server) -> RemoteArbiter {
    let arbiter = RemoteArbiter::create(control(server), "served".to_owned(), "web").unwrap();
    assert_eq!(arbiter.pair("fresh").unwrap(), "fresh");
    arbiter.share(&candidate("a")).unwrap();
    arbiter
}

fn join(server: &Server) -> RemoteArbiter {
    let arbiter = RemoteArbiter::open(control(server), "served".to_owned(), "web").unwrap();
    assert_eq!(arbiter.pair_name().unwrap(), "fresh");
    arbiter
}

fn write(client: &Client, generation: Option<u64>, byte: u8) -> Result<Vec<u8>, ClientError> {
    let bind = |generation| Call::Write { export: "web".to_owned(), generation }.encode();
    let binding = generation.map(bind);
    client.request(binding.as_deref(), Request::Write { offset: 0, data: [byte; 512].into() })
}

/// The first byte of the image.
fn first(server: &Server) -> u8 {
    let mut byte = [0];
    std::fs::File::open(server.image()).unwrap().read_exact_at(&mut byte, 0).unwrap();
    byte[0]
}

#[test]
fn a_generation_that_is_over_writes_no_more_on_connections_old_and_new() {
    let mut server = Server::of_size(SIZE);
    let a = new_pair(&server);
    assert_eq!(a.try_win(Generation(1), &candidate("a")).unwrap(), Verdict::Won);
    let open = || Client::open(at(&server), "web", Call::Life.encode(), |_| {}).unwrap();
    let (old, new, stranger) = (open(), open(), open());
    write(&old, Some(1), 1).unwrap();
    assert!(matches!(write(&new, Some(2), 2), Err(ClientError::Refused(_))), "it is not won yet");
    assert_eq!(write(&stranger, None, 3), Err(ClientError::Server(EPERM)), "a pair has it");
    let b = join(&server);
    b.share(&candidate("b")).unwrap();
    assert_eq!(b.try_win(Generation(2), &candidate("b")).unwrap(), Verdict::Won);
    // The old one's connection is as it was, and it has not been told.
    assert_eq!(write(&old, Some(1), 4), Err(ClientError::Server(EPERM)));
    write(&new, Some(2), 5).unwrap();
    assert_eq!(first(&server), 5);
    drop((old, new, stranger));
    // The same after the server has begun anew.
    server.kill();
    server.start_again();
    let again = Client::open(at(&server), "web", Call::Life.encode(), |_| {}).unwrap();
    assert!(matches!(write(&again, Some(1), 6), Err(ClientError::Refused(_))));
    write(&again, Some(2), 7).unwrap();
    assert_eq!(first(&server), 7);
    assert_eq!(a.winner(Generation(2)).unwrap().map(|who| who.id), Some("b".to_owned()));
}

#[test]
fn a_served_arbiter_decides_as_one_in_a_directory_does() {
    let mut server = Server::of_size(SIZE);
    let absent = RemoteArbiter::open(control(&server), "served".to_owned(), "web");
    assert!(matches!(absent, Err(RemoteError::Arbiter(ArbiterError::Absent { .. }))), "{absent:?}");
    let a = new_pair(&server);
    let other = RemoteArbiter::create(control(&server), "served".to_owned(), "web");
    assert!(matches!(other, Err(RemoteError::Arbiter(ArbiterError::InUse { .. }))), "{other:?}");
    let b = join(&server);
    assert_eq!((a.latest().unwrap(), b.winner(Generation(1)).unwrap()), (Generation(0), None));
    // A token is found by whoever asks the same server.
    let token = b.leave_token(&candidate("b")).unwrap();
    assert!(a.finds(&token).unwrap() && !a.finds("0").unwrap());
    b.take_token(&token);
    assert!(!a.finds(&token).unwrap());
    // One test-and-set, for ever.
    assert_eq!(b.announce(Generation(1), &candidate("b"), EntrySequence(7)).unwrap(), []);
    let others = a.announce(Generation(1), &candidate("a"), EntrySequence(5)).unwrap();
    assert_eq!(others, [EntrySequence(7)]);
    assert_eq!(b.try_win(Generation(1), &candidate("b")).unwrap(), Verdict::Won);
    for _ in 0..2 {
        let lost = Verdict::Lost { winner: candidate("b") };
        assert_eq!(a.try_win(Generation(1), &candidate("a")).unwrap(), lost);
        assert_eq!(b.try_win(Generation(1), &candidate("b")).unwrap(), Verdict::Won);
        assert_eq!(a.known_winner(Generation(1)).unwrap(), Some(candidate("b")));
        assert_eq!(a.latest().unwrap(), Generation(1));
        // Also with a server that has begun anew.
        server.kill();
        let away = b.latest();
        assert!(matches!(away, Err(ArbiterError::Unreachable { .. })), "{away:?}");
        server.start_again();
    }
    // What would be a path in the arbiter's directory is no side.
    let strange = a.try_win(Generation(2), &candidate("../x"));
    assert!(matches!(strange, Err(ArbiterError::Unreachable { .. })), "{strange:?}");
}

#[test]
fn a_pair_made_anew_in_the_place_of_another_is_not_taken_for_it() {
    let mut server = Server::of_size(SIZE);
    let a = new_pair(&server);
    assert_eq!(a.try_win(Generation(1), &candidate("a")).unwrap(), Verdict::Won);
    server.kill();
    std::fs::remove_dir_all(server.directory.path().join("web.img.vmft")).unwrap();
    server.start_again();
    let other = RemoteArbiter::create(control(&server), "served".to_owned(), "web").unwrap();
    assert_eq!(other.pair("another").unwrap(), "another");
    let winner = a.winner(Generation(2)).unwrap().unwrap();
    assert!(winner.to_string().contains("another pair"), "{winner}");
    let Verdict::Lost { .. } = a.try_win(Generation(2), &candidate("a")).unwrap() else {
        panic!("won in another pair")
    };
}

#[test]
fn a_strangers_client_reads_a_pairs_export_and_does_not_write_it() {
    let server = Server::of_size(SIZE);
    let write = || -> Vec<OsString> {
        let words = ["-f", "raw", "-c", "write -P 9 0 512"].map(OsString::from);
        words.into_iter().chain([server.uri()]).collect()
    };
    succeed("qemu-io", &write());
    assert_eq!(first(&server), 9, "nobody's yet: an image is filled like that");
    let a = new_pair(&server);
    assert_eq!(a.try_win(Generation(1), &candidate("a")).unwrap(), Verdict::Won);
    assert!(!run("qemu-io", &write()).status.success());
    assert!(succeed("nbdinfo", &[server.uri()]).contains("is_read_only: true"));
}
