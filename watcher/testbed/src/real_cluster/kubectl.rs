//! What an operator types: `kubectl` and `helm`.

use std::process::{Command, Output, Stdio};

use serde_json::Value;

use super::{LIMIT, READY, RealCluster};
use crate::{
    chart,
    command::text,
    program::kubernetes,
    wait::{try_wait_slowly, wait_slowly},
};

/// A pod, as the API server has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its node.
    pub node: String,
    /// Its address.
    pub ip: String,
    /// All of its addresses.
    pub ips: Vec<String>,
    /// Its uid.
    pub uid: String,
}

impl RealCluster {
    /// The command `kubectl WORDS` of the administrator.
    pub fn kubectl_command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(kubernetes("kubectl"));
        command.arg("--kubeconfig").arg(self.api.admin_kubeconfig());
        command.args(words).env("HOME", self.dir.path()).stdin(Stdio::null());
        command
    }

    /// Runs `kubectl WORDS`.
    pub fn try_kubectl(&self, words: &[&str]) -> Output {
        self.kubectl_command(words).output().expect("kubectl")
    }

    /// What `kubectl WORDS` prints.
    ///
    /// # Panics
    /// When it fails.
    pub fn kubectl(&self, words: &[&str]) -> String {
        let output = self.try_kubectl(words);
        assert!(output.status.success(), "kubectl {}: {}", words.join(" "), text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Everything that it prints, whether or not it succeeds.
    pub fn kubectl_text(&self, words: &[&str]) -> String {
        text(&self.try_kubectl(words))
    }

    /// What it prints, without the end of the line; `None`: it fails.
    pub fn kubectl_line(&self, words: &[&str]) -> Option<String> {
        let output = self.try_kubectl(words);
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// `kubectl apply` of this manifest.
    pub fn apply(&self, manifest: &str) {
        let file = tempfile::NamedTempFile::new_in(self.dir.path()).expect("file");
        std::fs::write(file.path(), manifest).expect("manifest");
        let path = file.path().to_str().expect("UTF-8 path");
        // The account `default` of a new namespace comes a moment later.
        let mut last = String::new();
        let applied = try_wait_slowly(LIMIT, || {
            let output = self.try_kubectl(&["apply", "-f", path]);
            last = text(&output);
            let early = last.contains("serviceaccount \"") && last.contains("not found");
            assert!(output.status.success() || early, "{last}\n{manifest}");
            output.status.success()
        });
        assert!(applied.is_some(), "{last}\n{manifest}");
    }

    /// The pods of `namespace` with this label selector, those that are being deleted too.
    pub fn pods(&self, namespace: &str, selector: &str) -> Vec<Value> {
        let list = self.kubectl(&["-n", namespace, "get", "pods", "-l", selector, "-o", "json"]);
        let list: Value = serde_json::from_str(&list).expect("JSON");
        list["items"].as_array().expect("items").clone()
    }

    /// Waits until the pod is ready, and returns it.
    pub fn ready_pod(&self, namespace: &str, name: &str) -> Pod {
        self.wait_ready(namespace, name);
        self.pod(namespace, name).expect("the pod")
    }

    /// A pod, as it is now.
    pub fn pod(&self, namespace: &str, name: &str) -> Option<Pod> {
        let pod = self.kubectl_line(&["-n", namespace, "get", "pod", name, "-o", "json"])?;
        let pod: Value = serde_json::from_str(&pod).ok()?;
        let text = |pointer: &str| pod.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
        let ips = pod["status"]["podIPs"].as_array().into_iter().flatten();
        let ips = ips.filter_map(|entry| entry["ip"].as_str().map(str::to_owned)).collect();
        Some(Pod {
            ips,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            node: text("/spec/nodeName")?,
            ip: text("/status/podIP")?,
            uid: text("/metadata/uid")?,
        })
    }

    /// Waits until the pod is ready.
    pub fn wait_ready(&self, namespace: &str, name: &str) {
        let ready = try_wait_slowly(LIMIT, || {
            self.kubectl_line(&["-n", namespace, "get", "pod", name, "-o", READY])
                .is_some_and(|ready| ready == "True")
        });
        assert!(
            ready.is_some(),
            "{namespace}/{name} is not ready\n{}",
            self.kubectl_text(&["-n", namespace, "describe", "pod", name])
        );
    }

    /// Waits until no pod of `namespace` with this label selector is left.
    pub fn wait_gone(&self, namespace: &str, selector: &str) {
        wait_slowly(LIMIT, &format!("the pods {selector} to go"), || {
            self.pods(namespace, selector).is_empty()
        });
    }

    /// What `words` print in a container; `Err` when they fail.
    ///
    /// # Errors
    /// Everything that they print, when they fail.
    pub fn exec(&self, pod: &Pod, container: &str, words: &[&str]) -> Result<String, String> {
        let start = ["-n", &pod.namespace, "exec", &pod.name, "-c", container, "--"];
        let output = self.try_kubectl(&[&start, words].concat());
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(text(&output))
        }
    }

    /// Runs `helm WORDS` as the administrator.
    ///
    /// # Errors
    /// Everything that it prints, when it fails.
    pub fn helm(&self, words: &[&str]) -> Result<String, String> {
        let output = chart::helm_as(&self.api.admin_kubeconfig(), words);
        if output.status.success() { Ok(text(&output)) } else { Err(text(&output)) }
    }
}
