//! The command line, and the job and the files it stands for.

use crate::cargo::{self, Built};
use crate::contents::{self, Contents};
use crate::job::{Command, Job};
use anyhow::{Context, Result, bail};
use clap::Parser;
use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmft_guest_images::{Cache, Progress, default_guest, lockstep_guest};

/// Where commands are looked up in the box: what was brought in, then busybox.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/box/bin";
/// Variables of the caller that the command sees: these, and those that begin with one of the next.
const VARIABLES: [&str; 4] = ["HOME", "RUSTC_BOOTSTRAP", "USER", "XDG_CACHE_HOME"];
const VARIABLE_PREFIXES: [&str; 2] = ["VMFT_", "RUST_"];
/// The programs of this project that are built for the box.
const PROGRAMS: [&str; 2] = ["vmft", "vmft-bench"];
/// What vmft runs to make and check disk images, of Debian's e2fsprogs.
const DISK_PROGRAMS: [&str; 3] = ["mke2fs", "e2fsck", "debugfs"];

/// Runs a command on a host with upstream, unmodified KVM: Debian's cloud kernel in QEMU, which
/// emulates a CPU with SVM.
///
/// Its output and its exit status are passed on. 124: the time was up; 125: the box failed; 127: the
/// command could not be started; 128 and more: a signal ended it.
#[derive(Debug, Parser)]
#[command(name = "stock-kvm", max_term_width = 100, after_help = EXAMPLES)]
pub struct Options {
    /// A shell in the box, on this terminal
    #[arg(long, conflicts_with = "command")]
    pub shell: bool,
    /// Ends the box when it has run so long; 0: never
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub timeout: u64,
    /// The box's memory
    #[arg(long, value_name = "MIB", default_value_t = 1536, value_parser = clap::value_parser!(u32).range(256..))]
    pub memory: u32,
    /// The box's CPUs. With more than one, QEMU 7.2 now and then gets the guests of the box wrong
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub cpus: u8,
    /// Brings a file, a directory or a program (with its libraries) into the box, to the same path
    #[arg(long = "with", value_name = "FILE")]
    with: Vec<String>,
    /// Builds with cargo's release profile
    #[arg(long)]
    release: bool,
    /// Shows what the box's kernel prints, on standard error
    #[arg(long, short)]
    pub verbose: bool,
    /// `vmft …`, `vmft-bench …`, `test …`, a file of this host, or a command of busybox
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required_unless_present = "shell")]
    command: Vec<String>,
}

const EXAMPLES: &str = "\
Examples:
  stock-kvm vmft doctor                      this project's vmft, with the default guest and e2fsprogs
  stock-kvm test -p vmft-vmm --test kvm      the tests that `cargo test` would run with these words
  stock-kvm --release vmft-bench --quick --only kvm-linux-compute
  stock-kvm --with data.bin ./program data.bin
  stock-kvm sh -c 'dmesg | grep -i kvm'";

/// What goes into the box.
#[derive(Debug)]
pub struct Load {
    /// What is to be done.
    pub job: Job,
    /// The files it needs.
    pub contents: Contents,
}

impl Options {
    /// How long the box may run.
    pub fn time_limit(&self) -> Option<Duration> {
        (self.timeout > 0).then(|| Duration::from_secs(self.timeout))
    }

    /// Builds what is to be built and collects what goes into the box.
    pub fn load(&self, cache: &Cache, progress: &mut dyn Progress) -> Result<Load> {
        let here = env::current_dir().context("the current directory")?;
        let mut load = Load { job: Job::default(), contents: Contents::default() };
        load.job.environment = environment();
        load.contents.directory(&here);
        let home = load.job.environment.get("HOME").map_or("/root", String::as_str);
        load.contents.directory(Path::new(home));
        for word in &self.with {
            load.contents.bring(&contents::find(word)?)?;
        }
        match self.command.split_first() {
            Some((word, rest)) if PROGRAMS.contains(&word.as_str()) => {
                self.add_program(&mut load, &here, word, rest)?;
            }
            Some((word, rest)) if word == "test" => self.add_tests(&mut load, rest)?,
            Some((word, rest)) => add_command(&mut load, &here, word, rest)?,
            None => self.add_shell(&mut load)?,
        }
        if self.shell || self.command[0] == "test" || PROGRAMS.contains(&self.command[0].as_str()) {
            add_tools(&mut load.contents, cache, progress)?;
        }
        Ok(load)
    }

    fn cargo(&self, words: &[&str]) -> Result<Vec<Built>> {
        let mut all: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        all.insert(1, "--locked".to_owned());
        if self.release {
            all.insert(1, "--release".to_owned());
        }
        cargo::build(&all)
    }

    /// Builds `vmft`, and the program of this name if it is another; says where they are, that one last.
    fn programs(&self, name: &str) -> Result<Vec<PathBuf>> {
        let mut words = vec!["build", "-p", "vmft", "--bin", "vmft"];
        if name != "vmft" {
            words.extend(["--bin", name]);
        }
        let built = self.cargo(&words)?.into_iter().map(|built| built.executable);
        let mut built: Vec<PathBuf> = built.collect();
        built.sort_by_key(|program| program.ends_with(name));
        Ok(built)
    }

    /// A program finds `vmft` beside it.
    fn add_program(
        &self,
        load: &mut Load,
        here: &Path,
        name: &str,
        arguments: &[String],
    ) -> Result<()> {
        let programs = self.programs(name)?;
        for program in &programs {
            load.contents.bring(program)?;
        }
        let program = programs.last().context("cargo did not say where it put it")?;
        load.job.commands.push(command(program, arguments, here)?);
        Ok(())
    }

    /// The shell finds `vmft` in its path.
    fn add_shell(&self, load: &mut Load) -> Result<()> {
        for program in self.programs("vmft")? {
            load.contents.bring_as(&program, Path::new("/usr/bin/vmft"))?;
        }
        load.contents.text("/box/shell", 0o644, b"");
        Ok(())
    }

    fn add_tests(&self, load: &mut Load, words: &[String]) -> Result<()> {
        let (words, arguments) = match words.iter().position(|word| word == "--") {
            Some(at) => (&words[..at], &words[at + 1..]),
            None => (words, &[][..]),
        };
        let selection = Selection::of(words)?;
        let mut all = vec!["test", "--no-run", "--workspace"];
        all.extend(&selection.targets);
        let mut built = self.cargo(&all)?;
        built.retain(|built| !built.test || selection.has(built));
        // Tests start the programs of their package, and read files that lie beside them.
        for built in &built {
            load.contents.bring(&built.executable)?;
            let data = built.directory.join("tests");
            if built.test && data.is_dir() {
                load.contents.bring(&data)?;
            }
        }
        for test in built.into_iter().filter(|built| built.test) {
            let mut command = command(&test.executable, arguments, &test.directory)?;
            command.heading = Some(format!("stock-kvm: {}", test.name));
            load.contents.directory(&test.directory);
            load.job.commands.push(command);
        }
        if load.job.commands.is_empty() {
            bail!("this selects no tests");
        }
        Ok(())
    }
}

/// Which tests, in the words of `cargo test`.
///
/// Cargo is asked for the tests of the whole workspace, and those of other packages are left out afterwards.
/// Asked for one package, it would build what that depends on with the features that this package alone asks
/// for: once more, that is, beside what `cargo test --workspace` has built.
#[derive(Debug)]
struct Selection<'a> {
    /// Those of these packages; of all if none is named.
    packages: Vec<&'a str>,
    /// The other words.
    targets: Vec<&'a str>,
}

impl<'a> Selection<'a> {
    fn of(words: &'a [String]) -> Result<Self> {
        let mut selection = Self { packages: Vec::new(), targets: Vec::new() };
        let mut words = words.iter().map(String::as_str);
        while let Some(word) = words.next() {
            match word
                .strip_prefix("--package=")
                .or(word.strip_prefix("-p").filter(|name| !name.is_empty()))
            {
                Some(name) => selection.packages.push(name),
                None if matches!(word, "-p" | "--package") => {
                    selection
                        .packages
                        .push(words.next().context("-p wants the name of a package")?);
                }
                None => selection.targets.push(word),
            }
        }
        Ok(selection)
    }

    fn has(&self, built: &Built) -> bool {
        self.packages.is_empty() || self.packages.contains(&built.package.as_str())
    }
}

/// The default guest, the lockstep kernel if it was built, and the programs that make disks, without
/// which little of vmft can run.
fn add_tools(contents: &mut Contents, cache: &Cache, progress: &mut dyn Progress) -> Result<()> {
    for guest in [Some(default_guest(cache, progress)?), lockstep_guest(cache).ok()] {
        let Some(guest) = guest else { continue };
        let directory = guest.kernel.parent().context("the guest's directory")?;
        contents.bring(directory)?;
    }
    for program in DISK_PROGRAMS {
        if let Some(file) = contents::find_program(program) {
            contents.bring(&file)?;
        }
    }
    Ok(())
}

/// A file of this host, or else a command that the box has.
fn add_command(load: &mut Load, here: &Path, word: &str, arguments: &[String]) -> Result<()> {
    let mut program = PathBuf::from(word);
    if word.contains('/') && program.exists() {
        program = contents::clean(&program)?;
        load.contents.bring(&program)?;
    }
    load.job.commands.push(command(&program, arguments, here)?);
    Ok(())
}

fn command(program: &Path, arguments: &[String], directory: &Path) -> Result<Command> {
    let program = program.to_str().with_context(|| format!("{} is no text", program.display()))?;
    Ok(Command {
        heading: None,
        program: program.to_owned(),
        arguments: arguments.to_vec(),
        directory: directory.to_owned(),
    })
}

fn environment() -> std::collections::BTreeMap<String, String> {
    let wanted = |name: &str| {
        VARIABLES.contains(&name) || VARIABLE_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
    };
    let inherited = env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| wanted(name));
    let own = [("PATH", PATH), ("LC_ALL", "C"), ("HOME", "/root")];
    let own = own.map(|(name, value)| (name.to_owned(), value.to_owned()));
    own.into_iter().chain(inherited).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(words: &[&str]) -> Job {
        let words = ["stock-kvm"].iter().chain(words);
        let options = Options::try_parse_from(words).unwrap();
        let cache = Cache::new("/nowhere");
        options.load(&cache, &mut vmft_guest_images::NoProgress).unwrap().job
    }

    #[test]
    fn packages_are_told_apart_from_the_other_words_of_a_selection() {
        let words = ["-p", "a", "--test", "kvm", "--package=b", "-pc"].map(str::to_owned);
        let selection = Selection::of(&words).unwrap();
        assert_eq!(selection.packages, ["a", "b", "c"]);
        assert_eq!(selection.targets, ["--test", "kvm"]);
        assert!(Selection::of(&["-p".to_owned()]).is_err());
    }

    #[test]
    fn options_after_the_command_are_the_commands() {
        let job = job(&["--timeout", "5", "sh", "-c", "true", "--shell", "--", "x"]);
        assert_eq!(job.commands[0].program, "sh");
        assert_eq!(job.commands[0].arguments, ["-c", "true", "--shell", "--", "x"]);
        assert_eq!(job.environment["PATH"], PATH);
    }

    #[test]
    fn a_command_or_a_shell_is_needed_but_not_both() {
        assert!(Options::try_parse_from(["stock-kvm"]).is_err());
        assert!(Options::try_parse_from(["stock-kvm", "--shell", "sh"]).is_err());
        let options = Options::try_parse_from(["stock-kvm", "--shell", "--timeout", "0"]).unwrap();
        assert_eq!(options.time_limit(), None);
    }

    #[test]
    fn a_file_of_the_host_is_brought_in_at_its_own_path() {
        let program = env::current_exe().unwrap();
        let job = job(&[program.to_str().unwrap(), "--list"]);
        assert_eq!(Path::new(&job.commands[0].program), program);
    }
}
