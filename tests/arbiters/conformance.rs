//! What every arbiter does, whatever it is made of.

use crate::cluster::{Cluster, MEMBERS};
use crate::server::Server;
use nix::sys::signal::Signal;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};
use vmft_backup::arbiter::{
    Arbiter, ArbiterError, Candidate, DirectoryArbiter, EtcdArbiter, RemoteArbiter, RemoteError,
    Verdict,
};
use vmft_fuzzing::Random;
use vmft_log::entry::{EntrySequence, Generation};
use vmft_nbd::rustls::ClientConfig;
use vmft_nbd::rustls::pki_types::ServerName;
use vmft_nbd::{ByteStream, Connect, Control};

const LIMIT: Duration = Duration::from_secs(120);
/// Generations that several sides ask for at once, and how many of those there are.
const RACES: u64 = 20;
const SIDES: usize = 4;

type Opened = Result<Arc<dyn Arbiter>, ArbiterError>;

/// A kind of arbiter, in a place of its own for one pair.
trait Kind {
    fn create(&self) -> Opened;
    fn open(&self) -> Opened;
    /// Whatever keeps it dies, and begins anew.
    fn restart(&mut self);
    /// It cannot be reached any more.
    fn go_away(&mut self);
    fn come_back(&mut self);
    /// An operator takes the pair away.
    fn remove(&mut self);
}

struct InDirectory(tempfile::TempDir);

impl InDirectory {
    fn path(&self) -> PathBuf {
        self.0.path().join("arbiter")
    }

    fn away(&self) -> PathBuf {
        self.0.path().join("away")
    }
}

impl Kind for InDirectory {
    fn create(&self) -> Opened {
        Ok(Arc::new(DirectoryArbiter::create(&self.path())?))
    }
    fn open(&self) -> Opened {
        Ok(Arc::new(DirectoryArbiter::open(&self.path())?))
    }
    fn restart(&mut self) {
        // A directory that was unmounted and mounted again.
        self.go_away();
        self.come_back();
    }
    fn go_away(&mut self) {
        std::fs::rename(self.path(), self.away()).unwrap();
    }
    fn come_back(&mut self) {
        std::fs::rename(self.away(), self.path()).unwrap();
    }
    fn remove(&mut self) {
        std::fs::remove_dir_all(self.path()).unwrap();
    }
}

#[derive(Debug)]
struct At(PathBuf);

impl Connect for At {
    async fn connect(&self) -> io::Result<Box<dyn ByteStream>> {
        Ok(Box::new(tokio::net::UnixStream::connect(&self.0).await?))
    }
    fn tls(&self) -> io::Result<Option<(Arc<ClientConfig>, ServerName<'static>)>> {
        Ok(None)
    }
}

/// The arbiter of a served disk.
struct OnServer(Server);

impl OnServer {
    fn control(&self) -> Control {
        Control::start(At(self.0.directory.path().join("disks")), LIMIT).unwrap()
    }
}

fn opened(opened: Result<RemoteArbiter, RemoteError>) -> Opened {
    match opened {
        Ok(arbiter) => Ok(Arc::new(arbiter)),
        Err(RemoteError::Arbiter(error)) => Err(error),
        Err(other) => panic!("{other}"),
    }
}

impl Kind for OnServer {
    fn create(&self) -> Opened {
        opened(RemoteArbiter::create(self.control(), "served".to_owned(), "web"))
    }
    fn open(&self) -> Opened {
        opened(RemoteArbiter::open(self.control(), "served".to_owned(), "web"))
    }
    fn restart(&mut self) {
        self.0.kill();
        self.0.start_again();
    }
    fn go_away(&mut self) {
        self.0.kill();
    }
    fn come_back(&mut self) {
        self.0.start_again();
    }
    fn remove(&mut self) {
        self.0.kill();
        std::fs::remove_dir_all(self.0.directory.path().join("web.img.vmft")).unwrap();
        self.0.start_again();
    }
}

impl Kind for Cluster {
    fn create(&self) -> Opened {
        Ok(Arc::new(EtcdArbiter::create(&self.place("web"))?))
    }
    fn open(&self) -> Opened {
        Ok(Arc::new(EtcdArbiter::open(&self.place("web"))?))
    }
    fn restart(&mut self) {
        (0..MEMBERS).for_each(|member| self.kill(member));
        self.start_again(0..MEMBERS);
    }
    fn go_away(&mut self) {
        // The one that is left has no majority.
        (1..MEMBERS).for_each(|member| self.signal(member, Signal::SIGSTOP));
    }
    fn come_back(&mut self) {
        (1..MEMBERS).for_each(|member| self.signal(member, Signal::SIGCONT));
    }
    fn remove(&mut self) {
        self.remove_web();
    }
}

fn candidate(id: impl ToString) -> Candidate {
    Candidate { id: id.to_string(), host: "here".into(), pid: 1, role: "backup".into() }
}

/// Asks again, as sides do, while there is no answer.
fn until_answered<T>(mut ask: impl FnMut() -> Result<T, ArbiterError>) -> T {
    let began = Instant::now();
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(error) => assert!(began.elapsed() < LIMIT, "{error}"),
        }
    }
}

fn lost_to(verdict: &Verdict) -> &Candidate {
    let Verdict::Lost { winner } = verdict else { panic!("won") };
    winner
}

#[test]
fn a_directory_is_an_arbiter() {
    conforms(&mut InDirectory(tempfile::tempdir().unwrap()));
}

#[test]
fn a_server_of_disks_is_an_arbiter() {
    conforms(&mut OnServer(Server::of_size(1 << 20)));
}

#[test]
fn an_etcd_is_an_arbiter() {
    conforms(&mut Cluster::start());
}

fn conforms(kind: &mut dyn Kind) {
    belongs_to_one_pair(kind);
    let (a, b) = (until_answered(|| kind.create()), kind.open().unwrap());
    for (side, id) in [(&a, "a"), (&b, "b")] {
        assert_eq!(side.pair("another").unwrap(), "pair", "it is the same pair's as before");
        side.share(&candidate(id)).unwrap();
    }
    passes_word(&*a, &*b);
    let latest = decides_once(kind);
    stays_decided(kind, &a, &b, latest);
    fences_a_pair_that_was_removed(kind, &a);
}

fn belongs_to_one_pair(kind: &dyn Kind) {
    let absent = kind.open();
    assert!(matches!(absent, Err(ArbiterError::Absent { .. })), "{absent:?}");
    let a = kind.create().unwrap();
    assert_eq!(a.pair("pair").unwrap(), "pair");
    assert_eq!(a.pair("late").unwrap(), "pair");
    a.share(&candidate("a")).unwrap();
    let taken = || {
        let other = kind.create();
        assert!(matches!(other, Err(ArbiterError::InUse { .. })), "{other:?}");
    };
    taken();
    // A backup that waits has no share, one that has joined does.
    let b = kind.open().unwrap();
    assert_eq!(b.pair_name().unwrap(), "pair");
    b.share(&candidate("b")).unwrap();
    drop(a);
    taken();
    assert_eq!((b.latest().unwrap(), b.winner(Generation(1)).unwrap()), (Generation(0), None));
}

fn passes_word(a: &dyn Arbiter, b: &dyn Arbiter) {
    let token = b.leave_token(&candidate("b")).unwrap();
    assert!(a.finds(&token).unwrap() && b.finds(&token).unwrap());
    b.take_token(&token);
    for other in [token.as_str(), "", "../pair", "0", &"/".repeat(32)] {
        assert!(!a.finds(other).unwrap(), "{other:?}");
    }
    let announce = |side: &dyn Arbiter, generation, id, last| {
        side.announce(Generation(generation), &candidate(id), EntrySequence(last)).unwrap()
    };
    assert_eq!(announce(a, 1, "a", 70), []);
    assert_eq!(announce(b, 1, "b", 65), [EntrySequence(70)]);
    assert_eq!(announce(a, 1, "a", 71), [EntrySequence(65)]);
    assert_eq!(announce(b, 2, "b", 65), []);
}

/// Many sides ask at once, some of their answers are lost, and some of their questions are late. The last
/// generation.
fn decides_once(kind: &dyn Kind) -> Generation {
    let sides: Vec<_> = (0..SIDES).map(|_| kind.open().unwrap()).collect();
    for generation in (1..=RACES).map(Generation) {
        let barrier = Arc::new(Barrier::new(SIDES));
        let ask = |(side, arbiter): (usize, &Arc<dyn Arbiter>)| {
            let (arbiter, barrier) = (Arc::clone(arbiter), Arc::clone(&barrier));
            let mut random = Random::new(generation.0 * 10 + side as u64);
            std::thread::spawn(move || {
                barrier.wait();
                asks_with_losses(&arbiter, generation, side, &mut random)
            })
        };
        let threads: Vec<_> = sides.iter().enumerate().map(ask).collect();
        let all: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        let has_won = |verdicts: &Vec<Verdict>| verdicts.contains(&Verdict::Won);
        let winner = all.iter().position(has_won).expect("somebody has won");
        for (side, verdicts) in all.iter().enumerate() {
            let lost = Verdict::Lost { winner: candidate(winner) };
            let expected = if side == winner { &Verdict::Won } else { &lost };
            assert!(
                verdicts.iter().all(|it| it == expected),
                "{generation:?} {side}: {verdicts:?}"
            );
        }
        let found = sides[0].winner(generation).unwrap();
        assert_eq!(found, Some(candidate(winner)));
        assert_eq!(sides[1].latest().unwrap(), generation);
    }
    Generation(RACES)
}

/// All answers to one side that asks until it has one that is not lost.
fn asks_with_losses(
    arbiter: &Arc<dyn Arbiter>,
    generation: Generation,
    side: usize,
    random: &mut Random,
) -> Vec<Verdict> {
    let (mut late, mut verdicts) = (Vec::new(), Vec::new());
    loop {
        let (arbiter, who) = (Arc::clone(arbiter), candidate(side));
        let ask = move || until_answered(|| arbiter.try_win(generation, &who));
        match random.below(4) {
            // Nobody hears the answer, but this test.
            0 => verdicts.push(ask()),
            // The question is asked whenever it pleases.
            1 => late.push(std::thread::spawn(ask)),
            _ => {
                verdicts.push(ask());
                break;
            }
        }
    }
    verdicts.extend(late.into_iter().map(|thread| thread.join().unwrap()));
    verdicts
}

fn stays_decided(
    kind: &mut dyn Kind,
    a: &Arc<dyn Arbiter>,
    b: &Arc<dyn Arbiter>,
    latest: Generation,
) {
    let next = Generation(latest.0 + 1);
    assert_eq!(b.try_win(next, &candidate("b")).unwrap(), Verdict::Won);
    kind.restart();
    assert_eq!(until_answered(|| b.try_win(next, &candidate("b"))), Verdict::Won);
    let verdict = until_answered(|| a.try_win(next, &candidate("a")));
    assert_eq!(lost_to(&verdict), &candidate("b"));
    assert_eq!(a.known_winner(next).unwrap(), Some(candidate("b")));
    assert_eq!(until_answered(|| a.latest()), next);
    let after = Generation(next.0 + 1);
    kind.go_away();
    let away = a.try_win(after, &candidate("a"));
    assert!(matches!(away, Err(ArbiterError::Unreachable { .. })), "{away:?}");
    let away = a.winner(after);
    assert!(matches!(away, Err(ArbiterError::Unreachable { .. })), "{away:?}");
    kind.come_back();
    // What was asked may have been done meanwhile, or not: it is for the one who asked alone.
    assert_eq!(until_answered(|| a.try_win(after, &candidate("a"))), Verdict::Won);
    assert_eq!(lost_to(&until_answered(|| b.try_win(after, &candidate("b")))), &candidate("a"));
}

fn fences_a_pair_that_was_removed(kind: &mut dyn Kind, a: &Arc<dyn Arbiter>) {
    kind.remove();
    let new = until_answered(|| kind.create());
    assert_eq!(new.pair("new").unwrap(), "new");
    let next = Generation(RACES + 3);
    let winner = until_answered(|| a.winner(next)).expect("another pair is in its place");
    assert!(winner.to_string().contains("another pair"), "{winner}");
    let verdict = until_answered(|| a.try_win(next, &candidate("a")));
    assert_eq!(lost_to(&verdict), &winner);
    assert_eq!(new.winner(next).unwrap(), None, "nothing was taken from it");
    assert_eq!(new.latest().unwrap(), Generation(0));
}
