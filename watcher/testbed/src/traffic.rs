//! A loop of requests by curl that runs while something is done to the mesh.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{cluster::ClusterPod, process::Process, wait::wait_for};

/// One curl after another in a pod, each with a new connection.
#[derive(Debug)]
pub struct RequestLoop {
    process: Process,
    stop: PathBuf,
}

impl RequestLoop {
    /// Its files go to `folder`, which is its own.
    pub fn start(client: &ClusterPod, url: &str, folder: &Path) -> Self {
        fs::create_dir(folder).expect("folder");
        let stop = folder.join("stop");
        let script = format!(
            "while [ ! -e {} ]; do curl -sS --noproxy '*' -m 5 -o /dev/null -w '%{{http_code}}\\n' {url} \
             || echo failed; done",
            stop.display()
        );
        let process = client.spawn("loop", &["bash", "-c", &script], &folder.join("log"));
        Self { process, stop }
    }

    fn answers(&self) -> Vec<String> {
        self.process.output().lines().map(str::to_owned).collect()
    }

    /// Waits for `count` more answers.
    pub fn more(&self, count: usize) {
        let wanted = self.answers().len() + count;
        wait_for("more requests", || self.answers().len() >= wanted);
    }

    /// How many requests there were, and what those that were not answered by 200 said.
    pub fn finish(mut self) -> (usize, Vec<String>) {
        fs::write(&self.stop, "").expect("stop file");
        wait_for("the loop to end", || !self.process.is_running());
        let answers = self.answers();
        let count = answers.len();
        (count, answers.into_iter().filter(|answer| answer != "200").collect())
    }
}
