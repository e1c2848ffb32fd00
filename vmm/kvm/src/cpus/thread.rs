//! The threads that execute the guest's CPUs, and nothing else: each is lent its CPU, enters the guest, and
//! gives it back with what it stopped for.

use super::super::error::KvmError;
use super::super::vcpu::{Exited, Vcpu};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;
use vmft_cpu::kick::{Kick, Kicker};
use vmft_sandbox::Task;

/// What the engine waits for.
#[derive(Debug)]
pub(super) enum Event {
    /// A CPU has come back.
    Back { number: u8, vcpu: Box<Vcpu>, exited: Exited },
    /// Somebody wants the engine to come back.
    Kicked,
}

/// How far a CPU is to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RunUntil {
    /// Until it stops for something.
    Stopped,
    /// To the end of the instruction it is in.
    InstructionEnd,
}

/// A CPU's thread.
#[derive(Debug)]
pub(super) struct CpuThread {
    orders: Option<Sender<(Box<Vcpu>, RunUntil)>>,
    thread: Option<JoinHandle<()>>,
}

impl CpuThread {
    pub(super) fn start(number: u8, events: Sender<Event>) -> Result<Self, KvmError> {
        let (orders, taken) = mpsc::channel::<(Box<Vcpu>, RunUntil)>();
        let work = move || {
            while let Ok((mut vcpu, until)) = taken.recv() {
                if until == RunUntil::InstructionEnd {
                    vcpu.kicks.set_immediate_exit();
                }
                let running = vcpu.kicks.enter();
                let exited = vcpu.go();
                drop(running);
                if events.send(Event::Back { number, vcpu, exited }).is_err() {
                    return;
                }
            }
        };
        let thread = vmft_sandbox::spawn(Task::Cpu, format!("vmft-cpu{number}"), work)
            .map_err(KvmError::Kicks)?;
        Ok(Self { orders: Some(orders), thread: Some(thread) })
    }

    /// Lends the CPU to its thread.
    pub(super) fn lend(&self, vcpu: Box<Vcpu>, until: RunUntil) {
        let orders = self.orders.as_ref().expect("threads end with the engine");
        orders.send((vcpu, until)).expect("a CPU's thread does not panic");
    }

    /// Takes no more; a CPU that is under way has been kicked.
    pub(super) fn close(&mut self) {
        drop(self.orders.take());
    }

    /// Waits for its end.
    pub(super) fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // One that panicked has ended as well.
            let _ = thread.join();
        }
    }
}

/// Kicks for the engine, which waits for events.
#[derive(Debug)]
pub(super) struct GroupKick {
    /// A kick is among the events.
    given: AtomicBool,
    events: Sender<Event>,
}

impl GroupKick {
    pub(super) fn new(events: Sender<Event>) -> Arc<Self> {
        Arc::new(Self { given: AtomicBool::new(false), events })
    }

    pub(super) fn kicker(self: &Arc<Self>) -> Kicker {
        Kicker::of(Arc::<Self>::clone(self))
    }

    /// The engine has met the kick: the next is another.
    pub(super) fn met(&self) {
        self.given.store(false, Ordering::SeqCst);
    }
}

impl Kick for GroupKick {
    fn kick(&self) {
        if !self.given.swap(true, Ordering::SeqCst) {
            // An engine that is gone needs no kick.
            let _ = self.events.send(Event::Kicked);
        }
    }
}
