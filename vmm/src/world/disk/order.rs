//! Which of a disk's jobs may be under way together.
//!
//! The device lets no request overtake one that it meets (`devices/virtio/block/requests.rs`), byte by byte.
//! Storage may be written in larger units than a sector, and part of a unit is written by reading the whole of
//! it first; and what a failover makes again comes before everything else. So the order is kept here as well,
//! in the units of the storage.

use std::collections::VecDeque;

/// How many jobs behind one that has to wait are looked at: what waits behind those has time.
const LOOK_AHEAD: usize = 64;

/// What a job touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// It reads these bytes.
    Read { start: u64, end: u64 },
    /// It writes these bytes.
    Write { start: u64, end: u64 },
    /// It makes earlier writes durable.
    Flush,
    /// Nothing earlier comes after it, and nothing later before it.
    Everything,
}

impl Extent {
    /// The same in whole units of the storage.
    pub(super) fn in_units_of(self, unit: u64) -> Self {
        let whole = |start: u64, end: u64| (start / unit * unit, end.div_ceil(unit) * unit);
        match self {
            Self::Read { start, end } => {
                let (start, end) = whole(start, end);
                Self::Read { start, end }
            }
            Self::Write { start, end } => {
                let (start, end) = whole(start, end);
                Self::Write { start, end }
            }
            Self::Flush | Self::Everything => self,
        }
    }

    /// True if this must not overtake `earlier`.
    fn waits_for(self, earlier: Self) -> bool {
        let range = |extent| match extent {
            Self::Read { start, end } => Some((start, end, false)),
            Self::Write { start, end } => Some((start, end, true)),
            Self::Flush | Self::Everything => None,
        };
        match (self, earlier) {
            (Self::Everything, _) | (_, Self::Everything) => true,
            (Self::Flush, earlier) => matches!(earlier, Self::Write { .. }),
            (_, Self::Flush) => false,
            (later, earlier) => match (range(later), range(earlier)) {
                (Some((start, end, writes)), Some((other_start, other_end, other_writes))) => {
                    (writes || other_writes) && start < other_end && other_start < end
                }
                _ => false,
            },
        }
    }
}

/// The place of a job in the order in which they came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket(u64);

/// The jobs of one disk.
#[derive(Debug)]
pub(super) struct Order<T> {
    waiting: VecDeque<(Ticket, Extent, T)>,
    under_way: Vec<(Ticket, Extent)>,
    last: Ticket,
}

impl<T> Default for Order<T> {
    fn default() -> Self {
        Self { waiting: VecDeque::new(), under_way: Vec::new(), last: Ticket(0) }
    }
}

impl<T> Order<T> {
    /// The place of the last job that was added.
    pub(super) fn last(&self) -> Ticket {
        self.last
    }

    /// True if a job waits or is under way that came no later than that.
    pub(super) fn has_up_to(&self, last: Ticket) -> bool {
        let waiting = self.waiting.front().map(|(ticket, _, _)| *ticket);
        let under_way = self.under_way.iter().map(|(ticket, _)| *ticket);
        under_way.chain(waiting).any(|ticket| ticket <= last)
    }

    /// Adds a job behind all others.
    pub(super) fn push(&mut self, extent: Extent, job: T) {
        self.last.0 += 1;
        self.waiting.push_back((self.last, extent, job));
    }

    /// True if no job waits.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// True if a job could be taken.
    pub(super) fn has_next(&self) -> bool {
        self.next_index().is_some()
    }

    /// Takes the first job that need not wait.
    pub(super) fn take(&mut self) -> Option<(Ticket, T)> {
        let (ticket, extent, job) = self.waiting.remove(self.next_index()?)?;
        self.under_way.push((ticket, extent));
        Some((ticket, job))
    }

    /// A job has ended.
    pub(super) fn done(&mut self, ticket: Ticket) {
        self.under_way.retain(|(other, _)| *other != ticket);
    }

    fn next_index(&self) -> Option<usize> {
        for (index, (ticket, extent, _)) in self.waiting.iter().take(LOOK_AHEAD).enumerate() {
            // What came later and is under way already holds nothing up: a flush would wait for as long
            // as others write.
            let under_way = self.under_way.iter().filter(|(other, _)| other < ticket);
            let under_way = under_way.map(|(_, extent)| extent);
            let mut earlier = under_way.chain(self.waiting.iter().take(index).map(|(_, e, _)| e));
            if !earlier.any(|earlier| extent.waits_for(*earlier)) {
                return Some(index);
            }
            if *extent == Extent::Everything {
                return None;
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(start: u64, end: u64) -> Extent {
        Extent::Read { start, end }
    }

    fn write(start: u64, end: u64) -> Extent {
        Extent::Write { start, end }
    }

    fn order(extents: &[Extent]) -> Order<usize> {
        let mut order = Order::default();
        for (number, extent) in extents.iter().enumerate() {
            order.push(*extent, number);
        }
        order
    }

    /// Takes every job that need not wait.
    fn take_all(order: &mut Order<usize>) -> Vec<(Ticket, usize)> {
        std::iter::from_fn(|| order.take()).collect()
    }

    fn numbers(taken: &[(Ticket, usize)]) -> Vec<usize> {
        taken.iter().map(|(_, number)| *number).collect()
    }

    #[test]
    fn overlapping_jobs_come_in_order_and_others_together() {
        let mut order = order(&[write(0, 512), write(0, 512), read(512, 1024), read(0, 1024)]);
        let first = take_all(&mut order);
        assert_eq!(numbers(&first), [0, 2]);
        order.done(first[1].0);
        assert!(!order.has_next());
        order.done(first[0].0);
        let second = take_all(&mut order);
        assert_eq!(numbers(&second), [1]);
        order.done(second[0].0);
        assert_eq!(numbers(&take_all(&mut order)), [3]);
        assert!(order.is_empty());
    }

    #[test]
    fn a_flush_waits_for_the_writes_before_it_and_holds_nothing_up() {
        let mut order = order(&[write(0, 512), read(4096, 8192), Extent::Flush, write(512, 1024)]);
        let first = take_all(&mut order);
        assert_eq!(numbers(&first), [0, 1, 3]);
        order.done(first[0].0);
        assert_eq!(numbers(&take_all(&mut order)), [2], "3 came later");
    }

    #[test]
    fn nothing_passes_a_job_that_touches_everything() {
        let mut order = order(&[read(0, 512), Extent::Everything, read(512, 1024)]);
        let first = take_all(&mut order);
        assert_eq!(numbers(&first), [0]);
        order.done(first[0].0);
        let second = take_all(&mut order);
        assert_eq!(numbers(&second), [1]);
        order.done(second[0].0);
        assert_eq!(numbers(&take_all(&mut order)), [2]);
    }

    #[test]
    fn sectors_of_one_unit_are_neighbours_that_meet() {
        let unit = |extent: Extent| extent.in_units_of(4096);
        let mut order = order(&[write(0, 512), write(512, 1024), write(4096, 4608)].map(unit));
        assert_eq!(numbers(&take_all(&mut order)), [0, 2]);
    }
}
