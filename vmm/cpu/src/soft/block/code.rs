//! Blocks and their machine code.

use super::{BlockCache, BlockId, Code, Compiler, Cpu, Left, NEVER, NotCompiled, OPTIONS};
use crate::soft::limits::MAX_BLOCK;
use iced_x86::{Decoder, Instruction};

impl BlockCache {
    /// Notes that a block without code is about to be executed, and compiles it if it was often enough.
    /// True if it is to be looked at again: it has code now, or for want of room all blocks were
    /// forgotten.
    #[inline(always)]
    pub(in super::super) fn warm(&mut self, cpu: &mut Cpu, id: BlockId) -> bool {
        let Some(compiler) = &self.compiler else { return false };
        let hot = compiler.hot;
        let Some(block) = self.slots.get_mut(id.slot as usize) else { return false };
        if block.heat < hot {
            block.heat += 1;
            return false;
        }
        block.heat != NEVER && self.compile(cpu, id)
    }

    #[cold]
    #[inline(never)]
    fn compile(&mut self, cpu: &mut Cpu, id: BlockId) -> bool {
        let Some(block) = self.get(id) else { return false };
        if !Compiler::may_run(cpu) {
            return false;
        }
        let physical = block.physical;
        let instructions = self.decode_again(cpu, id).unwrap_or_default();
        let made = match &mut self.compiler {
            Some(compiler) if !instructions.is_empty() => {
                compiler.compile(id, physical, &instructions)
            }
            _ => Err(NotCompiled::NotWorth),
        };
        let block = &mut self.slots[id.slot as usize];
        match made {
            Ok(code) => block.code = Some(code),
            Err(NotCompiled::NotWorth) => {
                block.heat = NEVER;
                return false;
            }
            Err(NotCompiled::Full) => self.clear(cpu),
        }
        true
    }

    /// The instructions of a block in one page, whose ops no longer know them.
    fn decode_again(&self, cpu: &Cpu, id: BlockId) -> Option<Vec<Instruction>> {
        let block = self.get(id).filter(|block| block.is_plain())?;
        let mut buffer = vec![0; block.bytes.into()];
        cpu.ram.read(block.physical, &mut buffer);
        let decoder = Decoder::with_ip(64, &buffer, 0, OPTIONS);
        let instructions: Vec<Instruction> = decoder.into_iter().take(MAX_BLOCK).collect();
        let ops = self.ops(block);
        let same = ops.len() == instructions.len()
            && ops
                .iter()
                .zip(&instructions)
                .all(|(op, i)| u64::from(op.offset) == i.ip() && op.length() == i.len() as u64);
        same.then_some(instructions)
    }

    /// Runs the block's code, from its beginning or behind its first `done` instructions, for at most
    /// `left` instructions. `None` if it has no code, or cannot be entered there.
    #[inline]
    pub(in super::super) fn run_code(
        &mut self,
        cpu: &mut Cpu,
        id: BlockId,
        done: usize,
        left: u64,
    ) -> Option<Left> {
        if !Compiler::may_run(cpu) {
            return None;
        }
        let block = self.slots.get(id.slot as usize).filter(|block| block.epoch == id.epoch)?;
        let (code, compiler) = (block.code.as_ref()?, self.compiler.as_mut()?);
        if compiler.checks() {
            let ops = self.ops.get(&block.ops);
            return compiler.run_checked(cpu, code, ops, block.bytes.into(), done);
        }
        compiler.run(cpu, code, done, left)
    }

    /// Makes the way from one block to another, at `distance`, a jump, if both have code.
    pub(in super::super) fn join(&mut self, from: BlockId, distance: u64, to: BlockId) {
        if let Some((compiler, from, to)) = self.codes(from, to) {
            compiler.join(from, distance, to);
        }
    }

    /// The same for one way out of a block.
    pub(in super::super) fn join_through(&mut self, from: BlockId, site: usize, to: BlockId) {
        if let Some((compiler, from, to)) = self.codes(from, to) {
            compiler.join_through(from, site, to);
        }
    }

    fn codes(&mut self, from: BlockId, to: BlockId) -> Option<(&mut Compiler, &Code, &Code)> {
        let code = |id: BlockId| {
            let block = self.slots.get(id.slot as usize)?;
            block.code.as_ref().filter(|_| block.epoch == id.epoch)
        };
        Some((self.compiler.as_mut()?, code(from)?, code(to)?))
    }
}
