//! Exceptions an instruction can raise.

/// An exception, before delivery. Faults leave the state as before the instruction; traps
/// (`#DB` for single steps, `#BP`, `INT n`) are delivered by the engine, not returned here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exception {
    /// `#DE`, vector 0.
    DivideError,
    /// `#BR`, vector 5.
    BoundRange,
    /// `#UD`, vector 6.
    InvalidOpcode,
    /// `#NM`, vector 7: CR0.TS or CR0.EM.
    DeviceNotAvailable,
    /// `#DF`, vector 8: an exception while delivering another.
    DoubleFault,
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

impl Exception {
    /// The vector it is delivered through.
    pub(super) const fn vector(self) -> u8 {
        match self {
            Self::DivideError => 0,
            Self::BoundRange => 5,
            Self::InvalidOpcode => 6,
            Self::DeviceNotAvailable => 7,
            Self::DoubleFault => 8,
            Self::InvalidTss(_) => 10,
            Self::SegmentNotPresent(_) => 11,
            Self::StackFault(_) => 12,
            Self::GeneralProtection(_) => 13,
            Self::PageFault { .. } => 14,
            Self::X87FloatingPoint => 16,
            Self::AlignmentCheck => 17,
            Self::SimdFloatingPoint => 19,
        }
    }

    /// The error code it pushes, if it pushes one.
    pub(super) const fn error_code(self) -> Option<u16> {
        match self {
            Self::InvalidTss(error)
            | Self::SegmentNotPresent(error)
            | Self::StackFault(error)
            | Self::GeneralProtection(error)
            | Self::PageFault { error, .. } => Some(error),
            Self::DoubleFault | Self::AlignmentCheck => Some(0),
            _ => None,
        }
    }

    /// True if `self` during the delivery of `first` makes a double fault (SDM volume 3,
    /// table "Conditions for Generating a Double Fault").
    pub(super) const fn doubles(self, first: Self) -> bool {
        match first {
            Self::PageFault { .. } => self.is_contributory() || self.vector() == 14,
            _ => first.is_contributory() && self.is_contributory(),
        }
    }

    const fn is_contributory(self) -> bool {
        matches!(
            self,
            Self::DivideError
                | Self::InvalidTss(_)
                | Self::SegmentNotPresent(_)
                | Self::StackFault(_)
                | Self::GeneralProtection(_)
        )
    }

    /// The same exception, raised while an event from outside the program is delivered: the
    /// EXT bit of a selector error code is set.
    pub(super) const fn external(self) -> Self {
        match self {
            Self::InvalidTss(error) => Self::InvalidTss(error | 1),
            Self::SegmentNotPresent(error) => Self::SegmentNotPresent(error | 1),
            Self::StackFault(error) => Self::StackFault(error | 1),
            Self::GeneralProtection(error) => Self::GeneralProtection(error | 1),
            other => other,
        }
    }
}
