//! Files whose lock says which process may do something; the others wait.

use crate::error::GuestError;
use crate::progress::Progress;
use std::fs::{File, TryLockError};
use std::path::Path;

/// Makes the file if need be and locks it, until the result is dropped. If another process has the lock,
/// says that it is `waiting`, and waits.
///
/// # Errors
/// [`GuestError::File`].
pub(crate) fn lock_file(
    path: &Path,
    waiting: &str,
    progress: &mut dyn Progress,
) -> Result<File, GuestError> {
    let open = File::options().create(true).truncate(false).write(true).open(path);
    let file = open.map_err(GuestError::file("opening", path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            progress.step(waiting);
            file.lock().map_err(GuestError::file("locking", path))?;
        }
        Err(TryLockError::Error(error)) => return Err(GuestError::file("locking", path)(error)),
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::NoProgress;

    /// Says that somebody waits.
    struct Told(std::sync::mpsc::Sender<String>);

    impl Progress for Told {
        fn step(&mut self, what: &str) {
            self.0.send(what.to_owned()).unwrap();
        }
        fn note(&mut self, _what: &str) {}
    }

    #[test]
    fn the_second_waits_for_the_first_and_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let first = lock_file(&path, "waiting", &mut NoProgress).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let second = {
            let path = path.clone();
            std::thread::spawn(move || lock_file(&path, "waiting", &mut Told(tell)).unwrap())
        };
        assert_eq!(told.recv().unwrap(), "waiting");
        assert!(!second.is_finished(), "the first still has it");
        drop(first);
        second.join().unwrap();
    }
}
