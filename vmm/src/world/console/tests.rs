use super::sink::Sink;
use super::*;
use crate::inputs::Room;
use crate::outputs::OutputKind;
use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::ErrorKind;
use vmft_log::entry::Arrival;

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(600);

fn write(hub: &ConsoleHub, sequence: u64, offset: u64, bytes: &[u8]) {
    hub.write(OutputSequence(sequence), offset, bytes);
}

/// What a sink answers to one write.
#[derive(Debug)]
enum Answer {
    /// It takes so many bytes at most.
    Takes(usize),
    Fails(ErrorKind),
    /// It answers nothing before the test lets it.
    Stuck(std::sync::mpsc::Receiver<()>),
}

/// A sink that answers as the test says, and takes everything after that.
#[derive(Debug)]
struct Scripted {
    answers: VecDeque<Answer>,
    taken: Arc<Mutex<Vec<u8>>>,
}

impl Sink for Scripted {
    fn name(&self) -> String {
        "a test".to_owned()
    }
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let mut most = bytes.len();
        match self.answers.pop_front() {
            Some(Answer::Takes(limit)) => most = most.min(limit),
            Some(Answer::Fails(kind)) => return Err(kind.into()),
            Some(Answer::Stuck(until)) => drop(until.recv()),
            None => {}
        }
        let mut taken = self.taken.lock();
        let place = usize::try_from(offset).expect("small");
        assert_eq!(place, taken.len(), "bytes come in order, each once");
        taken.extend(&bytes[..most]);
        Ok(most)
    }
    fn is_gone(&self, error: &io::Error) -> bool {
        error.kind() == ErrorKind::BrokenPipe
    }
}

/// A console with such a sink, what that has taken, and which outputs are out.
#[derive(Debug)]
struct Stage {
    hub: Arc<ConsoleHub>,
    taken: Arc<Mutex<Vec<u8>>>,
    out: Arc<Mutex<Vec<u64>>>,
}

fn stage(answers: impl Into<VecDeque<Answer>>) -> Stage {
    let hub = Arc::new(ConsoleHub::new(true, EarlyInput::Dropped));
    let (taken, out) = (Arc::default(), Arc::<Mutex<Vec<u64>>>::default());
    let sink = Scripted { answers: answers.into(), taken: Arc::clone(&taken) };
    sink::start(&hub, Box::new(sink)).expect("a thread");
    let heard = Arc::clone(&out);
    let on_out = move |output: OutputSequence| heard.lock().push(output.0);
    hub.go_live(Arc::new(Mailbox::default()), Some(Arc::new(on_out)));
    Stage { hub, taken, out }
}

impl Stage {
    fn taken(&self) -> Vec<u8> {
        self.taken.lock().clone()
    }

    fn out(&self) -> Vec<u64> {
        self.out.lock().clone()
    }
}

#[test]
fn a_sink_that_fails_and_takes_little_has_every_byte_once_in_the_end() {
    let full = || Answer::Fails(ErrorKind::StorageFull);
    let stage = stage([full(), Answer::Takes(2), full(), Answer::Takes(0), Answer::Takes(1)]);
    write(&stage.hub, 1, 0, b"hello");
    write(&stage.hub, 2, 5, b" world");
    assert!(stage.hub.drain(LONG));
    assert_eq!(stage.taken(), b"hello world");
    assert_eq!(stage.out().last(), Some(&2));
    assert_eq!((stage.hub.undelivered(), stage.hub.trouble()), (0, None));
}

#[test]
fn no_output_is_out_before_a_sink_that_fails_has_taken_it() {
    let (allow, allowed) = std::sync::mpsc::channel();
    let stage = stage([Answer::Fails(ErrorKind::StorageFull), Answer::Stuck(allowed)]);
    write(&stage.hub, 1, 0, b"abc");
    assert!(!stage.hub.drain(Duration::ZERO));
    assert!(stage.out().is_empty());
    drop(allow);
    assert!(stage.hub.drain(LONG));
    assert_eq!((stage.out(), stage.taken()), (vec![1], b"abc".to_vec()));
}

#[test]
fn a_reader_that_is_gone_for_good_holds_nothing_up_and_what_it_missed_is_known() {
    let stage = stage([Answer::Takes(2), Answer::Fails(ErrorKind::BrokenPipe)]);
    write(&stage.hub, 1, 0, b"hello");
    assert!(stage.hub.drain(LONG));
    write(&stage.hub, 2, 5, b" world");
    assert!(stage.hub.drain(Duration::ZERO), "nobody is waited for");
    assert_eq!((stage.hub.backlog(), stage.hub.undelivered()), (0, 9));
    assert_eq!((stage.out(), stage.taken()), (vec![1, 2], b"he".to_vec()));
}

#[test]
fn what_a_stuck_sink_was_not_seen_to_take_is_handed_to_whoever_follows() {
    let (allow, allowed) = std::sync::mpsc::channel();
    let stage = stage([Answer::Takes(2), Answer::Stuck(allowed)]);
    write(&stage.hub, 1, 0, b"abc");
    while stage.hub.written() < 2 {
        std::thread::yield_now();
    }
    write(&stage.hub, 2, 3, b"def");
    // A packet is between.
    write(&stage.hub, 4, 6, b"ghi");
    let unwritten = stage.hub.unwritten();
    let expected = OutputKind::Console { offset: 2, bytes: b"cdefghi".to_vec() };
    assert_eq!(unwritten, [Output { sequence: OutputSequence(4), kind: expected }]);
    assert_eq!(stage.hub.undelivered(), 7);
    assert!(stage.hub.backlog() >= 7);
    stage.hub.close();
    drop(allow);
}

#[test]
fn what_waits_for_a_stuck_sink_takes_little_more_memory_than_its_bytes() {
    let hub = ConsoleHub::new(true, EarlyInput::Dropped);
    let bytes = 300_000;
    for number in 0..bytes {
        write(&hub, number + 1, number, b"x");
    }
    assert!((bytes..bytes * 3 / 2).contains(&(hub.backlog() as u64)), "{}", hub.backlog());
    let handed: usize = hub
        .unwritten()
        .iter()
        .map(|output| match &output.kind {
            OutputKind::Console { bytes, .. } => bytes.len(),
            _ => 0,
        })
        .sum();
    assert_eq!(handed as u64, bytes, "nothing of it is forgotten");
}

#[test]
fn a_side_that_goes_live_lets_out_what_it_kept_however_far_that_goes_back() {
    let stage = stage(VecDeque::new());
    let len = 3 << 20;
    let all: Vec<u8> = (0..len).map(|number: u32| number.to_le_bytes()[0]).collect();
    stage.hub.remember(0, &all);
    for (sequence, (place, bytes)) in (1..).zip(all.chunks(1 << 16).enumerate()) {
        write(&stage.hub, sequence, (place << 16) as u64, bytes);
    }
    assert!(stage.hub.drain(LONG));
    assert!(stage.taken() == all);
}

#[test]
fn what_is_typed_waits_until_the_guest_takes_it() {
    let hub = Arc::new(ConsoleHub::new(false, EarlyInput::Dropped));
    let mailbox = Arc::new(Mailbox::default());
    hub.go_live(Arc::clone(&mailbox), None);
    let typed: Vec<u8> = (0..200_000u32).map(|number| number.to_le_bytes()[0]).collect();
    let (theirs, bytes) = (Arc::clone(&hub), typed.clone());
    let typist = std::thread::spawn(move || theirs.type_in(&bytes));
    let mut read = Vec::new();
    while read.len() < typed.len() {
        match mailbox.take_arrival(Room { console: 4096, packets: false }) {
            Some(Arrival::ConsoleInput(bytes)) => read.extend(bytes),
            Some(other) => panic!("{other:?}"),
            None => std::thread::yield_now(),
        }
    }
    assert_eq!(typist.join().expect("no panic"), Typed::All);
    assert!(read == typed);
}

#[test]
fn what_is_typed_before_a_sides_own_guest_is_there_reaches_it() {
    let hub = Arc::new(ConsoleHub::new(false, EarlyInput::Waits));
    let theirs = Arc::clone(&hub);
    let typist = std::thread::spawn(move || theirs.type_in(b"early"));
    let mailbox = Arc::new(Mailbox::default());
    hub.go_live(Arc::clone(&mailbox), None);
    assert_eq!(typist.join().expect("no panic"), Typed::All);
    let arrival = mailbox.take_arrival(Room { console: 4096, packets: false });
    assert!(matches!(arrival, Some(Arrival::ConsoleInput(bytes)) if bytes == b"early"));

    let never = Arc::new(ConsoleHub::new(false, EarlyInput::Waits));
    let theirs = Arc::clone(&never);
    let typist = std::thread::spawn(move || theirs.type_in(b"early"));
    never.close();
    assert_eq!(typist.join().expect("no panic"), Typed::Over, "nobody waits for ever");
}

#[test]
fn whoever_types_at_a_guest_that_takes_nothing_is_let_go_when_it_is_over() {
    let hub = Arc::new(ConsoleHub::new(false, EarlyInput::Dropped));
    hub.go_live(Arc::new(Mailbox::default()), None);
    let theirs = Arc::clone(&hub);
    let typist = std::thread::spawn(move || theirs.type_in(&[b'x'; 200_000]));
    hub.close();
    assert_eq!(typist.join().expect("no panic"), Typed::Over);
}

#[test]
fn a_file_written_by_both_sides_has_each_byte_once() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let target = ConsoleTarget::File(dir.path().join("console"));
    let primary = ConsoleHub::open(&target, EarlyInput::Dropped).expect("writable");
    let backup = ConsoleHub::open(&target, EarlyInput::Dropped).expect("writable");
    write(&primary, 1, 0, b"one ");
    write(&primary, 2, 4, b"two ");
    assert!(primary.drain(LONG));
    backup.remember(0, b"one two three ");
    // The backup does not know that output 2 is out: it repeats it.
    write(&backup, 2, 4, b"two ");
    write(&backup, 3, 8, b"three ");
    assert!(backup.drain(LONG));
    let bytes = std::fs::read(dir.path().join("console")).expect("written");
    assert_eq!(bytes, b"one two three ");
}

#[test]
fn a_file_that_somebody_cuts_or_removes_is_gone_on_with_at_the_same_place() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("console");
    let hub = ConsoleHub::open(&ConsoleTarget::File(path.clone()), EarlyInput::Dropped)
        .expect("writable");
    write(&hub, 1, 0, b"one ");
    assert!(hub.drain(LONG));
    OpenOptions::new().write(true).truncate(true).open(&path).expect("writable");
    write(&hub, 2, 4, b"two ");
    assert!(hub.drain(LONG));
    assert_eq!(std::fs::read(&path).expect("there"), b"\0\0\0\0two ");
    std::fs::remove_file(&path).expect("there");
    write(&hub, 3, 8, b"three");
    assert!(hub.drain(LONG));
    assert_eq!(std::fs::read(&path).expect("made anew"), b"\0\0\0\0\0\0\0\0three");
}

#[test]
fn a_named_pipe_is_written_like_a_terminal() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("pipe");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("made");
    // Both ends, so that opening waits for nobody.
    let mut reader = OpenOptions::new().read(true).write(true).open(&path).expect("opened");
    let hub = ConsoleHub::open(&ConsoleTarget::File(path), EarlyInput::Dropped).expect("writable");
    write(&hub, 1, 100, b"from the middle");
    let mut bytes = [0; 15];
    io::Read::read_exact(&mut reader, &mut bytes).expect("written");
    assert_eq!(&bytes, b"from the middle");
}

#[test]
fn a_closing_console_waits_for_its_readers_to_take_the_last_bytes() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("console");
    let hub =
        ConsoleHub::open(&ConsoleTarget::Socket(path.clone()), EarlyInput::Dropped).expect("bound");
    let mut client = ConsoleClient::attach(&path, 0).expect("listening");
    write(&hub, 1, 0, b"hello");
    assert!(matches!(client.next_event(), ConsoleEvent::Record(_)));
    // More than a socket holds: the reader must read for the side to end.
    let len = 1 << 20;
    write(&hub, 2, 5, &vec![b'x'; len]);
    let read = std::thread::spawn(move || {
        let mut got = 0;
        while let ConsoleEvent::Record(record) = client.next_event() {
            got += record.bytes.len();
        }
        got
    });
    hub.close();
    assert_eq!(hub.lock().readers, 0, "everything is sent when the console is closed");
    assert_eq!(read.join().expect("no panic"), len);
}

#[test]
fn outputs_are_reported_out_only_after_they_are_written() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("console");
    let hub = ConsoleHub::open(&ConsoleTarget::File(path.clone()), EarlyInput::Dropped)
        .expect("writable");
    let out = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&out);
    let report = move |sequence: OutputSequence| {
        let len = std::fs::metadata(&path).expect("exists").len();
        seen.lock().push((sequence.0, len));
    };
    hub.go_live(Arc::new(Mailbox::default()), Some(Arc::new(report)));
    write(&hub, 1, 0, b"abc");
    write(&hub, 2, 3, b"def");
    assert!(hub.drain(LONG));
    let out = out.lock();
    let (last, len) = *out.last().expect("reported");
    assert_eq!((last, len), (2, 6));
    assert!(out.iter().all(|(sequence, len)| *len >= sequence * 3));
}
