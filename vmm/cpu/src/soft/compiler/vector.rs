//! Vector instructions: the host executes them as they are, on the same registers.
//!
//! Listed are those whose results and flags the architecture fixes to the bit: moves, integers, and the
//! operations of IEEE 754, for which the interpreter asks the host as well. The guest's MXCSR is in
//! force while code runs, with every exception masked ([`super::Compiler::may_run`]). Approximations, dot
//! products, sums across a register, and what touches MMX or MXCSR are the interpreter's.

use super::address::{Access, Extent};
use super::operands::Form;
use super::translate::{Translator, Unsupported};
use crate::soft::flags::ARITHMETIC;
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

/// SSE and SSE2: every host has them.
fn is_sse2(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Movaps
            | M::Movapd
            | M::Movdqa
            | M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Movss
            | M::Movsd
            | M::Movq
            | M::Movd
            | M::Movlps
            | M::Movlpd
            | M::Movhps
            | M::Movhpd
            | M::Movlhps
            | M::Movhlps
            | M::Movmskps
            | M::Movmskpd
            | M::Pmovmskb
            | M::Pand
            | M::Andps
            | M::Andpd
            | M::Pandn
            | M::Andnps
            | M::Andnpd
            | M::Por
            | M::Orps
            | M::Orpd
            | M::Pxor
            | M::Xorps
            | M::Xorpd
            | M::Paddb
            | M::Paddw
            | M::Paddd
            | M::Paddq
            | M::Paddsb
            | M::Paddsw
            | M::Paddusb
            | M::Paddusw
            | M::Psubb
            | M::Psubw
            | M::Psubd
            | M::Psubq
            | M::Psubsb
            | M::Psubsw
            | M::Psubusb
            | M::Psubusw
            | M::Pavgb
            | M::Pavgw
            | M::Pcmpeqb
            | M::Pcmpeqw
            | M::Pcmpeqd
            | M::Pcmpgtb
            | M::Pcmpgtw
            | M::Pcmpgtd
            | M::Pminub
            | M::Pminsw
            | M::Pmaxub
            | M::Pmaxsw
            | M::Pmullw
            | M::Pmulhw
            | M::Pmulhuw
            | M::Pmuludq
            | M::Pmaddwd
            | M::Psadbw
            | M::Psllw
            | M::Pslld
            | M::Psllq
            | M::Pslldq
            | M::Psrlw
            | M::Psrld
            | M::Psrlq
            | M::Psrldq
            | M::Psraw
            | M::Psrad
            | M::Packsswb
            | M::Packssdw
            | M::Packuswb
            | M::Punpcklbw
            | M::Punpcklwd
            | M::Punpckldq
            | M::Punpcklqdq
            | M::Punpckhbw
            | M::Punpckhwd
            | M::Punpckhdq
            | M::Punpckhqdq
            | M::Unpcklps
            | M::Unpcklpd
            | M::Unpckhps
            | M::Unpckhpd
            | M::Pshufd
            | M::Pshuflw
            | M::Pshufhw
            | M::Shufps
            | M::Shufpd
            | M::Pinsrw
            | M::Addps
            | M::Addpd
            | M::Addss
            | M::Addsd
            | M::Subps
            | M::Subpd
            | M::Subss
            | M::Subsd
            | M::Mulps
            | M::Mulpd
            | M::Mulss
            | M::Mulsd
            | M::Divps
            | M::Divpd
            | M::Divss
            | M::Divsd
            | M::Minps
            | M::Minpd
            | M::Minss
            | M::Minsd
            | M::Maxps
            | M::Maxpd
            | M::Maxss
            | M::Maxsd
            | M::Sqrtps
            | M::Sqrtpd
            | M::Sqrtss
            | M::Sqrtsd
            | M::Cvtps2pd
            | M::Cvtpd2ps
            | M::Cvtss2sd
            | M::Cvtsd2ss
            | M::Cvtdq2ps
            | M::Cvtps2dq
            | M::Cvttps2dq
            | M::Cvtdq2pd
            | M::Cvtpd2dq
            | M::Cvttpd2dq
            | M::Cvtsi2ss
            | M::Cvtsi2sd
            | M::Cvtss2si
            | M::Cvttss2si
            | M::Cvtsd2si
            | M::Cvttsd2si
    )
}

/// SSE3, SSSE3, SSE4.1, SSE4.2.
fn is_later(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Lddqu
            | M::Movddup
            | M::Movsldup
            | M::Movshdup
            | M::Pshufb
            | M::Palignr
            | M::Pabsb
            | M::Pabsw
            | M::Pabsd
            | M::Psignb
            | M::Psignw
            | M::Psignd
            | M::Pmulhrsw
            | M::Pmaddubsw
            | M::Phaddw
            | M::Phaddd
            | M::Phsubw
            | M::Phsubd
            | M::Pmuldq
            | M::Pmulld
            | M::Pcmpeqq
            | M::Pcmpgtq
            | M::Pminud
            | M::Pminuw
            | M::Pminsb
            | M::Pminsd
            | M::Pmaxud
            | M::Pmaxuw
            | M::Pmaxsb
            | M::Pmaxsd
            | M::Packusdw
            | M::Pmovsxbw
            | M::Pmovsxbd
            | M::Pmovsxbq
            | M::Pmovsxwd
            | M::Pmovsxwq
            | M::Pmovsxdq
            | M::Pmovzxbw
            | M::Pmovzxbd
            | M::Pmovzxbq
            | M::Pmovzxwd
            | M::Pmovzxwq
            | M::Pmovzxdq
            | M::Pblendw
            | M::Blendps
            | M::Blendpd
            | M::Pblendvb
            | M::Blendvps
            | M::Blendvpd
            | M::Pinsrb
            | M::Pinsrd
            | M::Pinsrq
            | M::Pextrb
            | M::Pextrd
            | M::Pextrq
            | M::Roundps
            | M::Roundpd
            | M::Roundss
            | M::Roundsd
    )
}

/// The store with the cache that is one without it.
fn cached(code: Code) -> Option<Code> {
    Some(match code {
        Code::Movntps_m128_xmm => Code::Movaps_xmmm128_xmm,
        Code::Movntpd_m128_xmm => Code::Movapd_xmmm128_xmm,
        Code::Movntdq_m128_xmm => Code::Movdqa_xmmm128_xmm,
        Code::Movnti_m32_r32 => Code::Mov_rm32_r32,
        Code::Movnti_m64_r64 => Code::Mov_rm64_r64,
        _ => return None,
    })
}

impl Translator {
    pub(super) fn vector(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        use Mnemonic as M;
        let mnemonic = i.mnemonic();
        if let Some(code) = cached(i.code()) {
            let mut j = *i;
            j.set_code(code);
            return self.wide(&j, Form { access: Access::Write, ..Form::MOVE });
        }
        match mnemonic {
            M::Cmpps | M::Cmppd | M::Cmpss | M::Cmpsd
                if i.op_count() == 3 && i.immediate8() < 8 =>
            {
                self.wide(i, Form::MOVE)
            }
            M::Comiss | M::Comisd | M::Ucomiss | M::Ucomisd => self.wide(i, Form::COMPARE),
            M::Ptest if self.host.sse4 => self.wide(i, Form::COMPARE),
            M::Crc32 if self.host.sse4 => self.same(i, Form::MOVE),
            M::Pextrw if i.code() == Code::Pextrw_r32_xmm_imm8 => self.wide(i, Form::MOVE),
            _ if is_sse2(mnemonic) || (self.host.sse4 && is_later(mnemonic)) => {
                self.wide(i, Form::MOVE.into_first(i))
            }
            _ => Err(Unsupported),
        }
    }

    /// A vector instruction whose operand of 16 bytes in memory must be aligned, if it does not say
    /// otherwise.
    fn wide(&mut self, i: &Instruction, form: Form) -> Result<(), Unsupported> {
        use Mnemonic as M;
        let registers = (0..i.op_count()).any(|n| {
            i.op_kind(n) == OpKind::Register
                && !i.op_register(n).is_xmm()
                && !i.op_register(n).is_gpr()
        });
        // What is not known to need the guest's MXCSR does not run under another.
        if registers || !self.vectors || (form.right != 0 && form.right != ARITHMETIC) {
            return Err(Unsupported);
        }
        let bytes = i.memory_size().size();
        let any = matches!(i.mnemonic(), M::Movups | M::Movupd | M::Movdqu | M::Lddqu);
        self.same_in(i, form, Extent { bytes, aligned: bytes == 16 && !any })
    }
}
