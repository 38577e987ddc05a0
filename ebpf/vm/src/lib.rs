//! Boots the kernels of the support range, for tests: one kernel, some programs, one command.
//!
//! The machine is emulated in software (TCG), so this works wherever QEMU does, also inside a
//! virtual machine; it is about twenty times slower than the processor, so it is for function only.
//! `.ci/setup/kernels` fetches the kernels.

#![expect(clippy::disallowed_methods, reason = "who runs the tests says by the environment where things are")]

mod initramfs;

use std::{
    env,
    fs::{self, File, TryLockError},
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

/// The kernels that are booted. 5.15 is packaged by nobody whose kernels are used here.
pub const KERNELS: [&str; 4] = ["5.10", "6.1", "6.12", "7.2"];

/// What is set inside, for programs that boot themselves.
pub const INSIDE: &str = "ADIT_VM";

/// Longer than the slowest of the tests takes on a machine that does much else.
const PATIENCE: Duration = Duration::from_mins(15);

const MEMORY_MIB: &str = "1024";
/// Without cmpxchg16b (cx16): QEMU 7.2 emulates it so that the kernel's allocator, which uses it,
/// corrupts memory.
const PROCESSOR: &str = "qemu64,-cx16,+ssse3,+sse4.1,+sse4.2,+popcnt";
/// An oops ends the machine. With the allocator's own checks (F) the kernel from 7.x on gives
/// socket storage to programs also on a processor without cmpxchg16b.
const PARAMETERS: &str = "console=ttyS0 panic=-1 oops=panic quiet mitigations=off";
const PARAMETERS_7: &str = "console=ttyS0 panic=-1 oops=panic quiet mitigations=off slab_debug=F";

/// Whether this process runs in one of these machines.
#[must_use]
pub fn is_inside() -> bool {
    env::var_os(INSIDE).is_some()
}

/// Boots `kernel` (one of [`KERNELS`]) with `programs`, each at its own path or found on PATH, with
/// the libraries that it needs; busybox stands in for everything else. Runs `command` by its shell,
/// as root in the initial namespaces, with cgroup v2, bpffs and tracefs mounted. Returns what it
/// printed.
///
/// # Errors
/// The kernel or a program is not there, the machine does not boot, or the command failed.
pub fn run(kernel: &str, programs: &[&Path], command: &str) -> anyhow::Result<String> {
    let folder = cache()?.join(kernel);
    ensure!(
        folder.join("release").exists(),
        "no Linux {kernel} in {}: `.ci/setup/kernels` fetches it",
        folder.display()
    );
    let work = tempfile::Builder::new().prefix("adit-vm").tempdir().context("a folder")?;
    let image = initramfs::build(work.path(), &folder, programs, command)?;
    let _turn = turn()?;
    let machine = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-cpu", PROCESSOR, "-m", MEMORY_MIB, "-smp", "1"])
        .args(["-display", "none", "-nodefaults", "-no-reboot", "-serial", "stdio"])
        .args(["-append", if kernel.starts_with('7') { PARAMETERS_7 } else { PARAMETERS }])
        .arg("-kernel")
        .arg(folder.join("vmlinuz"))
        .arg("-initrd")
        .arg(image)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start qemu-system-x86_64, which `make setup` installs")?;
    let console = Machine(machine).watch()?;
    match console.rsplit_once(initramfs::STATUS) {
        Some((said, status)) if status.trim_start().starts_with("0\n") => Ok(said.to_owned()),
        Some((said, status)) => {
            let status = status.lines().next().unwrap_or_default();
            bail!("on Linux {kernel} it ended with status {status}:\n{said}")
        }
        None => bail!("Linux {kernel} stopped or took too long:\n{console}"),
    }
}

/// As many machines as there are processors: what is emulated slowly must not also wait for its
/// neighbour. Ours ends with what is returned.
fn turn() -> anyhow::Result<File> {
    let places = thread::available_parallelism().map_or(1, usize::from);
    let place = |number| File::create(env::temp_dir().join(format!("adit-vm-{number}.lock")));
    let places = (0..places).map(place).collect::<Result<Vec<_>, _>>().context("the lock files")?;
    loop {
        for place in &places {
            match place.try_lock() {
                Ok(()) => return place.try_clone().context("the lock file"),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(error).context("waiting for our turn"),
            }
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// Where `.ci/setup/kernels` puts them.
fn cache() -> anyhow::Result<PathBuf> {
    let cache = env::var_os("ADIT_CACHE")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache/adit")))
        .context("neither ADIT_CACHE nor HOME is set")?;
    Ok(cache.join("kernels"))
}

/// A machine that is switched off with its owner.
struct Machine(Child);

impl Machine {
    /// What its console says until it is switched off, or for as long as we are patient.
    fn watch(mut self) -> anyhow::Result<String> {
        let console = self.0.stdout.take().context("the console")?;
        let reader = thread::spawn(move || {
            let mut said = String::new();
            for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).replace('\r', "");
                said.push_str(&line);
                said.push('\n');
            }
            said
        });
        let deadline = Instant::now() + PATIENCE;
        while !reader.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(50));
        }
        drop(self);
        Ok(reader.join().unwrap_or_default())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The program called `name`, as the shell would find it.
///
/// # Errors
/// There is none on PATH.
pub fn on_path(name: &str) -> anyhow::Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| fs::metadata(file).is_ok_and(|meta| meta.is_file()))
        .with_context(|| format!("{name} is not on PATH; `make setup` installs it"))
}
