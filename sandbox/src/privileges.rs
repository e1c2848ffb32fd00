//! What a side keeps of its user's privileges.

use caps::{CapSet, Capability, CapsHashSet};
use nix::unistd::{Gid, User, setgroups, setresgid, setresuid};

/// What is kept beyond the start, where the user had it: to use files whoever owns them (Landlock says which
/// files these are), to stay in memory and on a CPU, and to count branches.
const KEPT: [Capability; 5] = [
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_IPC_LOCK,
    Capability::CAP_PERFMON,
    Capability::CAP_SYS_NICE,
    Capability::CAP_SYS_RESOURCE,
];

/// What is kept until the main thread runs the guest, and by threads that open a link: to open TAP devices,
/// and low ports.
const AT_START: [Capability; 2] = [Capability::CAP_NET_ADMIN, Capability::CAP_NET_BIND_SERVICE];

/// A privilege that cannot be given up.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// The kernel refuses a set of capabilities.
    #[error("giving up capabilities: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    /// The kernel refuses it.
    #[error("{what}: {source}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: nix::errno::Errno,
    },
    /// Nobody has that name.
    #[error("there is no user {0}")]
    NoUser(String),
}

/// Gives everything up but what a side needs until it runs its guest; with a user's name, becomes that user.
/// Programs that it starts could have no more, not even those that are set-user-ID.
///
/// # Errors
/// [`PrivilegeError`]
pub(crate) fn reduce(user: Option<&str>) -> Result<(), PrivilegeError> {
    let kernel = |what| move |source| PrivilegeError::Kernel { what, source };
    nix::sys::prctl::set_no_new_privs().map_err(kernel("forbidding new privileges"))?;
    let mut kept: CapsHashSet = KEPT.into_iter().chain(AT_START).collect();
    if let Some(name) = user {
        let found = User::from_name(name).map_err(kernel("looking up the user"))?;
        let found = found.ok_or_else(|| PrivilegeError::NoUser(name.to_owned()))?;
        // Whose files may be used is the new user's affair.
        kept.remove(&Capability::CAP_DAC_OVERRIDE);
        bound(&kept)?;
        caps::securebits::set_keepcaps(true)?;
        become_user(&found).map_err(kernel("becoming that user"))?;
    }
    bound(&kept)?;
    hold(&kept)
}

fn become_user(user: &User) -> nix::Result<()> {
    let groups = groups_of(user)?;
    setgroups(&groups)?;
    setresgid(user.gid, user.gid, user.gid)?;
    setresuid(user.uid, user.uid, user.uid)
}

fn groups_of(user: &User) -> nix::Result<Vec<Gid>> {
    let name = std::ffi::CString::new(user.name.as_str()).map_err(|_| nix::errno::Errno::EINVAL)?;
    nix::unistd::getgrouplist(&name, user.gid)
}

/// Gives up, for this thread, what only the start needs.
///
/// # Errors
/// [`PrivilegeError`]
pub(crate) fn end_start() -> Result<(), PrivilegeError> {
    hold(&KEPT.into_iter().collect())
}

/// Nothing but what is in `kept` can come back, if this thread may say so.
fn bound(kept: &CapsHashSet) -> Result<(), PrivilegeError> {
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for capability in caps::runtime::thread_all_supported().difference(kept) {
            caps::drop(None, CapSet::Bounding, *capability)?;
        }
    }
    Ok(())
}

/// Keeps of this thread's capabilities those in `kept`.
fn hold(kept: &CapsHashSet) -> Result<(), PrivilegeError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let held: CapsHashSet = permitted.intersection(kept).copied().collect();
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new())?;
    caps::set(None, CapSet::Effective, &held)?;
    caps::set(None, CapSet::Permitted, &held)?;
    Ok(())
}
