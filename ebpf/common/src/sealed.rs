//! Values of hash maps, as programs read them without a lock.
//!
//! The kernel gives the memory of an entry that was removed or replaced to the next one at once,
//! while a program may still hold a reference to it. What that program reads then is of two entries,
//! or of another key's. The kernel promises neither the order nor the size of what it copies into an
//! entry, and the same entry may be there again a moment later: neither a key within the value nor a
//! version number shows that all of it belongs together. A sum over key and value does, whatever the
//! order.

use crate::address::{Address, to_words};

/// Odd, with as many ones as zeros: the golden ratio's fraction in 64 bits.
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// What a seal is made of: each word of a value or a key, in the order of memory.
pub trait Sum {
    /// `sum`, with this value taken in.
    #[must_use]
    fn sum(&self, sum: u64) -> u64;
}

/// `sum`, with `word` taken in. Two values that differ in one word never have the same sum.
#[inline(always)]
#[must_use]
pub const fn word(sum: u64, word: u64) -> u64 {
    let sum = (sum ^ word).wrapping_mul(MULTIPLIER);
    sum ^ (sum >> 32)
}

/// `sum`, with two halves of a word taken in.
#[inline(always)]
#[must_use]
pub(crate) const fn halves(sum: u64, low: u32, high: u32) -> u64 {
    word(sum, low as u64 | (high as u64) << 32)
}

/// Two quarters of a word, as a half.
#[inline(always)]
#[must_use]
pub(crate) const fn quarters(low: u16, high: u16) -> u32 {
    low as u32 | (high as u32) << 16
}

impl Sum for u64 {
    #[inline(always)]
    fn sum(&self, sum: u64) -> u64 {
        word(sum, *self)
    }
}

impl Sum for Address {
    #[inline(always)]
    fn sum(&self, sum: u64) -> u64 {
        let words = to_words(self);
        halves(halves(sum, words[0], words[1]), words[2], words[3])
    }
}

/// Such as names of cgroups.
impl<const N: usize> Sum for [u64; N] {
    #[inline(always)]
    fn sum(&self, sum: u64) -> u64 {
        let (mut sum, mut at) = (sum, 0);
        while at < N {
            sum = word(sum, self[at]);
            at += 1;
        }
        sum
    }
}

/// A value of a map, sealed with its key.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes))]
pub struct Sealed<V> {
    value: V,
    /// Of the key and the value.
    seal: u64,
}

impl<V> Sealed<V> {
    /// Fails to compile where there would be hidden bytes.
    const HAS_NO_PADDING: () = assert!(size_of::<Self>() == size_of::<V>() + size_of::<u64>());
}

// SAFETY: any bytes are a value of it, since any are one of `V` and of a number. None of its bytes
// are uninitialised: `V` has no padding (`IntoBytes`), and there is none beside it, which
// `HAS_NO_PADDING` proves for each type that is ever sealed. It shares no mutable state.
#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya's marker for plain data is an unsafe trait")]
unsafe impl<V> aya::Pod for Sealed<V> where
    V: Copy + 'static + zerocopy::FromBytes + zerocopy::IntoBytes + zerocopy::Immutable
{
}

impl<V: Sum> Sealed<V> {
    /// How many words of 8 bytes the value takes. The seal is the sum of the key's and these, as they
    /// stand in memory; it follows them.
    pub const WORDS: usize = size_of::<V>() / size_of::<u64>();

    /// What the sum of an entry of `key` begins with.
    #[inline(always)]
    #[must_use]
    pub fn begin(key: &impl Sum) -> u64 {
        key.sum(MULTIPLIER)
    }
}

impl<V: Sum + Copy> Sealed<V> {
    /// `value` for the entry of `key`.
    #[inline(always)]
    #[must_use]
    pub fn new(key: &impl Sum, value: V) -> Self {
        let () = Self::HAS_NO_PADDING;
        Self { value, seal: value.sum(Self::begin(key)) }
    }

    /// `value`, which no key opens but by chance: what stands in a variable before an entry is read.
    #[inline(always)]
    #[must_use]
    pub const fn broken(value: V) -> Self {
        Self { value, seal: 0 }
    }

    /// Seals the same value for the entry of `key`.
    #[inline(always)]
    pub fn seal_for(&mut self, key: &impl Sum) {
        self.seal = self.value.sum(Self::begin(key));
    }

    /// The value; `None`: it is not whole, or was not written for `key`. `self` is a copy, made by
    /// reading the entry once: of the entry itself, something else might be used than was checked.
    #[inline(always)]
    #[must_use]
    pub fn open(&self, key: &impl Sum) -> Option<&V> {
        if self.is_of(key) { Some(&self.value) } else { None }
    }

    /// Whether the value is whole, and was written for `key`.
    #[inline(always)]
    #[must_use]
    pub fn is_of(&self, key: &impl Sum) -> bool {
        self.seal == self.value.sum(Self::begin(key))
    }

    /// The value, whatever the seal says: for who shows or repairs what is there.
    #[inline(always)]
    #[must_use]
    pub const fn unchecked(&self) -> &V {
        &self.value
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;
    use core::fmt::Debug;

    use zerocopy::{FromBytes, Immutable, IntoBytes};

    use super::*;
    use crate::{
        enrolment::{CgroupInfo, NetnsInfo, PodRecord},
        flows::{Flow, Original, TunnelFlow},
        lifecycle::Name,
    };

    /// `T` whose bytes are all different, and those that differ from it in one bit.
    fn variants<T: FromBytes>() -> (T, Vec<T>) {
        let bytes: Vec<u8> = (1..).take(size_of::<T>()).collect();
        let read = |bytes: &[u8]| T::read_from_bytes(bytes).unwrap();
        let changed = (0..bytes.len() * 8).map(|bit| {
            let mut other = bytes.clone();
            other[bit / 8] ^= 1 << (bit % 8);
            read(&other)
        });
        (read(&bytes), changed.collect())
    }

    fn holds_for<K, V>()
    where
        K: Sum + FromBytes,
        V: Sum + Copy + Debug + PartialEq + FromBytes + IntoBytes + Immutable,
    {
        let (key, other_keys) = variants::<K>();
        let (value, other_values) = variants::<V>();
        let sealed = Sealed::new(&key, value);
        assert_eq!(sealed.open(&key), Some(&value));
        assert!(other_keys.iter().all(|other| sealed.open(other).is_none()));
        assert!(other_values.iter().all(|other| Sealed { value: *other, ..sealed }.open(&key).is_none()));
        assert!(Sealed { seal: sealed.seal ^ 1, ..sealed }.open(&key).is_none());

        // So do the programs read it.
        let words = value.as_bytes().chunks_exact(8);
        let words = words.map(|word| u64::from_ne_bytes(word.try_into().unwrap()));
        assert_eq!(words.clone().count(), Sealed::<V>::WORDS);
        assert_eq!(words.fold(Sealed::<V>::begin(&key), word), sealed.seal);
    }

    #[test]
    fn any_bit_breaks_the_seal() {
        holds_for::<u64, CgroupInfo>();
        holds_for::<Name, CgroupInfo>();
        holds_for::<u64, NetnsInfo>();
        holds_for::<[u8; 16], PodRecord>();
        holds_for::<Flow, Original>();
        holds_for::<Flow, TunnelFlow>();
    }

    /// A torn read: each word is of one of the two values.
    #[test]
    fn no_mixture_of_two_entries_opens() {
        let entry = |flags, cookie| CgroupInfo { flags, netns_cookie: cookie, ..CgroupInfo::CLOSED };
        let (one, other) = (Sealed::new(&5u64, entry(1, 7)), Sealed::new(&6u64, entry(2, 0)));
        let words = |sealed: &Sealed<CgroupInfo>| -> Vec<u64> {
            let value = sealed.value.as_bytes().chunks_exact(8);
            let value = value.map(|word| u64::from_ne_bytes(word.try_into().unwrap()));
            value.chain([sealed.seal]).collect()
        };
        let (one_words, other_words) = (words(&one), words(&other));
        for mask in 0..1u32 << one_words.len() {
            let mixed: Vec<u64> = (0..one_words.len())
                .map(|at| if mask & 1 << at == 0 { one_words[at] } else { other_words[at] })
                .collect();
            let bytes: Vec<u8> = mixed.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let mixed = Sealed::<CgroupInfo>::read_from_bytes(&bytes).unwrap();
            assert_eq!(mixed.is_of(&5u64), mixed == one, "{mask:#b}");
            assert_eq!(mixed.is_of(&6u64), mixed == other, "{mask:#b}");
        }
    }
}
