//! Why the engine cannot be opened.

use vmm_sys_util::errno;

/// Why there is no `kvm` engine.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The host has no `/dev/kvm`.
    #[error("this host has no /dev/kvm")]
    Missing,
    /// This user may not open it.
    #[error("no permission to open /dev/kvm")]
    Permission,
    /// It could not be opened for another reason.
    #[error("opening /dev/kvm")]
    Open(#[source] errno::Error),
    /// It speaks another version of the interface.
    #[error("/dev/kvm speaks version {found} of its interface, not 12")]
    Version {
        /// What it says.
        found: i32,
    },
    /// The host's KVM lacks something the engine needs.
    #[error("this host's KVM lacks {capability}")]
    Capability {
        /// The capability's name in the kernel's interface.
        capability: &'static str,
    },
    /// A request that sets the machine up was refused.
    #[error("KVM refused to {action}")]
    Refused {
        /// What was asked for.
        action: &'static str,
        /// The host's reason.
        #[source]
        source: errno::Error,
    },
    /// There is no counter of guest branches that points could be named by.
    #[error("{0}")]
    Counter(String),
    /// The host gave no signal, thread or mapping for kicks.
    #[error("setting up kicks")]
    Kicks(#[source] std::io::Error),
}

impl KvmError {
    /// For `map_err`: this request was refused.
    pub(crate) fn refused(action: &'static str) -> impl FnOnce(errno::Error) -> Self {
        move |source| Self::Refused { action, source }
    }
}
