//! What a confined process is refused, by its own trying: each try is a process, which is this program again.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};
use vmft_sandbox::{Files, Sandbox, Task, Use, outside_of_landlock, spawn};

/// The variable that tells a process of these tests what to try, and where.
const TRY: &str = "VMFT_SANDBOX_TRY";
const PLACE: &str = "VMFT_SANDBOX_PLACE";

/// Something that a thread tries.
#[derive(Debug, Clone, Copy)]
struct Attempt {
    name: &'static str,
    /// The call; whether it succeeds is all the same, if only it is made.
    make: fn(),
    /// Who may.
    allowed: &'static [Task],
}

fn call(number: libc::c_long, arguments: [u64; 5]) {
    let [a, b, c, d, e] = arguments;
    // SAFETY: none of the calls below has an argument that is used as an address of this process's memory:
    // they are zero, where the kernel looks for one, or numbers.
    unsafe { libc::syscall(number, a, b, c, d, e) };
}

const WRITERS: &[Task] = &[Task::Guest, Task::Channel, Task::Arbiter, Task::Outside];

/// One call of each kind of power.
const ATTEMPTS: &[Attempt] = &[
    Attempt { name: "run", make: || call(libc::SYS_execve, [0; 5]), allowed: &[] },
    Attempt { name: "fork", make: || call(libc::SYS_fork, [0; 5]), allowed: &[] },
    Attempt { name: "vfork", make: || call(libc::SYS_clone, [0x4000, 0, 0, 0, 0]), allowed: &[] },
    Attempt { name: "trace", make: || call(libc::SYS_ptrace, [16, 1, 0, 0, 0]), allowed: &[] },
    Attempt { name: "mount", make: || call(libc::SYS_mount, [0; 5]), allowed: &[] },
    Attempt { name: "unshare", make: || call(libc::SYS_unshare, [0; 5]), allowed: &[] },
    Attempt { name: "load", make: || call(libc::SYS_init_module, [0; 5]), allowed: &[] },
    Attempt { name: "kill", make: || call(libc::SYS_kill, [1, 0, 0, 0, 0]), allowed: &[] },
    Attempt { name: "signal", make: || call(libc::SYS_tgkill, [1, 1, 0, 0, 0]), allowed: &[] },
    Attempt { name: "ring", make: || call(libc::SYS_io_uring_setup, [0; 5]), allowed: &[] },
    // A terminal's input, typed for it: TIOCSTI.
    Attempt { name: "type", make: || call(libc::SYS_ioctl, [9999, 0x5412, 0, 0, 0]), allowed: &[] },
    Attempt {
        name: "write-and-execute",
        make: || call(libc::SYS_mmap, [0, 4096, 7, 0x22, u64::MAX]),
        allowed: &[],
    },
    Attempt {
        name: "connect",
        make: || call(libc::SYS_socket, [2, 1, 0, 0, 0]),
        allowed: &[Task::Link, Task::Channel],
    },
    Attempt {
        name: "create",
        make: || call(libc::SYS_openat, [0, 0, libc::O_CREAT as u64, 0, 0]),
        // The device of TAPs is opened to be written.
        allowed: &[Task::Guest, Task::Link, Task::Channel, Task::Arbiter, Task::Outside],
    },
    Attempt { name: "remove", make: || call(libc::SYS_unlink, [0; 5]), allowed: WRITERS },
    Attempt {
        name: "write-disk",
        make: || call(libc::SYS_pwrite64, [9999, 0, 0, 0, 0]),
        allowed: &[
            Task::Guest,
            Task::Disk,
            Task::Console,
            Task::Channel,
            Task::Arbiter,
            Task::Outside,
        ],
    },
    Attempt {
        name: "send",
        make: || call(libc::SYS_sendto, [9999, 0, 0, 0, 0]),
        allowed: &[
            Task::Guest,
            Task::Network,
            Task::Link,
            Task::Console,
            Task::Channel,
            Task::Arbiter,
            Task::Api,
        ],
    },
    Attempt {
        name: "kvm",
        make: || call(libc::SYS_ioctl, [9999, 0xAE80, 0, 0, 0]),
        allowed: &[Task::Guest, Task::Cpu, Task::Channel],
    },
    Attempt {
        name: "read",
        make: || call(libc::SYS_read, [9999, 0, 0, 0, 0]),
        allowed: &Task::ALL,
    },
    Attempt {
        name: "execute",
        make: || call(libc::SYS_mmap, [0, 4096, 5, 0x22, u64::MAX]),
        allowed: &Task::ALL,
    },
    Attempt { name: "open", make: || call(libc::SYS_openat, [0, 0, 0, 0, 0]), allowed: &Task::ALL },
];

/// Runs this program again, for [`tried_here`] alone.
fn again(what: &str, place: &Path) -> Output {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "tried_here", "--nocapture"]).env(TRY, what).env(PLACE, place);
    child.output().unwrap()
}

/// Does what the variable says, in a process of its own; nothing where there is none.
#[test]
fn tried_here() {
    let Ok(what) = std::env::var(TRY) else { return };
    let place = std::env::var(PLACE).unwrap();
    let place = Path::new(&place);
    match what.split_once(' ') {
        Some((task, attempt)) => {
            let task = Task::ALL.into_iter().find(|known| format!("{known:?}") == task).unwrap();
            let attempt = ATTEMPTS.iter().find(|known| known.name == attempt).unwrap();
            Sandbox::default().enter().unwrap();
            spawn(task, "tries", attempt.make).unwrap().join().unwrap();
        }
        None if what == "files" => try_files(place),
        None if what == "user" => {
            let sandbox = Sandbox { user: Some("nobody".to_owned()), ..Sandbox::default() };
            sandbox.enter().unwrap();
            let state = || fs::read_to_string("/proc/thread-self/status").unwrap();
            println!("{}", spawn(Task::Disk, "disk", state).unwrap().join().unwrap());
        }
        None => panic!("{what}?"),
    }
}

#[test]
fn a_thread_is_killed_for_what_its_task_does_not_need_and_not_for_what_it_does() {
    let place = tempfile::tempdir().unwrap();
    for task in Task::ALL {
        for attempt in ATTEMPTS {
            let output = again(&format!("{task:?} {}", attempt.name), place.path());
            let killed = output.status.signal() == Some(libc::SIGSYS);
            let may = attempt.allowed.contains(&task);
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(
                killed, !may,
                "{task:?} tries to {}: {:?} {said}",
                attempt.name, output.status
            );
            assert_eq!(output.status.success(), may, "{task:?} {}: {said}", attempt.name);
        }
    }
}

/// True if this kernel has Landlock: asked as landlock_create_ruleset(2) says.
fn has_landlock() -> bool {
    // SAFETY: with no attributes and this flag, the call returns a number and touches nothing.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
    version > 0
}

fn writes(path: &Path) -> bool {
    let opened = OpenOptions::new().write(true).create(true).truncate(false).open(path);
    opened.is_ok_and(|mut file| file.write_all(b"x").is_ok())
}

fn try_files(place: &Path) {
    let at = |name: &str| place.join(name);
    let mut files = Files::default();
    files.add(&at("disk"), Use::Write);
    files.add(&at("base"), Use::Read);
    files.add(&at("shared/disk.vmft"), Use::Directory);
    let sandbox = Sandbox { files, user: None };
    assert_eq!(sandbox.enter().unwrap().files_confined, has_landlock());

    assert!(writes(&at("disk")) && File::open(at("base")).is_ok());
    fs::create_dir(at("shared/disk.vmft")).unwrap();
    assert!(writes(&at("shared/disk.vmft/claim")));
    fs::hard_link(at("shared/disk.vmft/claim"), at("shared/disk.vmft/generation-1")).unwrap();
    fs::remove_file(at("shared/disk.vmft/claim")).unwrap();

    if has_landlock() {
        assert!(!writes(&at("base")) && !writes(&at("other")) && !writes(&at("new")));
        assert!(File::open(at("other")).is_err() && fs::read_dir(place).is_err());
        assert!(fs::remove_file(at("other")).is_err());
        let (from, to) = (at("disk"), at("shared/stolen"));
        assert!(fs::rename(from, to).is_err());
        let inside = spawn(Task::Arbiter, "arbiter", {
            let other = at("other");
            move || writes(&other)
        });
        assert!(!inside.unwrap().join().unwrap(), "every thread is confined");
    }
    let named_later = at("snapshot");
    let file = outside_of_landlock(move || File::create(named_later)).unwrap();
    file.set_len(4096).unwrap();
    assert!(file.as_raw_fd() > 2);
}

#[test]
fn the_files_that_are_named_can_be_used_and_no_others() {
    let place = tempfile::tempdir().unwrap();
    fs::create_dir(place.path().join("shared")).unwrap();
    for file in ["disk", "base", "other"] {
        fs::write(place.path().join(file), "x").unwrap();
    }
    let output = again("files", place.path());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(fs::metadata(place.path().join("snapshot")).unwrap().len(), 4096);
}

#[test]
fn a_side_that_root_starts_for_another_user_has_no_privileges_of_root() {
    if !nix::unistd::geteuid().is_root() {
        // Only root can become another user: that is refused.
        let output = again("user", Path::new("."));
        assert!(!output.status.success());
        return;
    }
    let output = again("user", Path::new("/"));
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let field = |name: &str| {
        let line = said.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name} in {said}")).trim().to_owned()
    };
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    let uid = nobody.uid.to_string();
    assert_eq!(field("Uid:").split_whitespace().collect::<Vec<_>>(), [&uid; 4]);
    assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), ("1".to_owned(), "2".to_owned()));
    let capabilities = u64::from_str_radix(&field("CapPrm:"), 16).unwrap();
    // DAC_OVERRIDE, SETUID, NET_ADMIN, SYS_ADMIN (capability.h).
    for number in [1, 7, 12, 21] {
        assert_eq!(capabilities & 1 << number, 0, "capability {number} of {capabilities:#x}");
    }
}
