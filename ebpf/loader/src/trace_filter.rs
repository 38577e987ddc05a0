//! What of the verdicts the programs report, while the settings say that they filter.

use adit_ebpf_common::{
    address::Address,
    maps::{TRACE_LEFT_OUT, TRACE_WATCHED},
};
use aya::maps::{HashMap, LpmTrie, lpm_trie::Key};

use crate::{
    Kernel, KernelError,
    maps::{find_mut, missing_is_fine},
};

impl Kernel {
    /// Has verdicts about `key` reported, an address or what stands for a cgroup or a netns; or no
    /// more.
    ///
    /// # Errors
    /// The kernel refused; the map may be full.
    pub fn watch(&mut self, key: &Address, on: bool) -> Result<(), KernelError> {
        let failed = KernelError::map("write", TRACE_WATCHED.name);
        let map = HashMap::<_, Address, u32>::try_from(find_mut(&mut self.object, TRACE_WATCHED.name));
        let write = |mut map: HashMap<_, Address, u32>| {
            if on { map.insert(key, 1, 0) } else { missing_is_fine(map.remove(key)) }
        };
        map.and_then(write).map_err(failed)
    }

    /// Has verdicts left out whose either end is in the range of `address`, mapped where IPv4, with
    /// this prefix length; or no more.
    ///
    /// # Errors
    /// The kernel refused; the map may be full.
    pub fn leave_out(&mut self, address: Address, length: u32, on: bool) -> Result<(), KernelError> {
        let failed = KernelError::map("write", TRACE_LEFT_OUT.name);
        let map = LpmTrie::<_, Address, u8>::try_from(find_mut(&mut self.object, TRACE_LEFT_OUT.name));
        let key = Key::new(length, address);
        let write = |mut map: LpmTrie<_, Address, u8>| {
            if on { map.insert(&key, 1, 0) } else { missing_is_fine(map.remove(&key)) }
        };
        map.and_then(write).map_err(failed)
    }
}
