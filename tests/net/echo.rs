//! A client that keeps one TCP connection to the guest's echo server open, and notes how long each
//! answer took.

use crate::lab::{GUEST, Lab, Place};
use crate::stage::LIMIT;
use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What the client saw.
#[derive(Debug, Clone, Copy, Default)]
pub struct Saw {
    /// Questions answered, rightly and in order.
    pub answers: u64,
    /// The longest time an answer took.
    pub worst: Duration,
}

/// How many answers came, and whether the connection is over.
#[derive(Debug, Default)]
struct Progress {
    answers: Mutex<(u64, bool)>,
    changed: Condvar,
}

impl Progress {
    fn set(&self, answers: u64, over: bool) {
        *self.answers.lock().unwrap() = (answers, over);
        self.changed.notify_all();
    }
}

/// A session that goes on.
#[derive(Debug)]
pub struct Echo {
    progress: Arc<Progress>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Saw>>,
}

impl Echo {
    /// Connects, and asks again as soon as there is an answer.
    pub fn start(lab: &Lab) -> Self {
        let namespace = File::open(format!("/run/netns/{}", lab.name(Place::Client))).unwrap();
        let (progress, stop): (Arc<Progress>, Arc<AtomicBool>) = Default::default();
        let (told, ending) = (Arc::clone(&progress), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let over = Over(&told);
            converse(over.0, &ending)
        });
        Self { progress, stop, thread: Some(thread) }
    }

    /// Answers so far.
    pub fn answers(&self) -> u64 {
        self.progress.answers.lock().unwrap().0
    }

    /// Waits until `more` answers have come.
    pub fn wait(&self, more: u64) {
        let wanted = self.answers() + more;
        assert!(self.wait_until(wanted, LIMIT), "the connection is lost");
    }

    /// Waits for so many answers, for as long as `limit`; whether they came.
    pub fn wait_until(&self, wanted: u64, limit: Duration) -> bool {
        let answers = self.progress.answers.lock().unwrap();
        let waiting = |(answers, over): &mut (u64, bool)| *answers < wanted && !*over;
        let (answers, _) =
            self.progress.changed.wait_timeout_while(answers, limit, waiting).unwrap();
        answers.0 >= wanted
    }

    /// Ends the session; its connection must have lasted.
    pub fn finish(mut self) -> Saw {
        self.stop.store(true, Ordering::Release);
        self.thread.take().unwrap().join().expect("the connection lasts")
    }
}

/// Tells that the connection is over, however it ended.
struct Over<'a>(&'a Progress);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        let answers = self.0.answers.lock().unwrap().0;
        self.0.set(answers, true);
    }
}

fn converse(progress: &Progress, stop: &AtomicBool) -> Saw {
    let mut stream = TcpStream::connect((GUEST, 7)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut saw = Saw::default();
    while !stop.load(Ordering::Acquire) {
        let question = format!("question {:08}\n", saw.answers);
        let asked = Instant::now();
        stream.write_all(question.as_bytes()).unwrap();
        let mut answer = vec![0; question.len()];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, question.as_bytes(), "another answer");
        saw.worst = saw.worst.max(asked.elapsed());
        saw.answers += 1;
        progress.set(saw.answers, false);
    }
    saw
}
