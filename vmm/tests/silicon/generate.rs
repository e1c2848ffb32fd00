//! Makes cases: a pure function of the seed and the case's number.

use crate::case::{
    Bits, Case, Floating, Inputs, Link, Redundant, Step, assemble, decodes_as_built, is_near_branch,
};
use crate::corpus::{Corpus, Inexact, Policy};
use crate::definedness;
use crate::layout::{CODE, MEMORY_LEN, PAGE};
use crate::operands::{self, Plan};
use crate::rng::Rng;
use crate::special::{self, Extras};
use crate::values::{self, Flavor};
use iced_x86::{Code, FlowControl, Instruction, Register};

/// Bytes of code a case may have, the final jump included.
const MAX_CODE: usize = 256;
/// Instructions a case may have before flag-defining ones are put in between.
const MAX_STEPS: u64 = 12;

/// The common memory of all cases under `seed`: integers, floats of each width, random bits.
pub fn template(seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed, u64::MAX);
    let mut memory = Vec::with_capacity(MEMORY_LEN);
    let page = PAGE as usize;
    for flavor in [
        Flavor::Integer,
        Flavor::Single,
        Flavor::Double,
        Flavor::Integer,
        Flavor::Double,
        Flavor::Single,
    ] {
        memory.extend(values::operand(&mut rng, flavor, page));
    }
    for at in (0..page).step_by(8) {
        memory[at..at + 8].copy_from_slice(&rng.next().to_le_bytes());
    }
    memory
}

/// Case `index` under `seed`.
pub fn case(seed: u64, index: u64, corpus: &Corpus) -> Case {
    let mut rng = Rng::new(seed, index);
    let (focus, policy) = corpus.focus[(index % corpus.focus.len() as u64) as usize];
    for _ in 0..10_000 {
        if let Some(case) = attempt(index, focus, policy, corpus, &mut rng) {
            return case;
        }
    }
    panic!("no snippet for {focus:?} in 10000 attempts (seed {seed}, case {index})");
}

/// A snippet in the making.
struct Draft {
    steps: Vec<Step>,
    /// Steps that need a target, each with the first step that may be it.
    open: Vec<(usize, usize)>,
    /// Steps in the middle of a group that works only from its beginning: no targets.
    inner: Vec<usize>,
}

impl Draft {
    fn push(&mut self, step: Step) {
        if is_near_branch(&step.instruction) {
            self.open.push((self.steps.len(), self.steps.len() + 1));
        }
        self.steps.push(step);
    }

    fn close(&mut self, rng: &mut Rng) {
        for &(step, first) in &self.open {
            self.steps[step].target = Some(self.target(first, rng));
        }
    }

    /// A step from `first` on to branch to, or the end.
    fn target(&self, first: usize, rng: &mut Rng) -> usize {
        let end = self.steps.len();
        let first = first.min(end);
        loop {
            let target = first + rng.index(end - first + 1);
            if !self.inner.contains(&target) {
                return target;
            }
        }
    }
}

fn attempt(
    index: u64,
    focus: Code,
    policy: Policy,
    corpus: &Corpus,
    rng: &mut Rng,
) -> Option<Case> {
    let mut plan = Plan::new(corpus.bits, rng);
    // How exact a transcendental function must be depends on its argument, which is known alone.
    let alone = policy == Policy::Last(Inexact::Transcendental) || rng.percent(45);
    let length = if alone { 1 } else { 2 + rng.below(MAX_STEPS - 1) };
    let strings = rng.percent(25);
    if strings && length > 1 {
        special::prepare_strings(&mut plan, rng);
    }
    let mut draft = Draft { steps: Vec::new(), open: Vec::new(), inner: Vec::new() };
    let before = match policy {
        Policy::Last(_) => length - 1,
        Policy::Anywhere if rng.percent(15) => rng.below(length),
        _ => 0,
    };
    for _ in 0..before {
        push_any(&mut draft, focus, strings, corpus, &plan, rng)?;
    }
    let mut extras = Extras::default();
    let focus_step = draft.steps.len();
    let (instruction, found) = focus_instruction(focus, focus_step == 0, &mut plan, rng)?;
    if let Some(found) = found {
        extras = found;
    }
    let flavor = special::flavor(&instruction);
    draft.push(decorated(instruction, corpus.bits, rng));
    if !matches!(policy, Policy::Last(_)) {
        for _ in before + 1..length {
            push_any(&mut draft, focus, strings, corpus, &plan, rng)?;
        }
    }
    draft.close(rng);
    let step = draft.target(1, rng);
    let links = extras.links.into_iter().map(|place| Link { place, step }).collect();
    let steps = draft.steps;
    let mut case = Case {
        index,
        bits: corpus.bits,
        focus,
        focus_step,
        origin: CODE,
        inputs: inputs(&plan, flavor, rng),
        steps,
        patches: extras.patches,
        links,
        stride: if rng.percent(75) { 0 } else { 1 + rng.below(4) },
    };
    definedness::repair(&mut case);
    place(&mut case, rng)?;
    case.steps.iter().all(|step| decodes_as_built(step, case.bits)).then_some(case)
}

/// An instance of the focus; at the very beginning with the inputs it needs.
fn focus_instruction(
    focus: Code,
    first: bool,
    plan: &mut Plan,
    rng: &mut Rng,
) -> Option<(Instruction, Option<Extras>)> {
    if !first {
        let mut instruction = operands::build(focus, plan, rng)?;
        special::tame(&mut instruction);
        if plan.bits == Bits::Long && special::repeats_narrowly(&instruction) {
            return None;
        }
        return Some((instruction, None));
    }
    special::prepare(focus, plan, rng);
    let mut instruction = operands::build(focus, plan, rng)?;
    let extras = special::finish(&mut instruction, plan, rng);
    Some((instruction, Some(extras)))
}

/// Adds an instruction that may stand anywhere, half of the time a relative of the focus.
fn push_any(
    draft: &mut Draft,
    focus: Code,
    strings: bool,
    corpus: &Corpus,
    plan: &Plan,
    rng: &mut Rng,
) -> Option<()> {
    if plan.bits == Bits::Long && rng.percent(3) {
        push_indirect(draft, rng);
        return Some(());
    }
    let mut plan = plan.clone();
    for _ in 0..100 {
        let mut code = rng.pick(&corpus.anywhere);
        if rng.percent(50) {
            let related = |code: &Code| code.cpuid_features() == focus.cpuid_features();
            let mut draws = (0..12).map(|_| rng.pick(&corpus.anywhere));
            code = draws.find(related).unwrap_or(code);
        }
        if code.is_string_instruction() && !strings {
            continue;
        }
        let Some(mut instruction) = operands::build(code, &mut plan, rng) else { continue };
        special::tame(&mut instruction);
        if plan.bits == Bits::Long && special::repeats_narrowly(&instruction) {
            continue;
        }
        let step = decorated(instruction, corpus.bits, rng);
        if decodes_as_built(&step, corpus.bits) {
            draft.push(step);
            return Some(());
        }
    }
    None
}

/// Adds an indirect jump, call or return to a later step.
fn push_indirect(draft: &mut Draft, rng: &mut Rng) {
    let register = rng.pick(&[Register::RAX, Register::RBX, Register::R9, Register::R14]);
    let at = draft.steps.len();
    let mut lea = Instruction::new();
    lea.set_code(Code::Lea_r64_m);
    lea.set_op0_register(register);
    lea.set_op1_kind(iced_x86::OpKind::Memory);
    lea.set_memory_base(Register::RIP);
    lea.set_memory_displ_size(8);
    draft.steps.push(Step::plain(lea));
    let with = |code| Instruction::with1(code, register).expect("takes one register");
    match rng.below(3) {
        0 => draft.steps.push(Step::plain(with(Code::Jmp_rm64))),
        1 => draft.steps.push(Step::plain(with(Code::Call_rm64))),
        _ => {
            draft.steps.push(Step::plain(with(Code::Push_r64)));
            draft.steps.push(Step::plain(Instruction::with(Code::Retnq)));
        }
    }
    draft.open.push((at, draft.steps.len()));
    draft.inner.extend(at + 1..draft.steps.len());
}

/// Sometimes with a prefix that changes nothing.
fn decorated(instruction: Instruction, bits: Bits, rng: &mut Rng) -> Step {
    let plain = Step::plain(instruction);
    if bits == Bits::Short {
        return plain;
    }
    let redundant = match rng.below(100) {
        0..=4 if instruction.segment_prefix() == Register::None => {
            Redundant::Segment(rng.pick(&[0x26, 0x2E, 0x36, 0x3E]))
        }
        5..=8 => Redundant::Rex(0x40 | rng.below(16) as u8),
        _ => return plain,
    };
    let step = Step { redundant: Some(redundant), ..plain.clone() };
    let relative = instruction.flow_control() != FlowControl::Next;
    if !relative && decodes_as_built(&step, bits) { step } else { plain }
}

/// Chooses where the snippet lies: inside a page, or across the boundary of two.
fn place(case: &mut Case, rng: &mut Rng) -> Option<()> {
    let (code, _) = assemble(&case.steps, CODE, case.bits).ok()?;
    if code.len() > MAX_CODE {
        return None;
    }
    case.origin = if rng.percent(80) {
        CODE + 0x100 + rng.below(0x700)
    } else {
        CODE + PAGE - rng.below(code.len() as u64)
    };
    Some(())
}

fn inputs(plan: &Plan, focus: Flavor, rng: &mut Rng) -> Inputs {
    const ARITHMETIC: u64 = 0x8D5;
    let mut rflags = 0x202 | (rng.next() & ARITHMETIC);
    for (percent, flag) in [(12, 10), (2, 8), (2, 14), (2, 21)] {
        if rng.percent(percent) {
            rflags |= 1 << flag;
        }
    }
    let all = [Flavor::Integer, Flavor::Single, Flavor::Double];
    let favourite = match focus {
        Flavor::Integer => rng.pick(&all),
        Flavor::Extended | Flavor::Decimal => Flavor::Integer,
        other => other,
    };
    let control = values::x87_control(rng);
    let status = values::x87_status(rng, control);
    let mut xmm = [0; 16];
    for register in &mut xmm {
        let flavor = if rng.percent(70) { favourite } else { rng.pick(&all) };
        *register = values::vector(rng, flavor);
    }
    let floating = Floating {
        control,
        status,
        in_use: values::x87_tags(rng, (status >> 11) & 7),
        stack: std::array::from_fn(|_| values::extended(rng)),
        mxcsr: values::mxcsr(rng),
        xmm,
    };
    Inputs { general: plan.general, rflags, floating }
}
