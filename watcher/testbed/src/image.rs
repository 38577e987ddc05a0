//! Container images of the programs that the tests built, which are linked with the machine's C
//! library: it goes into the image with them. `make image` builds the static ones, which takes
//! minutes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use adit_image::{
    archive::{About, archive},
    contents::{Contents, File},
};

use crate::{
    command::{run, text},
    istio,
    program::binary,
};

/// The image of Adit itself, as the chart names it by default with the tag `e2e`.
pub const ADIT: &str = "localhost/adit:e2e";
/// The image of Istio's control plane.
pub const ISTIOD: &str = "localhost/istiod:e2e";
/// The image of Istio's node agent.
pub const ISTIO_AGENT: &str = "localhost/istio-cni:e2e";
/// The image of the tests' pods: a shell, and the [roles](crate::roles) of the testbed.
pub const POD: &str = "localhost/pod:e2e";

/// The archive of [`ADIT`], made in `folder`, which keeps it for the next run.
pub fn adit(folder: &Path) -> PathBuf {
    let programs = ["watcher", "ztunnel", "ztunnel-control"]
        .map(|name| (binary(name), format!("/usr/local/bin/{name}")));
    // The tunnel is what it runs by itself, as with `make image`.
    Image { reference: ADIT, programs: &programs, entrypoint: &["/usr/local/bin/ztunnel"], user: "" }
        .write(folder)
}

/// The archive of [`ISTIOD`], made in `folder`, as Istio's Dockerfile has it.
pub fn istiod(folder: &Path) -> PathBuf {
    let inside = "/usr/local/bin/pilot-discovery";
    let programs = [(istio::program("pilot-discovery"), inside.to_owned())];
    Image { reference: ISTIOD, programs: &programs, entrypoint: &[inside], user: "1337:1337" }.write(folder)
}

/// The archive of [`ISTIO_AGENT`], made in `folder`, as Istio's Dockerfile has it: with iptables and
/// nftables, which its base image brings.
pub fn istio_agent(folder: &Path) -> PathBuf {
    let mut programs = vec![
        (istio::program("istio-cni"), "/opt/cni/bin/istio-cni".to_owned()),
        (istio::program("install-cni"), "/usr/local/bin/install-cni".to_owned()),
        (find("nft"), "/usr/sbin/nft".to_owned()),
    ];
    // One program with many names, and what it loads.
    let iptables = find("xtables-nft-multi");
    for family in ["iptables", "ip6tables"] {
        for verb in ["", "-save", "-restore", "-nft", "-nft-save", "-nft-restore"] {
            programs.push((iptables.clone(), format!("/usr/sbin/{family}{verb}")));
        }
    }
    let library = libraries_of(&iptables).into_iter().find(|path| path.contains("/libxtables"));
    let library = fs::canonicalize(library.expect("libxtables")).expect("a library");
    for module in fs::read_dir(library.with_file_name("xtables")).expect("the modules of iptables") {
        let module = module.expect("a module").path();
        let inside = module.to_str().expect("UTF-8 path").to_owned();
        programs.push((module, inside));
    }
    Image { reference: ISTIO_AGENT, programs: &programs, entrypoint: &[], user: "" }.write(folder)
}

/// The archive of [`POD`], made in `folder`.
pub fn pod(folder: &Path) -> PathBuf {
    let busybox = find("busybox");
    let programs = [
        (binary("examples/pod"), "/usr/local/bin/pod".to_owned()),
        (busybox.clone(), "/bin/busybox".to_owned()),
        (busybox, "/bin/sh".to_owned()),
    ];
    Image { reference: POD, programs: &programs, entrypoint: &["/bin/sleep"], user: "" }.write(folder)
}

/// The archive of the image that holds a pod's namespaces, made in `folder`.
pub fn pause(folder: &Path, reference: &str) -> PathBuf {
    // By its name busybox knows what to do.
    let programs = [(find("busybox"), "/bin/sleep".to_owned())];
    Image { reference, programs: &programs, entrypoint: &["/bin/sleep", "1000000000"], user: "" }
        .write(folder)
}

fn find(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("no {name} on PATH: run make setup"))
}

/// An image that is to be written.
struct Image<'a> {
    reference: &'a str,
    /// Programs, and where they are in it.
    programs: &'a [(PathBuf, String)],
    entrypoint: &'a [&'a str],
    /// Who runs it; empty: root.
    user: &'a str,
}

impl Image<'_> {
    /// Writes it, named after itself, unless what is there is newer than all of its programs.
    fn write(&self, folder: &Path) -> PathBuf {
        let (_, name) = self.reference.rsplit_once('/').expect("a registry");
        let path = folder.join(format!("{}.tar", name.replace(':', "-")));
        let modified = |path: &Path| fs::metadata(path).and_then(|found| found.modified()).ok();
        if self.programs.iter().all(|(program, _)| modified(program) < modified(&path)) {
            return path;
        }
        let mut contents = Contents::default();
        let mut libraries = BTreeSet::new();
        for (program, inside) in self.programs {
            let stripped = folder.join("stripped");
            // What only a debugger reads is most of it.
            run(&format!("strip --strip-debug -o {} {}", stripped.display(), program.display()));
            let bytes = fs::read(&stripped).expect("a program");
            contents.add(inside, File { bytes, is_program: true }).expect("a path");
            libraries.extend(libraries_of(program));
        }
        for library in libraries {
            let bytes = fs::read(&library).expect("a library");
            contents.add(&library, File { bytes, is_program: true }).expect("a path");
        }
        let about = About {
            reference: self.reference.to_owned(),
            architecture: if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            entrypoint: self.entrypoint.iter().map(|word| (*word).to_owned()).collect(),
            user: self.user.to_owned(),
            path: "/usr/local/bin:/usr/sbin:/bin".to_owned(),
            labels: BTreeMap::new(),
            modified: 0,
        };
        // Whole or not at all: a run may be interrupted.
        let next = path.with_extension("next");
        fs::write(&next, archive(&contents, &about).expect("an archive")).expect("an archive");
        fs::rename(next, &path).expect("an archive");
        path
    }
}

/// The loader and the libraries that `program` asks for; none if it is static.
fn libraries_of(program: &Path) -> Vec<String> {
    let output = Command::new("ldd").arg(program).output().expect("ldd");
    let text = text(&output);
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(str::to_owned);
    text.lines().filter(|line| line.contains("(0x")).filter_map(path).collect()
}
