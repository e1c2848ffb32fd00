//! Any bytes as instructions: the engine does something with them, the same with tiny caches as
//! with large ones, wherever it is stopped, and never ends the process.
//!
//! `VMFT_FUZZ_CASES` sets how many cases there are; a failure names its seed, and `VMFT_FUZZ_SEED`
//! begins there.

use super::random::{SLOT, instruction, prepared};
use super::*;
use crate::Vector;
use crate::memory::PageNumber;
use vmft_fuzzing::{Random, cases};

/// Cases of a quick run.
const CASES: u64 = 1500;
/// Bytes of code of a case.
const LENGTH: usize = 4096;

/// Random bytes, or instructions in which some bytes are wrong, or instructions that are whole.
fn code(numbers: &mut Random) -> Vec<u8> {
    let kind = numbers.below(4);
    if kind == 0 {
        return (0..LENGTH).map(|_| numbers.next() as u8).collect();
    }
    let mut code = vec![0x90; LENGTH];
    // Packed closely, or with room behind each, where the handlers go on.
    let closely = numbers.below(2) == 0;
    let mut at = 0;
    while at + SLOT <= LENGTH {
        let bytes = match numbers.below(6) {
            0 => SYSTEM[numbers.below(SYSTEM.len() as u64) as usize].to_vec(),
            _ => instruction(std::array::from_fn(|_| numbers.next() as u8)),
        };
        code[at..at + bytes.len()].copy_from_slice(&bytes);
        at += if closely { bytes.len() } else { SLOT };
    }
    if kind != 1 {
        for _ in 0..numbers.below(64) {
            let at = numbers.below(LENGTH as u64) as usize;
            code[at] ^= 1 << numbers.below(8);
        }
    }
    code
}

/// Instructions that change the system's state, and vector instructions.
const SYSTEM: &[&[u8]] = &[
    &[0x0F, 0x22, 0xC0],                   // mov cr0, rax
    &[0x0F, 0x22, 0xE3],                   // mov cr4, rbx
    &[0x0F, 0x22, 0xD8],                   // mov cr3, rax
    &[0x0F, 0x20, 0xE0],                   // mov rax, cr4
    &[0x0F, 0x23, 0xF8],                   // mov dr7, rax
    &[0x0F, 0x30],                         // wrmsr
    &[0x0F, 0x32],                         // rdmsr
    &[0xB9, 0x80, 0x00, 0x00, 0xC0],       // mov ecx, EFER
    &[0xB9, 0x10, 0x00, 0x00, 0x00],       // mov ecx, TSC
    &[0x0F, 0x01, 0x13],                   // lgdt [rbx]
    &[0x0F, 0x01, 0x1B],                   // lidt [rbx]
    &[0x0F, 0x00, 0xD0],                   // lldt ax
    &[0x0F, 0x00, 0xD8],                   // ltr ax
    &[0x0F, 0x02, 0xC3],                   // lar eax, ebx
    &[0x0F, 0x01, 0xF8],                   // swapgs
    &[0x0F, 0x01, 0x3B],                   // invlpg [rbx]
    &[0x8E, 0xD0],                         // mov ss, eax
    &[0x48, 0xCF],                         // iretq
    &[0x48, 0xCB],                         // retfq
    &[0xFF, 0x2B],                         // jmp far [rbx]
    &[0x0F, 0x07],                         // sysret
    &[0x0F, 0xAE, 0x03],                   // fxsave [rbx]
    &[0x0F, 0xAE, 0x0B],                   // fxrstor [rbx]
    &[0x0F, 0xAE, 0x13],                   // ldmxcsr [rbx]
    &[0xD9, 0xF8],                         // fprem
    &[0xDB, 0x2B],                         // fld tword [rbx]
    &[0xDF, 0x33],                         // fbstp [rbx]
    &[0xD9, 0xFE],                         // fsin
    &[0xDD, 0x23],                         // frstor [rbx]
    &[0x66, 0x0F, 0x3A, 0x63, 0xC1, 0x1A], // pcmpistri xmm0, xmm1, 0x1a
    &[0xF2, 0x0F, 0x2D, 0xC1],             // cvtsd2si eax, xmm1
    &[0x66, 0x0F, 0xF7, 0xC1],             // maskmovdqu xmm0, xmm1
    &[0x9D],                               // popfq
    &[0xFB, 0xF4],                         // sti; hlt
    &[0xF3, 0x6D],                         // rep insd
    &[0xF3, 0xA5],                         // rep movsd
    &[0xEB, 0x00],                         // jmp to the next
];

/// Runs to each bound in turn; a halted CPU is woken, and one that can be interrupted is, at the
/// last of them. True if the machine has stopped for good.
fn run(machine: &mut Machine, bounds: &[u64]) -> bool {
    for bound in bounds {
        loop {
            match machine.run_to(*bound) {
                Exit::BusAccess => {}
                Exit::Bound => break,
                Exit::Halted { interruptible: true } => machine.engine.inject(Vector(0x41)),
                Exit::Halted { interruptible: false } | Exit::Shutdown | Exit::Caught(_) => {
                    return true;
                }
                Exit::Fatal(fault) => panic!("a guest stopped its machine: {fault}"),
                other @ (Exit::InterruptWindow | Exit::Kicked) => panic!("{other:?}"),
            }
        }
    }
    let last = bounds.last().copied().unwrap_or_default();
    let wanting = machine.engine.run(ExecutionPoint::new(last + 1), true, &mut machine.bus);
    if wanting == Exit::InterruptWindow {
        machine.engine.inject(Vector(0x42));
    }
    false
}

/// Ascending points up to `end`, which is the last.
fn bounds(numbers: &mut Random, from: u64, end: u64) -> Vec<u64> {
    let mut bounds: Vec<u64> =
        (0..numbers.below(12)).map(|_| from + numbers.below(end - from)).collect();
    bounds.push(end);
    bounds.sort_unstable();
    bounds
}

fn written(machine: &Machine) -> Vec<PageNumber> {
    machine.ram().tracker().take_written()
}

fn page(machine: &Machine, page: PageNumber) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    machine.ram().memory().read_slice(&mut bytes, page.address()).expect("in memory");
    bytes
}

fn case(mut numbers: Random) {
    let code = code(&mut numbers);
    let user = numbers.below(2) == 0;
    let limits = CacheLimits::tiny(1 + numbers.below(8) as usize);
    let limits = limits.times(1 << numbers.below(6));
    let mut roomy = prepared(&code, user, CacheLimits::default());
    let mut narrow = prepared(&code, user, limits);
    let mut point = 0;
    for _ in 0..4 {
        let end = point + 1 + numbers.below(400);
        let over = run(&mut roomy, &bounds(&mut numbers, point, end));
        assert_eq!(run(&mut narrow, &bounds(&mut numbers, point, end)), over);
        narrow.engine.cache.sound(&narrow.engine.cpu);
        assert_eq!(roomy.point(), narrow.point());
        assert_eq!(roomy.state(), narrow.state());
        if over {
            break;
        }
        point = roomy.point();
    }
    assert_eq!(roomy.bus.seen, narrow.bus.seen);
    let mut pages = written(&roomy);
    pages.extend(written(&narrow));
    for number in pages {
        assert!(page(&roomy, number) == page(&narrow, number), "page {number:?}");
    }
}

#[test]
fn any_bytes_are_executed_the_same_whatever_the_caches_hold() {
    cases(CASES, case);
}
