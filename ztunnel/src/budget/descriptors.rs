//! File descriptors: there is one table for the whole process.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

/// At least so many stay for what is no connection: control plane, certificates, node agent.
const LEAST_RESERVE: usize = 256;

/// What the connections of all pods may hold together.
#[derive(Debug)]
pub struct ProcessDescriptors {
    limit: usize,
    held: AtomicUsize,
    /// One pod may not take what others need. Off where there is one pod only.
    fair: bool,
}

impl ProcessDescriptors {
    /// Of a process that may open `open_files`. `reserve`: how many of them are kept; `None`: a
    /// sixteenth, at least 256, at most half.
    #[must_use]
    pub fn new(open_files: usize, reserve: Option<usize>, fair: bool) -> Self {
        let reserve = reserve.unwrap_or_else(|| (open_files / 16).max(LEAST_RESERVE).min(open_files / 2));
        Self { limit: open_files.saturating_sub(reserve), held: AtomicUsize::new(0), fair }
    }

    /// How many connections may hold.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit
    }
}

/// What the connections of one pod hold.
#[derive(Debug)]
pub(crate) struct PodDescriptors(Arc<Pod>);

#[derive(Debug)]
struct Pod {
    process: Arc<ProcessDescriptors>,
    most: usize,
    held: AtomicUsize,
}

impl PodDescriptors {
    /// `most`: the pod's own limit.
    pub(super) fn new(process: &Arc<ProcessDescriptors>, most: Option<usize>) -> Self {
        let (process, most) = (Arc::clone(process), most.unwrap_or(usize::MAX));
        Self(Arc::new(Pod { process, most, held: AtomicUsize::new(0) }))
    }

    /// Takes `count` for a connection. `None`: the pod has its share.
    ///
    /// A pod may have as many as are free: one alone gets half of all, two a third each, and
    /// something is always left for the next one.
    pub(crate) fn take(&self, count: usize) -> Option<DescriptorLease> {
        let lease = self.take_anyway(count);
        let (pod, process) = (&self.0, &self.0.process);
        let (own, all) = (pod.held.load(Relaxed), process.held.load(Relaxed));
        let share = if process.fair { process.limit.saturating_sub(all) } else { usize::MAX };
        (own <= pod.most.min(share) && all <= process.limit).then_some(lease)
    }

    /// The same for what must be, such as the pod's listeners.
    pub(crate) fn take_anyway(&self, count: usize) -> DescriptorLease {
        self.0.held.fetch_add(count, Relaxed);
        self.0.process.held.fetch_add(count, Relaxed);
        DescriptorLease { pod: Arc::clone(&self.0), count }
    }
}

/// Descriptors of one connection, given back on drop.
#[derive(Debug)]
pub(crate) struct DescriptorLease {
    pod: Arc<Pod>,
    count: usize,
}

impl Drop for DescriptorLease {
    fn drop(&mut self) {
        self.pod.held.fetch_sub(self.count, Relaxed);
        self.pod.process.held.fetch_sub(self.count, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(pod: &PodDescriptors) -> Vec<DescriptorLease> {
        std::iter::from_fn(|| pod.take(1)).collect()
    }

    #[test]
    fn a_pod_alone_gets_half_and_there_is_always_room_for_another_one() {
        let process = Arc::new(ProcessDescriptors::new(1000, Some(100), true));
        let [one, two, three] = [(); 3].map(|()| PodDescriptors::new(&process, None));
        let of_one = filled(&one);
        assert_eq!(of_one.len(), 450);
        let of_two = filled(&two);
        assert_eq!(of_two.len(), 225);
        assert_eq!(filled(&three).len(), 112);
        drop(of_two);
        assert_eq!(filled(&three).len(), 225, "what was given back can be taken");
        drop(of_one);
        assert_eq!(process.held.load(Relaxed), 0);
    }

    #[test]
    fn a_pod_has_its_own_limit_and_one_that_is_alone_may_have_all() {
        let process = Arc::new(ProcessDescriptors::new(1000, Some(100), false));
        assert_eq!(filled(&PodDescriptors::new(&process, Some(30))).len(), 30);
        assert_eq!(filled(&PodDescriptors::new(&process, None)).len(), 900);
    }

    #[test]
    fn the_reserve_is_a_sixteenth_within_reason() {
        for (files, limit) in [(1 << 20, (1 << 20) - (1 << 16)), (1024, 768), (100, 50)] {
            assert_eq!(ProcessDescriptors::new(files, None, true).limit(), limit, "of {files}");
        }
    }
}
