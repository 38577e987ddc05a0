//! The commands of pages in `docs/`, run as they stand there.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    process::Command,
};

use testbed::{chart, command::text, image, program::kubernetes};

use crate::rig::{Rig, SYSTEM};

/// What the page calls the registry that an operator has.
const REGISTRY: &str = "registry.example";

/// The page on how to install.
pub const INSTALL: &str = "install.md";
/// The page on what to do with what is installed.
pub const OPERATIONS: &str = "operations.md";
/// The page on our own control plane.
pub const CONTROL_PLANE: &str = "control-plane.md";

/// The commands in a section of a page, in their order: what follows the prompt, with the lines that
/// a backslash continues. An empty name is what stands before the first section.
fn commands(page: &str, section: &str) -> Vec<String> {
    let text = fs::read_to_string(chart::folder().join("../../docs").join(page)).expect(page);
    let begins = |prefix: &str| text.split_once(&format!("\n{prefix} {section}\n")).map(|(_, rest)| rest);
    let rest = if section.is_empty() { Some(&*text) } else { begins("##").or_else(|| begins("###")) };
    let rest = rest.unwrap_or_else(|| panic!("{page} has no section {section}"));
    let ends = [rest.find("\n## "), rest.find("\n### ")].into_iter().flatten().min().unwrap_or(rest.len());
    let text = rest[..ends].replace("\\\n", " ");
    let (mut found, mut is_console) = (Vec::new(), false);
    for line in text.lines().map(str::trim) {
        match line.strip_prefix("```") {
            Some(kind) => is_console = kind == "console",
            None if is_console => found.extend(line.strip_prefix("# ").map(str::to_owned)),
            None => {}
        }
    }
    assert!(!found.is_empty(), "{page}: {section}");
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

/// The programs that an operator has, and ours as they are on `node1`.
fn make_programs(folder: &Path, system: &str) {
    fs::create_dir(folder).expect("folder");
    symlink(chart::program(), folder.join("helm")).expect("link");
    symlink(kubernetes("kubectl"), folder.join("kubectl")).expect("link");
    for program in ["watcher", "ztunnel"] {
        let script = format!(
            "#!/bin/sh\n\
             pod=$(kubectl -n {system} get pods -l app=ztunnel --field-selector spec.nodeName=node1 -o name)\n\
             exec kubectl -n {system} exec $pod -c {program} -- {program} \"$@\"\n"
        );
        let file = folder.join(program);
        fs::write(&file, script).expect("a script");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("permissions");
    }
}

/// Runs the commands of a section, and waits after each for what the page says to wait for.
pub fn follow(rig: &Rig, page: &str, section: &str) {
    let folder = rig.cluster.file("bin");
    if !folder.exists() {
        make_programs(&folder, rig.system);
    }
    for line in commands(page, section) {
        // As the page says of other namespaces.
        let line = line.replace(SYSTEM, rig.system);
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
            rig.cluster.wait_gone(rig.system, "app=ztunnel");
        }
    }
}
