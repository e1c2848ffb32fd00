//! A backup made to diverge: reported on both sides, mended by a checkpoint, and as good as any other
//! afterwards; but one that is not mended yet never goes on.

use crate::kill::finish;
use crate::stage::{LIMIT, Pair, Setup, held_script, let_end};
use std::path::Path;
use vmft::api_client;
use vmft::pair::Which;
use vmft_backup::fault::{Fault, FaultOrder, Planted};
use vmft_backup::status::{Role, SideStatus};

/// A page below the first megabyte, all of which Linux keeps away from: nobody reads or writes it, so what
/// is planted there stays until a digest sees it.
const SPARE: u64 = 0x5_0000;
/// Instructions in which there is a digest for sure.
const WINDOW: u64 = 2 << 25;

fn plant(socket: &Path, fault: Fault, live: bool) -> anyhow::Result<Planted> {
    api_client::fault(socket, FaultOrder { fault, live })
}

fn flip(number: u64) -> Fault {
    Fault::FlipBit { address: SPARE + 4096 * number + 0x123, bit: 4 }
}

fn mended(count: u64) -> impl Fn(&SideStatus) -> bool {
    move |status| status.divergences_mended == count
}

/// What a side says of its last divergence, which a flip planted at `point` in page `number` made.
fn check_report(status: &SideStatus, point: u64, number: u64) {
    let report = status.divergence.as_ref().expect("it has diverged");
    assert_eq!(report.page, Some(SPARE + 4096 * number), "{report:?}");
    let (agreed, found) = (report.agreed.unwrap(), report.found.unwrap());
    assert!(agreed <= point && point < found && found - agreed < WINDOW, "{point}: {report:?}");
    let window = format!("divergence between points {agreed} and {found}: ");
    assert!(report.text.starts_with(&window), "{report:?}");
}

#[test]
fn planted_divergences_are_reported_on_both_sides_and_mended_however_many_they_are() {
    const RECORDS: u32 = 40;
    let mut pair = Pair::start(&Setup::default());
    pair.type_in(&held_script(RECORDS, 2_000));
    pair.read_text("vmft-line 000001");
    // More than may come in a row: between them mending has helped.
    for number in 1..=4 {
        let planted = plant(&pair.backup.api(), flip(number), false).unwrap();
        let backup = pair.backup.wait_status(LIMIT, mended(number)).unwrap();
        let primary = pair.primary.wait_status(LIMIT, mended(number)).unwrap();
        for status in [&backup, &primary] {
            assert_eq!(status.divergences, number, "{status:?}");
            check_report(status, planted.point.get(), number);
        }
        assert_eq!(pair.generation(), 1 + number, "each costs a generation; {}", pair.report());
        pair.wait_role(Which::Primary, Role::Primary);
        let agreed = pair.status(Which::Backup).digests_agreed;
        let helped = |status: &SideStatus| status.digests_agreed >= agreed + 5;
        pair.backup.wait_status(LIMIT, helped).unwrap();
    }
    for (side, words) in [
        (
            Which::Backup,
            ["joining again from a checkpoint", "the divergence is mended: joined again"],
        ),
        (
            Which::Primary,
            ["it diverged, and has to join again", "a backup has joined from a checkpoint"],
        ),
    ] {
        let all = |said: &str| words.iter().all(|word| said.matches(word).count() == 4);
        pair.side(side).wait_says(LIMIT, all).unwrap();
    }
    pair.read_now();
    assert!(!pair.shown().done, "the guest ended before it could be killed");
    pair.side(Which::Primary).kill().unwrap();
    let_end(&mut pair, Which::Backup);
    finish(&mut pair, Which::Backup, RECORDS);
    assert_eq!(pair.generation(), 6, "four mendings and a failover; {}", pair.report());
}

#[test]
fn a_backup_that_finds_its_divergence_after_the_primary_is_lost_does_not_go_on() {
    let mut pair = Pair::start(&Setup { both: vec!["--max-lag", "60s"], ..Setup::default() });
    pair.type_in(&held_script(40, 2_000));
    pair.read_text("vmft-line 000001");
    // Held, so that no digest comes between the flip and the primary's death.
    let hold = Fault::HoldReplay { ms: 600_000 };
    let held = plant(&pair.backup.api(), hold, false).unwrap();
    let planted = plant(&pair.backup.api(), flip(1), false).unwrap();
    assert_eq!(held, planted, "a held replay stays where it is");
    let enough = |status: &SideStatus| status.point > planted.point.get() + WINDOW;
    pair.primary.wait_status(LIMIT, enough).unwrap();
    pair.side(Which::Primary).kill().unwrap();
    let exit = pair.wait_exit_reading(Which::Backup);
    let said = pair.backup.messages();
    assert!(!exit.success() && said.contains("does not go on with a state"), "{said}");
    assert!(said.contains(&format!("of memory, the page at {:#x}", SPARE + 4096)), "{said}");
    assert_eq!(pair.generation(), 2, "it had won; {said}");
    assert_eq!(pair.witness(Which::Backup).end(), 0, "it has shown something; {said}");
}

#[test]
fn a_bit_flipped_on_the_live_side_is_what_the_backup_is_mended_to() {
    const RECORDS: u32 = 25;
    let mut pair = Pair::start(&Setup::default());
    pair.type_in(&held_script(RECORDS, 2_000));
    pair.read_text("vmft-line 000001");
    let refused = plant(&pair.primary.api(), flip(1), false).unwrap_err();
    assert!(refused.to_string().contains("say live=on"), "{refused:#}");
    let outside = Fault::FlipBit { address: 96 << 20, bit: 0 };
    for (socket, live) in [(pair.primary.api(), true), (pair.backup.api(), false)] {
        let refused = plant(&socket, outside, live).unwrap_err();
        assert!(refused.to_string().contains("no memory at 0x6000000"), "{refused:#}");
    }
    plant(&pair.primary.api(), flip(1), true).unwrap();
    let status = pair.backup.wait_status(LIMIT, mended(1)).unwrap();
    assert_eq!(status.divergence.unwrap().page, Some(SPARE + 4096));
    pair.wait_role(Which::Primary, Role::Primary);
    pair.side(Which::Primary).kill().unwrap();
    let_end(&mut pair, Which::Backup);
    finish(&mut pair, Which::Backup, RECORDS);
    assert_eq!(pair.generation(), 3, "{}", pair.report());
}
