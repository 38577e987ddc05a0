//! What has arrived of a stream and was not written to its socket yet.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf as _, Bytes, BytesMut};

/// While a socket takes nothing, what waits for it is copied if it is smaller than this. A frame is
/// a slice of the buffer that it was read into, and would keep all of it: a few bytes up to a
/// megabyte.
const COPIED: usize = 32 << 10;

/// Frames in their order. While their socket takes them they are not copied.
#[derive(Debug, Default)]
pub(super) struct Received {
    frames: VecDeque<Bytes>,
    /// Copies of small frames, after `frames`.
    copies: BytesMut,
    bytes: usize,
    stalled: bool,
}

impl Received {
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn push(&mut self, data: Bytes) {
        self.bytes += data.len();
        if self.stalled && data.len() < COPIED {
            self.copies.extend_from_slice(&data);
        }
        if !self.copies.is_empty() && (self.copies.len() >= COPIED || !self.stalled || data.len() >= COPIED) {
            self.frames.push_back(std::mem::take(&mut self.copies).freeze());
        }
        if !(self.stalled && data.len() < COPIED) {
            self.frames.push_back(data);
        }
    }

    pub(super) fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// The socket takes nothing more now.
    pub(super) fn stall(&mut self) {
        self.stalled = true;
        self.bytes = 0;
        for data in std::mem::take(&mut self.frames) {
            self.push(data);
        }
    }

    /// For one write.
    pub(super) fn slices<'a>(&'a self, into: &mut [IoSlice<'a>]) -> usize {
        let copies = (!self.copies.is_empty()).then_some(&self.copies[..]);
        let all = self.frames.iter().map(|data| &data[..]).chain(copies);
        let filled = into.iter_mut().zip(all).map(|(slice, data)| *slice = IoSlice::new(data));
        filled.count()
    }

    /// The first `written` bytes are gone.
    pub(super) fn advance(&mut self, written: usize) {
        self.bytes -= written;
        let mut left = written;
        while let Some(first) = self.frames.front_mut() {
            if first.len() > left {
                first.advance(left);
                return;
            }
            left -= first.len();
            self.frames.pop_front();
        }
        self.copies.advance(left);
        if self.bytes == 0 {
            // Between transfers no memory is held.
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(received: &Received) -> Vec<u8> {
        let mut slices = [IoSlice::new(&[]); 1024];
        let count = received.slices(&mut slices);
        slices[..count].iter().flat_map(|slice| slice.iter().copied()).collect()
    }

    #[test]
    fn all_bytes_stay_in_their_order_stalled_or_not() {
        for stall_at in [0, 1, 3, 9] {
            let (mut received, mut expected) = (Received::default(), Vec::new());
            for (number, size) in [1, COPIED, 10, 20, COPIED - 1, 2 * COPIED, 5, 7].into_iter().enumerate() {
                if number == stall_at {
                    received.stall();
                }
                let data = vec![u8::try_from(number).unwrap(); size];
                expected.extend_from_slice(&data);
                received.push(data.into());
                assert_eq!((received.bytes(), content(&received)), (expected.len(), expected.clone()));
            }
            while !expected.is_empty() {
                let n = expected.len().min(COPIED + 3);
                received.advance(n);
                expected.drain(..n);
                assert_eq!(content(&received), expected);
            }
            assert!(!received.is_stalled());
        }
    }

    #[test]
    fn tiny_frames_of_a_stalled_stream_keep_no_read_buffers() {
        let mut received = Received::default();
        received.push(Bytes::from_static(b"a"));
        received.stall();
        // Each frame is a slice of a large buffer.
        for _ in 0..10_000 {
            let read = Bytes::from(vec![7; 64 << 10]);
            received.push(read.slice(..1));
        }
        assert_eq!((received.bytes(), received.frames.len()), (10_001, 0));
        assert!(received.copies.capacity() <= 32 << 10, "{}", received.copies.capacity());
    }
}
