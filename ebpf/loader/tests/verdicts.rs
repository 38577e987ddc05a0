//! How often each rule decided, as the programs count it.

use adit_ebpf_common::{
    trace::Rule,
    verdicts::{ELSEWHERE, Verdicts},
};

use adit_ebpf_loader::Kernel;

use crate::rig::{INBOUND, OUTBOUND, Rig, agent::Agent, agent::How, at};

fn counted(rig: &Rig, netns_cookie: u64) -> Vec<(Rule, u64)> {
    let counts = rig.kernel.verdicts().of(netns_cookie).unwrap();
    counts.iter().flat_map(Verdicts::used).collect()
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn verdicts_are_counted_for_the_pod_whose_netns_it_is() {
    let mut rig = Rig::new();
    rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    rig.tunnel.listen(&format!("[::]:{INBOUND}"));
    rig.world.listen("[::]:8080");
    rig.app.dial(How::Tcp, at("192.0.2.1", 80)).unwrap();
    assert_eq!(counted(&rig, ELSEWHERE), [(Rule::Redirect, 1)], "nothing is lost before it is counted apart");

    rig.kernel.verdicts().begin(rig.cookie).unwrap();
    rig.app.dial(How::Tcp, at("192.0.2.1", 80)).unwrap();
    rig.app.dial(How::Tcp, at("192.0.2.2", 443)).unwrap();
    rig.world.dial(How::Tcp, at("10.99.0.1", 5678)).unwrap();
    // In the pod's cgroup, in a netns of its own.
    let mut nested = Agent::start();
    nested.enter_cgroup(&rig.cgroups.join("pods/mesh/container"));
    nested.enter_netns_of(&rig.world);
    nested.dial(How::Tcp, at("10.99.0.2", 8080)).unwrap();
    let expected = [(Rule::Redirect, 2), (Rule::SteerPlain, 1), (Rule::OtherNetns, 1)];
    assert_eq!(counted(&rig, rig.cookie), expected);
    rig.kernel.verdicts().begin(rig.cookie).unwrap();
    assert_eq!(counted(&rig, rig.cookie), expected, "counting goes on");
    assert_eq!(counted(&rig, ELSEWHERE), [(Rule::Redirect, 1)]);
}

/// Metrics must not go down when a pod ends.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn what_was_counted_of_a_pod_that_ended_stays_in_the_total() {
    let mut rig = Rig::new();
    rig.kernel.verdicts().begin(rig.cookie).unwrap();
    rig.world.dial(How::Tcp, at("10.99.0.1", 5678)).unwrap_err();
    let verdicts = rig.kernel.verdicts();
    let total =
        |verdicts: &adit_ebpf_loader::VerdictCounts| verdicts.total().unwrap().used().collect::<Vec<_>>();
    let before = total(verdicts);
    assert_eq!(before.len(), 1, "{before:?}");
    assert_eq!(verdicts.netns().unwrap(), [rig.cookie]);
    verdicts.end(rig.cookie).unwrap();
    verdicts.end(rig.cookie).unwrap();
    assert_eq!((verdicts.netns().unwrap(), total(verdicts)), (vec![], before.clone()));
    assert_eq!(counted(&rig, rig.cookie), []);
    let successor = Kernel::open(&rig.bpffs.pins()).unwrap();
    assert_eq!(total(successor.verdicts()), before, "nor when a watcher ends");
}
