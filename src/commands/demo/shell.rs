//! The demo's shell: a console to play with; the kill is the user's.

use super::{EXIT_LIMIT, Stage, check_alive, show};
use crate::pair::Look;
use crate::terminal::{RawTerminal, read_keys};
use anyhow::Result;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vmft_guest_images::disk::check_disk;

/// Connects the terminal to the pair until the guest is off.
pub(super) fn play(mut stage: Stage, disk: &Path) -> Result<ExitCode> {
    eprintln!(
        "vmft: primary is process {}, backup is process {}; kill either from another terminal.",
        stage.primary.pid(),
        stage.backup.pid()
    );
    eprintln!("vmft: 'poweroff' in the guest, or Ctrl-A x here, ends the demo.");
    let raw = RawTerminal::enter()?;
    let left = Arc::new(AtomicBool::new(false));
    let (leave, mut typists) = (Arc::clone(&left), stage.console.typists()?);
    read_keys(move |keys| {
        for typist in &mut typists {
            // A side that is gone takes no keys; the other does.
            let _ = typist.type_in(&keys.typed);
        }
        if keys.leave {
            leave.store(true, Ordering::Relaxed);
        }
        !keys.leave
    })?;
    loop {
        match stage.console.look(Duration::from_millis(100)) {
            Look::Bytes(bytes) => show(&bytes)?,
            Look::Closed => break,
            Look::Nothing => {
                let killed = stage.primary.try_exit()?.is_some();
                let survivors = [stage.primary.try_exit()?, stage.backup.try_exit()?];
                if survivors.iter().all(Option::is_some) {
                    break;
                }
                if !killed {
                    // The backup may be the one that was killed: the guest goes on all the same.
                    let _ = check_alive(&mut stage, killed);
                }
            }
        }
        if left.load(Ordering::Relaxed) {
            for side in [&stage.primary, &stage.backup] {
                // Only the live one has a guest to stop; a dead one does not answer.
                let _ = crate::api_client::shutdown(&side.api());
            }
            break;
        }
    }
    drop(raw);
    for side in [&mut stage.primary, &mut stage.backup] {
        side.wait_exit(EXIT_LIMIT)?;
    }
    let check = check_disk(disk)?;
    println!("vmft: the disk's file system is {}", if check.clean { "clean" } else { "NOT clean" });
    Ok(if check.clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
