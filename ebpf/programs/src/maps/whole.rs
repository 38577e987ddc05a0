//! Entries that others replace while a program reads them: a copy that is whole, or none. Why a seal
//! tells: [`adit_ebpf_common::sealed`].

use core::arch::asm;

use adit_ebpf_common::sealed::{self, Sealed, Sum};

/// How often an entry is read that is being replaced. Whoever meets a replacement each time is
/// treated as closed. The compiler makes no loop of so few, whose end Linux 5.10 would not see.
const LOOKS: u32 = 2;

/// What was read of an entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// It is there, whole.
    Whole,
    /// It is there, and was replaced whenever it was looked at.
    Torn,
    /// There is none.
    Missing,
}

/// Copies an entry, and tells whether the copy is whole and its key's own. The kernel may give the
/// memory of the entry to another one meanwhile.
///
/// # Safety
/// `entry` is a pointer that a look-up in a map gave to this program: the kernel frees its memory only
/// after the program.
#[inline(always)]
unsafe fn copy_whole<V: Sum>(entry: *const Sealed<V>, copy: &mut Sealed<V>, key: &impl Sum) -> bool {
    let (from, to) = (entry.cast::<u64>(), (&raw mut *copy).cast::<u64>());
    let mut sum = Sealed::<V>::begin(key);
    let mut at = 0;
    // SAFETY: the caller's, for `from`; both are aligned, and as long as `WORDS` says. Any bytes are a
    // value of the types of maps. Volatile, since the compiler may read memory again that it takes for
    // unchanged.
    unsafe {
        while at < Sealed::<V>::WORDS {
            let word = from.add(at).read_volatile();
            to.add(at).write(word);
            sum = sealed::word(sum, word);
            at += 1;
        }
        let seal = from.add(at).read_volatile();
        to.add(at).write(seal);
        sum == seal
    }
}

/// The same reference. The compiler does not know that, and so reads what it needs when it needs it.
/// Else it would load a whole value once and keep its parts apart, on the stack, where there is no room
/// for them.
#[inline(always)]
pub fn in_memory<T>(value: &T) -> &T {
    let same: *const T;
    // SAFETY: copies the pointer, so it is that of `value`, whose lifetime the result has.
    unsafe {
        asm!("{same} = {at}", at = in(reg) &raw const *value, same = lateout(reg) same, options(nostack, preserves_flags));
        &*same
    }
}

/// Reads the entry of `key`, which `find` gives a pointer to, into `copy`: one place, since the stack
/// is small.
#[inline(always)]
pub fn look<V: Copy + Sum>(
    key: &impl Sum,
    copy: &mut Sealed<V>,
    mut find: impl FnMut() -> Option<*const Sealed<V>>,
) -> Look {
    let mut looks = 0;
    while looks < LOOKS {
        let Some(entry) = find() else { return Look::Missing };
        // SAFETY: the look-up found it just now.
        if unsafe { copy_whole(entry, copy, key) } {
            return Look::Whole;
        }
        looks += 1;
    }
    Look::Torn
}
