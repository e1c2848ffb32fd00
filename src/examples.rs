//! What `--help` of each command ends with.

/// For `vmft demo`.
pub const DEMO: &str = "\
Examples:
  vmft demo                               kill the primary in the middle, count everything
  vmft demo --lines 500 --kill-after 400  a longer run, a later kill
  vmft demo --rounds 5 --lines 300        five kills, a standby takes the place of each
  vmft demo --guest shell                 a shell on the pair; kill either side yourself
  vmft demo --guest probe --engine kvm    a tiny guest on the host's KVM
  vmft demo --web                         three sides on a page, and buttons to kill and freeze them
  vmft demo --keep out --json             keep disk, consoles and messages; report as JSON

Exit code 0 only if no line, record or console byte is missing or repeated and the file system is
clean.";

/// For `vmft run`.
pub const RUN: &str = "\
Examples:
  vmft run                                      a shell in the default guest
  vmft run --disk path=guest.img                the same, with a disk at /dev/vda
  vmft run --cmdline vmft.run=idle --serial null --api-socket api.sock
  vmft run --kernel vmlinuz --initramfs initrd --cmdline 'console=ttyS0 quiet'
  vmft run --restore snap --disk path=guest.img

Ctrl-A x stops the guest. With standard input that is no terminal, Ctrl-C does.";

/// For `vmft primary`.
pub const PRIMARY: &str = "\
Example, two hosts that share /shared:
  A: vmft primary --disk path=/shared/guest.img --listen tls:0.0.0.0:7000
  B: vmft backup --disk path=/shared/guest.img --primary tls:A:7000 --listen tls:0.0.0.0:7000

The guest begins when the backup has joined. When B is lost, A goes on alone, and the next backup
may join at the same address. `vmft keys add A B` makes the certificates for ~/.config/vmft/tls.

Exit code 0 when the guest has stopped; 1 if the other side goes on in place of this one.";

/// For `vmft backup`.
pub const BACKUP: &str = "\
Example, two hosts that share /shared:
  A: vmft primary --disk path=/shared/guest.img --listen tls:0.0.0.0:7000
  B: vmft backup --disk path=/shared/guest.img --primary tls:A:7000 --listen tls:0.0.0.0:7000
  after A is lost, on C:
  C: vmft backup --disk path=/shared/guest.img --primary tls:B:7000

A backup needs no kernel: it gets the machine from the primary. It may be started first. Ctrl-C
makes it leave, and the primary goes on alone. Certificates: see `vmft keys --help`.

Exit code 0 when the guest has stopped or this side has left; 1 if it lost to another side.";

/// For `vmft explain`.
pub const EXPLAIN: &str = "\
Examples:
  vmft explain primary.events backup.events
  vmft explain --svg failover.svg primary.events backup.events
  vmft explain --all backup.events        with what decided who may go live

The files of both sides give the whole story; one is enough for its own part. Moments of one host are
compared exactly, those of several by their wall clocks.

Exit code 1 if who may go live was decided otherwise than this program would decide it.";

/// For `vmft switch`.
pub const SWITCH: &str = "\
Example:
  vmft switch --api-socket /run/vmft/web.api

The guest rests until all its outputs are out and the backup has everything; then the backup runs it,
in the next generation, and this side halts (exit code 1; `vmft up` follows the new one). If the
backup does not take it within a second, it runs on here.

Exit code 0 if another side runs the guest now.";

/// For `vmft pause`.
pub const PAUSE: &str = "\
Example:
  vmft pause --api-socket /run/vmft/web.api
  vmft resume --api-socket /run/vmft/web.api

The guest stands still, protected as before, and its time with it; its real-time clock is told of the
rest. That is a word to this side: if it is lost, or hands the guest over, the guest runs on elsewhere.

Exit code 0 once the guest stands still.";

/// For `vmft set`.
pub const SET: &str = "\
Examples:
  vmft set --api-socket /run/vmft/web.api --max-lag 500ms
  vmft set --api-socket /run/vmft/web.api --max-lag 200ms,then=unprotect
  vmft set --api-socket /run/vmft/web.api --interval 100ms     (of a pair with --protect checkpoint)

It holds until this side ends, and for no other side: one that takes over has what it was started
with, or what it was told by this command while it followed. `vmft status` says what is in force.";

/// For `vmft resume`.
pub const RESUME: &str = "\
Example:
  vmft status --api-socket /run/vmft/web.api     says which disk has failed, at what, since when
  vmft resume --api-socket /run/vmft/web.api     once there is room, or the storage is mended

A guest that was paused goes on. The requests that failed are tried again; if they fail again, the
guest stands still again.

Exit code 0 if it was paused, or there was something to try again.";

/// For `vmft completions`.
pub const COMPLETIONS: &str = "\
Examples:
  vmft completions bash > /etc/bash_completion.d/vmft
  vmft completions fish > ~/.config/fish/completions/vmft.fish";

/// For `vmft man`.
pub const MAN: &str = "\
Example:
  vmft man /usr/local/share/man/man1 && man vmft-up";

/// For `vmft up`.
pub const UP: &str = "\
Example, the same vmft.toml on both hosts:
  [guest]
  disk = \"path=/shared/guest.img\"
  [sides.a]
  address = \"tls:hostA:7000\"
  [sides.b]
  address = \"tls:hostB:7000\"

  A: vmft up --side a
  B: vmft up --side b

After a crash of one host or of both, the same again. `vmft config` says what is in force.

Exit code 0 when the guest has stopped or this side has left.";

/// For `vmft config`.
pub const CONFIG: &str = "\
Examples:
  vmft config                                  for every side of vmft.toml
  vmft config /etc/vmft/web.toml --side a
  vmft config --side a -- --suspect-after 500  with an option of the command line";

/// For `vmft disk serve`.
pub const DISK_SERVE: &str = "\
Example, two hosts and a third that keeps their disk:
  D: vmft disk serve --export web=/disks/web.img --listen tls:0.0.0.0:10809
  A: vmft primary --disk nbd=D:10809/web --listen tls:0.0.0.0:7000
  B: vmft backup --disk nbd=D:10809/web --primary tls:A:7000 --listen tls:0.0.0.0:7000

D is the arbiter as well: who goes on is decided there, and from then on it takes no write of the
other side. Any client of NBD may read an export; none but the pair writes to one that a pair has.
`vmft keys add A B D` makes the certificates for ~/.config/vmft/tls on each host. Ctrl-C ends it.

Exit code 0 when everything that was written is on the disks.";

/// For `vmft standby`.
pub const STANDBY: &str = "\
Example, three hosts that share /shared:
  A: vmft primary --disk path=/shared/guest.img --listen tls:0.0.0.0:7000
  B: vmft standby --disk path=/shared/guest.img --join tls:A:7000 tls:C:7000 --listen tls:0.0.0.0:7000
  C: vmft standby --disk path=/shared/guest.img --join tls:A:7000 tls:B:7000 --listen tls:0.0.0.0:7000

One of B and C follows A, the other waits. When A is lost, its backup goes on, and the one that waits
joins it. A host that comes back runs `vmft standby` as well. A standby never gives up; Ctrl-C ends it.
Certificates: see `vmft keys --help`.

Exit code 0 when the guest has stopped or this side has left; 1 if it was live and lost to another.";

/// For `vmft record`.
pub const RECORD: &str = "\
Example:
  vmft record --log boot.log --cmdline vmft.run=idle --serial null    then Ctrl-C
  vmft replay boot.log

The log has the whole machine in it, and every input; it is whole once the guest has stopped.";

/// For `vmft replay`.
pub const REPLAY: &str = "\
Examples:
  vmft replay boot.log                     compare every digest
  vmft replay boot.log --serial tty        show what the guest printed
  vmft replay boot.log --to 500000000 --snapshot snap
  vmft run --restore snap                  and go on from there

A log that is cut or damaged is replayed as far as it is good; then it says where that ends, and
the exit code is 1. A divergence, too, is reported with exit code 1.";

/// For `vmft status`.
pub const STATUS: &str = "\
Example:
  vmft primary ... --api-socket primary.sock
  vmft status --api-socket primary.sock
  vmft status --api-socket primary.sock --json
  vmft status --watch --api-socket primary.sock --api-socket backup.sock";

/// For `vmft dashboard`.
pub const DASHBOARD: &str = "\
Examples:
  vmft dashboard /run/vmft/a.api /run/vmft/b.api
  vmft dashboard --control --event-log a.events --event-log b.events a.api b.api
  ssh -L 8080:localhost:8080 hostA       and the page is at http://localhost:8080/ here, too

The sides are asked once in an interval, however many look, and not at all while nobody does.
Without --control the page only shows. With it, the address that is printed has a key in it:
whoever knows that may stop the guest. Ctrl-C ends it; the sides do not notice.";

/// For `vmft stop`.
pub const STOP: &str = "\
Example:
  vmft stop --api-socket primary.sock      stops the guest, and with it both sides
  vmft stop --api-socket backup.sock       a backup leaves, the primary goes on alone";

/// For `vmft snapshot`.
pub const SNAPSHOT: &str = "\
Example:
  vmft snapshot --api-socket primary.sock snap
  vmft run --restore snap --disk path=copy-of-the-disk.img

The snapshot has memory and devices, not the disks: copy them while the guest rests.";

/// For `vmft fault`.
pub const FAULT: &str = "\
Examples:
  vmft backup ... --api-socket backup.sock
  vmft fault --api-socket backup.sock flip-bit=0x50123    the backup diverges, and is mended
  vmft fault --api-socket backup.sock hold-replay=5s      the backup falls behind
  vmft status --api-socket backup.sock                    what came of it

A flipped bit is noticed at the next digest: after a third of a second of computing on soft.";

/// For `vmft console`.
pub const CONSOLE: &str = "\
Example:
  vmft primary ... --serial socket=primary.console
  vmft backup ... --serial socket=backup.console
  vmft console primary.console backup.console

Keys go to the side that is live. Ctrl-A x detaches; the guest goes on.";

/// For `vmft keys`.
pub const KEYS: &str = "\
Examples:
  vmft keys add A B C                       vmft-keys/A, B, C: a key and a certificate each
  scp -r vmft-keys/A A:.config/vmft/tls     and so on; then tls:HOST:PORT is all there is to say
  vmft keys renew                           before a year is over: copy each cert.pem to its host
  vmft keys revoke B                        B is lost or stolen: copy revoked.pem to the others
  vmft keys list

vmft-keys/authority can make sides: keep it off their hosts.";

/// For `vmft tls-init`.
pub const TLS_INIT: &str = "\
Example:
  vmft tls-init certs
  A: vmft primary ... --listen tls:0.0.0.0:7000,tls_dir=certs/primary
  B: vmft backup ... --primary tls:A:7000,tls_dir=certs/backup";

/// For `vmft doctor`.
pub const DOCTOR: &str = "\
Examples:
  vmft doctor                     a table: measured, expected, what follows
  vmft doctor --json              the same, and every fact, for programs
  vmft doctor --disk path=a.img   what a disk can do for a machine or a pair

It runs small probe guests on /dev/kvm, for a few seconds. Exit code 0 whatever it finds.";

/// For `vmft image import`.
pub const IMAGE_IMPORT: &str = "\
Examples:
  vmft image import debian-12-generic-amd64.qcow2 debian.img
  vmft image import debian.raw.xz debian.img
  truncate -s +8G debian.img                  more room, which the guest's first start takes
  vmft run --disk path=debian.img --seed user-data --memory size=512M";

/// For `vmft guest`.
pub const GUEST: &str = "\
Example:
  vmft guest --refresh
  vmft guest --debian 12 --package postgresql --output debian.img
  vmft guest --probe probe.elf; vmft run --engine kvm --kernel probe.elf

The cache is $VMFT_CACHE, else $XDG_CACHE_HOME/vmft, else ~/.cache/vmft.";
