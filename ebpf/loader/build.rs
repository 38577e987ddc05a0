//! Builds the kernel programs and hands the object to `src/object.rs`.
//!
//! They need a compiler that comes with the sources of `core` (the target has no prebuilt one) and
//! bpf-linker. The build takes the first of: `ADIT_EBPF_RUSTC` (the path of a rustc with rust-src
//! beside it), a rustup toolchain that has rust-src (a nightly before others), Debian's rustc-web
//! with cargo-web and rust-web-src. A released compiler builds `core` too when RUSTC_BOOTSTRAP
//! allows it.

#![expect(clippy::disallowed_methods, reason = "cargo speaks to build scripts by the environment")]

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

const TARGET: &str = "bpfel-unknown-none";
/// In the workspace's `Cargo.toml`.
const PROFILE: &str = "bpf";
const SETUP: &str = "run `make setup` in the repository's root, which installs it";

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    for path in ["../programs/src", "../programs/Cargo.toml", "../common/src", "../common/Cargo.toml"] {
        println!("cargo::rerun-if-changed={path}");
    }
    // Versions, profile and lints of the workspace.
    for path in ["Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed=../../{path}");
    }
    for name in ["ADIT_EBPF_RUSTC", "PATH", "RUSTUP_HOME", "CARGO_HOME"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("the kernel programs cannot be built: {problem}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo gave no OUT_DIR")?);
    let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../programs");
    let toolchain = Toolchain::find()?;
    let linker = find_linker()?;
    let target_dir = out.join("programs");

    let mut cargo = Command::new(&toolchain.cargo);
    // What the outer cargo says is about another compiler, another target and other flags.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let own =
            ["RUSTC", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS", "RUSTDOC", "RUSTUP_TOOLCHAIN"];
        if own.contains(&&*text) || (text.starts_with("CARGO") && text != "CARGO_HOME") {
            cargo.env_remove(&name);
        }
    }
    // Debug information becomes BTF, which socket storage maps ask for.
    let mut flags = OsString::from("-Cdebuginfo=2\u{1f}-Clink-arg=--btf\u{1f}-Clinker=");
    flags.push(&linker);
    // It has paths, which would make other programs of the same sources on another machine.
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let workspace = workspace.canonicalize().map_err(|error| format!("{}: {error}", workspace.display()))?;
    let paths = [(Some(workspace), "/adit"), (cargo_home(), "/cargo"), (Some(toolchain.sysroot), "/rust")];
    for (path, name) in paths.into_iter().filter_map(|(path, name)| path.map(|path| (path, name))) {
        flags.push("\u{1f}--remap-path-prefix=");
        flags.push(path);
        flags.push("=");
        flags.push(name);
    }
    let status = cargo
        .current_dir(&programs)
        .args(["build", "--profile", PROFILE, "--features", "bpf", "--locked"])
        .args(["-Zbuild-std=core", "--target", TARGET, "--target-dir"])
        .arg(&target_dir)
        .env("RUSTC", &toolchain.rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        .status()
        .map_err(|error| format!("cannot run {}: {error}", toolchain.cargo.display()))?;
    if !status.success() {
        return Err(format!("{} build in {} failed", toolchain.cargo.display(), programs.display()));
    }
    let built = target_dir.join(TARGET).join(PROFILE).join("adit");
    // A new file, not new contents: build folders that share files by hard links, as copies of a warm
    // one may, would get each other's programs.
    let object = out.join("adit.o");
    drop(fs::remove_file(&object));
    fs::copy(&built, &object).map(|_| ()).map_err(|error| format!("cannot copy {}: {error}", built.display()))
}

struct Toolchain {
    rustc: PathBuf,
    cargo: PathBuf,
    sysroot: PathBuf,
}

impl Toolchain {
    fn find() -> Result<Self, String> {
        if let Some(rustc) = env::var_os("ADIT_EBPF_RUSTC").map(PathBuf::from) {
            return match Self::at(rustc.clone()) {
                Some(toolchain) => Ok(toolchain),
                None => Err(format!(
                    "ADIT_EBPF_RUSTC={} is no rustc with the library sources (rust-src) and cargo beside it",
                    rustc.display()
                )),
            };
        }
        rustup_toolchains()
            .into_iter()
            .chain([PathBuf::from("/usr/bin/rustc")])
            .find_map(Self::at)
            .ok_or_else(|| {
                format!("no Rust toolchain with the library sources (rust-src) was found; {SETUP}")
            })
    }

    fn at(rustc: PathBuf) -> Option<Self> {
        let sysroot = output(Command::new(&rustc).current_dir("/").args(["--print", "sysroot"]))?;
        let sysroot = PathBuf::from(sysroot.trim());
        let sources = sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml");
        let cargo = rustc.with_file_name("cargo");
        (sources.exists() && cargo.exists()).then_some(Self { rustc, cargo, sysroot })
    }
}

/// The compilers of rustup's toolchains, nightlies first; none without rustup.
fn rustup_toolchains() -> Vec<PathBuf> {
    let list = output(Command::new("rustup").args(["toolchain", "list"])).unwrap_or_default();
    let mut names: Vec<_> = list.lines().filter_map(|line| line.split_whitespace().next()).collect();
    names.sort_by_key(|name| !name.starts_with("nightly"));
    names
        .into_iter()
        .filter_map(|name| output(Command::new("rustup").args(["which", "--toolchain", name, "rustc"])))
        .map(|path| PathBuf::from(path.trim()))
        .collect()
}

fn find_linker() -> Result<PathBuf, String> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(cargo_home().map(|home| home.join("bin")))
        .map(|dir| dir.join("bpf-linker"))
        .find(|file| file.is_file())
        .ok_or_else(|| format!("bpf-linker is neither on PATH nor in cargo's bin folder; {SETUP}"))
}

fn cargo_home() -> Option<PathBuf> {
    env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")))
}

/// What a command printed; `None` if it cannot be run or fails.
fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}
