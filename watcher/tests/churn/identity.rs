//! A pod keeps its identity: another pod had its address before, or processes of others visit its
//! netns.

use super::*;

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_wrong_address_takes_a_pod_out_of_the_mesh_and_is_said() {
    let mut node = WatcherNode::new();
    let network = network(&node, 0);
    let dir = pods_dir(&node).join(format!("pod{}/main", uid(0)));
    let _process = KillOnDrop(start_in(&network, &dir, "exec sleep infinity"));
    publish(&node, &[uid(0)], true, "");
    node.start(&[]);
    let received = node.tunnel().take_all();
    node.wait_state(0, "open", "");
    // The source comes to know the address: it is another one.
    publish(&node, &[uid(0)], true, "  addresses: [10.9.9.9]\n");
    node.wait_state(0, "refused", "address_not_held");
    publish(&node, &[uid(0)], true, "  addresses: [10.100.0.1]\n");
    node.wait_state(0, "open", "");
    drop(node);
    let received = received.join().unwrap();
    let kinds: Vec<bool> = received
        .iter()
        .filter(|received| matches!(received, Received::Add(..) | Received::Del(_)))
        .map(|received| matches!(received, Received::Add(..)))
        .collect();
    assert_eq!(kinds, [true, false, true], "{received:?}");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_visit_to_another_pods_netns_changes_nothing() {
    let mut node = WatcherNode::new();
    let networks = [network(&node, 0), network(&node, 1)];
    let pods = pods_dir(&node);
    let dir = |number| pods.join(format!("pod{}/main", uid(number)));
    let _processes: Vec<KillOnDrop> = (0..2)
        .map(|number| KillOnDrop(start_in(&networks[number], &dir(number), "exec sleep infinity")))
        .collect();
    publish(&node, &[uid(0), uid(1)], true, "");
    node.start(&[]);
    let received = node.tunnel().take_all();
    node.wait_state(0, "open", "");
    node.wait_state(1, "open", "");
    let before = node.status()["pods"].clone();
    // A process of the first pod enters the second one's netns, and one that never was anywhere
    // else does.
    let enter = format!("nsenter --net=/run/netns/{} sleep 1000 & exec sleep 1000", networks[1]);
    let visitor = KillOnDrop(start_in(&networks[0], &dir(0).with_file_name("visitor"), &enter));
    let second = KillOnDrop(start_in(&networks[1], &dir(0).with_file_name("second"), "exec sleep 1000"));
    let cgroups = |status: &serde_json::Value| status["cgroups"].as_object().map_or(0, serde_json::Map::len);
    wait_for("the new containers to be seen", || {
        (cgroups(&node.status()["pods"][0]) == cgroups(&before[0]) + 2).then_some(())
    });
    for number in 0..2 {
        let now = node.status()["pods"][number].clone();
        for key in ["state", "netns", "addresses"] {
            assert_eq!(now[key], before[number][key], "{key} of pod {number}");
        }
    }
    drop((visitor, second));
    drop(node);
    let received = received.join().unwrap();
    assert!(!received.iter().any(|received| matches!(received, Received::Del(_))), "{received:?}");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_reused_address_is_the_new_pods_from_the_first_moment_on() {
    let mut node = WatcherNode::new();
    let rounds = TestSize::get().pick(40, 1000);
    publish(&node, &[], true, "");
    node.start(&[]);
    let received = node.tunnel().take_all();
    for round in 0..rounds {
        // The same address in a new netns, for a new uid.
        let network = network(&node, 0);
        publish(&node, &[uid(round)], true, "  addresses: [10.100.0.1]\n");
        let pod = pods_dir(&node).join(format!("pod{}", uid(round)));
        let process = start_in(&network, &pod.join("main"), "exec sleep infinity");
        wait_for("the pod to be open", || {
            let status = node.status();
            let pod = &status["pods"][0];
            (pod["uid"] == uid(round) && pod["state"] == "open").then_some(())
        });
        end(process);
        remove(&pod);
    }
    drop(node);
    let received = received.join().unwrap();
    let added: Vec<&String> = received
        .iter()
        .filter_map(|received| match received {
            Received::Add(uid, _) => Some(uid),
            _ => None,
        })
        .collect();
    let expected: Vec<String> = (0..rounds).map(uid).collect();
    assert_eq!(added, expected.iter().collect::<Vec<_>>());
}
