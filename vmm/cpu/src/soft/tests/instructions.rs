//! Single instructions and small programs.

use super::*;
use iced_x86::code_asm::*;

#[test]
fn a_loop_counts_every_instruction() {
    let mut machine = Machine::new(|a| {
        let mut again = a.create_label();
        a.mov(rcx, 1000u64).unwrap();
        a.xor(eax, eax).unwrap();
        a.set_label(&mut again).unwrap();
        a.add(rax, rcx).unwrap();
        a.dec(rcx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(machine.run(), Exit::Halted { interruptible: false });
    assert_eq!(machine.state().general[0], 500_500);
    assert_eq!(machine.point(), 2 + 3 * 1000 + 1);
}

#[test]
fn an_exception_goes_through_the_idt_with_its_error_code() {
    let mut machine = Machine::new(|a| {
        a.nop().unwrap();
        a.mov(rax, qword_ptr(0xFFFF_8000_0000_0000u64)).unwrap();
    });
    let (vector, words) = machine.run_into_handler();
    assert_eq!((vector, words[0], words[1]), (14, 0, CODE + 1));
    assert_eq!(machine.state().cr2, 0xFFFF_8000_0000_0000);
    assert_eq!(machine.point(), 2, "the NOP and the handler's HLT");
}
