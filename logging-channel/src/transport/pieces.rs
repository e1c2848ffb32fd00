//! Pieces of a checkpoint on their way from the thread that packs them to the channel's, which other backups
//! may count on meanwhile: it takes them without waiting for a lock of the runtime's.

use super::waker::{ThreadWaker, WakeUps};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use vmft_threads::{Condvar, Mutex};

#[derive(Debug)]
struct Queue<T> {
    pieces: VecDeque<T>,
    has_giver: bool,
    has_taker: bool,
}

#[derive(Debug)]
struct Shared<T> {
    queue: Mutex<Queue<T>>,
    /// There is room, or nobody who takes.
    changed: Condvar,
    waker: Arc<ThreadWaker>,
    /// How many may wait.
    room: usize,
}

/// The end of the thread that packs.
#[derive(Debug)]
pub(super) struct Giver<T>(Arc<Shared<T>>);

/// The end of the channel's thread.
#[derive(Debug)]
pub(super) struct Taker<T> {
    shared: Arc<Shared<T>>,
    wake_ups: WakeUps,
}

/// Both ends of a queue in which so many pieces may wait; the second is for a task of the calling thread.
///
/// # Errors
/// The host's, for instance that no more files can be open.
pub(super) fn pieces<T>(room: usize) -> io::Result<(Giver<T>, Taker<T>)> {
    let (waker, wake_ups) = WakeUps::new()?;
    let queue = Mutex::new(Queue { pieces: VecDeque::new(), has_giver: true, has_taker: true });
    let shared = Arc::new(Shared { queue, changed: Condvar::new(), waker, room });
    Ok((Giver(Arc::clone(&shared)), Taker { shared, wake_ups }))
}

impl<T> Giver<T> {
    /// Gives a piece, when there is room. False if nobody takes any more.
    pub(super) fn give(&self, piece: T) -> bool {
        let Shared { queue, changed, waker, room } = &*self.0;
        let is_full = |queue: &mut Queue<T>| queue.has_taker && queue.pieces.len() >= *room;
        let mut queue = changed.wait_while(queue.lock(), is_full);
        if !queue.has_taker {
            return false;
        }
        queue.pieces.push_back(piece);
        drop(queue);
        waker.wake();
        true
    }
}

impl<T> Drop for Giver<T> {
    fn drop(&mut self) {
        self.0.queue.lock().has_giver = false;
        self.0.waker.wake();
    }
}

impl<T> Taker<T> {
    /// The next piece; `None` if there will be no more.
    pub(super) async fn next(&mut self) -> Option<T> {
        loop {
            {
                let mut queue = self.shared.queue.lock();
                if let Some(piece) = queue.pieces.pop_front() {
                    self.shared.changed.notify_one();
                    return Some(piece);
                }
                if !queue.has_giver {
                    return None;
                }
            }
            self.wake_ups.next().await;
        }
    }
}

impl<T> Drop for Taker<T> {
    fn drop(&mut self) {
        self.shared.queue.lock().has_taker = false;
        self.shared.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on_a_channels_thread(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        runtime.expect("a runtime").block_on(test);
    }

    #[test]
    fn all_that_is_given_is_taken_in_order_and_no_more_waits_than_there_is_room_for() {
        on_a_channels_thread(async {
            let (giver, mut taker) = pieces(2).expect("files");
            let shared = Arc::clone(&taker.shared);
            let gives = std::thread::spawn(move || (0..1000).all(|piece| giver.give(piece)));
            for expected in 0..1000 {
                assert!(shared.queue.lock().pieces.len() <= 2);
                assert_eq!(taker.next().await, Some(expected));
            }
            assert_eq!(taker.next().await, None, "the giver is gone");
            assert!(gives.join().expect("no panic"));
        });
    }

    #[test]
    fn a_giver_that_waits_for_room_hears_that_nobody_takes() {
        on_a_channels_thread(async {
            let (giver, mut taker) = pieces(1).expect("files");
            let gives = std::thread::spawn(move || (0..).take_while(|n| giver.give(*n)).count());
            assert_eq!(taker.next().await, Some(0));
            drop(taker);
            let given: usize = gives.join().expect("no panic");
            assert!((1..=2).contains(&given), "{given}");
        });
    }
}
