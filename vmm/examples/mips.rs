use std::time::Instant;
use vm_memory::{Bytes, GuestAddress};
use vmft_logging_channel::point::ExecutionPoint;
use vmft_vmm::engine::soft::SoftEngine;
use vmft_vmm::engine::state::Segment;
use vmft_vmm::engine::*;
use vmft_vmm::memory::*;
struct NoBus;
impl Bus for NoBus {
    fn port_read(&mut self, _: ExecutionPoint, _: u16, _: PortWidth) -> u32 {
        0
    }
    fn port_write(&mut self, _: ExecutionPoint, _: u16, _: PortWidth, _: u32) {}
    fn memory_read(&mut self, _: ExecutionPoint, _: u64, _: &mut [u8]) {}
    fn memory_write(&mut self, _: ExecutionPoint, _: u64, _: &[u8]) {}
    fn time_stamp(&mut self, at: ExecutionPoint) -> u64 {
        at.get()
    }
}
fn main() {
    use iced_x86::code_asm::*;
    for which in 0..4 {
        let ram = GuestRam::new(64 << 20).unwrap();
        let m = ram.memory();
        m.write_obj(0x2007u64, GuestAddress(0x1000)).unwrap();
        m.write_obj(0x87u64, GuestAddress(0x2000)).unwrap();
        let mut a = CodeAssembler::new(64).unwrap();
        let mut top = a.create_label();
        let mut f = a.create_label();
        match which {
            0 => {
                // pure ALU
                a.set_label(&mut top).unwrap();
                a.add(rax, rcx).unwrap();
                a.xor(rdx, rax).unwrap();
                a.shl(rax, 3).unwrap();
                a.sub(rax, rdx).unwrap();
                a.lea(rbx, qword_ptr(rax + rdx * 2 + 5)).unwrap();
                a.inc(rcx).unwrap();
                a.cmp(rcx, 1000000000).unwrap();
                a.jne(top).unwrap();
                a.jmp(top).unwrap();
            }
            1 => {
                // memory
                a.mov(rsi, 0x30_0000u64).unwrap();
                a.set_label(&mut top).unwrap();
                a.mov(rax, qword_ptr(rsi + rcx * 8)).unwrap();
                a.add(rax, 1).unwrap();
                a.mov(qword_ptr(rsi + rcx * 8), rax).unwrap();
                a.inc(rcx).unwrap();
                a.and(ecx, 0xfff).unwrap();
                a.add(dword_ptr(rsi), 3).unwrap();
                a.test(al, 1).unwrap();
                a.jne(top).unwrap();
                a.jmp(top).unwrap();
            }
            2 => {
                // calls
                a.set_label(&mut top).unwrap();
                a.mov(edi, 5).unwrap();
                a.call(f).unwrap();
                a.add(rbx, rax).unwrap();
                a.jmp(top).unwrap();
                for _ in 0..5000 {
                    a.nop().unwrap();
                }
                a.set_label(&mut f).unwrap();
                a.push(rbx).unwrap();
                a.push(rbp).unwrap();
                a.mov(rbp, rsp).unwrap();
                a.mov(eax, edi).unwrap();
                a.imul_3(eax, eax, 7).unwrap();
                a.pop(rbp).unwrap();
                a.pop(rbx).unwrap();
                a.ret().unwrap();
            }
            _ => {
                // branchy
                a.set_label(&mut top).unwrap();
                let mut odd = a.create_label();
                let mut next = a.create_label();
                a.imul_3(rax, rax, 1103515245).unwrap();
                a.add(rax, 12345).unwrap();
                a.test(eax, 0x10000).unwrap();
                a.jne(odd).unwrap();
                a.add(rbx, 1).unwrap();
                a.jmp(next).unwrap();
                a.set_label(&mut odd).unwrap();
                a.add(rdx, 3).unwrap();
                a.set_label(&mut next).unwrap();
                a.movzx(ecx, al).unwrap();
                a.jmp(top).unwrap();
            }
        }
        let code = a.assemble(0x10_0000).unwrap();
        m.write_slice(&code, GuestAddress(0x10_0000)).unwrap();
        let mut e = SoftEngine::new(ram);
        let mut s = CpuState { rip: 0x10_0000, rflags: 2, ..Default::default() };
        s.general[4] = 0x20_0000;
        s.cr0 = 0x8005_0033;
        s.cr3 = 0x1000;
        s.cr4 = 0x6A0;
        s.msrs.efer = 0xD01;
        s.segments.cs = Segment { selector: 8, base: 0, limit: u32::MAX, attributes: 0xA9B };
        e.restore(&s, ExecutionPoint::START).unwrap();
        let n = 200_000_000u64;
        let t = Instant::now();
        let exit = e.run(ExecutionPoint::new(n), false, &mut NoBus);
        let d = t.elapsed();
        println!("{which}: {exit:?} {:.1} MIPS", n as f64 / d.as_secs_f64() / 1e6);
    }
}
