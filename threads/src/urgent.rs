//! Threads whose lateness others would take for the death of this side.

/// Lets the calling thread run as soon as it has something to do, whatever else the host has to do: by
/// real-time priority, or else by the weight of its turns. Where the host allows neither, the thread is like
/// any other. Threads that it starts are ordinary ones.
///
/// For a thread that sleeps most of the time: one that does not leaves the guest little of its CPU.
pub fn make_thread_urgent() {
    let least = libc::sched_param { sched_priority: 1 };
    if schedule(libc::SCHED_RR, &least) {
        return;
    }
    let none = libc::sched_param { sched_priority: 0 };
    // SAFETY: numbers only; 0 names the calling thread.
    let heavier = schedule(libc::SCHED_OTHER, &none)
        && unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, HEAVIEST) } == 0;
    tracing::debug!(heavier, "no real-time priority for the channel");
}

/// The `nice` value of the largest weight.
const HEAVIEST: libc::c_int = -20;

/// True if the calling thread is scheduled so from now on.
fn schedule(policy: libc::c_int, parameter: &libc::sched_param) -> bool {
    // SAFETY: `parameter` is valid for the call; 0 names the calling thread.
    unsafe { libc::sched_setscheduler(0, policy | libc::SCHED_RESET_ON_FORK, parameter) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> libc::c_int {
        // SAFETY: 0 names the calling thread.
        unsafe { libc::sched_getscheduler(0) & !libc::SCHED_RESET_ON_FORK }
    }

    #[test]
    fn an_urgent_thread_is_urgent_where_that_is_allowed_and_what_it_starts_is_not() {
        let urgent = std::thread::spawn(|| {
            make_thread_urgent();
            let child = std::thread::spawn(policy).join().expect("no panic");
            (policy(), child)
        });
        let (own, child) = urgent.join().expect("no panic");
        assert!([libc::SCHED_RR, libc::SCHED_OTHER].contains(&own), "{own}");
        assert_eq!(child, libc::SCHED_OTHER);
    }
}
