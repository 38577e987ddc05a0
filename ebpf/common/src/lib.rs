//! What the kernel programs and user space share: the keys and values of the maps.
//!
//! A module uses only modules below it in this list (a test checks it):
//!
//! * [`pods`]: which cgroup is which pod, and what is done with its traffic
//! * [`trace`]: one record per verdict, while a tracer is attached
//! * [`flows`]: original destinations, and flows that pass untouched
//! * [`settings`]: what holds for the whole node, switchable at run time
//! * [`lifecycle`]: what happens to cgroups and processes
//! * [`address`]: one 16-byte form for both address families
//!
//! Integers and byte arrays only, every layout asserted: kernel and user space are compiled apart.
#![no_std]

pub mod address;
pub mod flows;
pub mod lifecycle;
pub mod pods;
pub mod settings;
pub mod trace;

/// Marks a type as plain data for aya, in user space only.
macro_rules! plain_data {
    ($($type:ty: $size:literal),+ $(,)?) => {$(
        const _: () = assert!(size_of::<$type>() == $size);
        // SAFETY: `repr(C)`, integers and byte arrays only; the size asserted above is the sum of the
        // fields, so there is no implicit padding.
        #[cfg(feature = "user")]
        #[expect(unsafe_code, reason = "aya's marker for plain data is an unsafe trait")]
        unsafe impl aya::Pod for $type {}
    )+};
}
pub(crate) use plain_data;

#[cfg(test)]
mod order {
    #[test]
    fn modules_use_only_what_stands_below_them() {
        testbed::module_order::assert_one_way(env!("CARGO_MANIFEST_DIR"));
    }
}
