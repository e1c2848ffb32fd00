//! Runs cases on the engine: a guest that is nothing but page tables, descriptor tables and one
//! HLT for each exception vector.
//!
//! The snippet runs in user mode at the layout's addresses. The page at [`EXIT`] may be read but
//! not executed, so that a finished snippet stops there by a page fault; every other exception
//! goes the same way, through the IDT and a supervisor stack, and is read off its frame.

use crate::breakpoints::{Hit, Setting};
use crate::case::{Bits, Floating, Outcome, Ready, Stop};
use crate::layout::{
    CODE, CODE_FILL, CODE_LEN, CONST, DATA, DATA_LEN, EXIT, EXIT_32, GS_BASE, MEMORY_LEN, PAGE,
    TAIL, USER_CODE, USER_CODE_32, USER_DATA,
};
use crate::native::has_error_code;
use vm_memory::{Bytes, GuestAddress};
use vmft_cpu::memory::{GuestRam, MIN_MEMORY};
use vmft_cpu::soft::{CacheLimits, SoftEngine};
use vmft_cpu::state::{
    CpuState, DescriptorTable, ModelSpecificRegisters, Segment, Segments, SseState, X87State,
};
use vmft_cpu::{Bus, Engine, Exit, PortWidth};
use vmft_log::point::ExecutionPoint;

// Physical addresses.
const TABLES: u64 = 0x10_0000;
const KERNEL_PHYSICAL: u64 = 0x11_0000;
/// Where the layout's first page lies; the others follow at their distance from it.
const LAYOUT_PHYSICAL: u64 = 0x20_0000;

/// Linear address of the supervisor's pages, all writable.
const KERNEL: u64 = 0xFFFF_8000_0000_0000;
const GDT: u64 = KERNEL;
const TSS: u64 = KERNEL + 0x200;
const IDT: u64 = KERNEL + PAGE;
/// One HLT for each vector, 16 bytes apart.
const HANDLERS: u64 = KERNEL + 2 * PAGE;
const STACK_TOP: u64 = KERNEL + 4 * PAGE;
const KERNEL_PAGES: u64 = 4;
const KERNEL_CODE: u16 = 0x10;
const TSS_SELECTOR: u16 = 0x40;

/// Instructions a snippet may take on the engine: the data has 24 KiB to repeat over, byte by byte.
const MAX_INSTRUCTIONS: u64 = 200_000;

/// How a case went wrong without an outcome to compare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stuck(pub Exit);

/// A guest to run cases in.
#[derive(Debug)]
pub struct Guest {
    ram: GuestRam,
    engine: SoftEngine,
}

struct NoDevices;

impl Bus for NoDevices {
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

fn physical(linear: u64) -> u64 {
    LAYOUT_PHYSICAL + linear - CODE
}

impl Guest {
    /// Builds the guest; `exit_page` is what data accesses find at [`EXIT`].
    pub fn new(exit_page: &[u8], limits: CacheLimits) -> Self {
        let ram = GuestRam::new(MIN_MEMORY).expect("the smallest memory is allowed");
        let mut guest = Self { engine: SoftEngine::with_limits(ram.clone(), limits), ram };
        guest.build_page_tables();
        guest.build_descriptors();
        guest.write(physical(EXIT), exit_page);
        guest.write(physical(CODE), &[CODE_FILL; CODE_LEN]);
        guest
    }

    fn write(&self, physical: u64, bytes: &[u8]) {
        self.ram
            .memory()
            .write_slice(bytes, GuestAddress(physical))
            .expect("everything lies in the smallest memory");
    }

    fn write_word(&self, physical: u64, word: u64) {
        self.write(physical, &word.to_le_bytes());
    }

    fn read_word(&self, physical: u64) -> u64 {
        self.ram
            .memory()
            .read_obj(GuestAddress(physical))
            .expect("everything lies in the smallest memory")
    }

    fn build_page_tables(&mut self) {
        const PRESENT: u64 = 1;
        const WRITABLE: u64 = 2;
        const USER: u64 = 4;
        const NO_EXECUTE: u64 = 1 << 63;
        let table = |n: u64| TABLES + n * PAGE;
        let [root, low_pointers, low_directory, low_pages] = [0, 1, 2, 3].map(table);
        let [high_pointers, high_directory, high_pages] = [4, 5, 6].map(table);
        let any = PRESENT | WRITABLE | USER;
        self.write_word(root, low_pointers | any);
        self.write_word(low_pointers + (CODE >> 30) * 8, low_directory | any);
        self.write_word(low_directory + ((CODE >> 21) & 511) * 8, low_pages | any);
        self.write_word(root + 256 * 8, high_pointers | PRESENT | WRITABLE);
        self.write_word(high_pointers, high_directory | PRESENT | WRITABLE);
        self.write_word(high_directory, high_pages | PRESENT | WRITABLE);
        let map = |linear: u64, len: u64, bits: u64| {
            for page in (linear..linear + len).step_by(PAGE as usize) {
                let entry = physical(page) | PRESENT | USER | bits;
                self.write_word(low_pages + ((page >> 12) & 511) * 8, entry);
            }
        };
        map(CODE, CODE_LEN as u64, 0);
        map(EXIT, PAGE, NO_EXECUTE);
        map(DATA, DATA_LEN, WRITABLE | NO_EXECUTE);
        map(CONST, PAGE, NO_EXECUTE);
        map(TAIL, PAGE, WRITABLE | NO_EXECUTE);
        for page in 0..KERNEL_PAGES {
            let entry = (KERNEL_PHYSICAL + page * PAGE) | PRESENT | WRITABLE;
            self.write_word(high_pages + page * 8, entry);
        }
    }

    /// The GDT is Linux's, as far as user code can tell; the gates open to users are its too.
    fn build_descriptors(&mut self) {
        let at = |linear: u64| KERNEL_PHYSICAL + linear - KERNEL;
        let tss_descriptor = {
            let base = TSS;
            let limit = 0x67;
            let low =
                limit | ((base & 0xFF_FFFF) << 16) | (0x8B << 40) | ((base >> 24 & 0xFF) << 56);
            [low, base >> 32]
        };
        let gdt = [
            0,
            0x00CF_9B00_0000_FFFF,
            0x00AF_9B00_0000_FFFF,
            0x00CF_9300_0000_FFFF,
            0x00CF_FB00_0000_FFFF,
            0x00CF_F300_0000_FFFF,
            0x00AF_FB00_0000_FFFF,
            0,
            tss_descriptor[0],
            tss_descriptor[1],
        ];
        for (n, descriptor) in (0u64..).zip(gdt) {
            self.write_word(at(GDT) + n * 8, descriptor);
        }
        self.write_word(at(TSS) + 4, STACK_TOP);
        self.write(at(TSS) + 102, &[0x68, 0]);
        for vector in 0..256 {
            let handler = HANDLERS + vector * 16;
            let user = if matches!(vector, 3 | 4) { 0x60 } else { 0 };
            let low = (handler & 0xFFFF)
                | (u64::from(KERNEL_CODE) << 16)
                | ((0x8E | user) << 40)
                | ((handler >> 16 & 0xFFFF) << 48);
            self.write_word(at(IDT) + vector * 16, low);
            self.write_word(at(IDT) + vector * 16 + 8, handler >> 32);
            self.write(at(handler), &[0xF4]);
        }
    }

    fn load(&self, ready: &Ready, origin: u64) {
        self.write(physical(origin), &ready.code);
        let split = (DATA_LEN + PAGE) as usize;
        self.write(physical(DATA), &ready.memory[..split]);
        self.write(physical(TAIL), &ready.memory[split..]);
    }

    /// Runs a program with breakpoints until anything but a debug exception; these are what comes
    /// back. Each is left as Linux leaves it: an instruction with a breakpoint on it is executed
    /// under RF.
    pub fn debug(
        &mut self,
        ready: &Ready,
        origin: u64,
        setting: &Setting,
        most: usize,
    ) -> Vec<Hit> {
        self.load(ready, origin);
        let mut state = initial_state(ready, origin);
        state.debug[..4].copy_from_slice(&setting.addresses);
        state.debug[7] = setting.control | 0x400;
        let mut hits = Vec::new();
        loop {
            self.engine.restore(&state, ExecutionPoint::START).expect("a state any CPU can be in");
            let exit = self.run_to_halt(0);
            assert_eq!(exit, Exit::Halted { interruptible: false });
            let met = self.engine.save().debug[6] & 0xF;
            let outcome = self.outcome().expect("it halts in a handler");
            if !matches!(outcome.stop, Stop::Exception { vector: 1, .. }) || hits.len() > most {
                self.write(physical(origin), &vec![CODE_FILL; ready.code.len()]);
                return hits;
            }
            hits.push((outcome.rip, met));
            let executes =
                (0..4).any(|n| met >> n & 1 != 0 && setting.control >> (16 + 4 * n) & 3 == 0);
            state.general = outcome.general;
            state.rip = outcome.rip;
            state.rflags = outcome.rflags | if executes { 1 << 16 } else { 0 };
            state.x87 = self.engine.save().x87;
            state.sse = self.engine.save().sse;
        }
    }

    /// Runs a case that begins at `origin`, `stride` instructions at a time.
    pub fn run(&mut self, ready: &Ready, origin: u64, stride: u64) -> Result<Outcome, Stuck> {
        self.load(ready, origin);
        let state = initial_state(ready, origin);
        self.engine.restore(&state, ExecutionPoint::START).expect("a state any CPU can be in");
        let exit = self.run_to_halt(stride);
        self.write(physical(origin), &vec![CODE_FILL; ready.code.len()]);
        if exit == (Exit::Halted { interruptible: false }) {
            self.outcome().ok_or(Stuck(exit))
        } else {
            Err(Stuck(exit))
        }
    }

    fn run_to_halt(&mut self, stride: u64) -> Exit {
        loop {
            let bound = match stride {
                0 => ExecutionPoint::new(MAX_INSTRUCTIONS),
                stride => self.engine.point().after(stride),
            };
            let exit = self.engine.run(bound, false, &mut NoDevices);
            let over = self.engine.point() >= ExecutionPoint::new(MAX_INSTRUCTIONS);
            match exit {
                Exit::Bound if self.engine.point() != bound => return exit,
                Exit::Bound if !over => {}
                exit => return exit,
            }
        }
    }

    /// Instructions the engine counted in the last run, the handler's HLT left out.
    pub fn retired(&self) -> u64 {
        self.engine.point().get().saturating_sub(1)
    }

    /// Reads the state and the exception's frame; `None` if the CPU halts elsewhere than in a handler.
    fn outcome(&mut self) -> Option<Outcome> {
        let state = self.engine.save();
        const RESUME: u64 = 1 << 16;
        let vector = state.rip.checked_sub(HANDLERS + 1)?;
        if vector % 16 != 0 {
            return None;
        }
        let vector = u8::try_from(vector / 16).ok()?;
        let with_error = has_error_code(vector);
        let frame_len = if with_error { 48 } else { 40 };
        if state.general[4] != STACK_TOP - frame_len {
            return None;
        }
        let frame = |n: u64| self.read_word(KERNEL_PHYSICAL + STACK_TOP - KERNEL - 40 + n * 8);
        let [rip, code, mut rflags, stack, data] = [0, 1, 2, 3, 4].map(frame);
        let selectors = [USER_CODE, USER_CODE_32].map(u64::from);
        if !selectors.contains(&code) || data != u64::from(USER_DATA) {
            return None;
        }
        let error =
            if with_error { self.read_word(KERNEL_PHYSICAL + STACK_TOP - KERNEL - 48) } else { 0 };
        let mut general = state.general;
        general[4] = stack;
        let stop = if vector == 14 && matches!(rip, EXIT | EXIT_32) {
            // The fault that stops a finished snippet sets it; the host's way out does not.
            rflags &= !RESUME;
            Stop::End
        } else {
            let address = if vector == 14 { state.cr2 } else { 0 };
            Stop::Exception { vector, error, address }
        };
        let mut memory = vec![0; MEMORY_LEN];
        let split = (DATA_LEN + PAGE) as usize;
        let ram = self.ram.memory();
        ram.read_slice(&mut memory[..split], GuestAddress(physical(DATA))).ok()?;
        ram.read_slice(&mut memory[split..], GuestAddress(physical(TAIL))).ok()?;
        Some(Outcome {
            stop,
            general,
            rip: if stop == Stop::End { EXIT } else { rip },
            rflags,
            data_selectors: [state.segments.ds.selector, state.segments.es.selector],
            floating: floating(&state),
            memory,
        })
    }
}

fn initial_state(ready: &Ready, origin: u64) -> CpuState {
    const CR0: u64 = 0x8005_0033; // PG, AM, WP, NE, ET, MP, PE
    const CR4: u64 = 0x6A0; // PGE, OSXMMEXCPT, OSFXSR, PAE
    const EFER: u64 = 0xD01; // NXE, LMA, LME, SCE
    let null = |base| Segment { base, ..Segment::default() };
    let flat = |selector, attributes| Segment { selector, base: 0, limit: u32::MAX, attributes };
    let (code, data) = match ready.bits {
        Bits::Long => (flat(USER_CODE, 0xAFB), null(0)),
        Bits::Short => (flat(USER_CODE_32, 0xCFB), flat(USER_DATA, 0xCF3)),
    };
    CpuState {
        general: ready.inputs.general,
        rip: origin,
        rflags: ready.inputs.rflags,
        segments: Segments {
            es: data,
            ds: data,
            fs: null(0),
            gs: null(GS_BASE),
            ldtr: null(0),
            cs: code,
            ss: flat(USER_DATA, 0xCF3),
            tr: Segment { selector: TSS_SELECTOR, base: TSS, limit: 0x67, attributes: 0x8B },
        },
        gdtr: DescriptorTable { base: GDT, limit: 0x7F },
        idtr: DescriptorTable { base: IDT, limit: 0xFFF },
        cr0: CR0,
        cr3: TABLES,
        cr4: CR4,
        debug: [0, 0, 0, 0, 0, 0, 0xFFFF_0FF0, 0x400],
        msrs: ModelSpecificRegisters { efer: EFER, ..ModelSpecificRegisters::default() },
        x87: x87(&ready.inputs.floating),
        sse: SseState { registers: ready.inputs.floating.xmm, mxcsr: ready.inputs.floating.mxcsr },
        ..CpuState::default()
    }
}

/// The full tag of a register in use, as `FNSTENV` works it out.
fn tag(register: [u8; 10]) -> u16 {
    const VALID: u16 = 0;
    const ZERO: u16 = 1;
    const SPECIAL: u16 = 2;
    let exponent = u16::from_le_bytes([register[8], register[9]]) & 0x7FFF;
    let fraction = u64::from_le_bytes(register[..8].try_into().expect("eight bytes"));
    match (exponent, fraction) {
        (0, 0) => ZERO,
        (0 | 0x7FFF, _) => SPECIAL,
        _ if fraction >> 63 == 0 => SPECIAL,
        _ => VALID,
    }
}

fn x87(floating: &Floating) -> X87State {
    const EMPTY: u16 = 3;
    let top = usize::from(floating.status >> 11) & 7;
    let mut tags = 0;
    for physical in 0..8 {
        let register = floating.stack[(physical + 8 - top) & 7];
        let in_use = floating.in_use >> physical & 1 != 0;
        tags |= if in_use { tag(register) } else { EMPTY } << (2 * physical);
    }
    X87State {
        control: floating.control,
        status: floating.status,
        tags,
        registers: floating.stack,
        ..X87State::default()
    }
}

fn floating(state: &CpuState) -> Floating {
    let in_use = (0..8)
        .filter(|physical| state.x87.tags >> (2 * physical) & 3 != 3)
        .fold(0, |bits, physical| bits | (1 << physical));
    Floating {
        control: state.x87.control,
        status: state.x87.status,
        in_use,
        stack: state.x87.registers,
        mxcsr: state.sse.mxcsr,
        xmm: state.sse.registers,
    }
}
