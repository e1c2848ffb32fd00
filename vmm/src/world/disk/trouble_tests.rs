//! Storage that fails, and what becomes of what was asked of it.

use super::*;
use crate::inputs::Room;
use crate::world::{DiskPolicy, HostCache, NoFence, Permit};
use std::sync::mpsc::{Receiver, channel};

const SECTOR: usize = 512;
const LONG: Duration = Duration::from_secs(3600);

/// Storage of eight sectors that fails, or does not answer, as long as it is told to.
#[derive(Debug, Default)]
struct Moody {
    mood: Mutex<Mood>,
    changed: Condvar,
    sectors: Mutex<[u8; 8]>,
    /// Letters as they were written, and `|` for a flush.
    log: Mutex<String>,
    cached: bool,
    fences: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Mood {
    #[default]
    Well,
    Full,
    FlushFails,
    ReadFails,
    Silent,
}

impl Moody {
    fn set(&self, mood: Mood) {
        *self.mood.lock() = mood;
        self.changed.notify_all();
    }

    fn check(&self, fails: Mood, kind: io::ErrorKind) -> io::Result<()> {
        let mood = self.mood.lock();
        let silent = |mood: &mut Mood| *mood == Mood::Silent;
        let mood = self.changed.wait_while(mood, silent);
        if *mood == fails { Err(kind.into()) } else { Ok(()) }
    }

    fn log(&self) -> String {
        self.log.lock().clone()
    }
}

impl Storage for Moody {
    fn unit(&self) -> u64 {
        1
    }

    fn cache(&self) -> HostCache {
        if self.cached { HostCache::WriteBack } else { HostCache::None }
    }

    fn identity(&self) -> Option<String> {
        None
    }

    fn join(&self, _: bool) -> io::Result<bool> {
        Ok(true)
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.check(Mood::ReadFails, io::ErrorKind::Other)?;
        data.fill(self.sectors.lock()[offset as usize / SECTOR]);
        Ok(())
    }

    fn write(&self, _: Permit, offset: u64, data: &[u8]) -> Result<(), WriteError> {
        self.check(Mood::Full, io::ErrorKind::StorageFull)?;
        self.sectors.lock()[offset as usize / SECTOR] = data[0];
        self.log.lock().push(char::from(data[0]));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.check(Mood::FlushFails, io::ErrorKind::Other)?;
        self.log.lock().push('|');
        Ok(())
    }

    fn fences(&self) -> bool {
        self.fences
    }

    fn repeats_flush(&self, _: &io::Error) -> bool {
        self.cache() == HostCache::None
    }
}

struct Stage {
    storage: Arc<Moody>,
    desk: Arc<DiskDesk>,
    mailbox: Arc<Mailbox>,
    queue: DiskQueue,
}

impl Stage {
    fn new(on_error: OnError, storage: Moody) -> Self {
        let (storage, mailbox) = (Arc::new(storage), Arc::new(Mailbox::default()));
        let desk = Arc::<DiskDesk>::default();
        let queue = DiskQueue::start(
            0,
            Arc::clone(&storage) as Arc<dyn Storage>,
            Arc::new(NoFence),
            Arc::clone(&mailbox),
            DiskErrors::of("/a.img".into()),
            DiskPolicy { on_error, timeout: LONG },
            Arc::clone(&desk),
        )
        .expect("a thread");
        desk.attend(std::slice::from_ref(&queue));
        Self { storage, desk, mailbox, queue }
    }

    fn write(&self, request: u64, sector: u64, letter: char) {
        let data = vec![letter as u8; SECTOR];
        let write = DiskOperation::Write { offset: sector * SECTOR as u64, data };
        self.queue.request(RequestId(request), write);
    }

    fn read(&self, request: u64, sector: u64) {
        let read = DiskOperation::Read { offset: sector * SECTOR as u64, len: SECTOR as u32 };
        self.queue.request(RequestId(request), read);
    }

    fn flush(&self, request: u64) {
        self.queue.request(RequestId(request), DiskOperation::Flush);
    }

    /// What the machine's thread is asked to look at.
    fn news(&self) -> DiskNews {
        loop {
            if let Some(news) = self.desk.take_news() {
                return news;
            }
            assert_eq!(self.mailbox.wait_asked(), Asked::Pause);
        }
    }

    fn failed(&self) -> DiskTrouble {
        match self.news() {
            DiskNews::Failed(trouble) => trouble,
            other => panic!("{other:?}"),
        }
    }

    /// The next answer that the guest would get: which request, and how it went.
    fn answer(&self) -> (u64, u8) {
        loop {
            self.mailbox.wait(None, Room::default());
            match self.mailbox.take_arrival(Room::default()) {
                Some(Arrival::DiskCompletion { request, status, .. }) => {
                    return (request.0, status);
                }
                // It was woken for what is asked.
                None => drop(self.mailbox.take_asked()),
                other => panic!("{other:?}"),
            }
        }
    }

    fn is_answered(&self) -> bool {
        self.mailbox.take_arrival(Room::default()).is_some()
    }

    fn settle(&self) -> Receiver<()> {
        let (done, settled) = channel();
        self.queue.settle(done);
        settled
    }

    fn under_way(&self) -> usize {
        self.queue.shared.lock().under_way.len()
    }

    fn wait_under_way(&self, count: usize) {
        while self.under_way() < count {
            std::thread::yield_now();
        }
    }
}

#[test]
fn what_fails_is_kept_with_all_that_must_not_overtake_it_until_it_is_resumed() {
    let stage = Stage::new(OnError::Stop, Moody::default());
    stage.storage.set(Mood::Full);
    stage.write(1, 3, 'a');
    let trouble = stage.failed();
    assert_eq!((trouble.what.as_str(), trouble.is_full), ("writing 512 bytes at byte 1536", true));
    assert_eq!(trouble.path.to_str(), Some("/a.img"));
    assert!(stage.desk.stands_still());
    // The storage is well again, but nobody has said so: what meets the write waits, what does not goes on.
    stage.storage.set(Mood::Well);
    stage.write(2, 3, 'b');
    stage.flush(3);
    stage.write(4, 0, 'c');
    assert_eq!(stage.answer(), (4, STATUS_OK));
    assert!(!stage.is_answered());
    assert_eq!(stage.storage.log(), "c");
    assert_eq!(stage.desk.resume(), 1);
    let mut answers = [stage.answer(), stage.answer(), stage.answer()];
    assert_eq!(answers[0], (1, STATUS_OK));
    answers.sort();
    assert_eq!(answers, [(1, STATUS_OK), (2, STATUS_OK), (3, STATUS_OK)]);
    assert_eq!(stage.storage.sectors.lock()[3], b'b');
    assert!(!stage.desk.stands_still() && stage.desk.troubles().is_empty());
    assert_eq!(stage.desk.resume(), 0);
}

#[test]
fn what_fails_again_when_it_is_resumed_is_kept_again() {
    let stage = Stage::new(OnError::Stop, Moody::default());
    stage.storage.set(Mood::ReadFails);
    stage.read(1, 0);
    assert!(!stage.failed().is_full);
    assert_eq!(stage.desk.resume(), 1);
    stage.failed();
    stage.storage.set(Mood::Well);
    assert_eq!(stage.desk.resume(), 1);
    assert_eq!(stage.answer(), (1, STATUS_OK));
}

#[test]
fn a_guest_that_is_to_be_told_is_told_and_does_not_stand_still() {
    let stage = Stage::new(OnError::Report, Moody::default());
    stage.storage.set(Mood::Full);
    stage.write(1, 3, 'a');
    assert_eq!(stage.answer(), (1, STATUS_IO_ERROR));
    assert!(!stage.desk.stands_still());
    assert_eq!(stage.desk.take_news(), None);
}

#[test]
fn a_flush_that_would_succeed_with_its_writes_lost_is_not_tried_again() {
    // Without the host's cache it is.
    let stage = Stage::new(OnError::Stop, Moody::default());
    stage.storage.set(Mood::FlushFails);
    stage.flush(1);
    stage.failed();
    stage.storage.set(Mood::Well);
    stage.desk.resume();
    assert_eq!(stage.answer(), (1, STATUS_OK));
    let cached = || Moody { cached: true, ..Moody::default() };
    let stage = Stage::new(OnError::Stop, cached());
    stage.storage.set(Mood::FlushFails);
    stage.flush(1);
    assert_eq!(stage.answer(), (1, STATUS_IO_ERROR));
    // A backup could make it good; once there is none, the guest is told.
    let stage = Stage::new(OnError::Failover, cached());
    stage.storage.set(Mood::FlushFails);
    stage.flush(1);
    stage.failed();
    assert!(!stage.is_answered());
    stage.desk.answer_final();
    assert_eq!(stage.answer(), (1, STATUS_IO_ERROR));
    assert!(!stage.desk.stands_still());
}

#[test]
fn a_disk_that_is_frozen_begins_nothing_and_is_quiet_when_its_writes_have_ended() {
    let stage = Stage::new(OnError::Failover, Moody::default());
    stage.storage.set(Mood::Silent);
    stage.write(1, 0, 'a');
    stage.read(2, 5);
    stage.wait_under_way(2);
    assert!(!stage.desk.freeze(Duration::ZERO), "the write could land later");
    stage.storage.set(Mood::Well);
    assert!(stage.desk.freeze(LONG));
    assert_eq!(stage.storage.log(), "a");
    stage.write(3, 1, 'b');
    let settled = stage.settle();
    assert_eq!((stage.answer().1, stage.answer().1), (STATUS_OK, STATUS_OK));
    assert!(!stage.is_answered());
    stage.desk.thaw();
    settled.recv().expect("it goes on");
    assert_eq!(stage.storage.log(), "ab|");
}

#[test]
fn a_read_that_hangs_and_a_write_to_storage_that_fences_do_no_harm_later() {
    for (fences, write) in [(false, false), (true, true)] {
        let stage = Stage::new(OnError::Failover, Moody { fences, ..Moody::default() });
        stage.storage.set(Mood::Silent);
        if write {
            stage.write(1, 0, 'a')
        } else {
            stage.read(1, 0)
        }
        stage.wait_under_way(1);
        assert!(stage.desk.freeze(Duration::ZERO));
        stage.storage.set(Mood::Well);
    }
}

#[test]
fn a_request_that_hangs_is_told_once_and_so_is_its_end() {
    let stage = Stage::new(OnError::Stop, Moody::default());
    stage.storage.set(Mood::Silent);
    stage.write(1, 0, 'a');
    stage.wait_under_way(1);
    stage.queue.shared.look(LONG);
    assert!(stage.desk.troubles().is_empty(), "not for long yet");
    for _ in 0..2 {
        stage.queue.shared.look(Duration::ZERO);
    }
    let DiskNews::Hangs(trouble) = stage.news() else { panic!("it hangs") };
    assert_eq!((trouble.error, trouble.may_land_later), (None, true));
    assert_eq!(stage.desk.troubles().len(), 1);
    assert!(!stage.desk.stands_still(), "it may still succeed");
    stage.storage.set(Mood::Well);
    assert!(matches!(stage.news(), DiskNews::Answers(..)));
    assert_eq!(stage.desk.take_news(), None);
    assert_eq!(stage.answer(), (1, STATUS_OK));
    assert!(stage.desk.troubles().is_empty());
}

#[test]
fn a_survivor_has_shown_that_its_storage_works_when_all_is_done_that_it_issued_again() {
    let stage = Stage::new(OnError::Failover, Moody::default());
    stage.storage.set(Mood::Full);
    stage.write(1, 0, 'a');
    stage.desk.begin_proof();
    stage.failed();
    assert!(stage.desk.is_unproved());
    // What comes later shows nothing.
    stage.read(2, 5);
    assert_eq!(stage.answer(), (2, STATUS_OK));
    assert!(stage.desk.is_unproved());
    stage.storage.set(Mood::Well);
    stage.desk.resume();
    assert_eq!(stage.answer(), (1, STATUS_OK));
    stage.settle().recv().expect("done");
    assert!(!stage.desk.is_unproved());
    let idle = Stage::new(OnError::Failover, Moody::default());
    idle.desk.begin_proof();
    assert!(!idle.desk.is_unproved(), "nothing is left to be shown");
}
