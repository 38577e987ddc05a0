//! Istio's control plane in the cluster: its own charts, with an image of what `.ci/setup/istio`
//! builds.

use testbed::{image, istio};

use crate::rig::{ISTIO, Rig, image_folder};

/// Installs Istio's kinds and its control plane, on `node1`, and waits until it is ready.
pub fn install(rig: &Rig) {
    rig.cluster.nodes[0].import(&image::istiod(&image_folder()));
    helm(rig, "istio-base", "base", &["--create-namespace"]);
    helm(
        rig,
        "istiod",
        "istio-control/istio-discovery",
        &[
            "--set=profile=ambient",
            &format!("--set=image={}", image::ISTIOD),
            "--set=global.imagePullPolicy=Never",
            "--set=autoscaleEnabled=false",
            "--set=resources.requests.cpu=50m",
            "--set=resources.requests.memory=128Mi",
            r"--set=nodeSelector.kubernetes\.io/hostname=node1",
            // Tunnels may be in either namespace: docs/install.md, node by node.
            r"--set=env.CA_TRUSTED_NODE_ACCOUNTS=istio-system/ztunnel\,adit-system/ztunnel",
        ],
    );
    let rollout = ["-n", ISTIO, "rollout", "status", "deployment/istiod", "--timeout=120s"];
    let done = rig.cluster.try_kubectl(&rollout);
    assert!(done.status.success(), "istiod is not rolled out\n{}", rig.system_story());
}

/// `helm install` of one of Istio's charts.
pub fn helm(rig: &Rig, release: &str, chart: &str, more: &[&str]) {
    let folder = istio::chart(chart);
    let words = ["install", release, folder.to_str().expect("UTF-8 path"), "--namespace", ISTIO];
    rig.cluster
        .helm(&[&words, more].concat())
        .unwrap_or_else(|said| panic!("helm install {release}: {said}"));
}
