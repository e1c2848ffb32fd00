//! Who may write to an export: the generation that was won last.

use std::sync::{PoisonError, RwLock};

/// A write of a generation that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a later generation has been won")]
pub struct Late;

/// Lets writes of the last generation through, and no others. A generation is won between writes:
/// those that are under way are done then, and none of an older generation begins later.
#[derive(Debug)]
pub struct Gate {
    /// Zero until a pair has the export.
    latest: RwLock<u64>,
}

impl Gate {
    /// Of an export whose last generation is `latest`; zero if no pair has had it.
    pub fn new(latest: u64) -> Self {
        Self { latest: RwLock::new(latest) }
    }

    /// The last generation; zero if there is none.
    pub fn latest(&self) -> u64 {
        *self.latest.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes in `generation`; `None` for somebody who is of no pair, which is well as long as no
    /// pair has the export.
    ///
    /// # Errors
    /// [`Late`]; then nothing was done.
    pub fn write<T>(&self, generation: Option<u64>, write: impl FnOnce() -> T) -> Result<T, Late> {
        let latest = self.latest.read().unwrap_or_else(PoisonError::into_inner);
        if generation.unwrap_or(0) != *latest {
            return Err(Late);
        }
        Ok(write())
    }

    /// Lets somebody win `generation`, by `win`, which says whether it is won now, by whomever:
    /// then it is the last.
    pub fn advance<T>(&self, generation: u64, win: impl FnOnce() -> (bool, T)) -> T {
        let mut latest = self.latest.write().unwrap_or_else(PoisonError::into_inner);
        let (is_won, result) = win();
        if is_won {
            *latest = (*latest).max(generation);
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn only_the_last_generation_writes() {
        let gate = Gate::new(0);
        assert_eq!(gate.write(None, || 1), Ok(1), "no pair has it");
        assert_eq!(gate.write(Some(1), || 1), Err(Late), "it is not won");
        gate.advance(1, || (true, ()));
        assert_eq!(gate.write(None, || 1), Err(Late));
        assert_eq!(gate.write(Some(1), || 1), Ok(1));
        gate.advance(2, || (false, ()));
        assert_eq!(gate.write(Some(1), || 1), Ok(1), "nobody has won");
        gate.advance(2, || (true, ()));
        assert_eq!((gate.write(Some(1), || 1), gate.write(Some(2), || 2)), (Err(Late), Ok(2)));
        gate.advance(1, || (true, ()));
        assert_eq!(gate.latest(), 2);
    }

    #[test]
    fn a_generation_is_won_after_the_writes_that_are_under_way() {
        let gate = Gate::new(1);
        let ((begun, has_begun), (go_on, may_end)) = (channel(), channel::<()>());
        let (told, order) = channel();
        std::thread::scope(|scope| {
            let (gate, end_of_write) = (&gate, told.clone());
            scope.spawn(move || {
                gate.write(Some(1), || {
                    begun.send(()).expect("awaited");
                    may_end.recv().expect("told");
                    end_of_write.send("written").expect("awaited");
                })
                .expect("the last generation");
            });
            has_begun.recv().expect("it begins");
            scope.spawn(move || gate.advance(2, || (true, told.send("won").expect("awaited"))));
            go_on.send(()).expect("it waits");
        });
        assert_eq!(order.iter().collect::<Vec<_>>(), ["written", "won"]);
        assert_eq!(gate.write(Some(1), || ()), Err(Late));
    }
}
