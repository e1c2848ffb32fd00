//! The device node of KVM.

use super::facts::{API_VERSION, Access};
use kvm_ioctls::Kvm;
use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Opens KVM; it is only given back if it speaks the version of the interface that we do.
pub fn open(path: &Path) -> (Access, Option<Kvm>) {
    let Ok(name) = CString::new(path.as_os_str().as_bytes()) else {
        return (Access::Absent, None);
    };
    match Kvm::new_with_path(&name) {
        Ok(kvm) => {
            let api_version = kvm.get_api_version();
            (Access::Open { api_version }, (api_version == API_VERSION).then_some(kvm))
        }
        Err(error) => (refused(error.errno()), None),
    }
}

fn refused(errno: i32) -> Access {
    match errno {
        libc::ENOENT | libc::ENOTDIR => Access::Absent,
        libc::EACCES | libc::EPERM => Access::Denied,
        _ => Access::Failed(io::Error::from_raw_os_error(errno).to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_of_not_opening_is_told_apart() {
        assert_eq!(open(Path::new("/nonexistent/kvm")).0, Access::Absent);
        assert_eq!(refused(libc::EACCES), Access::Denied);
        assert!(matches!(refused(libc::ENODEV), Access::Failed(_)));
    }

    #[test]
    fn a_device_that_is_not_kvm_is_not_used() {
        let (access, kvm) = open(Path::new("/dev/null"));
        assert_eq!(access, Access::Open { api_version: -1 });
        assert!(kvm.is_none());
    }
}
