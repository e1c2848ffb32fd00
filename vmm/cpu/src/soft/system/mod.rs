//! What belongs to the system rather than to a program: control registers, segments,
//! interrupts, system calls, ports.
//!
//! The CPU is always in long mode. Interrupts and system calls enter 64-bit code; programs may be
//! 32-bit or 16-bit code. Call gates and task gates are refused with `#GP` of their selector.

pub(super) mod control;
pub(super) mod debug;
pub(super) mod interrupts;
pub(super) mod io;
pub(super) mod msr;
pub(super) mod segments;
pub(super) mod syscall;
pub(super) mod transfer;
