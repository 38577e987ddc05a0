//! One form for both address families: 16 bytes in network byte order, IPv4 mapped
//! (`::ffff:a.b.c.d`, RFC 4291 §2.5.5.2).

/// An IP address, IPv4 in mapped form.
pub type Address = [u8; 16];

/// No address: the pod has none of this family.
pub const UNSPECIFIED: Address = [0; 16];

/// `octets` in mapped form.
#[inline(always)]
#[must_use]
pub const fn mapped(octets: [u8; 4]) -> Address {
    let [a, b, c, d] = octets;
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

/// The middle of `::ffff:a.b.c.d`, as a word in memory order.
const MAPPED_WORD: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

/// The IPv4 address whose four bytes, as they stand in memory, make up `word`: in mapped form.
#[inline(always)]
#[must_use]
pub const fn from_v4_word(word: u32) -> Address {
    from_words([0, 0, MAPPED_WORD, word])
}

/// The address whose bytes, as they stand in memory, make up `words`. The kernel's contexts hold
/// addresses so: network byte order in memory, whatever the numeric value of a word is.
#[inline(always)]
#[must_use]
pub const fn from_words(words: [u32; 4]) -> Address {
    let [a, b, c, d] =
        [words[0].to_ne_bytes(), words[1].to_ne_bytes(), words[2].to_ne_bytes(), words[3].to_ne_bytes()];
    [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
}

/// The reverse of [`from_words`].
#[inline(always)]
#[must_use]
pub const fn to_words(address: &Address) -> [u32; 4] {
    [word(address, 0), word(address, 4), word(address, 8), word(address, 12)]
}

#[inline(always)]
const fn word(address: &Address, at: usize) -> u32 {
    u32::from_ne_bytes([address[at], address[at + 1], address[at + 2], address[at + 3]])
}

/// Like `==`, without the call of `memcmp` that the compiler makes of it.
#[inline(always)]
#[must_use]
pub const fn same(a: &Address, b: &Address) -> bool {
    let (a, b) = (to_words(a), to_words(b));
    a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
}

/// Whether `address` is in fe80::/10.
#[inline(always)]
#[must_use]
pub const fn is_link_local(address: &Address) -> bool {
    address[0] == 0xfe && address[1] & 0xc0 == 0x80
}

/// Whether `address` is IPv4 in mapped form.
#[inline(always)]
#[must_use]
pub const fn is_v4(address: &Address) -> bool {
    let mut i = 0;
    while i < 10 {
        if address[i] != 0 {
            return false;
        }
        i += 1;
    }
    address[10] == 0xff && address[11] == 0xff
}

/// Whether `address` is in 127.0.0.0/8 or `::1`.
#[inline(always)]
#[must_use]
pub const fn is_loopback(address: &Address) -> bool {
    if is_v4(address) {
        return address[12] == 127;
    }
    let mut i = 0;
    while i < 15 {
        if address[i] != 0 {
            return false;
        }
        i += 1;
    }
    address[15] == 1
}

/// Whether `address` is `0.0.0.0` or `::`, which connect(2) takes for loopback.
#[inline(always)]
#[must_use]
pub const fn is_unspecified(address: &Address) -> bool {
    let mut i = if is_v4(address) { 12 } else { 0 };
    while i < 16 {
        if address[i] != 0 {
            return false;
        }
        i += 1;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_recognised_in_both_families() {
        assert!(is_loopback(&mapped([127, 0, 0, 1])) && is_loopback(&mapped([127, 9, 9, 9])));
        assert!(!is_loopback(&mapped([128, 0, 0, 1])));
        let mut six = UNSPECIFIED;
        assert!(!is_loopback(&six));
        six[15] = 1;
        assert!(is_loopback(&six) && !is_v4(&six));
        six[0] = 0xfd;
        assert!(!is_loopback(&six));
    }

    #[test]
    fn words_keep_the_order_of_bytes() {
        let four = mapped([10, 1, 2, 3]);
        assert_eq!(from_v4_word(u32::from_ne_bytes([10, 1, 2, 3])), four);
        assert_eq!(from_words(to_words(&four)), four);
        assert!(same(&four, &mapped([10, 1, 2, 3])) && !same(&four, &mapped([10, 1, 2, 4])));
    }

    #[test]
    fn unspecified_is_recognised_in_both_families() {
        assert!(is_unspecified(&UNSPECIFIED) && is_unspecified(&mapped([0; 4])));
        assert!(!is_unspecified(&mapped([0, 0, 0, 1])));
        let mut six = UNSPECIFIED;
        six[0] = 0xfd;
        assert!(!is_unspecified(&six));
    }
}
