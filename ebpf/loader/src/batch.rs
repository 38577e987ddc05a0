//! Whole maps in a few system calls.
//!
//! `BPF_MAP_LOOKUP_BATCH` gives thousands of entries at a time, where going from key to key takes
//! two calls for each. Hash maps have it from Linux 5.6 on, LPM tries from 5.13 on.

use std::{io, os::fd::BorrowedFd};

use aya::maps::{Map, MapData};
use zerocopy::FromBytes;

use crate::sys::{self, Batch};

/// How many entries are asked for at once. A hash map gives whole buckets: more than one holds.
const AT_ONCE: u32 = 4096;
/// Says that the kernel, or this type of map, has no batches.
const ENOTSUPP: i32 = 524;

/// The key of an LPM trie.
#[derive(Clone, Copy, Debug, FromBytes)]
#[repr(C)]
pub(crate) struct TrieKey<K> {
    /// How many bits of `data` count.
    pub(crate) prefix_len: u32,
    /// The prefix.
    pub(crate) data: K,
}

/// The data of a map that may be read so.
pub(crate) fn data(map: &Map) -> Option<&MapData> {
    match map {
        Map::HashMap(data) | Map::LpmTrie(data) => Some(data),
        _ => None,
    }
}

/// The keys and values of `map`, which are of these types; `None`: it cannot be read in batches.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn entries<K: FromBytes, V: FromBytes>(map: BorrowedFd<'_>) -> io::Result<Option<Vec<(K, V)>>> {
    let (key_size, value_size) = (size_of::<K>(), size_of::<V>());
    let mut found = Vec::new();
    // A hash map keeps the number of a bucket there, a trie a key.
    let mut position: Option<Vec<u8>> = None;
    loop {
        let (mut keys, mut values) =
            (vec![0; AT_ONCE as usize * key_size], vec![0; AT_ONCE as usize * value_size]);
        let mut next = vec![0; key_size.max(size_of::<u32>())];
        let mut batch = Batch {
            from: position.as_deref(),
            next: &mut next,
            keys: &mut keys,
            values: &mut values,
            count: AT_ONCE,
        };
        let (count, is_last) = match sys::lookup_batch(map, &mut batch) {
            Ok(batch) => batch,
            Err(error) if position.is_none() && is_unsupported(&error) => return Ok(None),
            // A trie that changes at the same time.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(None),
            Err(error) => return Err(error),
        };
        let keys = keys.chunks_exact(key_size.max(1)).take(count);
        for (key, value) in keys.zip(values.chunks_exact(value_size.max(1))) {
            let read = (K::read_from_bytes(key).ok(), V::read_from_bytes(value).ok());
            if let (Some(key), Some(value)) = read {
                found.push((key, value));
            }
        }
        if is_last {
            return Ok(Some(found));
        }
        position = Some(next);
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | ENOTSUPP))
}
