//! The exclusion lists of pods, and the ids that the kernel programs know them by.

use std::{collections::BTreeSet, sync::Arc};

use super::PodTable;
use crate::model::exclusions::Exclusions;

impl PodTable {
    /// The exclusions of a pod, and their id; 0: they take no entries. Other exclusions have another id,
    /// so that the programs see the old list or the new one and nothing between; equal ones share
    /// theirs.
    pub(in crate::agent) fn exclusions(&mut self, uid: &str) -> (u32, Arc<Exclusions>) {
        let Some(entry) = self.entries.get_mut(uid) else { return Default::default() };
        let exclusions = entry.exclusions_here();
        (self.exclusion_id(uid, &exclusions), exclusions)
    }

    fn exclusion_id(&mut self, uid: &str, exclusions: &Arc<Exclusions>) -> u32 {
        let Some(entry) = self.entries.get_mut(uid) else { return 0 };
        if !exclusions.takes_entries() {
            entry.exclusions = None;
            return 0;
        }
        if let Some((id, before)) = &entry.exclusions
            && before == exclusions
        {
            return *id;
        }
        let exclusions = Arc::clone(exclusions);
        let id = self.exclusion_ids.get(&exclusions).copied().unwrap_or_else(|| {
            self.last_exclusion_id = self.last_exclusion_id.wrapping_add(1).max(1);
            self.last_exclusion_id
        });
        entry.exclusions = Some((id, Arc::clone(&exclusions)));
        // Of lists that no pod has any more, nothing is remembered.
        let known: BTreeSet<u32> =
            self.iter().filter_map(|entry| Some(entry.exclusions.as_ref()?.0)).collect();
        self.exclusion_ids.retain(|_, id| known.contains(id));
        self.exclusion_ids.insert(exclusions, id);
        id
    }

    /// The ids of the exclusion lists that the pods' last plans name.
    pub(in crate::agent) fn planned_lists(&self) -> BTreeSet<u32> {
        self.iter().filter_map(|entry| Some(entry.plan.exclusions.as_ref()?.0)).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use crate::model::pod::{Entry, Pod, Update};

    use super::*;

    #[test]
    fn equal_exclusions_share_an_id_and_others_get_another() {
        let (mut pods, now) = (PodTable::new(6), Instant::now());
        let mut id = |uid: &str, ports: &[u16]| {
            let exclusions = Exclusions {
                outbound_ports: ports.iter().map(|port| *port..=*port).collect(),
                ..Exclusions::default()
            };
            let pod = Pod { uid: uid.to_owned(), exclusions: Arc::new(exclusions), ..Pod::default() };
            let update = vec![(uid.to_owned(), Some(Entry::Pod(Arc::new(pod))))];
            pods.apply_update(Update::Changed(update), now);
            pods.exclusions(uid).0
        };
        for (uid, ports, expected) in [
            ("a", &[80][..], 7),
            ("a", &[80], 7),
            ("b", &[80], 7),
            ("a", &[81], 8),
            ("a", &[80], 7),
            ("b", &[], 0),
            ("a", &[], 0),
        ] {
            assert_eq!(id(uid, ports), expected, "{uid} {ports:?}");
        }
        assert_eq!(id("c", &[82]), 9, "no id is given twice");
        assert_eq!(pods.exclusions("unknown").0, 0);
    }
}
