//! The run loop.
//!
//! Blocks are executed whole while the bound is far enough and nothing needs attention. An op
//! that traps is looked at closely: the instructions before it retire, and then, depending on
//! the event, it is executed again with what it was missing (an answer from the bus, the
//! permission to overwrite decoded code), or its exception is delivered.

use super::block::BlockId;
use super::compiler::Left;
use super::cpu::{
    ARMED, Cpu, HALTED, SHADOW, SHUT_DOWN, SS_SHADOW, STEP_DUE, UNFINISHED, is_canonical,
};
use super::event::{BusRequest, Event, Flow, Trap};
use super::exception::Exception;
use super::flags;
use super::mmu::Intent;
use super::op::{Op, run_alone, run_ops};
use super::system::interrupts::Source;
use super::tlb::PAGE_MASK;
use super::{ATTENTION, SoftEngine};
use crate::memory::PAGE_SIZE;
use crate::{Bus, EngineFault, Exit};
use vmft_log::point::ExecutionPoint;

/// Events delivered without an instruction retiring, after which the guest is taken to be caught
/// in a fault of its own fault handler. No bound could stop it there, because the count of
/// instructions stands still.
const MAX_DELIVERIES: u32 = 1 << 16;
/// Longest instruction in bytes.
const MAX_LENGTH: usize = 15;

/// Where an op was executed.
#[derive(Debug, Clone, Copy)]
struct Site<'a> {
    op: &'a Op,
    /// Instructions of the block before it.
    index: u64,
    /// Address of the block's first instruction.
    block_rip: u64,
    /// Address behind the block.
    block_end: u64,
    /// It is the block's last.
    last: bool,
}

impl<'a> Site<'a> {
    fn new(ops: &'a [Op], index: usize, block_rip: u64, block_end: u64) -> Self {
        let last = index + 1 == ops.len();
        Self { op: &ops[index], index: index as u64, block_rip, block_end, last }
    }
}

/// What comes after compiled code.
#[derive(Debug)]
enum After {
    /// The rest of a block, whose first instructions are done, though not counted.
    Op { block: BlockId, done: usize },
    /// A block.
    Block(BlockId),
    /// The end of this run of blocks.
    Exit(Option<Exit>),
}

impl SoftEngine {
    pub(super) fn run_loop(&mut self, bound: u64, want: bool, bus: &mut dyn Bus) -> Exit {
        let watch = ATTENTION | if want { flags::IF } else { 0 };
        loop {
            if self.cpu.deliveries > MAX_DELIVERIES {
                self.cpu.system_flags |= SHUT_DOWN;
                self.cpu.deliveries = 0;
                return Exit::Caught(self.cpu.fault("events are delivered without end"));
            }
            let exit = if self.cpu.system_flags & watch != 0 {
                self.attend(bound, want, bus)
            } else if self.cpu.retired >= bound {
                Some(Exit::Bound)
            } else {
                self.run_blocks(bound, watch, bus)
            };
            if let Some(exit) = exit {
                return exit;
            }
        }
    }

    /// At a boundary that is not like any other.
    fn attend(&mut self, bound: u64, want: bool, bus: &mut dyn Bus) -> Option<Exit> {
        let state = self.cpu.system_flags;
        if state & SHUT_DOWN != 0 {
            return Some(Exit::Shutdown);
        }
        if state & HALTED != 0 {
            return Some(Exit::Halted { interruptible: state & flags::IF != 0 });
        }
        // The bound comes before the interrupt: what arrives at a point comes before the
        // interrupt taken there, on both sides.
        if self.cpu.retired >= bound {
            return Some(Exit::Bound);
        }
        // Watchpoints that the delivery of an event hit, or an instruction that loaded SS.
        if self.cpu.hits != 0 && state & SS_SHADOW == 0 {
            self.cpu.deliver_debug_trap(false);
            return None;
        }
        if want && self.cpu.can_take_interrupt() {
            return Some(Exit::InterruptWindow);
        }
        if state & (ARMED | flags::RF | SS_SHADOW) == ARMED {
            let address = self.cpu.linear_rip();
            if self.cpu.break_at(address) {
                return None;
            }
        }
        // One instruction, at whose end the shadow is over and the trap is due.
        let (before, hits) = (self.cpu.retired, self.cpu.hits);
        self.cpu.system_flags &= !(SHADOW | SS_SHADOW | UNFINISHED | flags::RF);
        let exit = self.run_one(bus);
        if let Some(Exit::Fatal(_)) = exit {
            self.cpu.system_flags = state;
            self.cpu.hits = hits;
            return exit;
        }
        let after = self.cpu.system_flags;
        self.cpu.system_flags &= !STEP_DUE;
        if after & UNFINISHED != 0 {
            // RF lasts until the last iteration: a breakpoint on the instruction is met once.
            self.cpu.system_flags |= state & flags::RF;
        }
        // Gates and SYSCALL clear TF and with it the step; POPF and IRET do not.
        let stepping = state & flags::TF != 0 && after & (flags::TF | STEP_DUE) != 0;
        let stepped = stepping && self.cpu.retired > before;
        let due = stepped || self.cpu.hits != 0;
        if due && after & (SS_SHADOW | SHUT_DOWN) == 0 {
            self.cpu.deliver_debug_trap(stepped);
        }
        exit
    }

    /// Executes blocks until the bound or until something needs attention.
    fn run_blocks(&mut self, bound: u64, watch: u64, bus: &mut dyn Bus) -> Option<Exit> {
        let mut id = match self.next_block() {
            Ok(id) => id,
            Err(Trap) => return self.fetch_trapped(),
        };
        loop {
            // One that was forgotten is looked for again.
            let block = self.cache.get(id)?;
            let left = bound - self.cpu.retired;
            if left < block.ops.len() as u64 {
                return self.run_part(id, left, bus);
            }
            let mut done = 0;
            if block.is_compiled() {
                match self.run_compiled(id, bound, bus) {
                    After::Op { block, done: before } => (id, done) = (block, before),
                    After::Block(next) => {
                        id = next;
                        continue;
                    }
                    After::Exit(exit) => return exit,
                }
            } else if self.cache.warm(&mut self.cpu, id) {
                continue;
            }
            let block = self.cache.get(id)?;
            let ops = self.cache.ops(block);
            let count = ops.len() as u64;
            let rip = self.cpu.rip();
            let end = rip.wrapping_add(block.bytes.into());
            self.cpu.next_rip = end;
            if run_ops(&mut self.cpu, &ops[done..]).is_err() {
                let index = ops.len() - 1 - self.cpu.ops_left;
                let exit = self.cpu.trapped(&Site::new(ops, index, rip, end), bus);
                self.forget_stale();
                return exit;
            }
            self.cpu.retired += count;
            let next = self.cpu.next_rip;
            self.cpu.set_rip(next);
            if self.cpu.system_flags & watch != 0 || self.cpu.retired >= bound {
                return None;
            }
            let distance = next.wrapping_sub(rip);
            let near = (next ^ rip) & PAGE_MASK == 0;
            let linked = block.successor(distance);
            let compiled = block.is_compiled();
            if let Some(next_id) = linked
                && (near || self.leads_to(next, next_id))
            {
                if compiled {
                    self.cache.join(id, distance, next_id);
                }
                id = next_id;
                continue;
            }
            let may_link = near || linked.is_some() || block.has_room();
            let from = id;
            id = match self.next_block() {
                Ok(id) => id,
                Err(Trap) => return self.fetch_trapped(),
            };
            if may_link {
                self.cache.link(from, distance, id);
            }
            if compiled {
                self.cache.join(from, distance, id);
            }
        }
    }

    /// Runs the code of a block, and of others behind it, until something is left to do here. Single
    /// instructions that are not compiled are executed on the way.
    fn run_compiled(&mut self, id: BlockId, bound: u64, bus: &mut dyn Bus) -> After {
        let left = bound - self.cpu.retired;
        let Some(mut how) = self.cache.run_code(&mut self.cpu, id, 0, left) else {
            return After::Op { block: id, done: 0 };
        };
        loop {
            let (block, done) = match how {
                Left::At { block, done, .. } => (block, done),
                Left::Between => return self.after_code(bound, None),
                Left::Through { block, site } => {
                    return self.after_code(bound, Some((block, site)));
                }
            };
            let Some(ops) = self.cache.get(block).map(|block| self.cache.ops(block)) else {
                unreachable!("code that ran belongs to a block");
            };
            if done + 1 >= ops.len() {
                return After::Op { block, done };
            }
            let rip = self.cpu.rip();
            let end = rip.wrapping_add(self.cache.get(block).map_or(0, |block| block.bytes.into()));
            self.cpu.next_rip = end;
            if run_ops(&mut self.cpu, &ops[done..=done]).is_err() {
                let exit = self.cpu.trapped(&Site::new(ops, done, rip, end), bus);
                self.forget_stale();
                return After::Exit(exit);
            }
            let left = bound - self.cpu.retired;
            how = match self.cache.run_code(&mut self.cpu, block, done + 1, left) {
                Some(how) => how,
                None => return After::Op { block, done: done + 1 },
            };
        }
    }

    /// Between blocks, by this way if it is one.
    fn after_code(&mut self, bound: u64, way: Option<(BlockId, usize)>) -> After {
        if self.cpu.retired >= bound {
            return After::Exit(None);
        }
        match self.next_block() {
            Ok(next) => {
                if let Some((block, site)) = way {
                    self.cache.join_through(block, site, next);
                }
                After::Block(next)
            }
            Err(Trap) => After::Exit(self.fetch_trapped()),
        }
    }

    /// Executes the first `left` instructions of a longer block.
    fn run_part(&mut self, id: BlockId, left: u64, bus: &mut dyn Bus) -> Option<Exit> {
        let block = self.cache.get(id)?;
        let ops = self.cache.ops(block);
        let rip = self.cpu.rip();
        let end = rip.wrapping_add(block.bytes.into());
        self.cpu.next_rip = end;
        let stop = left as usize;
        if run_ops(&mut self.cpu, &ops[..stop]).is_err() {
            let index = stop - 1 - self.cpu.ops_left;
            let exit = self.cpu.trapped(&Site::new(ops, index, rip, end), bus);
            self.forget_stale();
            return exit;
        }
        self.cpu.retired += left;
        self.cpu.set_rip(rip.wrapping_add(ops[stop].offset.into()));
        None
    }

    /// Executes one instruction.
    fn run_one(&mut self, bus: &mut dyn Bus) -> Option<Exit> {
        loop {
            let id = match self.next_block() {
                Ok(id) => id,
                Err(Trap) => return self.fetch_trapped(),
            };
            // One that was forgotten is looked for again.
            let Some(block) = self.cache.get(id) else { continue };
            let rip = self.cpu.rip();
            let end = rip.wrapping_add(block.bytes.into());
            self.cpu.next_rip = end;
            let site = Site::new(self.cache.ops(block), 0, rip, end);
            if self.cpu.check_code(site.op.length()).is_err() {
                return self.fetch_trapped();
            }
            if self.cpu.attempt(&site).is_ok() {
                self.cpu.retire(&site);
                return None;
            }
            let exit = self.cpu.trapped(&site, bus);
            self.forget_stale();
            return exit;
        }
    }

    /// The next instruction could not be fetched.
    fn fetch_trapped(&mut self) -> Option<Exit> {
        self.cpu.restart.finish();
        self.cpu.hits = 0;
        let exception = self.cpu.take_exception();
        self.cpu.deliver_exception(exception);
        None
    }

    /// True if the block guessed is the one that [`Self::next_block`] would find at `rip`.
    #[inline(always)]
    fn leads_to(&self, rip: u64, guess: BlockId) -> bool {
        let frame = self.cpu.tlb.fetch(self.cpu.cpl == 3, rip & PAGE_MASK);
        self.cpu.is_long()
            && self.cpu.stale.is_empty()
            && frame.zip(self.cache.get(guess)).is_some_and(|(frame, block)| {
                block.is_plain() && block.physical == frame | (rip & !PAGE_MASK)
            })
    }

    /// The block at RIP.
    fn next_block(&mut self) -> Result<BlockId, Trap> {
        let rip = self.cpu.rip();
        if self.cpu.is_long()
            && let Some(frame) = self.cpu.tlb.fetch(self.cpu.cpl == 3, rip & PAGE_MASK)
            && self.cpu.stale.is_empty()
            && let Some(id) = self.cache.recent(frame | (rip & !PAGE_MASK))
        {
            return Ok(id);
        }
        self.find_block(rip)
    }

    #[cold]
    #[inline(never)]
    fn find_block(&mut self, mut rip: u64) -> Result<BlockId, Trap> {
        if !self.cpu.is_long() {
            self.cpu.set_rip(self.cpu.own_rip());
            self.cpu.check_code(1)?;
            rip = self.cpu.linear_rip();
        }
        let physical = self.cpu.fetch_address(rip)?;
        self.forget_stale();
        if let Some(id) = self.cache.recent(physical | self.cpu.code_size.tag()) {
            return Ok(id);
        }
        if let Some(id) = self.cache.find(&mut self.cpu, physical) {
            return Ok(id);
        }
        let mut next = (rip & PAGE_MASK).wrapping_add(PAGE_SIZE);
        if !self.cpu.is_long() {
            next &= u64::from(u32::MAX);
        }
        let next_page = self.cpu.fetch_address(next)? & PAGE_MASK;
        self.forget_stale();
        Ok(self.cache.find_crossing(&mut self.cpu, physical, next_page))
    }
}

impl Cpu {
    /// Executes the op at the site alone.
    fn attempt(&mut self, site: &Site<'_>) -> Flow {
        self.executing = Some(site.op.offset);
        let flow = run_alone(self, site.op);
        self.executing = None;
        flow
    }

    /// The instruction completed.
    fn retire(&mut self, site: &Site<'_>) {
        self.retired += 1;
        let op = site.op;
        let behind = u64::from(op.offset) + op.length();
        let next = if site.last { self.next_rip } else { site.block_rip.wrapping_add(behind) };
        self.set_rip(next);
    }

    /// An op did not complete. The instructions before it retire; it is executed again for as
    /// long as that is what it needs. What it has overwritten is to be forgotten next.
    fn trapped(&mut self, site: &Site<'_>, bus: &mut dyn Bus) -> Option<Exit> {
        self.retired += site.index;
        self.executing = Some(site.op.offset);
        let mut accessed = false;
        loop {
            match self.event {
                Event::Bus(request) => {
                    let answer = perform(request, self.retired, bus);
                    self.restart.answer(answer);
                    accessed |= request != BusRequest::TimeStamp;
                }
                Event::CodeWrite => self.restart.code_writes = true,
                _ => {
                    self.restart.finish();
                    let exit = self.faulted(site);
                    self.executing = None;
                    return exit.or(accessed.then_some(Exit::BusAccess));
                }
            }
            self.event = Event::None;
            self.restart.again();
            self.next_rip = site.block_end;
            if self.attempt(site).is_ok() {
                self.restart.finish();
                self.retire(site);
                return accessed.then_some(Exit::BusAccess);
            }
            self.executing = Some(site.op.offset);
        }
    }

    /// The instruction at the site cannot complete: its event is delivered.
    fn faulted(&mut self, site: &Site<'_>) -> Option<Exit> {
        let own = site.block_rip.wrapping_add(site.op.offset.into());
        self.set_rip(own);
        let event = std::mem::take(&mut self.event);
        if !matches!(event, Event::Interrupt { .. }) {
            // What the instruction accessed before it faulted it will access again.
            self.hits = 0;
        }
        match event {
            Event::Exception(exception) => self.deliver_exception(exception),
            Event::GeneralDetect => self.deliver_general_detect(),
            Event::NonCanonical if site.op.on_stack() => {
                self.deliver_exception(Exception::StackFault(0));
            }
            Event::Interrupt { vector, privileged } => {
                self.set_rip(own.wrapping_add(site.op.length()));
                let source = if privileged { Source::Trap } else { Source::Software };
                if self.deliver(vector, None, source).is_ok() {
                    self.retired += 1;
                } else {
                    self.set_rip(own);
                    let exception = self.take_exception();
                    self.deliver_exception(exception);
                }
            }
            Event::Missing(what) => return Some(Exit::Fatal(self.fault(what))),
            _ => self.deliver_exception(Exception::GeneralProtection(0)),
        }
        None
    }

    /// Where the instruction at `rip` lies in memory. Outside memory there are no instructions.
    fn fetch_address(&mut self, rip: u64) -> Result<u64, Trap> {
        let user = self.cpl == 3;
        let page = rip & PAGE_MASK;
        if let Some(frame) = self.tlb.fetch(user, page) {
            return Ok(frame | (rip & !PAGE_MASK));
        }
        if !is_canonical(rip) {
            return Err(self.general_protection(0));
        }
        self.restart.code_writes = true;
        let walked = self.walk(rip, Intent::Fetch, user);
        self.restart.finish();
        let mapping = walked?;
        if self.ram.host_page(mapping.frame).is_none() {
            return Err(self.raise(Exception::InvalidOpcode));
        }
        self.tlb.insert_fetch(user, page, mapping);
        Ok(mapping.frame | (rip & !PAGE_MASK))
    }

    /// What is wrong with the instruction at RIP.
    fn fault(&self, what: &'static str) -> EngineFault {
        let rip = self.rip();
        let point = ExecutionPoint::new(self.retired);
        EngineFault { what: what.into(), rip, bytes: self.code_bytes(rip, MAX_LENGTH), point }
    }

    /// Up to `most` bytes of code at `rip`, as far as they can be had without a walk.
    pub(super) fn code_bytes(&self, rip: u64, most: usize) -> Vec<u8> {
        let user = self.cpl == 3;
        let byte_at = |address: u64| {
            let frame = self.tlb.fetch(user, address & PAGE_MASK)?;
            let mut byte = [0];
            self.ram.read(frame | (address & !PAGE_MASK), &mut byte).then_some(byte[0])
        };
        let first = self.linear(rip);
        (0..most as u64).map_while(|offset| byte_at(first.wrapping_add(offset))).collect()
    }
}

/// Performs a bus request before the instruction at `point` retires.
fn perform(request: BusRequest, point: u64, bus: &mut dyn Bus) -> u64 {
    let at = ExecutionPoint::new(point);
    match request {
        BusRequest::PortRead { port, width } => bus.port_read(at, port, width).into(),
        BusRequest::PortWrite { port, width, value } => {
            bus.port_write(at, port, width, value);
            0
        }
        BusRequest::MemoryRead { address, len } => {
            let mut data = [0; 8];
            bus.memory_read(at, address, &mut data[..usize::from(len)]);
            u64::from_le_bytes(data)
        }
        BusRequest::MemoryWrite { address, len, value } => {
            bus.memory_write(at, address, &value.to_le_bytes()[..usize::from(len)]);
            0
        }
        BusRequest::TimeStamp => bus.time_stamp(at),
    }
}
