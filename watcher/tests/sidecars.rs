//! Pods with the sidecars of other meshes: they are recognised and left alone, and each connection
//! between them and pods of this mesh is captured exactly once.

use std::{fs, path::Path};

use adit_ebpf_common::enrolment::flag;
use adit_ebpf_loader::Kernel;
use serde_json::json;
use testbed::{
    api_node::ApiNode,
    cluster::{Cluster, ClusterPod, Enrol},
    process::{Placement, Process},
    program::cache,
    wait::{LIMIT, try_wait, wait_for},
    watcher_node::WatcherNode,
};

/// Listens on the ports that its arguments name, and stays.
const PROXY: &str = "
import socket, sys, time
kept = [socket.create_server(('', int(port))) for port in sys.argv[1:]]
print('listens', flush=True)
time.sleep(10000)
";

/// A process of this user in the pod that listens on these ports.
fn proxy(node: &WatcherNode, pod: usize, user: u32, ports: &[&str]) -> Process {
    let here = &node.pods[pod];
    let user = format!("--reuid={user}");
    let words = [&["setpriv", &user, "--clear-groups", "/usr/bin/python3", "-c", PROXY], ports].concat();
    let command = Placement::in_cgroup(&here.cgroup.join("container")).in_netns(&here.netns).command(&words);
    let process = Process::spawn("proxy", command, &node.dir.path().join(format!("proxy-{pod}.log")));
    wait_for("the proxy to listen", || process.output().contains("listens"));
    process
}

/// What connect(2) says at once to a process of the pod: `EPERM` if it is captured, since the tunnel
/// has no listeners here.
fn dial(node: &WatcherNode, pod: usize) -> String {
    const DIAL: &str = "
import errno, socket, sys
s = socket.socket(); s.setblocking(False)
print(errno.errorcode[s.connect_ex((sys.argv[1], 80))])
";
    let here = &node.pods[pod];
    let placement = Placement::in_cgroup(&here.cgroup.join("container")).in_netns(&here.netns);
    let to = format!("10.88.{pod}.99");
    let output = placement.command(&["/usr/bin/python3", "-c", DIAL, &to]).output().expect("python3");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// What the maps say was found in the pod.
fn detected(node: &WatcherNode, pod: usize) -> u32 {
    let kernel = Kernel::open(&node.bpffs().join("adit").join(&node.name)).unwrap();
    let status = node.status();
    let cgroups = status["pods"][pod]["cgroups"].as_object().unwrap();
    let id = cgroups[node.pods[pod].cgroup.to_str().unwrap()].as_u64().unwrap();
    kernel.cgroup(id).unwrap().map_or(0, |info| info.detected)
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_sidecar_that_listens_as_its_user_is_found_where_an_operator_wants_that() {
    let mut node = WatcherNode::new();
    let (istio, linkerd, root, half) = (node.pod("a"), node.pod("b"), node.pod("c"), node.pod("d"));
    let mut first = proxy(&node, istio, 1337, &["15001", "15006"]);
    let _others = [proxy(&node, root, 0, &["15001", "15006"]), proxy(&node, half, 1337, &["15001"])];
    node.write_pods(&[true; 4], "");
    // Without the option an application is an application.
    node.start(&["--rescan", "600"]);
    let told = node.tunnel().take_all();
    node.wait_state(istio, "open", "reserved_port");
    node.wait_state(linkerd, "open", "");
    assert_eq!((dial(&node, istio).as_str(), detected(&node, istio)), ("EPERM", 0));
    node.kill_watcher();
    drop(told.join());

    node.start(&["--rescan", "1", "--detect-sidecars"]);
    let _told = node.tunnel().take_all();
    node.wait_state(istio, "plain", "sidecar");
    node.wait_state(root, "open", "reserved_port");
    node.wait_state(half, "open", "reserved_port");
    assert_eq!(detected(&node, istio), flag::SIDECAR);
    assert_eq!([root, half].map(|pod| detected(&node, pod)), [0, 0]);
    assert_eq!([istio, root, half].map(|pod| dial(&node, pod)), ["EINPROGRESS", "EPERM", "EPERM"]);
    assert!(!node.pods[istio].is_prepared(), "nothing of ours is in its netns");
    // One that starts in a pod that is served.
    let _late = proxy(&node, linkerd, 2102, &["4140", "4143"]);
    node.wait_state(linkerd, "plain", "sidecar");
    assert_eq!(dial(&node, linkerd), "EINPROGRESS");
    // A sidecar that starts anew finds its ports free.
    first.kill();
    let _again = proxy(&node, istio, 1337, &["15001", "15006"]);
    node.wait_state(istio, "plain", "sidecar");
}

#[test]
#[ignore = "needs root: make test"]
fn a_sidecar_is_known_by_what_its_injector_leaves() {
    let mut node = ApiNode::new(&json!({"istio.io/dataplane-mode": "ambient"}));
    let meta = |annotations, labels| json!({"metadata": {"annotations": annotations, "labels": labels}});
    let pods = [
        ("istio", meta(json!({"sidecar.istio.io/status": "{}"}), json!({})), true),
        ("linkerd", meta(json!({"linkerd.io/proxy-version": "edge-26.1.1"}), json!({})), true),
        ("kuma", meta(json!({"kuma.io/sidecar-injected": "true"}), json!({})), true),
        ("fsm", meta(json!({}), json!({"fsm-proxy-uuid": "1"})), true),
        ("container", json!({"spec": {"containers": [{"name": "linkerd-proxy", "image": "x"}]}}), true),
        ("none", meta(json!({"kuma.io/sidecar-injected": "false"}), json!({})), false),
    ];
    for (name, more, _) in &pods {
        node.pod(name, more);
    }
    node.host.start(&[]);
    let _told = node.tunnel().take_all();
    for (name, _, is_one) in &pods {
        let (state, code) = if *is_one { ("plain", "sidecar") } else { ("open", "") };
        node.wait_state(name, state, code);
    }
}

/// Envoy as Istio's sidecar has it: an original-destination cluster behind both of its ports.
fn envoy_config() -> String {
    let listener = |name: &str, port: u16| {
        format!(
            r#"  - name: {name}
    address: {{socket_address: {{address: "0.0.0.0", port_value: {port}}}}}
    listener_filters:
    - name: original_dst
      typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst}}
    filter_chains:
    - filters:
      - name: tcp
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: {name}
          cluster: original
          access_log:
          - name: log
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog
              log_format: {{text_format_source: {{inline_string: "captured {name} %DOWNSTREAM_LOCAL_ADDRESS%\n"}}}}
"#
        )
    };
    format!(
        "static_resources:\n  listeners:\n{}{}  clusters:\n  - name: original\n    type: ORIGINAL_DST\n    \
         lb_policy: CLUSTER_PROVIDED\n    connect_timeout: 5s\n",
        listener("outbound", 15001),
        listener("inbound", 15006)
    )
}

/// The redirection that an init container or a CNI plugin of a sidecar mesh makes in the pod's netns.
const REDIRECTION: &str = "
table ip sidecar {
  chain out {
    type nat hook output priority -100
    meta skuid 1337 return
    ip daddr 127.0.0.0/8 return
    meta l4proto tcp redirect to :15001
  }
  chain in {
    type nat hook prerouting priority -100
    meta l4proto tcp redirect to :15006
  }
}
";

/// Envoy in the pod, as the user of Istio's sidecar, and the redirection to it.
fn sidecar(cluster: &Cluster, pod: &ClusterPod) -> Process {
    let dir = cluster.dir.path();
    let file = |end: &str, text: &str| {
        let path = dir.join(format!("{}-{end}", pod.name));
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let (config, rules) = (file("envoy.yaml", &envoy_config()), file("rules", REDIRECTION));
    let binary = cache().join("envoy/envoy");
    assert!(binary.exists(), "no Envoy at {}: run make setup", binary.display());
    // Files of the tests are root's.
    let user = [
        "setpriv",
        "--reuid=1337",
        "--regid=1337",
        "--clear-groups",
        "--inh-caps=+dac_read_search",
        "--ambient-caps=+dac_read_search",
    ];
    let options = [
        "--disable-hot-restart",
        "--concurrency",
        "1",
        "--log-level",
        "error",
        "--file-flush-interval-msec",
        "100",
        "-c",
        &config,
    ];
    let words = [&user[..], &[binary.to_str().unwrap()], &options].concat();
    let process = pod.spawn("envoy", &words, &dir.join(format!("{}-envoy.log", pod.name)));
    wait_for("Envoy to listen", || {
        let listening = pod.exec(&["ss", "-Hltn", "sport = :15006"]);
        (!listening.stdout.is_empty()).then_some(())
    });
    let output = pod.exec(&["nft", "-f", &rules]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    process
}

/// How often each captured a connection: the two tunnels and the two sidecars, outbound and inbound.
fn captures(cluster: &Cluster, sidecars: &[Process; 2]) -> [[usize; 2]; 4] {
    const DIRECTIONS: [&str; 2] = ["outbound", "inbound"];
    let tunnel = |node: usize| {
        let log = cluster.nodes[node].access_log();
        DIRECTIONS.map(|direction| {
            log.iter().filter(|line| line.contains(&format!("direction=\"{direction}\""))).count()
        })
    };
    let sidecar = |envoy: &Process| {
        let log = envoy.output();
        DIRECTIONS.map(|direction| log.matches(&format!("captured {direction} ")).count())
    };
    [tunnel(0), tunnel(1), sidecar(&sidecars[0]), sidecar(&sidecars[1])]
}

/// Has every pod of the file enrolled by its label.
fn relabel(path: &Path) {
    let text = fs::read_to_string(path).unwrap();
    let next = path.with_extension("next");
    let (head, entries) = text.split_once("- ").unwrap();
    let labelled = entries.split("\n- ").map(|entry| {
        let label = "  labels: {istio.io/dataplane-mode: ambient}";
        if entry.contains("labels:") {
            format!("- {entry}\n")
        } else {
            format!("- {}\n{label}\n", entry.trim_end())
        }
    });
    fs::write(&next, head.to_owned() + &labelled.collect::<String>()).unwrap();
    fs::rename(next, path).unwrap();
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn each_connection_between_sidecars_and_this_mesh_is_captured_exactly_once() {
    let mut cluster = Cluster::new();
    let [near, far] = [0, 1].map(|node| cluster.pod(&format!("ambient{node}"), node, Enrol::Mesh));
    // Nobody in the mesh takes them for its own.
    let [near_side, far_side] = [0, 1].map(|node| cluster.pod(&format!("sidecar{node}"), node, Enrol::Plain));
    for pod in [&near, &far, &near_side, &far_side] {
        cluster.serve_web(pod, &pod.name);
    }
    let sidecars = [sidecar(&cluster, &near_side), sidecar(&cluster, &far_side)];
    for node in &mut cluster.nodes {
        node.watcher_words = ["--rescan", "600", "--detect-sidecars"].map(str::to_owned).into();
    }
    cluster.start();
    // A label would enrol them, and what is found in them prevents it.
    for node in &cluster.nodes {
        relabel(&node.pods_file());
        let reached = try_wait(LIMIT, || node.status().contains("a sidecar of Istio"));
        assert!(reached.is_some(), "{}", node.status());
    }
    let (tunnel0, tunnel1, envoy0, envoy1) = (0, 1, 2, 3);
    let (outbound, inbound) = (0, 1);
    let mut expected = captures(&cluster, &sidecars);
    for (from, to, captured) in [
        (&near, &far, [(tunnel0, outbound), (tunnel1, inbound)]),
        (&near, &far_side, [(tunnel0, outbound), (envoy1, inbound)]),
        (&near_side, &far, [(envoy0, outbound), (tunnel1, inbound)]),
        (&near_side, &far_side, [(envoy0, outbound), (envoy1, inbound)]),
        // On one node.
        (&near, &near_side, [(tunnel0, outbound), (envoy0, inbound)]),
        (&near_side, &near, [(envoy0, outbound), (tunnel0, inbound)]),
    ] {
        let said = from.curl(&format!("http://{}:8080/", to.v4)).unwrap_or_else(|error| {
            panic!("{} to {}: {error}\n{}", from.name, to.name, cluster.nodes[0].story())
        });
        assert!(said.starts_with(&to.name), "{said}");
        for (who, direction) in captured {
            expected[who][direction] += 1;
        }
        let mut last = [[0; 2]; 4];
        let reached = try_wait(LIMIT, || {
            last = captures(&cluster, &sidecars);
            last == expected
        });
        assert!(reached.is_some(), "{} to {}: {last:?}, expected {expected:?}", from.name, to.name);
    }
}
