use super::*;
use proptest::prelude::*;

/// A socket that takes and gives pieces of set sizes; a size of zero is one that would block.
#[derive(Debug, Default)]
struct Pieces {
    taken: Vec<u8>,
    given: VecDeque<u8>,
    sizes: VecDeque<usize>,
    closed: bool,
}

impl Pieces {
    fn next(&mut self, most: usize) -> io::Result<usize> {
        match self.sizes.pop_front().unwrap_or(most).min(most) {
            0 if most > 0 => Err(ErrorKind::WouldBlock.into()),
            size => Ok(size),
        }
    }
}

impl Read for Pieces {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.given.is_empty() {
            return if self.closed { Ok(0) } else { Err(ErrorKind::WouldBlock.into()) };
        }
        let size = self.next(into.len().min(self.given.len()))?;
        for (to, from) in into.iter_mut().zip(self.given.drain(..size)) {
            *to = from;
        }
        Ok(size)
    }
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let size = self.next(bytes.len())?;
        self.taken.extend(&bytes[..size]);
        Ok(size)
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let bytes: Vec<u8> = pieces.iter().flat_map(|piece| piece.to_vec()).collect();
        self.write(&bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 256,
        failure_persistence: None,
        rng_seed: proptest::test_runner::RngSeed::Fixed(0x9A55_7000),
        ..ProptestConfig::default()
    })]

    #[test]
    fn frames_survive_any_cutting_of_the_stream(
        frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..3_000), 1..20),
        sizes in prop::collection::vec(0usize..2_000, 0..60),
        back in prop::collection::vec(0usize..2_000, 0..60),
    ) {
        let mut sender = Stream::over(Pieces { sizes: sizes.into(), ..Pieces::default() });
        for frame in &frames {
            sender.send(frame).expect("there is room");
        }
        while sender.has_unsent() {
            sender.send_rest().expect("the peer is there");
        }
        let given = sender.socket.taken.into();
        let mut receiver = Stream::over(Pieces { given, sizes: back.into(), ..Pieces::default() });
        let mut received = Vec::new();
        while received.len() < frames.len() {
            receiver.receive(1, &mut received).expect("the peer is there");
        }
        let received: Vec<Vec<u8>> = received.into_iter().map(|packet| packet.frame).collect();
        prop_assert_eq!(received, frames);
    }
}

#[test]
fn a_length_no_frame_has_ends_the_connection() {
    for length in [0u32, MAX_PACKET as u32 + 1, u32::MAX] {
        let given = length.to_be_bytes().into();
        let mut stream = Stream::over(Pieces { given, ..Pieces::default() });
        let error = stream.receive(1, &mut Vec::new()).expect_err("hostile");
        assert_eq!(error.kind(), ErrorKind::InvalidData);
    }
}

#[test]
fn the_end_of_the_stream_is_an_error_also_inside_a_frame() {
    let given = [0, 0, 0, 9, 1, 2].into();
    let mut stream = Stream::over(Pieces { given, closed: true, ..Pieces::default() });
    let mut received = Vec::new();
    let error = stream.receive(9, &mut received).expect_err("closed");
    assert_eq!((error.kind(), received.len()), (ErrorKind::UnexpectedEof, 0));
}

#[test]
fn a_peer_that_takes_nothing_loses_whole_frames_and_gets_no_half_ones() {
    let blocked = Pieces { sizes: vec![0; 4_000].into(), ..Pieces::default() };
    let mut stream = Stream::over(blocked);
    let frame = [7; 1_500];
    let sent = (0..2_000).filter(|_| stream.send(&frame).is_ok()).count();
    assert!((600..=700).contains(&sent), "{sent} frames in {UNSENT_LIMIT} bytes");
    stream.socket.sizes.clear();
    stream.send_rest().expect("the peer takes again");
    assert!(!stream.has_unsent());
    assert_eq!(stream.socket.taken.len(), sent * (LENGTH + frame.len()));
}
