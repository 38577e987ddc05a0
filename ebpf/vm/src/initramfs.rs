//! What a machine boots into: busybox, the programs at their own paths, and a first process that
//! runs one command.

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, ensure};

/// The mark on the console that the command's exit status follows.
pub(crate) const STATUS: &str = "adit-vm status:";

/// Real programs come before busybox's of the same name.
const INIT: &str = r"#!/bin/sh
export PATH=/sbin:/usr/sbin:/usr/bin:/bin:/busybox HOME=/root ADIT_VM=1 RUST_BACKTRACE=0
for d in proc sys dev tmp run root; do mkdir -p /$d; done
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs run /run
mkdir -p /run/netns /var/run /var/log/nginx /var/lib/nginx
mount -t cgroup2 cgroup /sys/fs/cgroup; mount -t bpf bpf /sys/fs/bpf; mount -t tracefs trace /sys/kernel/tracing
while read module; do insmod /modules/$module.ko; done < /modules/modules
ip link set lo up
hostname vm
cd /root; sh /command; echo 'adit-vm status:'$?
poweroff -f
";

/// The image, in `work`.
pub(crate) fn build(
    work: &Path,
    kernel: &Path,
    programs: &[&Path],
    command: &str,
) -> anyhow::Result<PathBuf> {
    let root = work.join("root");
    for dir in ["busybox", "bin", "modules", "lib64"] {
        fs::create_dir_all(root.join(dir))?;
    }
    let busybox = crate::on_path("busybox")?;
    fs::copy(&busybox, root.join("busybox/busybox"))?;
    let applets = Command::new(&busybox).arg("--list").output().context("busybox")?;
    for applet in String::from_utf8_lossy(&applets.stdout).lines().filter(|name| *name != "busybox") {
        symlink("busybox", root.join("busybox").join(applet))?;
    }
    // Busybox's shell would take its own applets before programs on PATH.
    let shell = crate::on_path("dash")?;
    for program in programs.iter().copied().chain([shell.as_path()]) {
        let program = if program.is_absolute() {
            program.to_owned()
        } else {
            crate::on_path(&program.to_string_lossy())?
        };
        place(&root, &program)?;
        for library in libraries(&program)? {
            place(&root, &library)?;
        }
    }
    symlink(shell, root.join("bin/sh"))?;
    for file in fs::read_dir(kernel)? {
        let file = file?;
        if file.file_name() != "vmlinuz" {
            fs::copy(file.path(), root.join("modules").join(file.file_name()))?;
        }
    }
    // Whoever drops its rights looks up whom to become.
    fs::create_dir_all(root.join("etc"))?;
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;
    fs::write(root.join("command"), command)?;
    fs::write(root.join("init"), INIT)?;
    let made = Command::new("chmod").arg("755").arg(root.join("init")).status()?;
    ensure!(made.success(), "chmod");
    pack(&root, work.join("image"))
}

/// `file`, at its own path below `root`, without what only debuggers read.
fn place(root: &Path, file: &Path) -> anyhow::Result<()> {
    let to = root.join(file.strip_prefix("/").unwrap_or(file));
    if to.exists() {
        return Ok(());
    }
    fs::create_dir_all(to.parent().context("a folder")?)?;
    let stripped = Command::new("strip")
        .arg("--strip-debug")
        .arg("-o")
        .arg(&to)
        .arg(file)
        .stderr(Stdio::null())
        .status();
    if !stripped.is_ok_and(|status| status.success()) {
        fs::copy(file, &to).with_context(|| format!("copying {}", file.display()))?;
    }
    Ok(())
}

/// The shared libraries that `program` needs; none if it is no dynamic executable.
fn libraries(program: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).stderr(Stdio::null()).output().context("ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

fn pack(root: &Path, image: PathBuf) -> anyhow::Result<PathBuf> {
    let mut find = Command::new("find").arg(".").current_dir(root).stdout(Stdio::piped()).spawn()?;
    let names = find.stdout.take().context("find")?;
    let packed = Command::new("cpio")
        .args(["--create", "--format=newc", "--quiet"])
        .current_dir(root)
        .stdin(names)
        .stdout(File::create(&image)?)
        .status()
        .context("cannot run cpio, which `make setup` installs")?;
    find.wait()?;
    ensure!(packed.success(), "cpio failed");
    Ok(image)
}
