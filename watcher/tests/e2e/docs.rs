//! The commands of `docs/install.md`, run as they stand there.

use std::{fs, os::unix::fs::symlink, process::Command};

use testbed::{chart, command::text, image, program::kubernetes};

use crate::rig::{Rig, SYSTEM};

/// What the page calls the registry that an operator has.
const REGISTRY: &str = "registry.example";

/// The commands in a section, in their order: what follows the prompt, with the lines that a
/// backslash continues.
fn commands(section: &str) -> Vec<String> {
    let page = chart::folder().join("../../docs/install.md");
    let page = fs::read_to_string(page).expect("docs/install.md");
    let heading = format!("\n## {section}\n");
    let (_, rest) = page.split_once(&heading).unwrap_or_else(|| panic!("no section {section}"));
    let text = rest.split("\n## ").next().expect("a section").replace("\\\n", " ");
    let (mut found, mut is_console) = (Vec::new(), false);
    for line in text.lines().map(str::trim) {
        match line.strip_prefix("```") {
            Some(kind) => is_console = kind == "console",
            None if is_console => found.extend(line.strip_prefix("# ").map(str::to_owned)),
            None => {}
        }
    }
    assert!(!found.is_empty(), "{section}");
    found
}

/// Brings the image to the nodes under the name that the page's commands give it.
pub fn import(rig: &Rig) {
    let chart = fs::read_to_string(chart::folder().join("Chart.yaml")).expect("Chart.yaml");
    let version = chart.lines().find_map(|line| line.strip_prefix("appVersion: ")).expect("a version");
    for node in &rig.cluster.nodes {
        let tagged = node.ctr(&["images", "tag", image::ADIT, &format!("{REGISTRY}/adit:{version}")]);
        assert!(tagged.status.success(), "{}", text(&tagged));
    }
}

/// Runs the commands of a section, and waits after each for what the page says to wait for.
pub fn follow(rig: &Rig, section: &str) {
    let folder = rig.cluster.file("bin");
    if !folder.exists() {
        fs::create_dir(&folder).expect("folder");
        symlink(chart::program(), folder.join("helm")).expect("link");
        symlink(kubernetes("kubectl"), folder.join("kubectl")).expect("link");
    }
    for line in commands(section) {
        let mut command = Command::new("sh");
        command.args(["-ec", &line]).current_dir(chart::folder().join("../.."));
        command.env("PATH", format!("{}:/usr/bin:/bin", folder.display()));
        command.env("KUBECONFIG", rig.cluster.api.admin_kubeconfig()).env("HOME", rig.cluster.dir.path());
        let output = command.output().expect("sh");
        assert!(output.status.success(), "{line}\n{}\n{}", text(&output), rig.system_story());
        println!("# {line}\n{}", text(&output));
        if line.starts_with("helm install ") || line.starts_with("helm upgrade ") {
            rig.wait_rolled_out();
        }
        if line.contains(" delete daemonset/") {
            rig.cluster.wait_gone(SYSTEM, "app=ztunnel");
        }
    }
}
