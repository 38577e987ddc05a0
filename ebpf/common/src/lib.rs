//! What the kernel programs and user space share: the maps, their keys and values, and the
//! decisions.
//!
//! * [`decide`]: the two decision lists, over what the caller knows
//! * [`maps`]: one table of all maps
//! * [`lifecycle`]: events of cgroups and processes
//! * [`verdicts`]: how often each rule decided, for each pod
//! * [`trace`]: one record per verdict, while somebody watches
//! * [`settings`]: what applies to the whole node, switchable at run time
//! * [`exclusions`]: which connections of a pod stay outside the mesh
//! * [`enrolment`]: which cgroup is which pod, and what happens to its traffic
//! * [`listeners`]: who listens where
//! * [`redirect_ports`]: to which port a connection is redirected
//! * [`reserved_ports`]: applications that want the tunnel's ports
//! * [`flows`]: original destinations, and flows that pass untouched
//! * [`sealed`]: values that show whether they are whole
//! * [`address`]: one 16-byte form for both address families
//!
//! Keys and values hold integers and byte arrays only. Kernel and user space compile them apart, so
//! every field stands where `repr(C)` puts it, and the derives of `zerocopy` refuse a type with
//! hidden padding.
#![no_std]
#![expect(
    clippy::inline_always,
    reason = "before it inlines, the verifier sees calls that share 512 bytes of stack"
)]

#[cfg(any(test, feature = "plain"))]
extern crate alloc;

pub mod address;
pub mod decide;
pub mod enrolment;
pub mod exclusions;
pub mod flows;
pub mod lifecycle;
pub mod listeners;
pub mod maps;
pub mod redirect_ports;
pub mod reserved_ports;
pub mod sealed;
pub mod settings;
pub mod trace;
pub mod verdicts;

/// Marks types as plain data for aya, in user space only.
macro_rules! plain_data {
    ($($type:ty),+ $(,)?) => {$(
        #[cfg(feature = "user")]
        const _: () = {
            const fn is_plain<T: zerocopy::FromBytes + zerocopy::IntoBytes + zerocopy::Immutable>() {}
            is_plain::<$type>();
        };
        // SAFETY: any bytes are a value of the type (`FromBytes`), all bytes of a value are
        // initialised, since it has no padding (`IntoBytes`), and it shares no mutable state
        // (`Immutable`): the derives prove all three.
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
