//! One form for both address families: 16 bytes in network byte order, IPv4 mapped
//! (`::ffff:a.b.c.d`, RFC 4291 §2.5.5.2).
#![expect(
    clippy::inline_always,
    reason = "before it inlines, the verifier sees calls that share 512 bytes of stack"
)]

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
    fn unspecified_is_recognised_in_both_families() {
        assert!(is_unspecified(&UNSPECIFIED) && is_unspecified(&mapped([0; 4])));
        assert!(!is_unspecified(&mapped([0, 0, 0, 1])));
        let mut six = UNSPECIFIED;
        six[0] = 0xfd;
        assert!(!is_unspecified(&six));
    }
}
