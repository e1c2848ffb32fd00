//! Exceptions an instruction can raise.

/// An exception, before delivery. Faults leave the state as before the instruction; traps
/// (`#DB` for single steps, `#BP`, `INT n`) are delivered by the engine, not returned here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exception {
    /// `#DE`, vector 0.
    DivideError,
    /// `#UD`, vector 6.
    InvalidOpcode,
    /// `#NM`, vector 7: CR0.TS or CR0.EM.
    DeviceNotAvailable,
    /// `#TS`, vector 10.
    InvalidTss(u16),
    /// `#NP`, vector 11.
    SegmentNotPresent(u16),
    /// `#SS`, vector 12.
    StackFault(u16),
    /// `#GP`, vector 13.
    GeneralProtection(u16),
    /// `#PF`, vector 14.
    PageFault {
        /// Goes to CR2.
        address: u64,
        /// P (0), W/R (1), U/S (2), RSVD (3), I/D (4).
        error: u16,
    },
    /// `#MF`, vector 16: a pending unmasked x87 exception.
    X87FloatingPoint,
    /// `#AC`, vector 17.
    AlignmentCheck,
    /// `#XM`, vector 19: an unmasked SSE exception.
    SimdFloatingPoint,
}
