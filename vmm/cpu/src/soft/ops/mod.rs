//! The instructions an unprivileged program uses, but SSE and x87.
//!
//! Each file has the general form of its instructions, which takes any operands; the forms that
//! matter for speed are specialised in `fast`.

pub(super) mod alu;
pub(super) mod bits;
pub(super) mod control;
pub(super) mod legacy;
pub(super) mod moves;
pub(super) mod muldiv;
pub(super) mod shift;
pub(super) mod stack;
pub(super) mod string;
