//! A pod is who it proves to be, whoever had its address or visits its netns.

use super::*;

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_wrong_address_takes_a_pod_out_of_the_mesh_and_is_said() {
    let mut bed = Bed::new();
    let network = Network::new(&bed, 0);
    let dir = pods_dir(&bed).join(format!("pod{}/main", uid(0)));
    let _process = Reaped(start_in(&network, &dir, "exec sleep infinity"));
    publish(&bed, &[uid(0)], true, "");
    bed.start(&[]);
    let told = answer_all(bed.tunnel());
    bed.wait_state(0, "open", "");
    // The source comes to know the address: it is another one.
    publish(&bed, &[uid(0)], true, "  addresses: [10.9.9.9]\n");
    bed.wait_state(0, "refused", "address_not_held");
    publish(&bed, &[uid(0)], true, "  addresses: [10.100.0.1]\n");
    bed.wait_state(0, "open", "");
    drop(bed);
    let told = told.join().unwrap();
    let kinds: Vec<bool> = told
        .iter()
        .filter(|told| matches!(told, Told::Add(..) | Told::Del(_)))
        .map(|told| matches!(told, Told::Add(..)))
        .collect();
    assert_eq!(kinds, [true, false, true], "{told:?}");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_visit_to_another_pods_netns_changes_nothing() {
    let mut bed = Bed::new();
    let networks = [Network::new(&bed, 0), Network::new(&bed, 1)];
    let pods = pods_dir(&bed);
    let dir = |number| pods.join(format!("pod{}/main", uid(number)));
    let _processes: Vec<Reaped> = (0..2)
        .map(|number| Reaped(start_in(&networks[number], &dir(number), "exec sleep infinity")))
        .collect();
    publish(&bed, &[uid(0), uid(1)], true, "");
    bed.start(&[]);
    let told = answer_all(bed.tunnel());
    bed.wait_state(0, "open", "");
    bed.wait_state(1, "open", "");
    let before = bed.status()["pods"].clone();
    // A process of the first pod enters the second one's netns, and one that never was anywhere else does.
    let enter = format!("nsenter --net=/run/netns/{} sleep 1000 & exec sleep 1000", networks[1].name);
    let visitor = Reaped(start_in(&networks[0], &dir(0).with_file_name("visitor"), &enter));
    let second = Reaped(start_in(&networks[1], &dir(0).with_file_name("second"), "exec sleep 1000"));
    let cgroups = |status: &serde_json::Value| status["cgroups"].as_object().map_or(0, serde_json::Map::len);
    wait_for("the new containers to be seen", || {
        (cgroups(&bed.status()["pods"][0]) == cgroups(&before[0]) + 2).then_some(())
    });
    for number in 0..2 {
        let now = bed.status()["pods"][number].clone();
        for key in ["state", "netns", "addresses"] {
            assert_eq!(now[key], before[number][key], "{key} of pod {number}");
        }
    }
    drop((visitor, second));
    drop(bed);
    let told = told.join().unwrap();
    assert!(!told.iter().any(|told| matches!(told, Told::Del(_))), "{told:?}");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_reused_address_is_the_new_pods_from_the_first_moment_on() {
    let mut bed = Bed::new();
    let rounds = count("ADIT_REUSED_ADDRESSES", 40);
    publish(&bed, &[], true, "");
    bed.start(&[]);
    let told = answer_all(bed.tunnel());
    for round in 0..rounds {
        // The same address in a new netns, for a new uid.
        let network = Network::new(&bed, 0);
        publish(&bed, &[uid(round)], true, "  addresses: [10.100.0.1]\n");
        let pod = pods_dir(&bed).join(format!("pod{}", uid(round)));
        let process = start_in(&network, &pod.join("main"), "exec sleep infinity");
        wait_for("the pod to be open", || {
            let status = bed.status();
            let pod = &status["pods"][0];
            (pod["uid"] == uid(round) && pod["state"] == "open").then_some(())
        });
        end(process);
        remove(&pod);
    }
    drop(bed);
    let told = told.join().unwrap();
    let added: Vec<&String> = told
        .iter()
        .filter_map(|told| match told {
            Told::Add(uid, _) => Some(uid),
            _ => None,
        })
        .collect();
    let expected: Vec<String> = (0..rounds).map(uid).collect();
    assert_eq!(added, expected.iter().collect::<Vec<_>>());
}
