//! How fast the `soft` engine executes: instructions a second of small loops.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, al, byte_ptr, eax, ecx, edi, qword_ptr, rax, rbp, rbx};
use iced_x86::code_asm::{rcx, rdx, rsi, rsp};
use std::hint::black_box;
use vm_memory::{Bytes, GuestAddress};
use vmft_cpu::memory::{GuestRam, MIN_MEMORY};
use vmft_cpu::soft::SoftEngine;
use vmft_cpu::state::Segment;
use vmft_cpu::{Bus, CpuState, Engine, Exit, PortWidth};
use vmft_log::point::ExecutionPoint;

const TABLES: u64 = 0x1000;
const CODE: u64 = 0x10_0000;
const STACK: u64 = 0x20_0000;
const DATA: u64 = 0x30_0000;
/// Instructions of one measured run.
const STEPS: u64 = 1_000_000;

/// Nothing is connected.
#[derive(Debug)]
struct NoBus;

impl Bus for NoBus {
    fn port_read(&mut self, _: ExecutionPoint, _: u16, _: PortWidth) -> u32 {
        u32::MAX
    }
    fn port_write(&mut self, _: ExecutionPoint, _: u16, _: PortWidth, _: u32) {}
    fn memory_read(&mut self, _: ExecutionPoint, _: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }
    fn memory_write(&mut self, _: ExecutionPoint, _: u64, _: &[u8]) {}
    fn time_stamp(&mut self, at: ExecutionPoint) -> u64 {
        at.get()
    }
}

type Program = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Registers only.
fn compute(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    a.add(rax, rcx)?;
    a.xor(rdx, rax)?;
    a.shl(rax, 3)?;
    a.sub(rax, rdx)?;
    a.lea(rbx, qword_ptr(rax + rdx * 2 + 5))?;
    a.imul_2(rbx, rax)?;
    a.inc(rcx)?;
    a.cmp(rcx, 0x7FFF_FFFF)?;
    a.jne(top)?;
    a.jmp(top)
}

/// Loads and stores.
fn memory(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(rsi, DATA)?;
    a.set_label(&mut top)?;
    a.mov(rax, qword_ptr(rsi + rcx * 8))?;
    a.add(rax, rcx)?;
    a.mov(qword_ptr(rsi + rcx * 8), rax)?;
    a.add(byte_ptr(rsi), al)?;
    a.inc(ecx)?;
    a.and(ecx, 0xFFF)?;
    a.jmp(top)
}

/// Calls, returns and the stack.
fn calls(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut top, mut callee) = (a.create_label(), a.create_label());
    a.set_label(&mut top)?;
    a.mov(edi, 5)?;
    a.call(callee)?;
    a.add(rbx, rax)?;
    a.jmp(top)?;
    a.set_label(&mut callee)?;
    a.push(rbx)?;
    a.push(rbp)?;
    a.mov(rbp, rsp)?;
    a.mov(eax, edi)?;
    a.imul_3(eax, eax, 7)?;
    a.pop(rbp)?;
    a.pop(rbx)?;
    a.ret()
}

fn engine_with(program: Program) -> SoftEngine {
    let ram = GuestRam::new(MIN_MEMORY).expect("the smallest memory is allowed");
    let mut assembler = CodeAssembler::new(64).expect("64 bits are supported");
    program(&mut assembler).expect("the program is encodable");
    let code = assembler.assemble(CODE).expect("the program is encodable");
    let memory = ram.memory();
    memory.write_obj((TABLES + 0x1000) | 7, GuestAddress(TABLES)).expect("in memory");
    memory.write_obj(0x87u64, GuestAddress(TABLES + 0x1000)).expect("in memory");
    memory.write_slice(&code, GuestAddress(CODE)).expect("in memory");
    let mut state = CpuState { rip: CODE, rflags: 2, ..CpuState::default() };
    state.general[4] = STACK;
    state.cr0 = 0x8005_0033;
    state.cr3 = TABLES;
    state.cr4 = 0x6A0;
    state.msrs.efer = 0xD01;
    state.segments.cs = Segment { selector: 8, base: 0, limit: u32::MAX, attributes: 0xA9B };
    let mut engine = SoftEngine::new(ram);
    engine.restore(&state, ExecutionPoint::START).expect("a valid state");
    engine
}

fn loops(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("soft");
    group.throughput(Throughput::Elements(STEPS));
    let programs: [(&str, Program); 3] =
        [("compute", compute), ("memory", memory), ("calls", calls)];
    for (name, program) in programs {
        let mut engine = engine_with(program);
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let bound = engine.point().after(STEPS);
                assert_eq!(black_box(engine.run(bound, false, &mut NoBus)), Exit::Bound);
            });
        });
    }
    group.finish();
}

criterion_group!(benches, loops);
criterion_main!(benches);
