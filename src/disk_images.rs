//! Opening disk images: what a file is comes before what is done with it, and every remedy is safe to
//! follow, also for an image with data up to its last byte.

use crate::nbd_disk;
use crate::options::{DiskOption, DiskPlace, MirrorOption};
use anyhow::{Result, anyhow, bail};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use vmft_backup::mirror::{Mirror, Mirrors};
use vmft_vmm::world::image_format::{self, ImageFormat};
use vmft_vmm::world::{DiskFile, DiskFileError, DiskPolicy, HostCache, OwnCopy};

/// Whose disks are opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DisksOf {
    /// A machine that nobody follows.
    Alone,
    /// The first side of a pair.
    NewPair,
    /// A side that joins a pair; the disks are still to be shared.
    Joining,
}

impl DisksOf {
    /// Whether the host's cache has a part in it, where an option does not say.
    fn cache(self) -> HostCache {
        if self == Self::Alone { HostCache::WriteBack } else { HostCache::None }
    }

    /// True if nobody else may be found on them.
    pub(crate) fn is_new(self) -> bool {
        self != Self::Joining
    }
}

/// Disks that are open.
#[derive(Debug, Default)]
pub struct OpenDisks {
    /// All of them.
    pub disks: Vec<DiskFile>,
    /// Those of which each side of a pair has a copy.
    pub mirrors: Mirrors,
}

/// Opens the disks. `policy`: how those deal with storage that fails of which nothing else is said.
pub fn open_disks(options: &[DiskOption], of: DisksOf, policy: DiskPolicy) -> Result<OpenDisks> {
    let mut mirrors = Vec::new();
    let mut open = |(number, disk): (u8, &DiskOption)| match &disk.place {
        DiskPlace::Image(path) if disk.mirror.is_some() => {
            let (opened, mirror) = open_copy(number, path, disk, of)?;
            mirrors.push(mirror);
            Ok(opened)
        }
        DiskPlace::Image(path) => {
            check_format(path, disk.read_only, disk.is_raw)?;
            let cache = disk.cache.unwrap_or(of.cache());
            DiskFile::open(path, disk.read_only, cache, of.is_new()).map_err(|error| {
                let remedy = disk_remedy(&error, of.is_new());
                anyhow!("{:#}{remedy}", anyhow::Error::from(error))
            })
        }
        DiskPlace::Export(export) => nbd_disk::open(export, disk.read_only, of),
        DiskPlace::Seed(files) => files.open(),
    };
    let with_policy = |(number, disk): (u8, &DiskOption)| {
        Ok(open((number, disk))?.with_policy(disk.policy(policy)))
    };
    let disks = (0u8..).zip(options).map(with_policy).collect::<Result<_>>()?;
    Ok(OpenDisks { disks, mirrors: Mirrors::new(mirrors) })
}

/// Opens this side's copy of a disk, and its record.
fn open_copy(
    number: u8,
    path: &Path,
    option: &DiskOption,
    of: DisksOf,
) -> Result<(DiskFile, Mirror)> {
    use std::os::unix::fs::FileTypeExt;
    let shown = path.display();
    if of == DisksOf::Alone {
        bail!("disk {shown}: mirror=on is for a pair; leave it out where nobody follows");
    }
    if path.metadata().is_ok_and(|data| data.file_type().is_block_device()) {
        bail!(
            "disk {shown} is a block device, beside which there is no room for the record of a copy; mirror=on \
             takes a file"
        );
    }
    check_format(path, false, option.is_raw)?;
    let MirrorOption { size, is_forced } = option.mirror.expect("it is mirrored");
    let cache = option.cache.unwrap_or(of.cache());
    let opened = OwnCopy::open(path, cache, size).and_then(|(copy, is_new)| {
        // Nobody else may have it: the other side least of all.
        Ok((copy.disk()?, copy, is_new))
    });
    let (disk, copy, is_new) = opened.map_err(|error| {
        let remedy = match &error {
            DiskFileError::Open { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                "; say size= to have a copy made, as large as the disk".to_owned()
            }
            DiskFileError::InUse { .. } => {
                "; each side of a pair with mirror=on has a file of its own".to_owned()
            }
            error => disk_remedy(error, true),
        };
        anyhow!("{:#}{remedy}", anyhow::Error::from(error))
    })?;
    let mirror = Mirror::new(number, copy, is_new, is_forced)?;
    Ok((disk, mirror))
}

/// Refuses a file that is no raw disk, before anything else is done with it. What cannot be read is left
/// to whoever opens it.
pub(crate) fn check_format(path: &Path, read_only: bool, is_raw: bool) -> Result<()> {
    let is_regular = |path: &Path| {
        use std::os::unix::fs::FileTypeExt;
        // Nothing else has a beginning and an end; opening a pipe would wait.
        path.metadata().is_ok_and(|data| data.is_file() || data.file_type().is_block_device())
    };
    if is_raw || !is_regular(path) {
        return Ok(());
    }
    let Ok(file) = File::open(path) else { return Ok(()) };
    let found = image_format::recognise(&file)
        .map_err(|error| anyhow!("reading disk {}: {error}", path.display()))?;
    let Some(format) = found.filter(|format| !(read_only && format.may_be_read())) else {
        return Ok(());
    };
    let remedy = format_remedy(format, path);
    bail!(
        "disk {} is {format}, not a raw disk, and would be destroyed by the guest's first write; {remedy}; \
         or, if its guest has put there what looks like that, say format=raw",
        path.display()
    )
}

/// How a file of that format becomes a disk. The command writes to a name that nothing has.
fn format_remedy(format: ImageFormat, path: &Path) -> String {
    let target = free_name(path);
    let (from, to) = (shell_word(path), shell_word(&target));
    match format {
        ImageFormat::Disk { qemu, .. } => {
            format!(
                "make a raw one of it with `qemu-img convert -f {qemu} -O raw {from} {to}` and name that"
            )
        }
        ImageFormat::AndroidSparse => {
            format!("make a raw one of it with `simg2img {from} {to}` and name that")
        }
        ImageFormat::Compressed { program, .. } => {
            format!("unpack it with `{program} -dc < {from} > {to}` and name that")
        }
        ImageFormat::Archive(_) => "unpack it somewhere and name the disk image in it".to_owned(),
        ImageFormat::Iso9660 => "add readonly=on, with which a guest can read it".to_owned(),
        ImageFormat::Program(_) => "a kernel is given with --kernel".to_owned(),
    }
}

/// What to do about a disk that cannot be used; empty where the error says it. Nothing that is proposed
/// makes a file shorter.
pub(crate) fn disk_remedy(error: &DiskFileError, new_machine: bool) -> String {
    match error {
        DiskFileError::Open { path, source } => match source.kind() {
            io::ErrorKind::NotFound if new_machine => {
                format!(
                    "; make an image first, for instance with `truncate -s +1G {}`",
                    shell_word(path)
                )
            }
            io::ErrorKind::NotFound => {
                "; name the image that the primary uses, on storage that both hosts share"
                    .to_owned()
            }
            _ => "; --disk path= takes an image file that this user may use".to_owned(),
        },
        DiskFileError::Size { path, size: 0 } => {
            format!("; give it a size, for instance with `truncate -s +1G {}`", shell_word(path))
        }
        DiskFileError::Size { path, .. } => {
            format!(
                "; fill its last sector up with zeros: `truncate -s %512 {}` makes it longer and keeps all \
                 that is there",
                shell_word(path)
            )
        }
        DiskFileError::Cached { path, .. } => format!(
            "; put it on one that does (local file systems, NFS, block devices), or accept that \
             with --disk path={},cache=writeback",
            path.display()
        ),
        DiskFileError::Unit { path, unit, .. } => format!(
            "; enlarge it with `truncate -s %{unit} {}`, which adds zeroes behind its end",
            shell_word(path)
        ),
        DiskFileError::InUse { .. } | DiskFileError::Thread { .. } => String::new(),
    }
}

/// A name beside `path` that nothing has.
fn free_name(path: &Path) -> PathBuf {
    let name = |number: Option<u32>| {
        let mut name = OsString::from(path);
        match number {
            None => name.push(".raw"),
            Some(number) => name.push(format!(".{number}.raw")),
        }
        PathBuf::from(name)
    };
    let free = |path: &PathBuf| path.symlink_metadata().is_err();
    let mut names = std::iter::once(None).chain((1..).map(Some)).map(name);
    names.find(free).expect("no directory has a file for every number")
}

/// A path as one word of a shell's command, and no option of it.
pub(crate) fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    let text = if text.starts_with('-') { format!("./{text}") } else { text };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+,:@%".contains(&byte);
    if !text.is_empty() && text.bytes().all(plain) {
        return text;
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn option(path: &Path, read_only: bool, is_raw: bool) -> DiskOption {
        // Temporary directories may be on any file system.
        let cache = Some(HostCache::WriteBack);
        DiskOption { read_only, cache, is_raw, ..DiskOption::at(DiskPlace::Image(path.to_owned())) }
    }

    fn refusal(path: &Path, read_only: bool) -> Option<String> {
        let opened =
            open_disks(&[option(path, read_only, false)], DisksOf::Alone, DiskPolicy::default());
        opened.err().map(|error| format!("{error:#}"))
    }

    /// The command between backquotes.
    fn proposed(refusal: &str) -> &str {
        refusal.split('`').nth(1).expect("a command")
    }

    fn run(command: &str) {
        let status = Command::new("sh").arg("-c").arg(command).status().expect("a shell");
        assert!(status.success(), "{command}");
    }

    #[test]
    fn a_file_of_another_format_is_refused_by_name_unless_it_is_said_to_be_raw() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("disk.img");
        let mut image = b"QFI\xFB\0\0\0\x03".to_vec();
        image.resize(1 << 16, 0);
        std::fs::write(&path, &image).expect("written");
        let tries = [(DisksOf::Alone, false), (DisksOf::NewPair, true), (DisksOf::Joining, false)];
        for (of, read_only) in tries {
            let error = open_disks(&[option(&path, read_only, false)], of, DiskPolicy::default());
            let error = format!("{:#}", error.expect_err("qcow2"));
            assert!(error.contains("qcow2"), "{error}");
            let command = proposed(&error);
            assert!(command.starts_with("qemu-img convert -f qcow2 -O raw "), "{command}");
            assert!(command.ends_with("/disk.img.raw"), "{command}");
        }
        assert_eq!(std::fs::read(&path).expect("there"), image, "nothing is changed");
        open_disks(&[option(&path, false, true)], DisksOf::Alone, DiskPolicy::default())
            .expect("its guest has written that");
    }

    #[test]
    fn a_proposed_command_overwrites_nothing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("it's a disk.gz");
        std::fs::write(&path, b"\x1F\x8B\x08").expect("written");
        let other = dir.path().join("it's a disk.gz.raw");
        std::fs::write(&other, "precious").expect("written");
        let refused = refusal(&path, false).expect("compressed");
        assert!(refused.contains("compressed (gzip)"), "{refused}");
        let command = proposed(&refused);
        assert!(command.ends_with(r"/it'\''s a disk.gz.1.raw'"), "{command}");
        // It fails, since that is no whole file, and the other is as it was.
        let status = Command::new("sh").arg("-c").arg(command).status().expect("a shell");
        assert!(!status.success());
        assert_eq!(std::fs::read(&other).expect("there"), b"precious");
    }

    #[test]
    fn a_disc_can_be_read_and_not_written() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("a.iso");
        let mut image = vec![0; 1 << 16];
        image[0x8001..0x8006].copy_from_slice(b"CD001");
        std::fs::write(&path, &image).expect("written");
        let refused = refusal(&path, false).expect("writable");
        assert!(refused.contains("ISO 9660") && refused.contains("readonly=on"), "{refused}");
        assert_eq!(refusal(&path, true), None);
    }

    #[test]
    fn the_remedy_for_an_odd_size_loses_nothing() {
        use std::os::unix::fs::FileExt;
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("disk.img");
        for size in [1u64, 511, 513, (2 << 30) + 1] {
            let file = File::create(&path).expect("made");
            file.write_all_at(b"x", size - 1).expect("sparse");
            let refused = refusal(&path, false).expect("an odd size");
            run(proposed(&refused));
            assert_eq!(refusal(&path, false), None);
            let mut last = [0];
            File::open(&path).and_then(|file| file.read_exact_at(&mut last, size - 1)).unwrap();
            assert_eq!(last, *b"x");
            assert_eq!(path.metadata().expect("there").len(), size.next_multiple_of(512));
        }
    }

    #[test]
    fn the_remedies_for_no_image_and_an_empty_one_make_one() {
        let dir = tempfile::tempdir().expect("temporary directory");
        for path in [dir.path().join("none.img"), dir.path().join("empty.img")] {
            if path.ends_with("empty.img") {
                File::create(&path).expect("made");
            }
            let refused = refusal(&path, false).expect("nothing there");
            run(proposed(&refused));
            assert_eq!(refusal(&path, false), None);
            // Once more on an image with something in it, it still takes nothing away.
            run(proposed(&refused));
            assert_eq!(path.metadata().expect("there").len(), 2 << 30);
        }
    }

    #[test]
    fn paths_are_words_of_a_command() {
        let word = |path: &str| shell_word(Path::new(path));
        assert_eq!(word("/a/b-c.img"), "/a/b-c.img");
        assert_eq!(word("-s.img"), "./-s.img");
        assert_eq!(word("a b$(x)"), "'a b$(x)'");
    }
}
