//! The x87 unit: which code runs which function.
//!
//! | file | idea |
//! |---|---|
//! | `stack` | registers, tags, exception flags |
//! | `frame` | what surrounds every instruction: availability, pending exceptions, memory, commit |
//! | `arith`, `unmasked`, `remainder` | arithmetic, and what unmasked overflow makes of it |
//! | `transcendental`, `series`, `wide` | the functions CPUs differ in, in software |
//! | `compare`, `transfer`, `decimal`, `control` | the other groups |

mod arith;
mod compare;
mod control;
mod decimal;
mod frame;
mod remainder;
mod series;
mod stack;
mod transcendental;
mod transfer;
mod unmasked;
mod wide;

pub(super) use frame::require_none_pending;
pub(super) use stack::{Stack, mark_all_empty, mark_all_full, settle_loaded};

use super::VectorContext;
use super::host_x87 as host;
use super::operands::{CARRY, PARITY, ZERO};
use crate::soft::exception::Exception;
use arith::{Binary, Kind, WithMemory};
use compare::Comparison;
use control::{Format, Waiting};
use frame::st_number;
use iced_x86::Instruction;
use remainder::{Quotient, remainder};
use transcendental::Trigonometric;

/// `FADD ST(i), ST(j)` and its like: operand 0 is the target.
fn binary<C: VectorContext>(
    cpu: &mut C,
    i: &Instruction,
    kind: Kind,
    run: Binary,
    pop: bool,
) -> Result<(), Exception> {
    let (target, other) = (st_number(i.op0_register()), st_number(i.op1_register()));
    frame::plain(cpu, i, |x87| arith::binary(x87, kind, run, target, other, pop))
}

/// `FADD m32` and its like.
fn with_memory<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    i: &Instruction,
    operation: WithMemory<BYTES>,
) -> Result<(), Exception> {
    frame::reading(cpu, i, |x87, operand| arith::with_memory(x87, operation, operand))
}

/// The forms of `with_memory`: kind, operation on memory, on registers, conversion.
macro_rules! memory_form {
    ($kind:ident, $run:ident, $on_registers:ident, $convert:ident) => {
        WithMemory {
            kind: Kind::$kind,
            run: host::$run,
            on_registers: host::$on_registers,
            convert: host::$convert,
        }
    };
}

/// `FCOM ST(i)` and its like; `FCOMPP` names no register and means ST(1).
fn compare<C: VectorContext>(
    cpu: &mut C,
    i: &Instruction,
    run: Comparison,
    pops: usize,
) -> Result<(), Exception> {
    let other = if i.op_count() == 0 { 1 } else { st_number(i.op1_register()) };
    frame::plain(cpu, i, |x87| compare::registers(x87, run, other, pops))
}

/// `FCOMI ST(i)` and its like.
fn compare_to_flags<C: VectorContext>(
    cpu: &mut C,
    i: &Instruction,
    run: Comparison,
    pop: bool,
) -> Result<(), Exception> {
    let mut flags = 0;
    frame::plain(cpu, i, |x87| {
        flags = compare::to_flags(x87, run, st_number(i.op1_register()), pop);
    })?;
    cpu.set_arithmetic_flags(flags);
    Ok(())
}

/// `FCMOVcc`: moves if any of `flags` is set, or if none is.
fn move_if<C: VectorContext>(
    cpu: &mut C,
    i: &Instruction,
    flags: u64,
    set: bool,
) -> Result<(), Exception> {
    let condition = (cpu.flags() & flags != 0) == set;
    frame::plain(cpu, i, |x87| transfer::move_if(x87, condition, st_number(i.op1_register())))
}

instructions! { cpu, i;
    // Arithmetic.
    Fadd_st0_sti => binary(cpu, i, Kind::Sum, host::add, false),
    Fadd_sti_st0 => binary(cpu, i, Kind::Sum, host::add, false),
    Faddp_sti_st0 => binary(cpu, i, Kind::Sum, host::add, true),
    Fadd_m32fp => with_memory(cpu, i, memory_form!(Sum, add_m32, add, load_m32)),
    Fadd_m64fp => with_memory(cpu, i, memory_form!(Sum, add_m64, add, load_m64)),
    Fiadd_m16int => with_memory(cpu, i, memory_form!(Sum, add_i16, add, load_i16)),
    Fiadd_m32int => with_memory(cpu, i, memory_form!(Sum, add_i32, add, load_i32)),
    Fsub_st0_sti => binary(cpu, i, Kind::Sum, host::sub, false),
    Fsub_sti_st0 => binary(cpu, i, Kind::Sum, host::sub, false),
    Fsubp_sti_st0 => binary(cpu, i, Kind::Sum, host::sub, true),
    Fsub_m32fp => with_memory(cpu, i, memory_form!(Sum, sub_m32, sub, load_m32)),
    Fsub_m64fp => with_memory(cpu, i, memory_form!(Sum, sub_m64, sub, load_m64)),
    Fisub_m16int => with_memory(cpu, i, memory_form!(Sum, sub_i16, sub, load_i16)),
    Fisub_m32int => with_memory(cpu, i, memory_form!(Sum, sub_i32, sub, load_i32)),
    Fsubr_st0_sti => binary(cpu, i, Kind::Sum, host::sub_reversed, false),
    Fsubr_sti_st0 => binary(cpu, i, Kind::Sum, host::sub_reversed, false),
    Fsubrp_sti_st0 => binary(cpu, i, Kind::Sum, host::sub_reversed, true),
    Fsubr_m32fp => with_memory(cpu, i, memory_form!(Sum, sub_reversed_m32, sub_reversed, load_m32)),
    Fsubr_m64fp => with_memory(cpu, i, memory_form!(Sum, sub_reversed_m64, sub_reversed, load_m64)),
    Fisubr_m16int => with_memory(cpu, i, memory_form!(Sum, sub_reversed_i16, sub_reversed, load_i16)),
    Fisubr_m32int => with_memory(cpu, i, memory_form!(Sum, sub_reversed_i32, sub_reversed, load_i32)),
    Fmul_st0_sti => binary(cpu, i, Kind::Product, host::mul, false),
    Fmul_sti_st0 => binary(cpu, i, Kind::Product, host::mul, false),
    Fmulp_sti_st0 => binary(cpu, i, Kind::Product, host::mul, true),
    Fmul_m32fp => with_memory(cpu, i, memory_form!(Product, mul_m32, mul, load_m32)),
    Fmul_m64fp => with_memory(cpu, i, memory_form!(Product, mul_m64, mul, load_m64)),
    Fimul_m16int => with_memory(cpu, i, memory_form!(Product, mul_i16, mul, load_i16)),
    Fimul_m32int => with_memory(cpu, i, memory_form!(Product, mul_i32, mul, load_i32)),
    Fdiv_st0_sti => binary(cpu, i, Kind::Quotient, host::div, false),
    Fdiv_sti_st0 => binary(cpu, i, Kind::Quotient, host::div, false),
    Fdivp_sti_st0 => binary(cpu, i, Kind::Quotient, host::div, true),
    Fdiv_m32fp => with_memory(cpu, i, memory_form!(Quotient, div_m32, div, load_m32)),
    Fdiv_m64fp => with_memory(cpu, i, memory_form!(Quotient, div_m64, div, load_m64)),
    Fidiv_m16int => with_memory(cpu, i, memory_form!(Quotient, div_i16, div, load_i16)),
    Fidiv_m32int => with_memory(cpu, i, memory_form!(Quotient, div_i32, div, load_i32)),
    Fdivr_st0_sti => binary(cpu, i, Kind::QuotientReversed, host::div_reversed, false),
    Fdivr_sti_st0 => binary(cpu, i, Kind::QuotientReversed, host::div_reversed, false),
    Fdivrp_sti_st0 => binary(cpu, i, Kind::QuotientReversed, host::div_reversed, true),
    Fdivr_m32fp => with_memory(cpu, i, memory_form!(QuotientReversed, div_reversed_m32, div_reversed, load_m32)),
    Fdivr_m64fp => with_memory(cpu, i, memory_form!(QuotientReversed, div_reversed_m64, div_reversed, load_m64)),
    Fidivr_m16int => with_memory(cpu, i, memory_form!(QuotientReversed, div_reversed_i16, div_reversed, load_i16)),
    Fidivr_m32int => with_memory(cpu, i, memory_form!(QuotientReversed, div_reversed_i32, div_reversed, load_i32)),
    Fsqrt => frame::plain(cpu, i, |x87| arith::unary(x87, host::sqrt)),
    Frndint => frame::plain(cpu, i, |x87| arith::unary(x87, host::round_to_integral)),
    Fscale => frame::plain(cpu, i, arith::scale),
    Fxtract => frame::plain(cpu, i, arith::extract),
    Fprem => frame::plain(cpu, i, |x87| remainder(x87, Quotient::Truncated)),
    Fprem1 => frame::plain(cpu, i, |x87| remainder(x87, Quotient::Nearest)),
    // Transcendental.
    Fsin => frame::plain(cpu, i, |x87| transcendental::of_angle(x87, Trigonometric::Sine)),
    Fcos => frame::plain(cpu, i, |x87| transcendental::of_angle(x87, Trigonometric::Cosine)),
    Fsincos => frame::plain(cpu, i, transcendental::sine_cosine),
    Fptan => frame::plain(cpu, i, transcendental::partial_tangent),
    Fpatan => frame::plain(cpu, i, |x87| transcendental::of_two(x87, transcendental::arctangent)),
    F2xm1 => frame::plain(cpu, i, transcendental::exponential),
    Fyl2x => frame::plain(cpu, i, |x87| transcendental::of_two(x87, transcendental::logarithm)),
    Fyl2xp1 => frame::plain(cpu, i, |x87| transcendental::of_two(x87, transcendental::logarithm_of_one_plus)),
    // Comparison.
    Fcom_st0_sti | Fcom_st0_sti_DCD0 => compare(cpu, i, host::compare, 0),
    Fcomp_st0_sti | Fcomp_st0_sti_DCD8 | Fcomp_st0_sti_DED0 => compare(cpu, i, host::compare, 1),
    Fcompp => compare(cpu, i, host::compare, 2),
    Fucom_st0_sti => compare(cpu, i, host::compare_unordered, 0),
    Fucomp_st0_sti => compare(cpu, i, host::compare_unordered, 1),
    Fucompp => compare(cpu, i, host::compare_unordered, 2),
    Fcom_m32fp => frame::reading(cpu, i, |x87, operand| compare::memory(x87, host::compare_m32, operand, 0)),
    Fcomp_m32fp => frame::reading(cpu, i, |x87, operand| compare::memory(x87, host::compare_m32, operand, 1)),
    Fcom_m64fp => frame::reading(cpu, i, |x87, operand| compare::memory(x87, host::compare_m64, operand, 0)),
    Fcomp_m64fp => frame::reading(cpu, i, |x87, operand| compare::memory(x87, host::compare_m64, operand, 1)),
    Ficom_m16int => frame::reading(cpu, i, |x87, operand| compare::memory(x87, host::compare_i16, operand, 0)),
    Ficomp_m16int => frame::reading(cpu, i, |x87, operand| compare::memory(x87, host::compare_i16, operand, 1)),
    Ficom_m32int => frame::reading(cpu, i, |x87, operand| compare::memory(x87, host::compare_i32, operand, 0)),
    Ficomp_m32int => frame::reading(cpu, i, |x87, operand| compare::memory(x87, host::compare_i32, operand, 1)),
    Fcomi_st0_sti => compare_to_flags(cpu, i, host::compare, false),
    Fcomip_st0_sti => compare_to_flags(cpu, i, host::compare, true),
    Fucomi_st0_sti => compare_to_flags(cpu, i, host::compare_unordered, false),
    Fucomip_st0_sti => compare_to_flags(cpu, i, host::compare_unordered, true),
    Ftst => frame::plain(cpu, i, compare::with_zero),
    Fxam => frame::plain(cpu, i, compare::examine),
    // Transfer.
    Fld_m32fp => frame::reading(cpu, i, |x87, operand| transfer::load(x87, host::load_m32(operand))),
    Fld_m64fp => frame::reading(cpu, i, |x87, operand| transfer::load(x87, host::load_m64(operand))),
    Fild_m16int => frame::reading(cpu, i, |x87, operand| transfer::load(x87, host::load_i16(operand))),
    Fild_m32int => frame::reading(cpu, i, |x87, operand| transfer::load(x87, host::load_i32(operand))),
    Fild_m64int => frame::reading(cpu, i, |x87, operand| transfer::load(x87, host::load_i64(operand))),
    Fld_m80fp => frame::reading(cpu, i, |x87, operand| transfer::load(x87, (*operand, 0))),
    Fbld_m80bcd => frame::reading(cpu, i, |x87, operand| transfer::load(x87, decimal::load(operand))),
    Fld_sti => frame::plain(cpu, i, |x87| transfer::load_register(x87, st_number(i.op0_register()))),
    Fst_m32fp => frame::writing(cpu, i, |x87| transfer::store(x87, host::store_m32, [0, 0, 0xC0, 0xFF], transfer::single_is_tiny, false)),
    Fstp_m32fp => frame::writing(cpu, i, |x87| transfer::store(x87, host::store_m32, [0, 0, 0xC0, 0xFF], transfer::single_is_tiny, true)),
    Fst_m64fp => frame::writing(cpu, i, |x87| transfer::store(x87, host::store_m64, [0, 0, 0, 0, 0, 0, 0xF8, 0xFF], transfer::double_is_tiny, false)),
    Fstp_m64fp => frame::writing(cpu, i, |x87| transfer::store(x87, host::store_m64, [0, 0, 0, 0, 0, 0, 0xF8, 0xFF], transfer::double_is_tiny, true)),
    Fist_m16int => frame::writing(cpu, i, |x87| transfer::store(x87, host::store_i16, [0, 0x80], transfer::never, false)),
    Fistp_m16int => frame::writing(cpu, i, |x87| transfer::store(x87, host::store_i16, [0, 0x80], transfer::never, true)),
    Fist_m32int => frame::writing(cpu, i, |x87| transfer::store(x87, host::store_i32, [0, 0, 0, 0x80], transfer::never, false)),
    Fistp_m32int => frame::writing(cpu, i, |x87| transfer::store(x87, host::store_i32, [0, 0, 0, 0x80], transfer::never, true)),
    Fistp_m64int => frame::writing(cpu, i, |x87| transfer::store(x87, host::store_i64, [0, 0, 0, 0, 0, 0, 0, 0x80], transfer::never, true)),
    Fisttp_m16int => frame::writing(cpu, i, |x87| transfer::store(x87, host::truncate_i16, [0, 0x80], transfer::never, true)),
    Fisttp_m32int => frame::writing(cpu, i, |x87| transfer::store(x87, host::truncate_i32, [0, 0, 0, 0x80], transfer::never, true)),
    Fisttp_m64int => frame::writing(cpu, i, |x87| transfer::store(x87, host::truncate_i64, [0, 0, 0, 0, 0, 0, 0, 0x80], transfer::never, true)),
    Fbstp_m80bcd => frame::writing(cpu, i, |x87| transfer::store(x87, host::store_decimal, decimal::INDEFINITE, transfer::never, true)),
    Fstp_m80fp => frame::writing(cpu, i, transfer::store_whole),
    Fst_sti => frame::plain(cpu, i, |x87| transfer::store_register(x87, st_number(i.op0_register()), false)),
    Fstp_sti | Fstp_sti_DFD0 | Fstp_sti_DFD8 => frame::plain(cpu, i, |x87| transfer::store_register(x87, st_number(i.op0_register()), true)),
    Fstpnce_sti => frame::plain(cpu, i, |x87| transfer::store_register_if_full(x87, st_number(i.op0_register()))),
    Fxch_st0_sti | Fxch_st0_sti_DDC8 | Fxch_st0_sti_DFC8 => frame::plain(cpu, i, |x87| transfer::exchange(x87, st_number(i.op1_register()))),
    Fcmovb_st0_sti => move_if(cpu, i, CARRY, true),
    Fcmovnb_st0_sti => move_if(cpu, i, CARRY, false),
    Fcmove_st0_sti => move_if(cpu, i, ZERO, true),
    Fcmovne_st0_sti => move_if(cpu, i, ZERO, false),
    Fcmovbe_st0_sti => move_if(cpu, i, CARRY | ZERO, true),
    Fcmovnbe_st0_sti => move_if(cpu, i, CARRY | ZERO, false),
    Fcmovu_st0_sti => move_if(cpu, i, PARITY, true),
    Fcmovnu_st0_sti => move_if(cpu, i, PARITY, false),
    Fchs => frame::plain(cpu, i, |x87| transfer::change_sign(x87, |bits| bits ^ 0x8000)),
    Fabs => frame::plain(cpu, i, |x87| transfer::change_sign(x87, |bits| bits & 0x7FFF)),
    Fld1 => frame::plain(cpu, i, |x87| transfer::load_constant(x87, transfer::ONE)),
    Fldz => frame::plain(cpu, i, |x87| transfer::load_constant(x87, transfer::NOUGHT)),
    Fldl2t => frame::plain(cpu, i, |x87| transfer::load_constant(x87, transfer::LOG2_10)),
    Fldl2e => frame::plain(cpu, i, |x87| transfer::load_constant(x87, transfer::LOG2_E)),
    Fldpi => frame::plain(cpu, i, |x87| transfer::load_constant(x87, transfer::PI)),
    Fldlg2 => frame::plain(cpu, i, |x87| transfer::load_constant(x87, transfer::LOG10_2)),
    Fldln2 => frame::plain(cpu, i, |x87| transfer::load_constant(x87, transfer::LN_2)),
    // Control.
    Wait => frame::wait(cpu),
    Fnop => frame::plain(cpu, i, |_| ()),
    Fneni | Fndisi | Fnsetpm => control::change(cpu, Waiting::No, |_| ()),
    Feni | Fdisi | Fsetpm => control::change(cpu, Waiting::Yes, |_| ()),
    Fninit => control::change(cpu, Waiting::No, control::initialise),
    Fnclex => control::change(cpu, Waiting::No, control::clear_exceptions),
    Fnstcw_m2byte => control::store_control(cpu, i, Waiting::No),
    Fnstsw_m2byte | Fnstsw_AX => control::store_status(cpu, i, Waiting::No),
    Fnstenv_m14byte => control::store_environment(cpu, i, Format::Words, Waiting::No),
    Fnstenv_m28byte => control::store_environment(cpu, i, Format::Doubles, Waiting::No),
    Fnsave_m94byte => control::save(cpu, i, Format::Words, Waiting::No),
    Fnsave_m108byte => control::save(cpu, i, Format::Doubles, Waiting::No),
    Finit => control::change(cpu, Waiting::Yes, control::initialise),
    Fclex => control::change(cpu, Waiting::Yes, control::clear_exceptions),
    Fstcw_m2byte => control::store_control(cpu, i, Waiting::Yes),
    Fstsw_m2byte | Fstsw_AX => control::store_status(cpu, i, Waiting::Yes),
    Fstenv_m14byte => control::store_environment(cpu, i, Format::Words, Waiting::Yes),
    Fstenv_m28byte => control::store_environment(cpu, i, Format::Doubles, Waiting::Yes),
    Fsave_m94byte => control::save(cpu, i, Format::Words, Waiting::Yes),
    Fsave_m108byte => control::save(cpu, i, Format::Doubles, Waiting::Yes),
    Fldcw_m2byte => control::load_control(cpu, i),
    Fldenv_m14byte => control::load_environment(cpu, i, Format::Words),
    Fldenv_m28byte => control::load_environment(cpu, i, Format::Doubles),
    Frstor_m94byte => control::restore(cpu, i, Format::Words),
    Frstor_m108byte => control::restore(cpu, i, Format::Doubles),
    Fincstp => frame::plain(cpu, i, |x87| control::move_top(x87, 1)),
    Fdecstp => frame::plain(cpu, i, |x87| control::move_top(x87, 7)),
    Ffree_sti => frame::plain(cpu, i, |x87| control::free(x87, st_number(i.op0_register()))),
    Ffreep_sti => frame::plain(cpu, i, |x87| control::free_and_pop(x87, st_number(i.op0_register()))),
}
