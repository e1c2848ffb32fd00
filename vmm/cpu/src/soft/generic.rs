//! The general path: one function for each kind of instruction, for any operands.
//!
//! What [`select`] knows is what the engine executes. Everything else is either not offered by
//! the CPU model, and undefined, or missing, and ends the run.

use super::cpu::Cpu;
use super::event::Flow;
use super::ops::{alu, bits, control, legacy, moves, muldiv, shift, stack, string};
use super::system::{
    control as registers, debug, interrupts, io, msr, segments, syscall, transfer,
};
use super::{vector, vector_context};
use crate::cpu_model::{self as cpuid, TimeStamp};
use iced_x86::{Code, Instruction, Mnemonic};

/// Executes one decoded instruction.
pub(super) type General = fn(&mut Cpu, &Instruction) -> Flow;

/// An instruction of the general path.
#[derive(Debug, Clone, Copy)]
pub(super) struct Decoded {
    pub(super) run: General,
    pub(super) instruction: Instruction,
}

/// The function for an instruction, whatever it is.
pub(super) fn of(instruction: &Instruction) -> General {
    let code = instruction.code();
    if code == Code::INVALID {
        return if instruction.len() >= 15 { control::too_long } else { control::undefined };
    }
    match select(code) {
        Some(function) => function,
        None if cpuid::offers(code, TimeStamp::Shown) => missing,
        None => control::undefined,
    }
}

fn missing(cpu: &mut Cpu, _: &Instruction) -> Flow {
    Err(cpu.missing("instruction is offered by CPUID but not implemented"))
}

/// The function for an instruction form, if the engine has it.
pub(super) fn select(code: Code) -> Option<General> {
    // Forms of old CPUs, with mnemonics that live on.
    let gone = matches!(code, Code::Popw_CS | Code::Mov_r32_tr | Code::Mov_tr_r32);
    if cpuid::withholds(code) || gone {
        return None;
    }
    string_instruction(code)
        .or_else(|| special_move(code))
        .or_else(|| program(code.mnemonic()))
        .or_else(|| branch(code))
        .or_else(|| system(code.mnemonic()))
        .or_else(|| vector::supports(code).then_some(vector_context::run as General))
}

fn string_instruction(code: Code) -> Option<General> {
    Some(match code {
        Code::Movsb_m8_m8 | Code::Movsw_m16_m16 | Code::Movsd_m32_m32 | Code::Movsq_m64_m64 => {
            string::any_movs
        }
        Code::Stosb_m8_AL | Code::Stosw_m16_AX | Code::Stosd_m32_EAX | Code::Stosq_m64_RAX => {
            string::any_stos
        }
        Code::Lodsb_AL_m8 | Code::Lodsw_AX_m16 | Code::Lodsd_EAX_m32 | Code::Lodsq_RAX_m64 => {
            string::any_lods
        }
        Code::Cmpsb_m8_m8 | Code::Cmpsw_m16_m16 | Code::Cmpsd_m32_m32 | Code::Cmpsq_m64_m64 => {
            string::any_cmps
        }
        Code::Scasb_AL_m8 | Code::Scasw_AX_m16 | Code::Scasd_EAX_m32 | Code::Scasq_RAX_m64 => {
            string::any_scas
        }
        Code::Insb_m8_DX | Code::Insw_m16_DX | Code::Insd_m32_DX => string::any_ins,
        Code::Outsb_DX_m8 | Code::Outsw_DX_m16 | Code::Outsd_DX_m32 => string::any_outs,
        _ => return None,
    })
}

fn special_move(code: Code) -> Option<General> {
    Some(match code {
        Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => {
            segments::mov_from_segment
        }
        Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => {
            segments::mov_to_segment
        }
        Code::Mov_r64_cr | Code::Mov_cr_r64 | Code::Mov_r32_cr | Code::Mov_cr_r32 => {
            registers::mov_control
        }
        Code::Mov_r64_dr | Code::Mov_dr_r64 | Code::Mov_r32_dr | Code::Mov_dr_r32 => {
            debug::mov_debug
        }
        _ if pops_segment(code) => segments::pop_segment,
        _ => return None,
    })
}

fn pops_segment(code: Code) -> bool {
    matches!(
        code,
        Code::Popw_ES
            | Code::Popd_ES
            | Code::Popw_SS
            | Code::Popd_SS
            | Code::Popw_DS
            | Code::Popd_DS
            | Code::Popw_FS
            | Code::Popd_FS
            | Code::Popq_FS
            | Code::Popw_GS
            | Code::Popd_GS
            | Code::Popq_GS
    )
}

fn program(mnemonic: Mnemonic) -> Option<General> {
    arithmetic(mnemonic).or_else(|| data(mnemonic)).or_else(|| legacy(mnemonic))
}

fn legacy(mnemonic: Mnemonic) -> Option<General> {
    Some(match mnemonic {
        Mnemonic::Daa => legacy::daa,
        Mnemonic::Das => legacy::das,
        Mnemonic::Aaa => legacy::aaa,
        Mnemonic::Aas => legacy::aas,
        Mnemonic::Aam => legacy::aam,
        Mnemonic::Aad => legacy::aad,
        Mnemonic::Salc => legacy::salc,
        Mnemonic::Into => legacy::into,
        Mnemonic::Bound => legacy::bound,
        Mnemonic::Arpl => legacy::arpl,
        Mnemonic::Pusha | Mnemonic::Pushad => legacy::pusha,
        Mnemonic::Popa | Mnemonic::Popad => legacy::popa,
        _ => return None,
    })
}

fn arithmetic(mnemonic: Mnemonic) -> Option<General> {
    Some(match mnemonic {
        Mnemonic::Add => alu::binary::<alu::Add>,
        Mnemonic::Adc => alu::binary::<alu::Adc>,
        Mnemonic::Sub => alu::binary::<alu::Sub>,
        Mnemonic::Sbb => alu::binary::<alu::Sbb>,
        Mnemonic::Cmp => alu::binary::<alu::Cmp>,
        Mnemonic::And => alu::binary::<alu::And>,
        Mnemonic::Or => alu::binary::<alu::Or>,
        Mnemonic::Xor => alu::binary::<alu::Xor>,
        Mnemonic::Test => alu::binary::<alu::Test>,
        Mnemonic::Inc => alu::inc,
        Mnemonic::Dec => alu::dec,
        Mnemonic::Neg => alu::neg,
        Mnemonic::Not => alu::not,
        Mnemonic::Xadd => alu::xadd,
        Mnemonic::Cmpxchg => alu::cmpxchg,
        Mnemonic::Cmpxchg8b => alu::cmpxchg8b,
        Mnemonic::Cmpxchg16b => alu::cmpxchg16b,
        Mnemonic::Shl | Mnemonic::Sal => shift::by_count::<shift::Shl>,
        Mnemonic::Shr => shift::by_count::<shift::Shr>,
        Mnemonic::Sar => shift::by_count::<shift::Sar>,
        Mnemonic::Rol => shift::by_count::<shift::Rol>,
        Mnemonic::Ror => shift::by_count::<shift::Ror>,
        Mnemonic::Rcl => shift::by_count::<shift::Rcl>,
        Mnemonic::Rcr => shift::by_count::<shift::Rcr>,
        Mnemonic::Shld => shift::shld,
        Mnemonic::Shrd => shift::shrd,
        Mnemonic::Bt => bits::bt,
        Mnemonic::Bts => bits::bts,
        Mnemonic::Btr => bits::btr,
        Mnemonic::Btc => bits::btc,
        Mnemonic::Bsf => bits::bsf,
        Mnemonic::Bsr => bits::bsr,
        Mnemonic::Popcnt => bits::popcnt,
        Mnemonic::Bswap => bits::bswap,
        Mnemonic::Mul => muldiv::mul,
        Mnemonic::Imul => muldiv::imul,
        Mnemonic::Div => muldiv::div,
        Mnemonic::Idiv => muldiv::idiv,
        _ => return None,
    })
}

fn data(mnemonic: Mnemonic) -> Option<General> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Mov | M::Movzx => moves::mov,
        M::Movsx | M::Movsxd => moves::movsx,
        M::Lea => moves::lea,
        M::Xchg => moves::xchg,
        M::Cmovo
        | M::Cmovno
        | M::Cmovb
        | M::Cmovae
        | M::Cmove
        | M::Cmovne
        | M::Cmovbe
        | M::Cmova
        | M::Cmovs
        | M::Cmovns
        | M::Cmovp
        | M::Cmovnp
        | M::Cmovl
        | M::Cmovge
        | M::Cmovle
        | M::Cmovg => moves::cmov,
        M::Seto
        | M::Setno
        | M::Setb
        | M::Setae
        | M::Sete
        | M::Setne
        | M::Setbe
        | M::Seta
        | M::Sets
        | M::Setns
        | M::Setp
        | M::Setnp
        | M::Setl
        | M::Setge
        | M::Setle
        | M::Setg => moves::setcc,
        M::Cbw => moves::cbw,
        M::Cwde => moves::cwde,
        M::Cdqe => moves::cdqe,
        M::Cwd => moves::cwd,
        M::Cdq => moves::cdq,
        M::Cqo => moves::cqo,
        M::Lahf => moves::lahf,
        M::Sahf => moves::sahf,
        M::Clc => moves::clc,
        M::Stc => moves::stc,
        M::Cmc => moves::cmc,
        M::Cld => moves::cld,
        M::Std => moves::std,
        M::Xlatb => moves::xlat,
        M::Push => stack::push,
        M::Pop => stack::pop,
        M::Pushf | M::Pushfd | M::Pushfq => stack::pushf,
        M::Popf | M::Popfd | M::Popfq => stack::popf,
        M::Enter => stack::enter,
        M::Leave => stack::leave,
        M::Clflush => moves::clflush,
        M::Nop
        | M::Reservednop
        | M::Pause
        | M::Endbr64
        | M::Endbr32
        | M::Rdsspd
        | M::Rdsspq
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetch
        | M::Prefetchw
        | M::Lfence
        | M::Mfence
        | M::Sfence => moves::nop,
        _ => return None,
    })
}

fn is_far_jump(code: Code) -> bool {
    matches!(
        code,
        Code::Jmp_m1616 | Code::Jmp_m1632 | Code::Jmp_m1664 | Code::Jmp_ptr1616 | Code::Jmp_ptr1632
    )
}

fn is_far_call(code: Code) -> bool {
    matches!(
        code,
        Code::Call_m1616
            | Code::Call_m1632
            | Code::Call_m1664
            | Code::Call_ptr1616
            | Code::Call_ptr1632
    )
}

fn branch(code: Code) -> Option<General> {
    use Mnemonic as M;
    Some(match code {
        _ if is_far_jump(code) => transfer::jmp_far,
        _ if is_far_call(code) => transfer::call_far,
        _ => match code.mnemonic() {
            M::Jmp => control::jmp,
            M::Call => control::call,
            M::Ret => control::ret,
            M::Retf => transfer::ret_far,
            M::Jo
            | M::Jno
            | M::Jb
            | M::Jae
            | M::Je
            | M::Jne
            | M::Jbe
            | M::Ja
            | M::Js
            | M::Jns
            | M::Jp
            | M::Jnp
            | M::Jl
            | M::Jge
            | M::Jle
            | M::Jg => control::jcc,
            M::Loop | M::Loope | M::Loopne | M::Jrcxz | M::Jecxz | M::Jcxz => control::count_branch,
            M::Ud0 | M::Ud1 | M::Ud2 => control::undefined,
            M::Int3 => control::int3,
            M::Int1 => control::int1,
            M::Int => control::int,
            M::Iret | M::Iretd | M::Iretq => interrupts::iret,
            M::Syscall => syscall::syscall,
            M::Sysret | M::Sysretq => syscall::sysret,
            _ => return None,
        },
    })
}

fn system(mnemonic: Mnemonic) -> Option<General> {
    Some(match mnemonic {
        Mnemonic::In => io::input,
        Mnemonic::Out => io::output,
        Mnemonic::Cli => io::cli,
        Mnemonic::Sti => io::sti,
        Mnemonic::Hlt => io::hlt,
        Mnemonic::Lss | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Les | Mnemonic::Lds => {
            segments::load_far_pointer
        }
        Mnemonic::Lgdt | Mnemonic::Lidt => segments::load_table,
        Mnemonic::Sgdt | Mnemonic::Sidt => segments::store_table,
        Mnemonic::Sldt | Mnemonic::Str => segments::store_selector,
        Mnemonic::Lldt => segments::lldt,
        Mnemonic::Ltr => segments::ltr,
        Mnemonic::Lar => segments::lar,
        Mnemonic::Lsl => segments::lsl,
        Mnemonic::Verr | Mnemonic::Verw => segments::verify,
        Mnemonic::Smsw => registers::smsw,
        Mnemonic::Lmsw => registers::lmsw,
        Mnemonic::Clts => registers::clts,
        Mnemonic::Invlpg => registers::invlpg,
        Mnemonic::Wbinvd | Mnemonic::Invd => registers::wbinvd,
        Mnemonic::Rdmsr => msr::rdmsr,
        Mnemonic::Wrmsr => msr::wrmsr,
        Mnemonic::Rdtsc => msr::rdtsc,
        Mnemonic::Rdtscp => msr::rdtscp,
        Mnemonic::Rdpmc => msr::rdpmc,
        Mnemonic::Cpuid => msr::cpuid,
        Mnemonic::Rdfsbase => msr::rdfsbase,
        Mnemonic::Rdgsbase => msr::rdgsbase,
        Mnemonic::Wrfsbase => msr::wrfsbase,
        Mnemonic::Wrgsbase => msr::wrgsbase,
        Mnemonic::Swapgs => msr::swapgs,
        _ => return None,
    })
}

/// True if the instruction sets what the run loop must look at before going on: the next
/// instruction needs a fresh look at flags, privilege or translations.
pub(super) fn ends_block(instruction: &Instruction) -> Ending {
    use Mnemonic as M;
    let code = instruction.code();
    if string_instruction(code).is_some() {
        let repeats = instruction.has_rep_prefix() || instruction.has_repne_prefix();
        return if repeats { Ending::Near } else { Ending::No };
    }
    match instruction.mnemonic() {
        M::Jmp | M::Call if is_far_jump(code) || is_far_call(code) => Ending::System,
        M::Jmp | M::Call => Ending::Near,
        M::Ret
        | M::Jo
        | M::Jno
        | M::Jb
        | M::Jae
        | M::Je
        | M::Jne
        | M::Jbe
        | M::Ja
        | M::Js
        | M::Jns
        | M::Jp
        | M::Jnp
        | M::Jl
        | M::Jge
        | M::Jle
        | M::Jg
        | M::Loop
        | M::Loope
        | M::Loopne
        | M::Jrcxz
        | M::Jecxz
        | M::Jcxz => Ending::Near,
        M::Sti
        | M::Popf
        | M::Popfd
        | M::Popfq
        | M::Hlt
        | M::Lmsw
        | M::Clts
        | M::Invlpg
        | M::Wrmsr
        | M::Retf
        | M::Int3
        | M::Int1
        | M::Int
        | M::Into
        | M::Iret
        | M::Iretd
        | M::Iretq
        | M::Syscall
        | M::Sysret
        | M::Sysretq
        | M::Ud0
        | M::Ud1
        | M::Ud2
        | M::INVALID
        | M::In
        | M::Out => Ending::System,
        M::Pop if matches!(code, Code::Popw_SS | Code::Popd_SS) => Ending::System,
        M::Mov => match special_move(code) {
            Some(_)
                if !matches!(
                    code,
                    Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg
                ) =>
            {
                Ending::System
            }
            _ => Ending::No,
        },
        _ => Ending::No,
    }
}

/// Whether and how an instruction ends its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// It does not.
    No,
    /// By a branch that changes nothing but RIP.
    Near,
    /// By a change to the system's state.
    System,
}
