//! Pods that go on making requests, and hold connections, while something is done to the cluster; and
//! what of it is seen on the wire.

use std::fs;

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use testbed::{
    capture::{Capture, segment::Segment},
    process::Process,
    real_cluster::Pod,
    wait::{try_wait_slowly, wait_slowly},
};

use crate::rig::{DEMO, LIMIT, PodSpec, Rig, SERVER};

/// A client that asks or holds, and prints how that goes.
#[derive(Debug)]
pub struct Traffic(Pod);

impl Traffic {
    /// Starts it and waits until it is answered.
    pub fn start(rig: &Rig, spec: PodSpec<'_>) -> Self {
        let traffic = Self(rig.pod(spec));
        traffic.more(rig, 1);
        traffic
    }

    /// A kubelet that has just started again knows nothing of the pod yet.
    fn log(&self, rig: &Rig) -> String {
        wait_slowly(LIMIT, "the log of the client", || {
            rig.cluster.kubectl_line(&["-n", &self.0.namespace, "logs", &self.0.name])
        })
    }

    /// How much was answered so far, and what was not.
    pub fn so_far(&self, rig: &Rig) -> (usize, Vec<String>) {
        let log = self.log(rig);
        let count = log.lines().rev().find_map(|line| line.strip_prefix("ok ")?.parse().ok());
        let failed = log.lines().filter_map(|line| line.strip_prefix("failed "));
        (count.unwrap_or(0), failed.map(str::to_owned).collect())
    }

    /// Waits for `count` more answers.
    pub fn more(&self, rig: &Rig, count: usize) {
        let wanted = self.so_far(rig).0 + count;
        let reached = try_wait_slowly(LIMIT, || self.so_far(rig).0 >= wanted);
        assert!(
            reached.is_some(),
            "{}: no more answers\n{}\n{}",
            self.0.name,
            self.log(rig),
            rig.system_story()
        );
    }

    /// Nothing has failed so far, also not among `count` more answers.
    pub fn assert_whole(&self, rig: &Rig, count: usize, when: &str) {
        self.more(rig, count);
        let (answered, failed) = self.so_far(rig);
        assert!(
            failed.is_empty(),
            "{}, {when}: {} failed beside {answered} that did not, the first {:?}\n{}",
            self.0.name,
            failed.len(),
            &failed[..failed.len().min(3)],
            rig.system_story()
        );
        println!("{}, {when}: {answered} answered, none failed", self.0.name);
    }

    /// Waits until it has gone.
    pub fn end(self, rig: &Rig) {
        rig.cluster.kubectl(&["-n", &self.0.namespace, "delete", "pod", &self.0.name]);
        wait_slowly(LIMIT, "the client to go", || rig.cluster.pod(&self.0.namespace, &self.0.name).is_none());
    }
}

/// Requests with a connection each, and connections that stay open, from node1 to node2.
#[derive(Debug)]
pub struct Load {
    requests: Traffic,
    connections: Traffic,
}

impl Load {
    /// Starts both; `number` tells them from others.
    pub fn start(rig: &Rig, number: u8) -> Self {
        let client = |name: &str, role: &[&str]| {
            let name = format!("{name}-{number}");
            Traffic::start(
                rig,
                PodSpec { namespace: DEMO, name: &name, account: "client", node: "node1", role },
            )
        };
        Self {
            requests: client("requests", &["ask", SERVER, "50", "10"]),
            connections: client("connections", &["hold", "http://server.demo.svc/echo", "200", "5"]),
        }
    }

    /// Nothing of either has failed so far.
    pub fn assert_whole(&self, rig: &Rig, when: &str) {
        self.requests.assert_whole(rig, 200, when);
        self.connections.assert_whole(rig, 25, when);
    }

    /// How many requests were answered so far, as the node has it on disk.
    pub fn answered_without_api(&self, rig: &Rig) -> usize {
        let Pod { namespace, name, uid, .. } = &self.requests.0;
        let last = format!("tail -n 1 /var/log/pods/{namespace}_{name}_{uid}/main/0.log");
        let line = rig.cluster.nodes[0].run(&last);
        line.rsplit(' ').next().and_then(|count| count.trim().parse().ok()).unwrap_or(0)
    }

    /// Waits until both have gone.
    pub fn end(self, rig: &Rig) {
        self.requests.end(rig);
        self.connections.end(rig);
    }
}

/// `wrk` in a pod: so many connections that each make a request, end, and come again.
#[derive(Debug)]
pub struct Storm(Process);

impl Storm {
    /// In `client`, to `url`: about 1,000 requests a second with a connection each, as long as the
    /// machine keeps up.
    pub fn start(rig: &Rig, client: &Pod, url: &str) -> Self {
        const CONNECTIONS: u32 = 128;
        const PAUSE: u32 = 70;
        let script = rig.cluster.file("wrk.lua");
        fs::write(&script, format!("function delay() return {PAUSE} end\n")).expect("script");
        let node = rig.node_of(client);
        let pid = rig.process_of(client);
        let line = format!(
            "cgroup=$(sed -n 's/^0:://p' /proc/{pid}/cgroup)
             mount=$(awk '$3 == \"cgroup2\" {{ print $2; exit }}' /proc/mounts)
             echo $$ > $mount$cgroup/cgroup.procs
             exec nsenter -t {pid} -n wrk -t 1 -c {CONNECTIONS} -d 10m --timeout 10s -s {} \
               -H 'Connection: close' {url}",
            script.display()
        );
        let log = rig.cluster.file("wrk.log");
        Self(Process::spawn("wrk", node.command("", &["sh", "-ec", &line]), &log))
    }

    /// Ends it: how many requests a second were answered.
    ///
    /// # Panics
    /// If one was not answered.
    pub fn end(self) -> f64 {
        let group = Pid::from_raw(i32::try_from(self.0.pid()).expect("a pid"));
        killpg(group, Signal::SIGINT).expect("wrk to run");
        let said = wait_slowly(LIMIT, "what wrk says", || {
            Some(self.0.output()).filter(|said| said.contains("Transfer/sec"))
        });
        println!("{said}");
        assert!(!said.contains("Socket errors") && !said.contains("Non-2xx"), "{said}");
        let rate = said.lines().find_map(|line| line.strip_prefix("Requests/sec:"));
        rate.expect("a rate").trim().parse().expect("a number")
    }
}

/// What went from one pod to the other since the capture began was HBONE, and there was some.
pub fn assert_only_hbone(wire: &Capture, client: &Pod, server: &Pod) {
    let between = |from: &Pod, to: &Pod, segment: &Segment| {
        from.ips.contains(&segment.from.ip().to_string()) && to.ips.contains(&segment.to.ip().to_string())
    };
    let clear: Vec<_> = wire
        .take()
        .into_iter()
        .map(|seen| seen.segment)
        .filter(|segment| between(client, server, segment) || between(server, client, segment))
        .filter(|segment| segment.from.port() != 15008 && segment.to.port() != 15008)
        .collect();
    assert!(clear.is_empty(), "in clear: {clear:?}");
    assert!(wire.counts().1 > 0, "no HBONE on the wire");
}
