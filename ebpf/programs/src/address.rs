//! Between the words of the kernel's contexts and the addresses of the maps.
//!
//! A context's address fields hold network byte order in memory, whatever the word's numeric value is.
//! Ports differ from field to field; each reader converts its own.

use adit_ebpf_common::address::Address;

/// The middle of `::ffff:a.b.c.d`, as a word in memory order.
const MAPPED_WORD: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

#[inline(always)]
pub fn from_v4_word(word: u32) -> Address {
    from_words([0, 0, MAPPED_WORD, word])
}

#[inline(always)]
pub fn from_words(words: [u32; 4]) -> Address {
    // SAFETY: both are sixteen bytes of plain data.
    unsafe { core::mem::transmute(words) }
}

#[inline(always)]
pub fn to_words(address: &Address) -> [u32; 4] {
    // SAFETY: as above.
    unsafe { core::mem::transmute(*address) }
}

/// As `==`, without the call of `memcmp` that the compiler makes of it.
#[inline(always)]
pub fn same(a: &Address, b: &Address) -> bool {
    let (a, b) = (to_words(a), to_words(b));
    a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
}
