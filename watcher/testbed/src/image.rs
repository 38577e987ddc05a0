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
    program::binary,
};

/// The image of Adit itself, as the chart names it by default with the tag `e2e`.
pub const ADIT: &str = "localhost/adit:e2e";
/// The image of the tests' pods: a shell, and the [roles](crate::roles) of the testbed.
pub const POD: &str = "localhost/pod:e2e";

/// The archive of [`ADIT`], made in `folder`, which keeps it for the next run.
pub fn adit(folder: &Path) -> PathBuf {
    let programs = ["watcher", "ztunnel", "ztunnel-control"]
        .map(|name| (binary(name), format!("/usr/local/bin/{name}")));
    write(folder, ADIT, "adit.tar", &programs, &[])
}

/// The archive of [`POD`], made in `folder`.
pub fn pod(folder: &Path) -> PathBuf {
    let busybox = find("busybox");
    let programs = [
        (binary("examples/pod"), "/usr/local/bin/pod".to_owned()),
        (busybox.clone(), "/bin/busybox".to_owned()),
        (busybox, "/bin/sh".to_owned()),
    ];
    write(folder, POD, "pod.tar", &programs, &["/bin/sleep"])
}

/// The archive of the image that holds a pod's namespaces, made in `folder`.
pub fn pause(folder: &Path, name: &str) -> PathBuf {
    // By its name busybox knows what to do.
    let programs = [(find("busybox"), "/bin/sleep".to_owned())];
    write(folder, name, "pause.tar", &programs, &["/bin/sleep", "1000000000"])
}

fn find(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("no {name} on PATH: run make setup"))
}

/// Writes an image of `programs` and where they are in it, unless it is newer than all of them.
fn write(
    folder: &Path,
    reference: &str,
    file: &str,
    programs: &[(PathBuf, String)],
    entrypoint: &[&str],
) -> PathBuf {
    let path = folder.join(file);
    let modified = |path: &Path| fs::metadata(path).and_then(|found| found.modified()).ok();
    if programs.iter().all(|(program, _)| modified(program) < modified(&path)) {
        return path;
    }
    let mut contents = Contents::default();
    let mut libraries = BTreeSet::new();
    for (program, inside) in programs {
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
        reference: reference.to_owned(),
        architecture: if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        entrypoint: entrypoint.iter().map(|word| (*word).to_owned()).collect(),
        path: "/usr/local/bin:/bin".to_owned(),
        labels: BTreeMap::new(),
        modified: 0,
    };
    // Whole or not at all: a run may be interrupted.
    let next = path.with_extension("next");
    fs::write(&next, archive(&contents, &about).expect("an archive")).expect("an archive");
    fs::rename(next, &path).expect("an archive");
    path
}

/// The loader and the libraries that `program` asks for; none if it is static.
fn libraries_of(program: &Path) -> Vec<String> {
    let output = Command::new("ldd").arg(program).output().expect("ldd");
    let text = text(&output);
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(str::to_owned);
    text.lines().filter(|line| line.contains("(0x")).filter_map(path).collect()
}
