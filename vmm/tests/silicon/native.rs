//! Runs cases on the host CPU, in a forked child, so that no snippet can take the test down.
//!
//! Parent and child share two mappings: the slots, which carry cases over and outcomes back,
//! and the backing of the layout, which the child also maps at the layout's own addresses.

use crate::case::{Bits, Floating, Outcome, Ready, Stop};
use crate::layout::{
    CODE, CODE_FILL, CODE_LEN, CONST, DATA, DATA_LEN, EXIT, MEMORY_LEN, PAGE, TAIL, USER_CODE,
    USER_CODE_32, USER_DATA,
};
use crate::trampoline::{self, CONTEXT, FxImage, NO_TRAP, Registers, Trap};
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

/// Cases that travel together; a fork costs about a millisecond.
pub const BATCH: usize = 256;

/// Bytes of code a case may have.
const SNIPPET_LEN: usize = 256;

/// Processor seconds a batch may take; it takes milliseconds. A snippet that never ends dies of it.
const BATCH_SECONDS: i64 = 2;

/// What became of a snippet that did not come back.
#[derive(Debug, Clone, Copy)]
pub struct Lost {
    /// The status of the child that `waitpid` told.
    pub status: libc::c_int,
}

#[repr(C)]
struct Slot {
    input: Registers,
    input_fx: FxImage,
    code: [u8; SNIPPET_LEN],
    code_len: usize,
    memory: [u8; MEMORY_LEN],
    output: Registers,
    output_fx: FxImage,
    trap: Trap,
}

#[repr(C)]
struct Shared {
    finished: AtomicU32,
    slots: [Slot; BATCH],
}

// Offsets in the backing of the layout.
const CODE_AT: usize = 0;
const EXIT_AT: usize = CODE_AT + CODE_LEN;
const DATA_AT: usize = EXIT_AT + PAGE as usize;
const BACKING_LEN: usize = DATA_AT + MEMORY_LEN;
const SIGNAL_STACK_LEN: usize = 256 << 10;

/// Runs cases on the host CPU.
#[derive(Debug)]
pub struct Native {
    shared: *mut Shared,
    backing: libc::c_int,
    /// The backing as the harness writes it, in parent and child.
    alias: *mut u8,
    signal_stack: *mut libc::c_void,
}

fn map(
    address: u64,
    len: usize,
    prot: libc::c_int,
    flags: libc::c_int,
    fd: libc::c_int,
    offset: usize,
) -> io::Result<*mut libc::c_void> {
    // SAFETY: either the kernel chooses the place, or MAP_FIXED_NOREPLACE refuses one in use.
    let at = unsafe {
        libc::mmap(address as *mut libc::c_void, len, prot, flags, fd, offset as libc::off_t)
    };
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at) }
}

impl Native {
    /// Sets up what parent and children share.
    pub fn new() -> io::Result<Self> {
        const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a plain system call on a constant string.
        let backing = unsafe { libc::memfd_create(c"silicon".as_ptr(), libc::MFD_CLOEXEC) };
        // SAFETY: as above, on the descriptor it gave.
        if backing < 0 || unsafe { libc::ftruncate(backing, BACKING_LEN as libc::off_t) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let anonymous = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let shared = map(0, size_of::<Shared>(), READ_WRITE, anonymous, -1, 0)?.cast::<Shared>();
        let alias = map(0, BACKING_LEN, READ_WRITE, libc::MAP_SHARED, backing, 0)?.cast::<u8>();
        let signal_stack = map(0, SIGNAL_STACK_LEN, READ_WRITE, anonymous, -1, 0)?;
        // SAFETY: both lie in the alias just mapped.
        unsafe {
            alias.add(CODE_AT).write_bytes(CODE_FILL, CODE_LEN);
            let stub = trampoline::exit_stub();
            alias.add(EXIT_AT).copy_from_nonoverlapping(stub.as_ptr(), stub.len());
        }
        Ok(Self { shared, backing, alias, signal_stack })
    }

    /// The page at [`EXIT`], which data accesses may read.
    pub fn exit_page() -> Vec<u8> {
        let mut page = vec![0; PAGE as usize];
        let stub = trampoline::exit_stub();
        page[..stub.len()].copy_from_slice(&stub);
        page
    }

    /// Runs up to [`BATCH`] cases, each from its origin.
    pub fn run(&mut self, cases: &[(&Ready, u64)]) -> io::Result<Vec<Result<Outcome, Lost>>> {
        assert!(cases.len() <= BATCH, "{} cases in a batch of {BATCH}", cases.len());
        for (n, (ready, origin)) in cases.iter().enumerate() {
            // SAFETY: no child runs now, so the slots are this thread's alone.
            fill_slot(unsafe { &mut (*self.shared).slots[n] }, ready, *origin);
        }
        let mut outcomes = Vec::with_capacity(cases.len());
        while outcomes.len() < cases.len() {
            let first = outcomes.len();
            let status = self.run_child(first, cases.len())?;
            // SAFETY: the child is gone; the slots are this thread's alone again.
            let shared = unsafe { &*self.shared };
            let finished = shared.finished.load(Ordering::Acquire) as usize;
            outcomes.extend(shared.slots[first..finished].iter().map(|slot| Ok(outcome(slot))));
            if finished < cases.len() {
                outcomes.push(Err(Lost { status }));
            }
        }
        Ok(outcomes)
    }

    /// Forks a child that runs the slots from `first` to `end`, and waits for it.
    fn run_child(&mut self, first: usize, end: usize) -> io::Result<i32> {
        // SAFETY: the shared mapping lives as long as self.
        unsafe { (*self.shared).finished.store(first as u32, Ordering::Release) };
        // SAFETY: the child neither allocates nor takes locks; it ends by `_exit`.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                let done = self.child(first, end).is_ok();
                // SAFETY: ends the child without running the parent's destructors.
                unsafe { libc::_exit(i32::from(!done)) }
            }
            child => {
                let mut status = 0;
                // SAFETY: a plain system call; the child is ours and not yet waited for.
                while unsafe { libc::waitpid(child, &raw mut status, 0) } < 0 {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
                Ok(status)
            }
        }
    }

    fn child(&self, first: usize, end: usize) -> io::Result<()> {
        const READ: libc::c_int = libc::PROT_READ;
        const WRITE: libc::c_int = libc::PROT_WRITE;
        const EXECUTE: libc::c_int = libc::PROT_EXEC;
        let page = PAGE as usize;
        let data = DATA_LEN as usize;
        for (address, len, prot, offset) in [
            (CODE, CODE_LEN, READ | EXECUTE, CODE_AT),
            (EXIT, page, READ | EXECUTE, EXIT_AT),
            (DATA, data, READ | WRITE, DATA_AT),
            (CONST, page, READ, DATA_AT + data),
            (TAIL, page, READ | WRITE, DATA_AT + data + page),
        ] {
            // Present from the start: a first touch would show as an absent page in an error code.
            let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
            map(address, len, prot, flags, self.backing, offset)?;
        }
        let limit = libc::timeval { tv_sec: BATCH_SECONDS, tv_usec: 0 };
        let timer = libc::itimerval { it_value: limit, it_interval: limit };
        // SAFETY: plain system calls; the signal stack is mapped as long as the process lives.
        unsafe {
            libc::setitimer(libc::ITIMER_VIRTUAL, &raw const timer, std::ptr::null_mut());
            trampoline::catch_exceptions(self.signal_stack, SIGNAL_STACK_LEN);
        }
        for n in first..end {
            // SAFETY: the parent only waits; slots and backing are this child's alone.
            unsafe {
                self.run_slot(&mut (*self.shared).slots[n]);
                (*self.shared).finished.store(n as u32 + 1, Ordering::Release);
            }
        }
        Ok(())
    }

    /// # Safety
    /// Only in a child that has mapped the layout and caught exceptions.
    unsafe fn run_slot(&self, slot: &mut Slot) {
        let code_at = CODE_AT + (slot.input.rip - CODE) as usize;
        // SAFETY: the lengths and offsets were checked by `fill_slot`, the memory is mapped, and
        // the context is touched by nobody but the snippet's way in and out.
        unsafe {
            let code = self.alias.add(code_at);
            code.copy_from_nonoverlapping(slot.code.as_ptr(), slot.code_len);
            let memory = self.alias.add(DATA_AT);
            memory.copy_from_nonoverlapping(slot.memory.as_ptr(), MEMORY_LEN);
            CONTEXT.input = slot.input;
            CONTEXT.input_fx = slot.input_fx;
            CONTEXT.trap = NO_TRAP;
            trampoline::enter();
            slot.output = CONTEXT.output;
            slot.output_fx = CONTEXT.output_fx;
            slot.trap = CONTEXT.trap;
            slot.memory.as_mut_ptr().copy_from_nonoverlapping(memory, MEMORY_LEN);
            code.write_bytes(CODE_FILL, slot.code_len);
        }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: all three were mapped by `new` with these lengths, and nothing refers to them.
        unsafe {
            libc::munmap(self.shared.cast(), size_of::<Shared>());
            libc::munmap(self.alias.cast(), BACKING_LEN);
            libc::munmap(self.signal_stack, SIGNAL_STACK_LEN);
            libc::close(self.backing);
        }
    }
}

fn fill_slot(slot: &mut Slot, ready: &Ready, origin: u64) {
    let len = ready.code.len();
    assert!(len <= SNIPPET_LEN, "a snippet of {len} bytes");
    assert!(origin >= CODE && origin + len as u64 <= CODE + CODE_LEN as u64);
    let (code, data) = match ready.bits {
        Bits::Long => (USER_CODE, 0),
        Bits::Short => (USER_CODE_32, USER_DATA.into()),
    };
    slot.input = Registers {
        general: ready.inputs.general,
        rflags: ready.inputs.rflags,
        rip: origin,
        data_selectors: [data; 2],
        code_selector: code.into(),
    };
    slot.code[..len].copy_from_slice(&ready.code);
    slot.code_len = len;
    slot.memory.copy_from_slice(&ready.memory);
    slot.input_fx = fx_image(&ready.inputs.floating);
}

fn fx_image(floating: &Floating) -> FxImage {
    let mut image = [0; 512];
    image[0..2].copy_from_slice(&floating.control.to_le_bytes());
    image[2..4].copy_from_slice(&floating.status.to_le_bytes());
    image[4] = floating.in_use;
    image[24..28].copy_from_slice(&floating.mxcsr.to_le_bytes());
    for (register, field) in floating.stack.iter().zip(image[32..160].chunks_exact_mut(16)) {
        field[..10].copy_from_slice(register);
    }
    for (register, field) in floating.xmm.iter().zip(image[160..416].chunks_exact_mut(16)) {
        field.copy_from_slice(&register.to_le_bytes());
    }
    FxImage(image)
}

fn floating(FxImage(image): &FxImage) -> Floating {
    let word = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
    let mut stack = [[0; 10]; 8];
    for (register, field) in stack.iter_mut().zip(image[32..160].chunks_exact(16)) {
        register.copy_from_slice(&field[..10]);
    }
    let mut xmm = [0; 16];
    for (register, field) in xmm.iter_mut().zip(image[160..416].chunks_exact(16)) {
        *register = u128::from_le_bytes(field.try_into().expect("chunks are sixteen bytes"));
    }
    Floating {
        control: word(0),
        status: word(2),
        in_use: image[4],
        stack,
        mxcsr: u32::from(word(24)) | (u32::from(word(26)) << 16),
        xmm,
    }
}

/// True for the vectors that push an error code.
pub fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17)
}

fn outcome(slot: &Slot) -> Outcome {
    let trap = &slot.trap;
    let stop = if trap.happened {
        let vector = trap.vector as u8;
        Stop::Exception {
            vector,
            error: if has_error_code(vector) { trap.error } else { 0 },
            address: if vector == 14 { trap.address } else { 0 },
        }
    } else {
        Stop::End
    };
    Outcome {
        stop,
        general: slot.output.general,
        rip: if trap.happened { trap.rip } else { EXIT },
        rflags: if trap.happened { trap.rflags } else { slot.output.rflags },
        data_selectors: slot.output.data_selectors.map(|selector| selector as u16),
        floating: floating(&slot.output_fx),
        memory: slot.memory.to_vec(),
    }
}
