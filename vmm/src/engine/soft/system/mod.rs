//! What belongs to the system rather than to a program: control registers, segments,
//! interrupts, system calls, ports.
//!
//! The CPU is always in long mode and executes 64-bit code segments only: a transfer to a code
//! segment without the L bit raises `#GP` of its selector, so that a 32-bit process dies in the
//! guest. Call gates and task gates are refused the same way.

pub(super) mod control;
pub(super) mod interrupts;
pub(super) mod io;
pub(super) mod msr;
pub(super) mod segments;
pub(super) mod syscall;
pub(super) mod transfer;
