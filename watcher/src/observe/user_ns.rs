//! From the numbers of users and groups in a pod to those of the node.
//!
//! A pod may have a user namespace of its own (`hostUsers: false`). The kernel tells the programs the
//! numbers of the initial one, so those that a pod uses have to be translated, as the pod's user
//! namespace maps them.
//!
//! Which namespace is the pod's own is no process's word: a process can make another one at any time,
//! where it calls itself what it likes. The pod's is the one that owns its netns, since the container
//! runtime makes both together. Of a process in that one the maps are read.

use std::{
    fs::{self, File},
    io,
    os::{fd::BorrowedFd, unix::fs::MetadataExt as _},
    path::Path,
};

use super::cgroups;
use crate::sys;

/// Processes of the pod that are asked whether they are in its user namespace.
const PROCESSES: usize = 256;
/// Cgroups of the pod whose processes are asked.
const CGROUPS: usize = 64;

/// How a user namespace maps users and groups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct IdMaps {
    users: Vec<Range>,
    groups: Vec<Range>,
}

/// So many numbers from `inside` on are those from `outside` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    inside: u32,
    outside: u32,
    count: u32,
}

impl IdMaps {
    /// Every number is its own.
    pub(crate) fn same() -> Self {
        let all = vec![Range { inside: 0, outside: 0, count: u32::MAX }];
        Self { users: all.clone(), groups: all }
    }

    /// The node's number of a user of the pod.
    pub(crate) fn user(&self, id: u32) -> Option<u32> {
        outside(&self.users, id)
    }

    /// The node's number of a group of the pod.
    pub(crate) fn group(&self, id: u32) -> Option<u32> {
        outside(&self.groups, id)
    }
}

fn outside(ranges: &[Range], id: u32) -> Option<u32> {
    ranges.iter().find_map(|range| {
        let offset = id.checked_sub(range.inside).filter(|offset| *offset < range.count)?;
        range.outside.checked_add(offset)
    })
}

/// How the user namespace that owns `netns` maps ids, as a process of the cgroup `dir` that is in it
/// tells. `None`: no such process is found.
///
/// # Errors
/// The owner is not told, as it is above this process's own, or the cgroup cannot be read.
pub(crate) fn of_netns(netns: BorrowedFd<'_>, dir: &Path) -> io::Result<Option<IdMaps>> {
    let owner = sys::owner_of(netns)?;
    let owner = id_of(&File::from(owner).metadata()?);
    if owner == id_of(&fs::metadata("/proc/self/ns/user")?) {
        return Ok(Some(IdMaps::same()));
    }
    let tree = cgroups::tree(dir, CGROUPS)?;
    for cgroup in tree.cgroups.keys() {
        for pid in cgroups::processes(cgroup, PROCESSES)? {
            let is_there =
                || fs::metadata(format!("/proc/{pid}/ns/user")).is_ok_and(|found| id_of(&found) == owner);
            if !is_there() {
                continue;
            }
            let read = |kind| fs::read_to_string(format!("/proc/{pid}/{kind}_map"));
            // Another process may have its number by now.
            if let (Ok(users), Ok(groups)) = (read("uid"), read("gid"))
                && is_there()
                && let (Some(users), Some(groups)) = (parse(&users), parse(&groups))
            {
                return Ok(Some(IdMaps { users, groups }));
            }
        }
    }
    Ok(None)
}

fn id_of(metadata: &fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// What `/proc/PID/uid_map` says. Seen from another user namespace than the process's own, the second
/// number is that of the reader's.
fn parse(text: &str) -> Option<Vec<Range>> {
    text.lines()
        .map(|line| {
            let mut numbers = line.split_whitespace().map(|number| number.parse().ok());
            let (inside, outside, count) = (numbers.next()??, numbers.next()??, numbers.next()??);
            Some(Range { inside, outside, count })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn numbers_are_translated_as_the_map_says() {
        let maps = IdMaps {
            users: parse("         0     100000      65536\n     70000          7          1\n").unwrap(),
            groups: parse("").unwrap(),
        };
        for (inside, outside) in [
            (0, Some(100_000)),
            (1337, Some(101_337)),
            (65535, Some(165_535)),
            (65536, None),
            (70_000, Some(7)),
            (70_001, None),
        ] {
            assert_eq!(maps.user(inside), outside, "{inside}");
        }
        assert_eq!(maps.group(0), None);
        assert_eq!(IdMaps::same().user(1337), Some(1337));
        assert!(parse("0 1\n").is_none() && parse("a b c\n").is_none());
    }

    #[test]
    #[ignore = "asks who owns the own netns, needs root: make test"]
    fn the_own_netns_is_owned_by_the_own_user_namespace() {
        let netns = File::open("/proc/self/ns/net").unwrap();
        let maps = of_netns(netns.as_fd(), Path::new("/nowhere")).unwrap();
        assert_eq!(maps, Some(IdMaps::same()));
    }
}
