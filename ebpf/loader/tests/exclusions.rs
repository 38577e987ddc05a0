//! Exclusion lists in the kernel: whole or not there, and taken over from an earlier build.

use adit_ebpf_common::exclusions::{INBOUND as IS_DIALLED, OUTBOUND as DIALS};
use adit_ebpf_loader::{ExclusionList, Kernel};
use aya::maps::{HashMap, LpmTrie, MapData, lpm_trie::Key};

use crate::rig::{Bpffs, address, cgroups};

/// BPF_F_NO_PREALLOC, which tries need.
const NO_PREALLOC: u32 = 1;

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_list_is_written_whole_or_not_at_all() {
    let bpffs = Bpffs::new();
    let mut kernel = Kernel::open(&bpffs.pins()).unwrap();
    let list = ExclusionList::default()
        .with_ports(DIALS, 80..=80)
        .with_ports(IS_DIALLED, 1..=65535)
        .with_cidr([0; 16], 0)
        .with_cidr(address("10.0.0.0"), 104);
    assert_eq!(list.len(), 1 + 16 + 2);
    kernel.add_exclusions(1, &list).unwrap();
    kernel.add_exclusions(2, &list).unwrap();
    kernel.remove_exclusions(1, &list).unwrap();
    kernel.remove_exclusions(1, &list).expect("missing is fine");
    assert_eq!(kernel.exclusions().unwrap(), [(2, list.clone())].into());

    let too_long = list.clone().with_cidr(address("fd00::"), 129);
    kernel.add_exclusions(3, &too_long).unwrap_err();
    assert_eq!(kernel.exclusions().unwrap(), [(2, list.clone())].into(), "nothing of it stays");
    kernel.remove_exclusions(2, &list).unwrap();

    // Every second port, so that no two share an entry: both directions fill the map.
    let mut full = ExclusionList::default();
    for port in (0..=u16::MAX).step_by(2) {
        full = full.with_ports(DIALS, port..=port).with_ports(IS_DIALLED, port..=port);
    }
    kernel.add_exclusions(4, &full).unwrap();
    kernel.add_exclusions(5, &list).unwrap_err();
    assert_eq!(kernel.exclusions().unwrap(), [(4, full)].into(), "nothing of what found no room stays");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn the_lists_of_an_earlier_build_are_taken_over() {
    let bpffs = Bpffs::new();
    drop(Kernel::open(&bpffs.pins()).unwrap());
    let maps = bpffs.pins().join("maps");
    // One entry for each port, and both families in one trie: an earlier build's layout.
    let mut ports = HashMap::<MapData, [u8; 8], u8>::create(4096, 0).unwrap();
    for (direction, range) in [(0u16, 7000..=7010u16), (1, 9090..=9090)] {
        for port in range {
            let key = [&7u32.to_ne_bytes()[..], &port.to_ne_bytes(), &direction.to_ne_bytes()].concat();
            ports.insert(<[u8; 8]>::try_from(key).unwrap(), 1, 0).unwrap();
        }
    }
    ports.pin(maps.join("excluded_ports")).unwrap();
    let mut cidrs = LpmTrie::<MapData, [u8; 20], u8>::create(4096, NO_PREALLOC).unwrap();
    for (range, length) in [("::", 0), ("10.0.0.0", 104)] {
        let key = [&7u32.to_be_bytes()[..], &address(range)].concat();
        cidrs.insert(&Key::new(32 + length, <[u8; 20]>::try_from(key).unwrap()), 1, 0).unwrap();
    }
    cidrs.pin(maps.join("excluded_cidrs")).unwrap();

    let kernel = Kernel::open(&bpffs.pins()).unwrap();
    let list = ExclusionList::default()
        .with_ports(DIALS, 7000..=7010)
        .with_ports(IS_DIALLED, 9090..=9090)
        .with_cidr([0; 16], 0)
        .with_cidr(address("10.0.0.0"), 104);
    assert_eq!(kernel.exclusions().unwrap(), [(7, list.clone())].into());
    drop(kernel);
    // As often as a watcher is killed before it has attached its programs; then they go.
    let (cgroups, mut kernel) = (cgroups(), Kernel::open(&bpffs.pins()).unwrap());
    assert_eq!(kernel.exclusions().unwrap(), [(7, list)].into());
    kernel.attach_pods(&cgroups.join("pods")).unwrap();
    assert!(!maps.join("excluded_ports").exists() && !maps.join("excluded_cidrs").exists());
    Kernel::remove(&bpffs.pins()).unwrap();
}
