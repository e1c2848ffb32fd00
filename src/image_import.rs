//! Disk images as they are shipped, made into raw ones: unpacked here, or converted by `qemu-img`.
//!
//! What becomes of one lies beside its place until it is whole, and is sparse. Nothing is overwritten.

use crate::disk_images::shell_word;
use crate::remedy::Remedy;
use anyhow::{Context, Result, bail};
use flate2::read::MultiGzDecoder;
use lzma_rust2::XzReader;
use ruzstd::decoding::StreamingDecoder;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use tempfile::NamedTempFile;
use vmft_guest_images::Progress;
use vmft_vmm::world::image_format::{self, ImageFormat};

/// So much is written at a time; what is all zeroes is left out.
const PIECE: usize = 64 << 10;
/// A disk is a whole number of these.
const SECTOR: u64 = 512;
/// Deepest nesting: a compressed qcow2 image.
const MAX_STEPS: usize = 3;

/// What a frame of zstd begins with; a skippable one, with any last four bits.
const ZSTD_FRAME: [u8; 4] = [0x28, 0xB5, 0x2F, 0xFD];

/// Several frames of zstd, one after the other.
struct Frames<R: BufRead>(R);

impl<R: BufRead> Frames<R> {
    /// Gives all frames to `take`.
    fn each(&mut self, mut take: impl FnMut(&mut dyn Read) -> io::Result<()>) -> io::Result<()> {
        while !self.0.fill_buf()?.is_empty() {
            let mut magic = [0; 4];
            let begun = self.0.fill_buf()?;
            let len = begun.len().min(4);
            magic[..len].copy_from_slice(&begun[..len]);
            if magic[0] & 0xF0 == 0x50 && magic[1..] == [0x2A, 0x4D, 0x18] {
                self.skip()?;
                continue;
            }
            if magic != ZSTD_FRAME {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "no zstd behind its end"));
            }
            take(&mut StreamingDecoder::new(&mut self.0).map_err(io::Error::other)?)?;
        }
        Ok(())
    }

    /// Skips a frame that has nothing of the file.
    fn skip(&mut self) -> io::Result<()> {
        let mut head = [0; 8];
        self.0.read_exact(&mut head)?;
        let len = u32::from_le_bytes(head[4..].try_into().expect("four bytes"));
        io::copy(&mut (&mut self.0).take(len.into()), &mut io::sink()).map(drop)
    }
}

/// A file that is written from its beginning on, with holes.
struct Sparse<'a> {
    file: &'a File,
    len: u64,
}

impl Sparse<'_> {
    fn add(&mut self, from: &mut dyn Read) -> io::Result<()> {
        let mut piece = vec![0; PIECE];
        loop {
            let mut filled = 0;
            while filled < PIECE {
                match from.read(&mut piece[filled..]) {
                    Ok(0) => break,
                    Ok(read) => filled += read,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            if piece[..filled].iter().any(|byte| *byte != 0) {
                self.file.write_all_at(&piece[..filled], self.len)?;
            }
            self.len += filled as u64;
            if filled < PIECE {
                return Ok(());
            }
        }
    }
}

/// The directory that a file is in, or would be.
pub(crate) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes a raw disk at `target`, where nothing may be, of the image at `source`; its size in bytes.
///
/// # Errors
/// The image is of no kind that can be imported, or damaged; or a program is missing, which is named.
pub fn import(source: &Path, target: &Path, progress: &mut dyn Progress) -> Result<u64> {
    if target.symlink_metadata().is_ok() {
        bail!("{} exists; images are not overwritten, name another", target.display());
    }
    let directory = directory_of(target);
    let mut made: Option<NamedTempFile> = None;
    for _ in 0..MAX_STEPS {
        let from = made.as_ref().map_or(source, NamedTempFile::path);
        let mut file = File::open(from)
            .with_context(|| format!("opening {}", from.display()))
            .remedy(|| "name an image file that this user may read")?;
        let format = image_format::recognise(&file)
            .with_context(|| format!("reading {}", source.display()))?;
        file.rewind().with_context(|| format!("reading {}", source.display()))?;
        let raw = match format {
            None | Some(ImageFormat::Iso9660) => made.is_some(),
            _ => false,
        };
        if raw {
            break;
        }
        let next = NamedTempFile::new_in(directory)
            .with_context(|| format!("writing beside {}", target.display()))?;
        let step = Step { source, from, progress };
        match format {
            None | Some(ImageFormat::Iso9660) => step.unpack("copying", file, &next, copy)?,
            Some(ImageFormat::Compressed { name: "gzip", .. }) => {
                step.unpack("unpacking", file, &next, |file, to| {
                    to.add(&mut MultiGzDecoder::new(file))
                })?;
            }
            Some(ImageFormat::Compressed { name: "xz", .. }) => {
                step.unpack("unpacking", file, &next, |file, to| {
                    to.add(&mut XzReader::new(file, true))
                })?;
            }
            Some(ImageFormat::Compressed { name: "zstd", .. }) => {
                step.unpack("unpacking", file, &next, |file, to| {
                    Frames(file).each(|frame| to.add(frame))
                })?;
            }
            Some(ImageFormat::Disk { qemu, name }) => step.convert(qemu, name, &next)?,
            Some(other) => bail!("{} is {other}; {}", source.display(), remedy(other, source)),
        }
        made = Some(next);
    }
    let made = made.expect("at least one step was made");
    let len = made.as_file().metadata().context("looking at what was made")?.len();
    if len == 0 {
        bail!("{} has nothing in it", source.display());
    }
    let size = len.next_multiple_of(SECTOR);
    made.as_file().set_len(size).context("filling the last sector up")?;
    made.as_file().sync_all().with_context(|| format!("writing {}", target.display()))?;
    made.persist_noclobber(target)
        .map_err(|error| error.error)
        .with_context(|| format!("writing {}", target.display()))?;
    Ok(size)
}

fn copy(mut file: BufReader<File>, to: &mut Sparse) -> io::Result<()> {
    to.add(&mut file)
}

fn remedy(format: ImageFormat, path: &Path) -> String {
    match format {
        ImageFormat::Compressed { program, .. } => {
            format!("unpack it with `{program} -dc < {} > FILE` first", shell_word(path))
        }
        ImageFormat::Archive(_) => "unpack it somewhere and import the disk image in it".to_owned(),
        ImageFormat::AndroidSparse => "make a raw one of it with `simg2img` first".to_owned(),
        ImageFormat::Program(_) => "a kernel is given with --kernel".to_owned(),
        ImageFormat::Disk { .. } | ImageFormat::Iso9660 => "it cannot be imported".to_owned(),
    }
}

/// One step on the way from an image to a raw disk.
struct Step<'a> {
    source: &'a Path,
    from: &'a Path,
    progress: &'a mut dyn Progress,
}

impl Step<'_> {
    fn unpack(
        self,
        doing: &str,
        file: File,
        to: &NamedTempFile,
        work: impl FnOnce(BufReader<File>, &mut Sparse) -> io::Result<()>,
    ) -> Result<()> {
        self.progress.step(&format!("{doing} {}", self.source.display()));
        let mut to = Sparse { file: to.as_file(), len: 0 };
        work(BufReader::with_capacity(1 << 20, file), &mut to)
            .with_context(|| format!("{doing} {}", self.source.display()))
            .remedy(|| "is it whole? fetch it again, or see whether there is room for it")?;
        to.file.set_len(to.len).context("writing what was unpacked")
    }

    fn convert(self, qemu: &str, name: &str, to: &NamedTempFile) -> Result<()> {
        self.progress.step(&format!("converting {} ({name})", self.source.display()));
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-f", qemu, "-O", "raw"]).arg(self.from).arg(to.path());
        let output = match command.output() {
            Ok(output) => output,
            Err(error) if error.kind() == io::ErrorKind::NotFound => bail!(
                "{} is a {name} image, which qemu-img converts: install Debian's package qemu-utils",
                self.source.display()
            ),
            Err(error) => return Err(error).context("starting qemu-img"),
        };
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            bail!("qemu-img cannot convert {}: {said}", self.source.display());
        }
        Ok(())
    }
}
