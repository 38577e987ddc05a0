//! Very many pods and processes, and watchers that are killed meanwhile.

use super::*;

/// What a watcher holds: fds, and kilobytes of memory.
fn holds(node: &WatcherNode) -> (usize, u64) {
    let pid = node.status()["pid"].as_u64().expect("a pid");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    let rss = rss.trim().trim_end_matches(" kB").parse().expect("a number");
    (fs::read_dir(format!("/proc/{pid}/fd")).expect("fds").count(), rss)
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn pods_that_came_and_went_leave_nothing() {
    let mut node = WatcherNode::new();
    let (pods, at_once) = (TestSize::get().pick(120, 2000), 10);
    publish(&node, &[], true, "");
    node.start(&[]);
    let received = node.tunnel().take_all();
    let networks: Vec<TestNetns> = (0..at_once).map(|number| network(&node, number)).collect();
    let pins = node.pins();
    let mut before = None;
    for batch in 0..pods / at_once {
        let uids: Vec<String> = (0..at_once).map(|i| uid(batch * at_once + i)).collect();
        let dirs: Vec<PathBuf> =
            uids.iter().map(|uid| pods_dir(&node).join(format!("besteffort/pod{uid}"))).collect();
        publish(&node, &uids, true, "");
        let processes: Vec<Child> = networks
            .iter()
            .zip(&dirs)
            .map(|(network, dir)| start_in(network, &dir.join("main"), "exec sleep infinity"))
            .collect();
        wait_for("the pods to be open", || {
            let status = node.status();
            let pods = status["pods"].as_array().unwrap();
            let open = pods.iter().filter(|pod| pod["state"] == "open").count();
            (open == at_once && pods.iter().all(|pod| uids.iter().any(|uid| pod["uid"] == **uid)))
                .then_some(())
        });
        processes.into_iter().for_each(end);
        for dir in &dirs {
            remove(dir);
        }
        publish(&node, &[], true, "");
        wait_for("everything to be put back", || {
            let status = node.status();
            let gone = |key: &str| status[key].as_array().is_some_and(Vec::is_empty);
            (gone("pods") && gone("draining") && node.pins().len() <= pins.len() + 6).then_some(())
        });
        // After the first batch, which fills caches.
        before.get_or_insert_with(|| holds(&node));
    }
    for network in &networks {
        let rules = run(&format!("ip -n {network} rule"));
        assert!(!rules.contains("0x539"), "{rules}");
    }
    let (before, after) = (before.unwrap(), holds(&node));
    // One more may have been open for a moment when it was counted first.
    assert!(after.0 <= before.0, "{} fds, {} before", after.0, before.0);
    assert!(after.1 < before.1 + 8192, "{} kB after {pods} pods, {} kB before", after.1, before.1);
    assert_eq!(node.status()["events"]["lost"], 0);
    let links = node.pins().into_iter().filter(|pin| pin.to_string_lossy().contains("links/netns-")).count();
    assert_eq!(links, 0, "links of netns");
    assert!(!node.dir.path().join("run").join(&node.name).join("records.json").exists() || links == 0);
    drop(node);
    received.join().unwrap();
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn killed_at_any_moment_the_watcher_comes_back_to_the_right_state() {
    let mut node = WatcherNode::new();
    let (kills, pods) = (TestSize::get().pick(6, 100), 8);
    let uids: Vec<String> = (0..pods).map(uid).collect();
    let networks: Vec<TestNetns> = (0..pods).map(|number| network(&node, number)).collect();
    let _processes = start_each(&node, &networks, &uids);
    for round in 0..kills {
        // Half of the pods change with every round, and the watcher dies somewhere in the middle of
        // it.
        publish(&node, &uids[round % 2 * pods / 2..][..pods / 2], true, "");
        node.start(&[]);
        let received = node.tunnel().take_all();
        publish(&node, &uids[(round + 1) % 2 * pods / 2..][..pods / 2], true, "");
        thread::sleep(Duration::from_millis((round as u64 * 7) % 40));
        node.watcher.as_ref().unwrap().signal(Signal::SIGKILL);
        assert!(!node.watcher.as_mut().unwrap().wait().success());
        node.kill_watcher();
        received.join().unwrap();
    }
    publish(&node, &uids[..1], true, "");
    node.start(&["--detach"]);
    let received = node.tunnel().take_all();
    node.wait_state(0, "open", "");
    wait_for("what the killed ones left to be put back", || {
        let status = node.status();
        let others =
            networks[1..].iter().any(|network| run(&format!("ip -n {network} rule")).contains("0x539"));
        (status["draining"].as_array().is_some_and(Vec::is_empty) && !others).then_some(())
    });
    let links = node.pins().into_iter().filter(|pin| pin.to_string_lossy().contains("links/netns-")).count();
    assert_eq!(links, 1);
    drop(node);
    received.join().unwrap();
}

/// Processes that the machine has started, and the CPU time of a process, in ticks of 10 ms.
fn started_and_spent(pid: u64) -> (u64, u64) {
    let stat = fs::read_to_string("/proc/stat").expect("stat");
    let started = stat.lines().find_map(|line| line.strip_prefix("processes ")).expect("processes");
    let own = fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    // What follows the name, which may hold anything: state, …; the 14th and 15th are user and
    // system time.
    let fields: Vec<&str> = own.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    let ticks = |i: usize| fields[i].parse::<u64>().expect("ticks");
    (started.trim().parse().expect("a number"), ticks(11) + ticks(12))
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_storm_of_processes_hides_no_pod() {
    // A shell command that starts processes as fast as it can.
    #[expect(clippy::disallowed_methods, reason = "an option of the test")]
    let storm = std::env::var("ADIT_STORM").unwrap_or_else(|_| "while :; do /bin/true; (:); done".to_owned());
    let mut node = WatcherNode::new();
    let networks: Vec<TestNetns> = (0..6).map(|number| network(&node, number)).collect();
    let dir = |node: &WatcherNode, number| pods_dir(node).join(format!("pod{}/main", uid(number)));
    let uids: Vec<String> = (0..networks.len()).map(uid).collect();
    publish(&node, &uids, true, "");
    node.start(&[]);
    let received = node.tunnel().take_all();
    let pid = node.status()["pid"].as_u64().expect("a pid");
    let mut running = Vec::new();
    for (place, stormy) in [("a pod", dir(&node, 0)), ("elsewhere", node.cgroup.join("watcher/storm"))] {
        let storms: Vec<KillOnDrop> =
            (0..2).map(|_| KillOnDrop(start_in(&networks[0], &stormy, &storm))).collect();
        if place == "a pod" {
            node.wait_state(0, "open", "");
        }
        let (since, before) = (Instant::now(), started_and_spent(pid));
        let second = usize::from(place != "a pod") * 2;
        let new: Vec<KillOnDrop> = (1..3)
            .map(|number| {
                let dir = dir(&node, number + second);
                KillOnDrop(start_in(&networks[number + second], &dir, "exec sleep 1000"))
            })
            .collect();
        for number in 1..3 {
            node.wait_state(number + second, "open", "");
        }
        // For a while, so that the rate says something.
        wait_for("three seconds of storm", || since.elapsed() > Duration::from_secs(3));
        let after = started_and_spent(pid);
        let seconds = since.elapsed().as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "for people")]
        let (rate, cpu) = ((after.0 - before.0) as f64 / seconds, (after.1 - before.1) as f64 / seconds);
        eprintln!(
            "storm in {place}: {rate:.0} processes a second, watcher {cpu:.1} % of a core, {}",
            node.status()["events"]
        );
        drop(storms);
        running.extend(new);
    }
    drop(running);
    drop(node);
    received.join().unwrap();
}
