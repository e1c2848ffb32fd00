//! Guests whom nobody invited.

use super::*;

#[test]
fn garbage_is_dropped_and_the_primary_goes_on_listening() {
    let (primary, told) = primary(primary_config());
    stranger(&primary).write_all(b"GET / HTTP/1.1\r\n\r\n").expect("it listens");
    let text = wait_for_refusal(&told);
    assert!(text.contains("does not speak this protocol"), "{text}");
    join(&primary);
}

#[test]
fn a_stranger_who_says_nothing_is_dropped_and_keeps_nobody_waiting() {
    let mut config = primary_config();
    config.setup_timeout = Duration::from_millis(500);
    let (primary, told) = primary(config);
    let mut silent = stranger(&primary);
    let joined = join(&primary);
    assert!(primary.wait_protected(PATIENCE));
    let text = wait_for_refusal(&told);
    assert_eq!(text, "the peer did not go on with its first byte for 500 ms");
    assert_eq!(silent.read(&mut [0]).expect("closed"), 0);
    assert_eq!(joined.channel.end(), None);
}

#[test]
fn a_stranger_of_another_version_is_told_so() {
    let (primary, told) = primary(primary_config());
    let mut other = stranger(&primary);
    other.write_all(b"vmf\x09 a hello of version nine").expect("it listens");
    other.shutdown(std::net::Shutdown::Write).expect("it listens");
    assert!(wait_for_refusal(&told).contains("protocol version 9 is spoken there, 3 here"));
    let mut answer = Vec::new();
    other.read_to_end(&mut answer).expect("an answer");
    let mut decoder = FrameDecoder::new(SessionId::HANDSHAKE);
    decoder.feed(&answer);
    let told = Frame::Refusal(Refusal::Version { ours: 3, theirs: 9 });
    assert_eq!(decoder.next_frame(), Ok(Some(told)));
}

#[test]
fn a_backup_that_stops_halfway_through_the_handshake_gives_its_place_back() {
    let mut config = primary_config();
    config.setup_timeout = Duration::from_millis(500);
    let (primary, told) = primary(config);
    let (_, hello) = Offered::new(identity(), Nonce([1; 16]));
    let hello = hello.encode(SessionId::HANDSHAKE).expect("small").seal();
    let cuts = [1, 10, 20, hello.len() - 1, hello.len()];
    let _halfway = cuts.map(|cut| {
        let mut halfway = stranger(&primary);
        halfway.write_all(&hello[..cut]).expect("it listens");
        halfway
    });
    for _ in cuts {
        let text = wait_for_refusal(&told);
        assert!(text.starts_with("the peer did not go on with its"), "{text}");
    }
    let _joined = join(&primary);
    assert!(primary.wait_protected(PATIENCE));
}
