//! Those who have connected and were not let in yet, as a backup or as a disk's client: how many
//! are heard, and who has to make way.
//!
//! Nobody is kept out because others wait: a newcomer takes the place of one who was there before. First
//! goes who has said nothing yet, then who has not shown a certificate, the oldest of each first; one
//! address can take no more than its share, and makes room among its own. How long each may stay is
//! for the greeting to say.

use super::listener::{Neighbourhood, Origin};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use tokio::sync::Notify;

/// Most who are heard at a time. Each can hold some hundred kilobytes.
pub(super) const MAX_STRANGERS: usize = 64;
/// Most of them from one address (of IPv6, from one network of 64 bits).
pub(super) const MAX_PER_ADDRESS: usize = 16;

/// How far somebody has come: in this order they are sent away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Progress {
    Silent,
    Speaking,
    Authenticated,
}

/// Counts those who came; the oldest has the lowest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Arrival(u64);

#[derive(Debug)]
struct Guest {
    from: Neighbourhood,
    progress: Progress,
    leave: Rc<Notify>,
}

#[derive(Debug, Default)]
struct State {
    guests: BTreeMap<Arrival, Guest>,
    last: u64,
}

/// The room where strangers are heard.
#[derive(Debug, Default)]
pub struct Lobby(RefCell<State>);

/// One who is there, until this is dropped.
#[derive(Debug)]
pub struct Visit {
    lobby: Rc<Lobby>,
    arrival: Arrival,
    leave: Rc<Notify>,
}

impl State {
    /// Who has to make way for one from there.
    fn whom(&self, from: Neighbourhood) -> Option<Arrival> {
        let first = |guests: &mut dyn Iterator<Item = (&Arrival, &Guest)>| {
            let ranked = guests.map(|(arrival, guest)| (guest.progress, *arrival));
            ranked.min().map(|(_, arrival)| arrival)
        };
        let neighbours = || self.guests.iter().filter(|(_, guest)| guest.from == from);
        if neighbours().count() >= MAX_PER_ADDRESS {
            return first(&mut neighbours());
        }
        (self.guests.len() >= MAX_STRANGERS).then(|| first(&mut self.guests.iter())).flatten()
    }
}

impl Lobby {
    /// Somebody comes in; if need be, another is sent away.
    pub fn enter(self: &Rc<Self>, from: Origin) -> Visit {
        let mut state = self.0.borrow_mut();
        let from = from.neighbourhood();
        if let Some(guest) = state.whom(from).and_then(|whom| state.guests.remove(&whom)) {
            guest.leave.notify_one();
        }
        state.last += 1;
        let (arrival, leave) = (Arrival(state.last), Rc::new(Notify::new()));
        let guest = Guest { from, progress: Progress::Silent, leave: Rc::clone(&leave) };
        state.guests.insert(arrival, guest);
        Visit { lobby: Rc::clone(self), arrival, leave }
    }

    #[cfg(test)]
    fn present(&self) -> Vec<u64> {
        self.0.borrow().guests.keys().map(|arrival| arrival.0).collect()
    }
}

impl Visit {
    /// Waits until this one has to make way.
    pub async fn sent_away(&self) {
        self.leave.notified().await;
    }

    /// It has said something.
    pub(super) fn speaks(&self) {
        self.set(Progress::Speaking);
    }

    /// It has shown a certificate that is trusted.
    pub(super) fn is_authenticated(&self) {
        self.set(Progress::Authenticated);
    }

    fn set(&self, progress: Progress) {
        // One that was just sent away does not know yet.
        if let Some(guest) = self.lobby.0.borrow_mut().guests.get_mut(&self.arrival) {
            guest.progress = progress;
        }
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.lobby.0.borrow_mut().guests.remove(&self.arrival);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(address: &str) -> Origin {
        Origin::Tcp(format!("{address}:1").parse().expect("an address"))
    }

    #[test]
    fn who_comes_in_finds_a_place_and_the_oldest_silent_one_loses_it() {
        let lobby = Rc::new(Lobby::default());
        let enter = |n: usize| lobby.enter(from(&format!("192.0.2.{n}")));
        let visits: Vec<Visit> = (0..MAX_STRANGERS).map(enter).collect();
        // The first speaks, the second has a certificate: the third is the first who must go.
        visits[0].speaks();
        visits[1].is_authenticated();
        let _newcomer = enter(100);
        let mut expected: Vec<u64> = (1..=MAX_STRANGERS as u64 + 1).filter(|n| *n != 3).collect();
        assert_eq!(lobby.present(), expected);
        visits[3..].iter().for_each(Visit::speaks);
        // The newcomer is the only silent one, and then the first is the oldest who speaks.
        let another = enter(101);
        expected.pop();
        expected.push(MAX_STRANGERS as u64 + 2);
        assert_eq!(lobby.present(), expected);
        another.speaks();
        let _third = enter(102);
        assert!(!lobby.present().contains(&1) && lobby.present().contains(&2));
        assert_eq!(lobby.present().len(), MAX_STRANGERS);
    }

    #[test]
    fn one_address_makes_room_among_its_own() {
        let lobby = Rc::new(Lobby::default());
        let other = lobby.enter(from("192.0.2.9"));
        let visits: Vec<Visit> =
            (0..4 * MAX_PER_ADDRESS).map(|_| lobby.enter(from("192.0.2.1"))).collect();
        assert_eq!(lobby.present().len(), 1 + MAX_PER_ADDRESS);
        assert_eq!(lobby.present()[0], 1);
        drop((other, visits));
        assert!(lobby.present().is_empty());
    }
}
