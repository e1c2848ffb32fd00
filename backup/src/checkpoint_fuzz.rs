//! The stream that a backup joins with, gone bad: refused, or a machine.

use super::*;
use std::collections::VecDeque;
use vmft_cpu::CpuCount;
use vmft_cpu::memory::MIN_MEMORY;
use vmft_fuzzing::{Random, change, damage, large_cases, peak_of};
use vmft_guest_images::probe::ProbeGuest;
use vmft_log::checkpoint::{
    CheckpointPiece, CheckpointReader, CheckpointWriter, PageEncoder, PieceKind,
};
use vmft_log::entry::OutputSequence;
use vmft_vmm::board::{BoardConfig, Bytes as Size, DiskConfig, NetConfig, UnixSeconds};
use vmft_vmm::devices::virtio::net::addresses::MacAddress;
use vmft_vmm::engine::EngineKind;
use vmft_vmm::machine::MachineConfig;
use vmft_vmm::outputs::{Output, OutputKind};

/// Cases of a quick run.
const CASES: u64 = 40;
/// So many ordinary cases one of these takes as long as: memory is mapped, and looked through.
const WORTH: u64 = 20;
/// How many bad streams are made in a case.
const EACH: usize = 5;
/// Most that the joining side allows.
const ALLOWED: u64 = 2 * MIN_MEMORY;

fn machine() -> Machine {
    let disk = DiskConfig { capacity: Size(1 << 20), read_only: false, serial: String::new() };
    let config = MachineConfig {
        board: BoardConfig {
            memory: Size(MIN_MEMORY),
            clock_base: UnixSeconds(1_700_000_000),
            disks: vec![disk],
            entropy: true,
            net: Some(NetConfig { mac: MacAddress([2, 0, 0, 0, 0, 7]), offloads: true }),
            cpus: CpuCount::ONE,
        },
        engine: EngineKind::Soft,
    };
    let kernel = ProbeGuest::default().image().into();
    let source = BootSource { kernel, ..BootSource::default() };
    Machine::new(config, source).expect("a probe guest")
}

fn output(sequence: u64) -> Output {
    let kind = OutputKind::Console { offset: sequence, bytes: vec![b'x'; 5] };
    Output { sequence: OutputSequence(sequence), kind }
}

type Pieces = VecDeque<(PieceKind, Vec<u8>)>;

/// A stream of this machine's memory with these states, whose digest is right.
fn stream(machine: &Machine, fixed: &[u8], state: &[u8]) -> Pieces {
    let limit = page_limit(machine.ram());
    let encoder = PageEncoder::for_zeroes(0);
    let begun = CheckpointWriter::begin(MemoryBase::Zeroes, limit, fixed, encoder);
    let (mut writer, mut pieces) = begun.expect("a small kernel");
    let mut pages = RamPages::some(machine.ram(), machine.nonzero_pages());
    while let Some(piece) = writer.next_pages(&mut pages, false) {
        pieces.push(piece);
    }
    let position = LogPosition::start_of_log(machine.point());
    let (last, _) = writer.finish(position, state).expect("a small state");
    pieces.extend(last);
    pieces.iter().map(|piece| (piece.kind(), piece.encode(Vec::new()))).collect()
}

/// States that can be read, and are those of no machine; or that cannot be read.
fn gone_bad(random: &mut Random, fixed: &mut Vec<u8>, content: &mut JoinContent) {
    match random.below(5) {
        0 => damage(random, fixed, &[]),
        1 => {
            let mut outputs = serde_json::to_value(&content.outputs).expect("plain values");
            change(random, &mut outputs);
            content.outputs = serde_json::from_value(outputs).unwrap_or_default();
        }
        2 => damage(random, &mut content.machine, &[]),
        _ => {
            let state = MachineState::decode(&content.machine).expect("good");
            let mut value = serde_json::to_value(state).expect("plain values");
            change(random, &mut value);
            if let Ok(state) = serde_json::from_value::<MachineState>(value) {
                content.machine = state.encode();
            }
        }
    }
}

/// Joins, as far as it goes: with the engine made ready at once, or at the end.
fn join(pieces: &Pieces, stands_by: bool) -> Option<Machine> {
    let not_ready = NotReady::default();
    let mut sink = MachineSink::within(ALLOWED);
    if stands_by {
        sink = MachineSink { stands_by: Some(not_ready), ..sink };
    }
    let mut reader = CheckpointReader::new();
    for (kind, bytes) in pieces {
        let piece = CheckpointPiece::decode(*kind, bytes).ok()?;
        let Some(mut checkpoint) = reader.handle_piece(piece, &mut sink).ok()? else { continue };
        sink.ready(&checkpoint).ok()?;
        JoinContent::unpack(&mut checkpoint).ok()?;
        return sink.into_machine(&checkpoint).ok();
    }
    None
}

#[test]
fn a_stream_gone_bad_is_refused_or_makes_a_machine() {
    let mut good_machine = machine();
    let good_fixed = good_machine.boot_source().encode();
    let state = good_machine.state().encode();
    let good_content = JoinContent { machine: state, outputs: vec![output(1), output(2)] };
    let good = stream(&good_machine, &good_fixed, &good_content.encode());
    let others: Vec<Vec<u8>> = good.iter().map(|(_, bytes)| bytes.clone()).collect();
    assert!(join(&good, false).is_some() && join(&good, true).is_some());
    let mut joined = 0u64;
    large_cases(CASES, WORTH, |mut random| {
        for _ in 0..EACH {
            let (mut fixed, mut content) = (good_fixed.clone(), good_content.clone());
            if random.chance(70) {
                gone_bad(&mut random, &mut fixed, &mut content);
            }
            let mut pieces = stream(&good_machine, &fixed, &content.encode());
            if random.chance(50) {
                let at = random.index(pieces.len());
                match random.below(4) {
                    0 => drop(pieces.remove(at)),
                    1 => pieces.swap(at, random.index(good.len().min(pieces.len()))),
                    _ => damage(&mut random, &mut pieces[at].1, &others),
                }
            }
            let size: usize = pieces.iter().map(|(_, bytes)| bytes.len()).sum();
            let stands_by = random.chance(50);
            let (machine, peak) = peak_of(|| join(&pieces, stands_by));
            assert!(peak <= (16 << 20) + 64 * size, "{peak} bytes for {size}");
            if let Some(mut machine) = machine {
                joined += 1;
                machine.state();
            }
        }
    });
    println!("{joined} joined");
}

#[test]
fn a_join_with_outputs_that_no_guest_has_put_out_is_refused() {
    let mut machine = machine();
    let fixed = machine.boot_source().encode();
    let state = machine.state().encode();
    let operation = vmft_vmm::board::DiskOperation::Flush;
    let request = vmft_log::entry::RequestId(1);
    let kind = OutputKind::Disk { disk: 200, request, operation };
    let disk = Output { sequence: OutputSequence(3), kind };
    for outputs in [vec![disk], vec![output(2), output(2)], vec![output(u64::MAX)]] {
        let content = JoinContent { machine: state.clone(), outputs };
        assert!(join(&stream(&machine, &fixed, &content.encode()), false).is_none());
    }
}
