//! The run loop.
//!
//! Blocks are executed whole while the bound is far enough and nothing needs attention. An op
//! that traps is looked at closely: the instructions before it retire, and then, depending on
//! the event, it is executed again with what it was missing (an answer from the bus, the
//! permission to overwrite decoded code), or its exception is delivered.

use super::block::{BlockId, Decoding};
use super::cpu::{HALTED, SHADOW, SHUT_DOWN, SS_SHADOW, STEP_DUE, is_canonical};
use super::event::{BusRequest, Event, Flow, Trap};
use super::exception::Exception;
use super::flags;
use super::mmu::Intent;
use super::op::{Op, run_ops};
use super::system::interrupts::Source;
use super::tlb::PAGE_MASK;
use super::{ATTENTION, SoftEngine};
use crate::engine::{Bus, EngineFault, Exit};
use crate::memory::PAGE_SIZE;
use vmft_logging_channel::point::ExecutionPoint;

/// Events delivered without an instruction retiring, after which the guest is taken to be
/// caught in a fault of its own fault handler, from which no bound could stop it.
const MAX_DELIVERIES: u32 = 1 << 16;
/// DR6.BS: a single step.
const DR6_STEP: u64 = 1 << 14;
/// Longest instruction in bytes.
const MAX_LENGTH: usize = 15;

/// Where an op was executed.
#[derive(Debug, Clone, Copy)]
struct Site {
    op: Op,
    /// Instructions of the block before it.
    index: u64,
    /// Address of the block's first instruction.
    block_rip: u64,
    /// Address behind the block.
    block_end: u64,
    /// It is the block's last.
    last: bool,
}

impl SoftEngine {
    pub(super) fn run_loop(&mut self, bound: u64, want: bool, bus: &mut dyn Bus) -> Exit {
        let watch = ATTENTION | if want { flags::IF } else { 0 };
        loop {
            if self.cpu.deliveries > MAX_DELIVERIES {
                return self.fatal("events are delivered without end");
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
        if want && self.cpu.can_take_interrupt() {
            return Some(Exit::InterruptWindow);
        }
        // One instruction, at whose end the shadow is over and the trap is due.
        let before = self.cpu.retired;
        self.cpu.system_flags &= !(SHADOW | SS_SHADOW);
        let exit = self.run_one(bus);
        if let Some(Exit::Fatal(_)) = exit {
            self.cpu.system_flags = state;
            return exit;
        }
        let after = self.cpu.system_flags;
        self.cpu.system_flags &= !STEP_DUE;
        // Gates and SYSCALL clear TF and with it the step; POPF and IRET do not.
        let stepping = state & flags::TF != 0 && after & (flags::TF | STEP_DUE) != 0;
        let trapping = stepping && after & SS_SHADOW == 0;
        if trapping && self.cpu.retired > before {
            self.cpu.debug[6] |= DR6_STEP;
            self.cpu.deliver_event(1, Source::Trap);
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
            let block = self.cache.block(id);
            let count = u64::from(block.count);
            let rip = self.cpu.rip();
            let end = rip.wrapping_add(block.bytes.into());
            self.cpu.next_rip = end;
            let left = bound - self.cpu.retired;
            if left < count {
                return self.run_part(id, left, bus);
            }
            let ops = self.cache.ops(id);
            if run_ops(&mut self.cpu, ops).is_err() {
                let index = ops.len() - 1 - self.cpu.ops_left;
                let site = self.site(id, index, rip, end);
                return self.trapped(site, bus);
            }
            self.cpu.retired += count;
            let next = self.cpu.next_rip;
            self.cpu.set_rip(next);
            if self.cpu.system_flags & watch != 0 || self.cpu.retired >= bound {
                return None;
            }
            let distance = next.wrapping_sub(rip);
            if let Some(next) = self.cache.successor(id, distance) {
                id = next;
                continue;
            }
            let from = id;
            id = match self.next_block() {
                Ok(id) => id,
                Err(Trap) => return self.fetch_trapped(),
            };
            if (next ^ rip) & PAGE_MASK == 0 {
                self.cache.link(from, distance, id);
            }
        }
    }

    fn site(&self, id: BlockId, index: usize, block_rip: u64, block_end: u64) -> Site {
        let ops = self.cache.ops(id);
        Site {
            op: ops[index],
            index: index as u64,
            block_rip,
            block_end,
            last: index + 1 == ops.len(),
        }
    }

    /// Executes the first `left` instructions of a longer block.
    fn run_part(&mut self, id: BlockId, left: u64, bus: &mut dyn Bus) -> Option<Exit> {
        let rip = self.cpu.rip();
        let end = self.cpu.next_rip;
        let stop = usize::try_from(left).expect("less than a block");
        let ops = self.cache.ops(id);
        if run_ops(&mut self.cpu, &ops[..stop]).is_err() {
            let index = stop - 1 - self.cpu.ops_left;
            let site = self.site(id, index, rip, end);
            return self.trapped(site, bus);
        }
        let offset = ops[stop].offset;
        self.cpu.retired += left;
        self.cpu.set_rip(rip.wrapping_add(offset.into()));
        None
    }

    /// Executes one instruction.
    fn run_one(&mut self, bus: &mut dyn Bus) -> Option<Exit> {
        let id = match self.next_block() {
            Ok(id) => id,
            Err(Trap) => return self.fetch_trapped(),
        };
        let rip = self.cpu.rip();
        let end = rip.wrapping_add(self.cache.block(id).bytes.into());
        self.cpu.next_rip = end;
        let site = self.site(id, 0, rip, end);
        match self.attempt(&site) {
            Ok(()) => {
                self.retire(&site);
                None
            }
            Err(Trap) => self.trapped(site, bus),
        }
    }

    /// Executes the op at the site alone.
    fn attempt(&mut self, site: &Site) -> Flow {
        (site.op.handler)(&mut self.cpu, &site.op, &[])
    }

    /// The instruction completed.
    fn retire(&mut self, site: &Site) {
        self.cpu.retired += 1;
        let op = &site.op;
        let behind = u64::from(op.offset) + u64::from(op.length);
        let next = if site.last { self.cpu.next_rip } else { site.block_rip.wrapping_add(behind) };
        self.cpu.set_rip(next);
    }

    /// An op did not complete. The instructions before it retire; it is executed again for as
    /// long as that is what it needs.
    fn trapped(&mut self, site: Site, bus: &mut dyn Bus) -> Option<Exit> {
        self.cpu.retired += site.index;
        let mut accessed = false;
        loop {
            match self.cpu.event {
                Event::Bus(request) => {
                    let answer = perform(request, self.cpu.retired, bus);
                    self.cpu.restart.answer(answer);
                    accessed |= request != BusRequest::TimeStamp;
                }
                Event::CodeWrite => self.cpu.restart.code_writes = true,
                _ => {
                    self.cpu.restart.finish();
                    let exit = self.faulted(&site);
                    self.forget_stale();
                    return exit.or(accessed.then_some(Exit::BusAccess));
                }
            }
            self.cpu.event = Event::None;
            self.cpu.restart.again();
            self.cpu.next_rip = site.block_end;
            if self.attempt(&site).is_ok() {
                self.cpu.restart.finish();
                self.retire(&site);
                self.forget_stale();
                return accessed.then_some(Exit::BusAccess);
            }
        }
    }

    /// The instruction at the site cannot complete: its event is delivered.
    fn faulted(&mut self, site: &Site) -> Option<Exit> {
        let own = site.block_rip.wrapping_add(site.op.offset.into());
        self.cpu.set_rip(own);
        match std::mem::take(&mut self.cpu.event) {
            Event::Exception(exception) => self.cpu.deliver_exception(exception),
            Event::NonCanonical if site.op.stack => {
                self.cpu.deliver_exception(Exception::StackFault(0));
            }
            Event::Interrupt { vector, privileged } => {
                self.cpu.set_rip(own.wrapping_add(site.op.length.into()));
                let source = if privileged { Source::Trap } else { Source::Software };
                if self.cpu.deliver(vector, None, source).is_ok() {
                    self.cpu.retired += 1;
                } else {
                    self.cpu.set_rip(own);
                    let exception = self.cpu.take_exception();
                    self.cpu.deliver_exception(exception);
                }
            }
            Event::Missing(what) => return Some(self.fatal(what)),
            _ => self.cpu.deliver_exception(Exception::GeneralProtection(0)),
        }
        None
    }

    /// The next instruction could not be fetched.
    fn fetch_trapped(&mut self) -> Option<Exit> {
        self.cpu.restart.finish();
        let exception = self.cpu.take_exception();
        self.cpu.deliver_exception(exception);
        None
    }

    /// The block at RIP.
    fn next_block(&mut self) -> Result<BlockId, Trap> {
        let rip = self.cpu.rip();
        if let Some(frame) = self.cpu.tlb.fetch(self.cpu.cpl == 3, rip & PAGE_MASK)
            && self.cpu.stale.is_empty()
            && let Some(id) = self.cache.recent(frame | (rip & !PAGE_MASK))
        {
            return Ok(id);
        }
        self.find_block(rip)
    }

    #[cold]
    #[inline(never)]
    fn find_block(&mut self, rip: u64) -> Result<BlockId, Trap> {
        let physical = self.fetch_address(rip)?;
        self.forget_stale();
        match self.cache.find(&mut self.cpu, physical, None) {
            Decoding::Done(id) => Ok(id),
            Decoding::NeedsNextPage => {
                let next = (rip & PAGE_MASK).wrapping_add(PAGE_SIZE);
                let next_page = self.fetch_address(next)? & PAGE_MASK;
                self.forget_stale();
                match self.cache.find(&mut self.cpu, physical, Some(next_page)) {
                    Decoding::Done(id) => Ok(id),
                    Decoding::NeedsNextPage => unreachable!("the next page is given"),
                }
            }
        }
    }

    /// Where the instruction at `rip` lies in memory. Outside memory there are no instructions.
    fn fetch_address(&mut self, rip: u64) -> Result<u64, Trap> {
        let user = self.cpu.cpl == 3;
        let page = rip & PAGE_MASK;
        if let Some(frame) = self.cpu.tlb.fetch(user, page) {
            return Ok(frame | (rip & !PAGE_MASK));
        }
        if !is_canonical(rip) {
            return Err(self.cpu.general_protection(0));
        }
        self.cpu.restart.code_writes = true;
        let walked = self.cpu.walk(rip, Intent::Fetch, user);
        self.cpu.restart.finish();
        let mapping = walked?;
        if self.cpu.ram.host_page(mapping.frame).is_none() {
            return Err(self.cpu.raise(Exception::InvalidOpcode));
        }
        self.cpu.tlb.insert_fetch(user, page, mapping);
        Ok(mapping.frame | (rip & !PAGE_MASK))
    }

    /// The run ends here, with the instruction at RIP.
    fn fatal(&mut self, what: &'static str) -> Exit {
        let rip = self.cpu.rip();
        let mut bytes = Vec::new();
        for offset in 0..MAX_LENGTH as u64 {
            let address = rip.wrapping_add(offset);
            let user = self.cpu.cpl == 3;
            let Some(frame) = self.cpu.tlb.fetch(user, address & PAGE_MASK) else { break };
            let mut byte = [0];
            self.cpu.ram.read(frame | (address & !PAGE_MASK), &mut byte);
            bytes.extend(byte);
        }
        let point = ExecutionPoint::new(self.cpu.retired);
        Exit::Fatal(EngineFault { what: what.into(), rip, bytes, point })
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
