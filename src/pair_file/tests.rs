use super::*;

const FILE: &str = r#"[guest]
disk = "path=/shared/guest.img"
memory = "1G"
cpus = 1

[pair]
suspect-after = 500
max-lag = "200ms,then=slow"
tls-dir = "/etc/vmft/tls"
first = "b"

[every-side]
serial = "null"

[sides.a]
address = "tls:hostA:7000"
net = "tap=tap0"

[sides.b]
address = "tls:hostB:7000"
listen = "tls:0.0.0.0:7000,tls_dir=/b"
serial = "file=/var/log/b.console"
disk = ["path=/mnt/guest.img", "path=/mnt/data.img,readonly=on"]

[sides.c]
address = "tls:hostC:7000"
on-error = "stop"
disk-timeout = "10s"
"#;

fn parse(text: &str) -> Result<PairFile, PairFileError> {
    PairFile::parse(Path::new("vmft.toml"), text)
}

fn refused(text: &str) -> String {
    let file = parse(text);
    let error = file.and_then(|file| primary(&file, "a", &[]).map(drop));
    error.expect_err("it says what cannot be").to_string()
}

fn value<'a>(in_force: &'a InForce, flag: &str) -> Option<(&'a [String], Origin)> {
    let setting = in_force.settings.iter().find(|setting| setting.flag == flag)?;
    Some((setting.values.as_slice(), setting.origin))
}

#[test]
fn one_file_gives_each_side_the_options_of_both_commands() {
    let file = parse(FILE).unwrap();
    assert_eq!(file.first(), "b");
    assert_eq!(file.sides().collect::<Vec<_>>(), ["a", "b", "c"]);
    let a = primary(&file, "a", &[]).unwrap();
    let words = a.words.join(" ");
    for word in [
        "--disk=path=/shared/guest.img",
        "--memory=size=1G",
        "--cpus=boot=1",
        "--suspect-after=500",
        "--listen=tls:0.0.0.0:7000,tls_dir=/etc/vmft/tls",
        "--net=tap=tap0",
        "--serial=null",
        "--name=a",
        "--no-wait",
    ] {
        assert!(words.contains(word), "{word} is not in {words}");
    }
    let b = standby(&file, "b", &[]).unwrap();
    let words = b.words.join(" ");
    for word in [
        "--join tls:hostA:7000,tls_dir=/etc/vmft/tls tls:hostC:7000,tls_dir=/etc/vmft/tls",
        "--listen=tls:0.0.0.0:7000,tls_dir=/b",
        "--disk=path=/mnt/guest.img --disk=path=/mnt/data.img,readonly=on",
        "--serial=file=/var/log/b.console",
    ] {
        assert!(words.contains(word), "{word} is not in {words}");
    }
    assert!(!words.contains("--cpus") && !words.contains("/shared"), "{words}");
    let place = primary(&file, "b", &[]).unwrap().options.arbiter_place().unwrap();
    assert_eq!(place.to_string(), "/mnt/guest.img.vmft");
    let words = standby(&file, "c", &[]).unwrap().words.join(" ");
    for word in ["--on-error=stop", "--disk-timeout=10s"] {
        assert!(words.contains(word), "{word} is not in {words}");
    }
}

#[test]
fn what_is_in_force_is_told_with_where_it_comes_from() {
    let file = parse(FILE).unwrap();
    let more = ["--serial=tty".to_owned(), "--suspect-after".to_owned(), "700".to_owned()];
    let InForce { settings } = primary(&file, "a", &more).unwrap().in_force;
    let in_force = InForce { settings };
    let line = |flag| value(&in_force, flag);
    assert_eq!(line("memory"), Some((&["size=1G".to_owned()][..], Origin::Line(3))));
    assert_eq!(line("net"), Some((&["tap=tap0".to_owned()][..], Origin::Line(17))));
    assert_eq!(line("serial"), Some((&["tty".to_owned()][..], Origin::CommandLine)));
    assert_eq!(line("suspect-after"), Some((&["700".to_owned()][..], Origin::CommandLine)));
    assert_eq!(line("protect"), Some((&["lockstep".to_owned()][..], Origin::Default)));
    assert_eq!(line("no-wait"), Some((&[][..], Origin::Default)));
    assert_eq!(line("insecure"), None);
    assert_eq!(line("kernel"), None);
    let text = in_force.to_string();
    let shown = text.lines().find(|line| line.contains("--memory")).unwrap();
    assert!(shown.contains("size=1G") && shown.ends_with("line 3"), "{shown}");
}

#[test]
fn every_error_is_told_with_its_line() {
    for (from, to, line, why) in [
        ("memory = \"1G\"", "memory = \"1x\"", 3, "no size"),
        ("memory = \"1G\"", "memroy = \"1G\"", 3, "unknown field `memroy`"),
        ("memory = \"1G\"", "memory = 1", 3, "expected a string"),
        ("cpus = 1", "cpus = 9", 4, "9 guest CPUs"),
        ("suspect-after = 500", "suspect-after = 5", 7, "40..=60000"),
        ("max-lag = \"200ms,then=slow\"", "max-lag = \"1ms\"", 8, "a lag of 1 ms"),
        ("first = \"b\"", "first = \"x\"", 10, "no such side"),
        ("serial = \"null\"", "serial = \"pty\"", 13, "pty"),
        ("address = \"tls:hostA:7000\"", "address = \"hostA\"", 16, "hostA"),
        ("[sides.a]", "[sides.a]\nlisten = \"x\"", 16, "x"),
        ("[sides.c]", "[side.c]", 25, "unknown field `side`"),
        ("address = \"tls:hostC:7000\"", "clock = \"host\"", 25, "no address"),
        ("[sides.a]", "[sides.\"a b\"]", 16, "no side's name"),
        ("[guest]", "[guest", 1, ""),
        ("[every-side]", "[every-side]\naddress = \"tls:h:1\"", 13, "an address of its own"),
    ] {
        let text = FILE.replace(from, to);
        assert_ne!(text, FILE, "{from}");
        let said = refused(&text);
        assert!(said.contains(&format!("line {line}:")) && said.contains(why), "{to}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    assert!(refused("").contains("there is no [sides.NAME]"));
    let file = parse(FILE).unwrap();
    let error = primary(&file, "d", &[]).unwrap_err().to_string();
    assert!(error.contains("no side `d`") && error.contains("a, b, c"), "{error}");
    let error = primary(&file, "a", &["--memory=x".to_owned()]).unwrap_err();
    assert!(matches!(error, PairFileError::CommandLine(_)), "{error}");
    let alone = parse("[sides.a]\naddress = \"tls:a:1\"\n").unwrap();
    assert!(
        standby(&alone, "a", &[]).unwrap_err().to_string().contains("line 2: this is the only")
    );
}

#[test]
fn options_that_exclude_each_other_in_the_file_are_told_with_a_line() {
    let text = FILE.replace("cpus = 1", "lockstep-kernel = true\nkernel = \"/k\"");
    let said = refused(&text);
    assert!(said.contains("line 4:") || said.contains("line 5:"), "{said}");
}

#[test]
fn times_of_the_file_have_their_units() {
    let with = |time: &str| FILE.replace("first = \"b\"", &format!("begin-after = \"{time}\""));
    let seconds = |text: &str| parse(text).unwrap().begin_after().map(|time| time.as_secs());
    assert_eq!(seconds(FILE).unwrap(), 15);
    assert_eq!(seconds(&with("3s")).unwrap(), 3);
    assert!(seconds(&with("3")).unwrap_err().to_string().contains("line 10:"));
}

#[test]
fn a_side_listens_everywhere_unless_its_address_is_a_number_or_a_socket() {
    let listens = |address: &str| {
        let text = FILE.replace("tls:hostA:7000", address);
        let in_force = primary(&parse(&text).unwrap(), "a", &[]).unwrap().in_force;
        value(&in_force, "listen").unwrap().0[0].clone()
    };
    for (address, listen) in [
        ("tls:hostA:7000,tls_dir=/a", "tls:0.0.0.0:7000,tls_dir=/a"),
        ("tls:10.0.0.1:7000", "tls:10.0.0.1:7000,tls_dir=/etc/vmft/tls"),
        ("tls:[fd00::1]:7000", "tls:[fd00::1]:7000,tls_dir=/etc/vmft/tls"),
        ("tcp:127.0.0.1:7000", "tcp:127.0.0.1:7000"),
        ("tcp:localhost:7000", "tcp:localhost:7000"),
        ("unix:/run/a.sock", "unix:/run/a.sock"),
    ] {
        assert_eq!(listens(address), listen);
    }
}

#[test]
fn a_file_gone_bad_is_refused_with_its_line_or_gives_options() {
    let (mut refused, mut taken) = (0u64, 0u64);
    vmft_fuzzing::cases(300, |mut random| {
        let mut bytes = FILE.as_bytes().to_vec();
        vmft_fuzzing::damage(&mut random, &mut bytes, &[]);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let options = parse(&text).and_then(|file| {
            primary(&file, "a", &[])?;
            standby(&file, "b", &[]).map(drop)
        });
        match options {
            Ok(()) => taken += 1,
            Err(PairFileError::Line { line, .. }) => {
                refused += 1;
                assert!((1..=text.lines().count() + 1).contains(&line), "line {line} of {text}");
            }
            Err(PairFileError::NoSide { .. }) => refused += 1,
            Err(other) => panic!("without a line: {other} in {text}"),
        }
    });
    println!("{refused} refused, {taken} taken");
}
