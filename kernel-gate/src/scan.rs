//! Reads a kernel's code.

use crate::{Examination, Finding, GateError};
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic};
use object::elf::{FileHeader64, PF_X, PT_LOAD, SHF_EXECINSTR, SHT_NOBITS};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader, Sym, SymbolTable};
use object::{LittleEndian, elf};
use std::collections::BTreeMap;

type Header = FileHeader64<LittleEndian>;
/// What addresses are called.
type Names<'a> = BTreeMap<u64, &'a [u8]>;

/// A stretch of code.
struct Code<'a> {
    address: u64,
    bytes: &'a [u8],
}

/// What may not be in a kernel that is followed on the host's CPU: stock KVM cannot trap it, or not
/// on every CPU. Not here is what KVM answers the same on both sides, or what faults because the
/// CPU model lacks it and control registers keep it off: `RDPMC`, `MONITOR`, the `XSAVE` family.
fn is_forbidden(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Rdtsc
            | Mnemonic::Rdtscp
            | Mnemonic::Rdpid
            | Mnemonic::Rdpru
            | Mnemonic::Rdrand
            | Mnemonic::Rdseed
            | Mnemonic::Tpause
            | Mnemonic::Umwait
            | Mnemonic::Xbegin
            | Mnemonic::Xtest
    )
}

/// Reads all the code there is.
pub(crate) fn scan(file: &[u8]) -> Result<Examination, GateError> {
    let image = |error: object::read::Error| GateError::Image(error.to_string());
    let header = Header::parse(file).map_err(image)?;
    if header.e_machine.get(LittleEndian) != elf::EM_X86_64 {
        return Err(GateError::Image("it is for another CPU".to_owned()));
    }
    let (code, names) = match sections(header, file).map_err(image)? {
        (code, names) if !code.is_empty() => (code, names),
        _ => (segments(header, file)?, BTreeMap::new()),
    };
    if code.is_empty() {
        return Err(GateError::Image("it has no code".to_owned()));
    }
    // Each byte of the file is code once: headers that name the same again would be read for ever.
    let bytes = code.iter().map(|stretch| stretch.bytes.len() as u64).sum();
    if bytes > file.len() as u64 {
        return Err(GateError::Image("its stretches of code lie over each other".to_owned()));
    }
    let mut examination = Examination { bytes, instructions: 0 };
    let mut findings = Findings::default();
    for stretch in &code {
        examination.instructions += read(stretch, &names, &mut findings);
    }
    match findings {
        Findings { count, first: Some(first) } => Err(GateError::Forbidden { count, first }),
        Findings { count: _, first: None } => Ok(examination),
    }
}

/// What is there that may not be.
#[derive(Default)]
struct Findings {
    count: usize,
    first: Option<Finding>,
}

/// Executable sections, and the names of addresses in them.
fn sections<'a>(
    header: &Header,
    file: &'a [u8],
) -> object::read::Result<(Vec<Code<'a>>, Names<'a>)> {
    let table = header.sections(LittleEndian, file)?;
    let mut code = Vec::new();
    for section in table.iter() {
        let flags = section.sh_flags(LittleEndian);
        let executable = flags.0 & SHF_EXECINSTR.0 != 0;
        if executable && section.sh_type(LittleEndian) != SHT_NOBITS {
            let bytes = section.data(LittleEndian, file)?;
            code.push(Code { address: section.sh_addr(LittleEndian), bytes });
        }
    }
    let symbols: SymbolTable<'_, Header> = table.symbols(LittleEndian, file, elf::SHT_SYMTAB)?;
    let mut names = BTreeMap::new();
    for symbol in symbols.iter() {
        if symbol.is_undefined(LittleEndian) || symbol.st_type() == elf::STT_FILE {
            continue;
        }
        let name = symbol.name(LittleEndian, symbols.strings()).unwrap_or_default();
        names.insert(symbol.st_value(LittleEndian), name);
    }
    Ok((code, names))
}

/// Executable segments of an image without sections.
fn segments<'a>(header: &Header, file: &'a [u8]) -> Result<Vec<Code<'a>>, GateError> {
    let image = |error: object::read::Error| GateError::Image(error.to_string());
    let mut code = Vec::new();
    for program in header.program_headers(LittleEndian, file).map_err(image)? {
        let executable = program.p_flags(LittleEndian).0 & PF_X.0 != 0;
        if program.p_type(LittleEndian) != PT_LOAD || !executable {
            continue;
        }
        let bytes = program
            .data(LittleEndian, file)
            .map_err(|()| GateError::Image("a segment lies outside the file".to_owned()))?;
        code.push(Code { address: program.p_vaddr(LittleEndian), bytes });
    }
    Ok(code)
}

/// Most characters of a name that are told.
const NAME: usize = 80;

/// Decodes a stretch from its start and from every name in it to the next; returns how many
/// instructions there are.
fn read(code: &Code<'_>, names: &Names<'_>, findings: &mut Findings) -> u64 {
    let end = code.address.saturating_add(code.bytes.len() as u64);
    let mut starts = vec![code.address];
    starts.extend(names.range(code.address..end).map(|(address, _)| *address));
    starts.push(end);
    starts.dedup();
    let mut instructions = 0;
    let mut decoder = Decoder::with_ip(64, code.bytes, code.address, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    for pair in starts.windows(2) {
        let offset = usize::try_from(pair[0] - code.address).expect("inside the stretch");
        decoder.set_position(offset).expect("inside the stretch");
        decoder.set_ip(pair[0]);
        while decoder.can_decode() && decoder.ip() < pair[1] {
            decoder.decode_out(&mut instruction);
            instructions += 1;
            if is_forbidden(instruction.mnemonic()) {
                findings.count += 1;
                findings.first.get_or_insert_with(|| Finding {
                    instruction: format!("{:?}", instruction.mnemonic()).to_uppercase(),
                    address: instruction.ip(),
                    function: name_of(instruction.ip(), names),
                });
            }
        }
    }
    instructions
}

fn name_of(address: u64, names: &Names<'_>) -> Option<String> {
    let (_, name) = names.range(..=address).next_back()?;
    // Whoever made the file chose it, and it is shown on a terminal.
    let shown = |byte: &u8| if byte.is_ascii_graphic() { char::from(*byte) } else { '?' };
    Some(name.iter().take(NAME).map(shown).collect())
}
