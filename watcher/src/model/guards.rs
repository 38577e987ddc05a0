//! Processes of a pod that are left alone: their connections stay outside the mesh, such as those of a
//! proxy that another mesh has put into the pod.

use std::collections::BTreeSet;

/// The guards of one pod, of one namespace or of the mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct GuardList {
    /// Which processes.
    pub guards: Guards,
    /// What is wider does not count.
    pub alone: bool,
}

/// Which processes are left alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Guards {
    /// Those of these users.
    pub users: BTreeSet<u32>,
    /// Those of these groups, by their first one.
    pub groups: BTreeSet<u32>,
    /// Those of these containers: by name, or the name of the cgroup's directory.
    pub containers: BTreeSet<String>,
    /// Whether the numbers are the node's: then nobody has to translate them any more.
    pub of_node: bool,
}

impl Guards {
    /// Whether they name a user or a group.
    #[must_use]
    pub fn has_ids(&self) -> bool {
        !self.users.is_empty() || !self.groups.is_empty()
    }

    /// Whether they leave nobody alone.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.has_ids() && self.containers.is_empty()
    }

    /// What holds for a pod: `levels` from the narrowest to the widest. They add up, as far as one does
    /// not say that it stands alone.
    #[must_use]
    pub fn effective<'a>(levels: impl Iterator<Item = &'a GuardList>) -> Self {
        let mut all = Self::default();
        for list in levels {
            all.users.extend(&list.guards.users);
            all.groups.extend(&list.guards.groups);
            all.containers.extend(list.guards.containers.iter().cloned());
            if list.alone {
                break;
            }
        }
        all
    }

    /// The same with the numbers of the node: `user` and `group` translate those of the pod. What has
    /// none there is left out.
    #[must_use]
    pub fn translated(&self, user: impl Fn(u32) -> Option<u32>, group: impl Fn(u32) -> Option<u32>) -> Self {
        if self.of_node {
            return self.clone();
        }
        Self {
            users: self.users.iter().filter_map(|id| user(*id)).collect(),
            groups: self.groups.iter().filter_map(|id| group(*id)).collect(),
            containers: self.containers.clone(),
            of_node: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guards_add_up_until_one_stands_alone() {
        let users = |users: &[u32], alone| GuardList {
            guards: Guards { users: users.iter().copied().collect(), ..Guards::default() },
            alone,
        };
        let of =
            |levels: &[GuardList]| Guards::effective(levels.iter()).users.into_iter().collect::<Vec<_>>();
        let mesh = users(&[1337], false);
        assert_eq!(of(&[users(&[1], false), users(&[], false), mesh.clone()]), [1, 1337]);
        assert_eq!(of(&[users(&[], false), users(&[2], true), mesh.clone()]), [2]);
        assert!(of(&[users(&[], true), mesh]).is_empty());
    }

    #[test]
    fn what_the_pod_has_no_number_for_guards_nobody() {
        let guards = Guards { users: [0, 1337].into(), groups: [7].into(), ..Guards::default() };
        let here = guards.translated(|id| (id > 0).then(|| id + 100_000), |_| None);
        assert_eq!((here.users.iter().collect::<Vec<_>>(), here.has_ids()), (vec![&101_337], true));
        assert!(here.groups.is_empty() && here.translated(|_| None, |_| None) == here);
    }
}
