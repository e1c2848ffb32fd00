use super::*;
use crate::devices::virtio::block::completed::{CompletedWrite, WriteCount};
use crate::inputs::Room;
use crate::world::{FenceError, HostCache, NoFence, Permit};
use std::collections::VecDeque;
use std::sync::mpsc::channel;

const SECTOR: usize = 512;

/// A disk behind a cache that a crash empties.
#[derive(Debug, Default)]
struct Cached {
    contents: Mutex<Contents>,
    /// The next write or flush fails.
    fails: Mutex<bool>,
}

#[derive(Debug, Default)]
struct Contents {
    cache: Vec<u8>,
    durable: Vec<u8>,
    /// Writes and flushes as they came.
    log: Vec<String>,
}

impl Cached {
    fn new(sectors: usize) -> Arc<Self> {
        let bytes = vec![b'.'; sectors * SECTOR];
        let contents = Contents { cache: bytes.clone(), durable: bytes, log: Vec::new() };
        Arc::new(Self { contents: Mutex::new(contents), fails: Mutex::new(false) })
    }

    fn log(&self) -> Vec<String> {
        self.contents.lock().log.clone()
    }

    /// The first byte of each sector, as it is after a crash.
    fn durable(&self) -> String {
        let contents = self.contents.lock();
        contents.durable.chunks(SECTOR).map(|sector| char::from(sector[0])).collect()
    }

    fn fail_next(&self) {
        *self.fails.lock() = true;
    }

    fn check(&self) -> io::Result<()> {
        let fails = std::mem::take(&mut *self.fails.lock());
        if fails { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

impl Storage for Cached {
    fn unit(&self) -> u64 {
        1
    }

    fn cache(&self) -> HostCache {
        HostCache::WriteBack
    }

    fn identity(&self) -> Option<String> {
        None
    }

    fn join(&self, _: bool) -> io::Result<bool> {
        Ok(true)
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let contents = self.contents.lock();
        let start = offset as usize;
        data.copy_from_slice(&contents.cache[start..start + data.len()]);
        Ok(())
    }

    fn write(&self, _: Permit, offset: u64, data: &[u8]) -> Result<(), WriteError> {
        self.check()?;
        let mut contents = self.contents.lock();
        let start = offset as usize;
        contents.cache[start..start + data.len()].copy_from_slice(data);
        contents.log.push(format!("{} at {}", char::from(data[0]), start / SECTOR));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.check()?;
        let mut contents = self.contents.lock();
        contents.durable = contents.cache.clone();
        contents.log.push("flush".to_owned());
        Ok(())
    }

    fn repeats_flush(&self, _: &io::Error) -> bool {
        self.cache() == HostCache::None
    }

    fn fences(&self) -> bool {
        false
    }
}

struct Stage {
    queue: DiskQueue,
    mailbox: Arc<Mailbox>,
}

impl Stage {
    fn new(storage: &Arc<Cached>, fence: impl Fence + 'static) -> Self {
        let mailbox = Arc::new(Mailbox::default());
        let storage = Arc::clone(storage) as Arc<dyn Storage>;
        let queue = DiskQueue::start(
            0,
            storage,
            Arc::new(fence),
            Arc::clone(&mailbox),
            DiskErrors::of("disk".into()),
            // Whatever fails, the guest is told.
            DiskPolicy { on_error: OnError::Report, ..DiskPolicy::default() },
            Arc::default(),
        );
        Self { queue: queue.expect("a thread"), mailbox }
    }

    /// Waits until everything so far is done.
    fn settle(&self) {
        let (done, settled) = channel();
        self.queue.settle(done);
        settled.recv().expect("the disk's threads live as long as the queue");
    }

    /// The status of each request that is done, and what a read has brought, by first byte.
    fn answers(&self) -> Vec<(u64, u8, String)> {
        let room = Room::default();
        let mut answers: Vec<_> = std::iter::from_fn(|| self.mailbox.take_arrival(room))
            .map(|arrival| match arrival {
                Arrival::DiskCompletion { request, status, data, .. } => (
                    request.0,
                    status,
                    data.first().map(|byte| char::from(*byte)).into_iter().collect(),
                ),
                other => panic!("{other:?}"),
            })
            .collect();
        answers.sort();
        answers
    }
}

fn write(sector: u64, letter: char) -> DiskOperation {
    DiskOperation::Write { offset: sector * SECTOR as u64, data: vec![letter as u8; SECTOR] }
}

fn read(sector: u64) -> DiskOperation {
    DiskOperation::Read { offset: sector * SECTOR as u64, len: SECTOR as u32 }
}

fn completed(writes: &[(u64, char)]) -> CompletedWrites {
    let write = |(sector, letter): &(u64, char)| CompletedWrite {
        offset: sector * SECTOR as u64,
        data: Arc::new(vec![*letter as u8; SECTOR]),
    };
    CompletedWrites {
        before: WriteCount(0),
        writes: writes.iter().map(write).collect::<VecDeque<_>>(),
    }
}

#[test]
fn a_survivor_makes_completed_writes_again_and_flushes_before_any_request() {
    let storage = Cached::new(8);
    let stage = Stage::new(&storage, NoFence);
    stage.queue.rewrite(&completed(&[(1, 'a'), (5, 'b'), (1, 'c')]));
    stage.queue.request(RequestId(1), read(1));
    stage.queue.request(RequestId(2), write(1, 'd'));
    stage.queue.request(RequestId(3), DiskOperation::Flush);
    stage.settle();
    let log = storage.log();
    let (again, later) = log.split_at(3);
    let mut again = again.to_vec();
    assert_eq!(again.pop().as_deref(), Some("flush"));
    again.sort();
    assert_eq!(again, ["b at 5", "c at 1"], "'a' is older");
    assert_eq!(later, ["d at 1", "flush"]);
    let expected = [(1, 0, "c".to_owned()), (2, 0, String::new()), (3, 0, String::new())];
    assert_eq!(stage.answers(), expected);
    assert_eq!(storage.durable(), ".d...b..");
}

#[test]
fn a_flush_answers_for_the_writes_that_its_predecessor_completed() {
    // The primary has completed a write into its host's cache, and died with it inside the flush.
    let storage = Cached::new(4);
    let stage = Stage::new(&storage, NoFence);
    stage.queue.rewrite(&completed(&[(2, 'w')]));
    stage.queue.request(RequestId(7), DiskOperation::Flush);
    stage.settle();
    assert_eq!(stage.answers(), [(7, 0, String::new())]);
    assert_eq!(storage.durable(), "..w.");
}

#[test]
fn what_cannot_be_written_again_makes_the_next_flush_fail_once() {
    let storage = Cached::new(4);
    let stage = Stage::new(&storage, NoFence);
    storage.fail_next();
    stage.queue.rewrite(&completed(&[(2, 'w')]));
    stage.queue.request(RequestId(1), DiskOperation::Flush);
    stage.settle();
    stage.queue.request(RequestId(2), DiskOperation::Flush);
    stage.settle();
    let status = |answer: &(u64, u8, String)| (answer.0, answer.1);
    let answers: Vec<_> = stage.answers().iter().map(status).collect();
    assert_eq!(answers, [(1, STATUS_IO_ERROR), (2, STATUS_OK)]);
}

#[test]
fn whoever_waits_for_everything_to_be_done_finds_it_durable() {
    let storage = Cached::new(4);
    let stage = Stage::new(&storage, NoFence);
    stage.settle();
    assert!(storage.log().is_empty(), "nothing was written");
    for sector in 0..4 {
        stage.queue.request(RequestId(sector + 1), write(sector, 'x'));
    }
    stage.settle();
    assert_eq!(storage.durable(), "xxxx");
    assert_eq!(storage.log().len(), 5);
}

#[derive(Debug)]
struct Fenced;

impl Fence for Fenced {
    fn check(&self) -> Result<Permit, FenceError> {
        Err(FenceError)
    }

    fn refused(&self) {}
}

#[test]
fn a_fenced_side_writes_nothing_not_even_what_was_completed() {
    let storage = Cached::new(4);
    let stage = Stage::new(&storage, Fenced);
    stage.queue.rewrite(&completed(&[(2, 'w')]));
    stage.queue.request(RequestId(1), write(0, 'x'));
    stage.queue.request(RequestId(2), DiskOperation::Flush);
    stage.queue.request(RequestId(3), read(0));
    stage.settle();
    assert!(storage.log().is_empty());
    assert_eq!(stage.answers(), [(3, 0, ".".to_owned())]);
}

/// Storage that takes what is written in the second generation, and notes what it is asked.
#[derive(Debug, Default)]
struct OfGenerations(Mutex<Vec<Permit>>);

impl Storage for OfGenerations {
    fn unit(&self) -> u64 {
        1
    }

    fn cache(&self) -> HostCache {
        HostCache::None
    }

    fn identity(&self) -> Option<String> {
        None
    }

    fn join(&self, _: bool) -> io::Result<bool> {
        Ok(true)
    }

    fn read(&self, _: u64, data: &mut [u8]) -> io::Result<()> {
        data.fill(0);
        Ok(())
    }

    fn write(&self, permit: Permit, _: u64, _: &[u8]) -> Result<(), WriteError> {
        self.0.lock().push(permit);
        if permit == Permit(Some(2)) { Ok(()) } else { Err(WriteError::Fenced) }
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn repeats_flush(&self, _: &io::Error) -> bool {
        self.cache() == HostCache::None
    }

    fn fences(&self) -> bool {
        false
    }
}

/// A fence that gives a permit of the first generation, and looks again once that is refused.
#[derive(Debug)]
struct Behind {
    refused: Mutex<bool>,
    then: Result<Permit, FenceError>,
}

impl Fence for Behind {
    fn check(&self) -> Result<Permit, FenceError> {
        if *self.refused.lock() { self.then } else { Ok(Permit(Some(1))) }
    }

    fn refused(&self) {
        *self.refused.lock() = true;
    }
}

#[test]
fn a_write_that_its_storage_refuses_is_made_again_by_a_winner_and_never_answered_to_a_loser() {
    let (first, second) = (Permit(Some(1)), Permit(Some(2)));
    for (then, asked, answered) in
        [(Ok(second), vec![first, second], true), (Err(FenceError), vec![first], false)]
    {
        let storage = Arc::new(OfGenerations::default());
        let mailbox = Arc::new(Mailbox::default());
        let fence = Behind { refused: Mutex::new(false), then };
        let queue = DiskQueue::start(
            0,
            Arc::clone(&storage) as Arc<dyn Storage>,
            Arc::new(fence),
            Arc::clone(&mailbox),
            DiskErrors::of("disk".into()),
            DiskPolicy::default(),
            Arc::default(),
        )
        .expect("a thread");
        queue.request(RequestId(7), DiskOperation::Write { offset: 0, data: vec![1] });
        let (done, settled) = channel();
        queue.settle(done);
        settled.recv().expect("the disk's threads live as long as the queue");
        assert_eq!(*storage.0.lock(), asked);
        assert_eq!(mailbox.take_arrival(Room::default()).is_some(), answered);
    }
}
