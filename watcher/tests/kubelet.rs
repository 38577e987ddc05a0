//! Whose connections pass as the kubelet's: of who listens on its port now.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use testbed::{
    api_server::ApiServer,
    cluster::Cluster,
    process::Process,
    wait::{LIMIT, try_wait, wait_for},
};

/// As real ones have it; each node has a netns of its own.
const PORT: &str = "10250";
const LISTEN: &str = "
import socket, sys, time
s = socket.socket(socket.AF_INET6); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(('::', int(sys.argv[1]))); s.listen(); print('listening', flush=True); time.sleep(1000)
";

struct Kubelet {
    cgroup: PathBuf,
    _process: Process,
}

impl Kubelet {
    /// A program in the cgroup `name` of the first node that listens on the kubelet's port.
    fn start(cluster: &Cluster, name: &str) -> Self {
        let node = &cluster.nodes[0];
        let cgroup = node.cgroup.join(name);
        fs::create_dir_all(&cgroup).expect("cgroup");
        let log = cluster.dir.path().join(format!("{name}.log"));
        let words = ["python3", "-c", LISTEN, PORT];
        let process = Process::spawn(name, node.at(&cgroup).command(&words), &log);
        wait_for("the listener", || process.output().contains("listening"));
        Self { cgroup, _process: process }
    }

    /// Kills it. Its cgroup stays.
    fn kill(self) {
        fs::write(self.cgroup.join("cgroup.kill"), "1").expect("Linux 5.14");
        wait_for("its end", || {
            fs::read_to_string(self.cgroup.join("cgroup.procs")).is_ok_and(|text| text.is_empty())
        });
    }
}

/// The names of the kubelet's programs that are pinned below `dir`.
fn attached(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("bpffs").filter_map(Result::ok).map(|entry| entry.path());
    let (dirs, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let names = files.iter().filter_map(|path| path.file_name()?.to_str().map(str::to_owned));
    let own = names.filter(|name| name.starts_with("kubelet-"));
    own.chain(dirs.iter().flat_map(|dir| attached(dir))).collect()
}

/// Waits until the kubelet's program is attached to where `kubelet` runs, and to nothing else.
fn wait_attached(cluster: &Cluster, kubelet: &Kubelet) {
    let wanted = format!("kubelet-{}", fs::metadata(&kubelet.cgroup).expect("cgroup").ino());
    let mut last = Vec::new();
    let done = try_wait(LIMIT, || {
        last = attached(&cluster.bpffs());
        last == [wanted.clone()]
    });
    assert!(done.is_some(), "wanted {wanted}, found {last:?}\n{}", cluster.nodes[0].story());
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_kubelet_that_moved_is_found_although_its_old_cgroup_stays() {
    let api = ApiServer::shared();
    let mut cluster = Cluster::new();
    let (cgroup2, bpffs) = (cluster.cgroup2.clone(), cluster.bpffs());
    cluster.nodes[0].contain(&cgroup2);
    cluster.follow_api(0, &api);
    let first = Kubelet::start(&cluster, "kubelet-one");
    cluster.nodes[0].start_watcher(&cgroup2, &bpffs, &["--detach"]);
    wait_attached(&cluster, &first);
    first.kill();
    let second = Kubelet::start(&cluster, "kubelet-two");
    wait_attached(&cluster, &second);
}
