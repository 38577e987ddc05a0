//! Looks for what no design can rule out: an enrolled pod's connection that passed the programs.
//!
//! Nothing should ever be found. What is found was made in clear by a fault of ours, of the kernel, or
//! of somebody who changed our maps or links for a moment; a scan repairs those, and would not show
//! that anything had passed meanwhile.
//!
//! Running connections stay when a pod is enrolled, or when its exclusions change. So the first look
//! after such a change only remembers what there is.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    ops::Bound,
    os::fd::AsFd as _,
};

use tracing::{debug, warn};

use crate::observe::{
    cgroups::CgroupId,
    connections::{self, Connection},
    listeners::listening,
    netns::Visitors,
    reserved_ports::{Holders, dir_of},
};

use super::in_clear::{PodSockets, in_clear};

/// How many pods are looked at at once. The kernel goes through the connections of the whole node for
/// each netns, so a scan must not ask for all of them.
pub(crate) const AT_ONCE: usize = 8;
/// How many connections of one pod are named in the log at once.
const NAMED: usize = 3;

/// What was found so far.
#[derive(Debug, Default)]
pub(crate) struct ClearAudit {
    /// By netns, the connections in clear that it had at the last look, those among them that were
    /// still being made.
    known: BTreeMap<u64, BTreeSet<SocketCookie>>,
    /// The netns that was looked at last.
    last: u64,
}

/// What the kernel calls a socket. It uses no number twice.
type SocketCookie = [u8; 8];

impl ClearAudit {
    /// What the pod in that netns may do has changed: what it has in clear by now may be right.
    pub(crate) fn forget(&mut self, netns_cookie: u64) {
        self.known.remove(&netns_cookie);
    }

    /// Those of `netns` whose turn it is.
    pub(crate) fn next_of(&mut self, netns: &BTreeSet<u64>) -> Vec<u64> {
        let after = netns.range((Bound::Excluded(self.last), Bound::Unbounded));
        let from_the_first = netns.range(..=self.last);
        let chosen: Vec<u64> = after.chain(from_the_first).take(AT_ONCE).copied().collect();
        self.last = chosen.last().copied().unwrap_or_default();
        chosen
    }

    /// Looks at `pods`; how many connections were made in clear since the last look. `tunnels` are
    /// the cgroups of tunnels; `is_kubelets` says whether the kubelet opened a connection.
    pub(crate) fn look(
        &mut self,
        visitors: &Visitors,
        pods: &[PodSockets],
        tunnels: &BTreeSet<CgroupId>,
        is_kubelets: impl Fn(&Connection) -> bool,
    ) -> Audited {
        let known = &self.known;
        let results = visitors.visit_each(pods, |visitor, pod| {
            let known = known.get(&pod.cookie);
            visitor.enter(pod.netns.as_fd(), || now_in_clear(pod, tunnels, known))
        });
        let mut audited = Audited::default();
        for (pod, found) in pods.iter().zip(results) {
            match found {
                Ok(mut found) => {
                    found.lasting.retain(|connection| !is_kubelets(connection));
                    audited.in_clear += self.compare(pod, &found);
                    audited.not_audited += found.not_audited;
                }
                Err(error) => debug!(uid = pod.uid, %error, "cannot list the connections of a pod"),
            }
        }
        audited
    }

    fn compare(&mut self, pod: &PodSockets, found: &InClear) -> usize {
        let Some(before) = self.known.insert(pod.cookie, found.all.clone()) else { return 0 };
        let new: Vec<_> = found.lasting.iter().filter(|found| !before.contains(&found.cookie())).collect();
        for connection in new.iter().take(NAMED) {
            let (uid, local, remote) = (&pod.uid, connection.local, connection.remote);
            warn!(uid, %local, %remote, "an enrolled pod has a connection that no tunnel carries");
        }
        new.len()
    }
}

/// How many connections a look found.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Audited {
    /// No tunnel carries them, and one should.
    pub in_clear: usize,
    /// No tunnel carries them, and a guard of a group may leave them alone: their process was not found.
    pub not_audited: usize,
}

/// What a netns has in clear.
#[derive(Debug)]
struct InClear {
    /// In whatever state it was seen.
    all: BTreeSet<SocketCookie>,
    /// What was established, and is so a moment later. The kernel's list is not one moment's: an end
    /// that closes meanwhile may be missing in it.
    lasting: Vec<Connection>,
    /// As of [`Audited`], of those that are new.
    not_audited: usize,
}

/// What the pod's netns, in which this thread is, has in clear.
fn now_in_clear(
    pod: &PodSockets,
    tunnels: &BTreeSet<CgroupId>,
    known: Option<&BTreeSet<SocketCookie>>,
) -> io::Result<InClear> {
    let look = || Ok::<_, io::Error>(in_clear(connections::connections()?, &listening()?, pod, tunnels));
    let mut lasting = look()?;
    let mut all: BTreeSet<SocketCookie> = lasting.iter().map(Connection::cookie).collect();
    if !all.is_empty() {
        let again: BTreeSet<SocketCookie> = look()?.iter().map(Connection::cookie).collect();
        lasting.retain(|connection| connection.is_established && again.contains(&connection.cookie()));
        all.extend(again);
    }
    let mut not_audited = 0;
    if let Some(known) = known.filter(|_| !pod.exclusions.guards.groups.is_empty()) {
        let mut holders = Holders::new();
        lasting.retain(|connection| {
            if known.contains(&connection.cookie()) {
                return false;
            }
            let group = group_of(&mut holders, pod, connection);
            not_audited += usize::from(group.is_none());
            group.is_some_and(|group| !pod.exclusions.guards.groups.contains(&group))
        });
    }
    Ok(InClear { all, lasting, not_audited })
}

/// The group of the process that has a connection of the pod, which no list of sockets tells.
fn group_of(holders: &mut Holders, pod: &PodSockets, connection: &Connection) -> Option<u32> {
    holders.group(dir_of(&pod.dirs, connection.cgroup_id?)?, connection.inode)
}

#[cfg(test)]
mod tests {
    use std::{fs::File, sync::Arc};

    use super::*;

    #[test]
    fn each_netns_has_its_turn() {
        let mut audit = ClearAudit::default();
        let netns: BTreeSet<u64> = (10..30).collect();
        let mut turns = || audit.next_of(&netns);
        let seen: Vec<u64> = [turns(), turns(), turns()].concat();
        let expected: Vec<u64> = (10..30).chain(10..14).collect();
        assert_eq!(seen, expected);
        assert_eq!(audit.next_of(&[7].into()), [7]);
        assert!(audit.next_of(&BTreeSet::new()).is_empty());
    }

    #[test]
    fn what_there_was_before_a_change_is_not_counted() {
        let pod = PodSockets {
            uid: "u".to_owned(),
            cookie: 5,
            netns: Arc::new(File::open("/proc/self/ns/net").unwrap().into()),
            exclusions: Arc::default(),
            guarded: BTreeSet::new(),
            cgroups: [1].into(),
            dirs: BTreeMap::new(),
        };
        let connection =
            |number| Connection::between("10.0.0.2:40000", "10.0.1.1:80", 1).with_cookie([number; 8]);
        // Those that were still being made, and those that are established.
        let found = |begun: &[u8], lasting: &[u8]| InClear {
            not_audited: 0,
            all: begun.iter().chain(lasting).map(|number| [*number; 8]).collect(),
            lasting: lasting.iter().copied().map(connection).collect(),
        };
        let mut audit = ClearAudit::default();
        assert_eq!(audit.compare(&pod, &found(&[2], &[1])), 0, "from before it was enrolled");
        assert_eq!(audit.compare(&pod, &found(&[], &[1, 2])), 0, "begun before it was enrolled");
        assert_eq!(audit.compare(&pod, &found(&[], &[1, 2, 3])), 1);
        assert_eq!(audit.compare(&pod, &found(&[], &[1, 2, 3])), 0, "counted once");
        audit.forget(5);
        assert_eq!(audit.compare(&pod, &found(&[], &[4])), 0, "its exclusions changed");
    }
}
