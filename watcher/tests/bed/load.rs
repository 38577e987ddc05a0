//! A loop of requests that runs while something is done to the mesh: one new connection each.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    pod::Pod,
    process::{Process, wait_for},
};

/// curl after curl in a pod, each with a connection of its own.
#[derive(Debug)]
pub struct RequestLoop {
    process: Process,
    stop: PathBuf,
}

impl RequestLoop {
    /// Its files go to `folder`, which is its own.
    pub fn start(client: &Pod, url: &str, folder: &Path) -> Self {
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
        self.process.output_so_far().lines().map(str::to_owned).collect()
    }

    /// Waits for `count` more answers.
    pub fn more(&self, count: usize) {
        let wanted = self.answers().len() + count;
        wait_for("more requests", Duration::from_secs(10), || (self.answers().len() >= wanted).then_some(()));
    }

    /// How many requests there were, and what those that were not answered by 200 said.
    pub fn finish(mut self) -> (usize, Vec<String>) {
        fs::write(&self.stop, "").expect("stop file");
        wait_for("the loop to end", Duration::from_secs(10), || (!self.process.is_running()).then_some(()));
        let answers = self.answers();
        let count = answers.len();
        (count, answers.into_iter().filter(|answer| answer != "200").collect())
    }
}
