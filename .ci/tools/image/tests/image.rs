//! Archives are the same bytes for the same input, are read back whole, and hold static programs
//! only.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use adit_image::{
    archive::{About, archive},
    bill, check,
    contents::{Contents, File},
    program,
};
use serde_json::Value;

fn about() -> About {
    About {
        reference: "localhost:5000/adit:1.2.3".to_owned(),
        architecture: "amd64",
        entrypoint: vec!["/usr/local/bin/watcher".to_owned()],
        user: String::new(),
        path: "/usr/local/bin".to_owned(),
        labels: BTreeMap::from([("org.opencontainers.image.title".to_owned(), "adit".to_owned())]),
        modified: 1_700_000_000,
    }
}

fn contents(paths: &[&str]) -> Contents {
    let mut contents = Contents::default();
    for path in paths {
        let bytes = path.repeat(1000).into_bytes();
        contents.add(path, File { bytes, is_program: path.contains("/bin/") }).unwrap();
    }
    contents
}

#[test]
fn the_same_input_gives_the_same_bytes_and_comes_back() {
    let files = ["/usr/local/bin/watcher", "/usr/local/bin/ztunnel", "/licenses/LICENSE"];
    let first = archive(&contents(&files), &about()).unwrap();
    let mut reversed = files;
    reversed.reverse();
    assert!(first == archive(&contents(&reversed), &about()).unwrap());
    let image = check::read(&first).unwrap();
    assert_eq!(image.contents, contents(&files));
    assert_eq!(image.name, "localhost:5000/adit:1.2.3");
    assert_eq!(image.config["created"], "2023-11-14T22:13:20Z");
    assert_eq!(image.config["config"]["Entrypoint"][0], "/usr/local/bin/watcher");
    assert_eq!(image.config["config"]["Labels"]["org.opencontainers.image.title"], "adit");
    let later = archive(&contents(&files), &About { modified: 0, ..about() }).unwrap();
    assert_ne!(check::read(&later).unwrap().digest, image.digest);
}

#[test]
fn who_runs_it_is_said_only_where_it_is_not_root() {
    let user = |user: &str| {
        let about = About { user: user.to_owned(), ..about() };
        check::read(&archive(&contents(&["/bin/a"]), &about).unwrap()).unwrap().config["config"]["User"]
            .clone()
    };
    assert_eq!(user("1337:1337"), "1337:1337");
    assert_eq!(user(""), Value::Null);
}

/// What another program makes of it: folders come first, everything is root's and of one time.
#[test]
fn tar_lists_what_was_put_in() {
    let dir = tempfile::tempdir().unwrap();
    let layer = contents(&["/usr/local/bin/watcher", "/a"]).layer(0).unwrap();
    fs::write(dir.path().join("layer.tar"), layer).unwrap();
    let arguments = ["--utc", "--numeric-owner", "-tvf", "layer.tar"];
    let listed = text(&Command::new("tar").args(arguments).current_dir(dir.path()).output().unwrap());
    let lines: Vec<Vec<&str>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
    let names: Vec<&str> = lines.iter().map(|words| *words.last().unwrap()).collect();
    assert_eq!(names, ["usr/", "usr/local/", "usr/local/bin/", "a", "usr/local/bin/watcher"]);
    let modes: Vec<&str> = lines.iter().map(|words| words[0]).collect();
    assert_eq!(modes, ["drwxr-xr-x", "drwxr-xr-x", "drwxr-xr-x", "-rw-r--r--", "-rwxr-xr-x"]);
    assert!(lines.iter().all(|words| words[1] == "0/0" && words[3] == "1970-01-01"), "{listed}");
}

#[test]
fn a_changed_byte_is_noticed() {
    let whole = archive(&contents(&["/usr/local/bin/watcher"]), &about()).unwrap();
    let mut noticed = 0;
    // Every byte of each blob, from its head in the archive on.
    for entry in tar::Archive::new(whole.as_slice()).entries().unwrap() {
        let entry = entry.unwrap();
        if !entry.path().unwrap().starts_with("blobs/sha256") || entry.size() == 0 {
            continue;
        }
        let begin = usize::try_from(entry.raw_file_position()).unwrap();
        let end = begin + usize::try_from(entry.size()).unwrap();
        for at in [begin, usize::midpoint(begin, end), end - 1] {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            let error = format!("{:#}", check::read(&changed).expect_err("taken"));
            assert!(error.contains("its digest is sha256:"), "{error}");
            noticed += 1;
        }
    }
    assert_eq!(noticed, 9);
}

#[test]
fn paths_that_lead_elsewhere_and_names_without_a_tag_are_refused() {
    for path in ["", "/", "relative", "/a/../b", "//a", "/a/./b", "/a/"] {
        let file = File { bytes: Vec::new(), is_program: false };
        let error = Contents::default().add(path, file).expect_err(path);
        assert!(error.to_string().contains("expected an absolute path"), "{error}");
    }
    let file = || File { bytes: Vec::new(), is_program: false };
    let mut twice = Contents::default();
    twice.add("/a", file()).unwrap();
    assert!(twice.add("/a", file()).expect_err("twice").to_string().contains("/a is there twice"));
    for reference in ["adit", "localhost:5000/adit", ":1", "adit:"] {
        let about = About { reference: reference.to_owned(), ..about() };
        let error = archive(&contents(&["/a"]), &about).expect_err(reference);
        assert!(error.to_string().contains("expected a name with a tag"), "{error}");
    }
}

fn compiled(dir: &Path, name: &str, options: &[&str]) -> PathBuf {
    let source = dir.join("hello.c");
    fs::write(&source, "#include <stdio.h>\nint main(void) { return puts(\"hello\") < 0; }\n").unwrap();
    let path = dir.join(name);
    let compiler = Command::new("cc").args(options).arg(&source).arg("-o").arg(&path).output().unwrap();
    assert!(compiler.status.success(), "{}", text(&compiler));
    path
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), output.stderr.as_slice()].concat()).into_owned()
}

#[test]
fn a_program_that_asks_for_a_loader_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = fs::read(compiled(dir.path(), "dynamic", &[])).unwrap();
    let error = program::architecture("dynamic", &bytes).expect_err("taken").to_string();
    assert!(error.starts_with("dynamic asks for the loader /lib"), "{error}");
    for bytes in [b"#!/bin/sh\n".to_vec(), bytes[..40].to_vec(), Vec::new()] {
        let error = program::architecture("other", &bytes).expect_err("taken").to_string();
        assert!(error.contains("other: expected a static ELF program"), "{error}");
    }
}

fn image(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_adit-image")).args(arguments).output().unwrap()
}

#[test]
#[ignore = "needs root: make test"]
fn a_program_of_the_archive_runs_in_an_empty_root() {
    let dir = tempfile::tempdir().unwrap();
    let program = compiled(dir.path(), "hello", &["-static"]);
    let out = dir.path().join("adit.tar");
    let (program, path) = (program.to_str().unwrap(), out.to_str().unwrap());
    let licence = format!("{}/../../../LICENSE=/licenses/LICENSE", env!("CARGO_MANIFEST_DIR"));
    let written = image(&[
        "write",
        "--out",
        path,
        "--name",
        "localhost/adit:1",
        "--program",
        program,
        "--file",
        &licence,
    ]);
    assert!(written.status.success(), "{}", text(&written));
    let root = dir.path().join("root");
    let checked = image(&["check", path, "--unpack", root.to_str().unwrap()]);
    assert!(text(&checked).starts_with("localhost/adit:1 sha256:"), "{}", text(&checked));
    assert!(root.join("licenses/LICENSE").is_file());
    let mode = fs::metadata(root.join("usr/local/bin/hello")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o755);
    let ran = Command::new("chroot").arg(&root).arg("/usr/local/bin/hello").output().unwrap();
    assert_eq!(text(&ran), "hello\n");
}

#[test]
fn the_bill_has_what_is_linked_and_nothing_else() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../..");
    let arguments =
        ["metadata", "--format-version", "1", "--locked", "--filter-platform", "x86_64-unknown-linux-gnu"];
    let metadata = Command::new(env!("CARGO")).args(arguments).current_dir(&root).output().unwrap();
    assert!(metadata.status.success(), "{}", text(&metadata));
    let metadata: Value = serde_json::from_slice(&metadata.stdout).unwrap();
    let lock = fs::read_to_string(root.join("Cargo.lock")).unwrap();
    let programs = ["watcher".to_owned(), "ztunnel".to_owned()];
    let bill = bill::bill(&metadata, &lock, &programs).unwrap();
    assert_eq!(bill, bill::bill(&metadata, &lock, &programs).unwrap());

    let components = bill["components"].as_array().unwrap();
    let find = |name: &str| components.iter().find(|component| component["name"] == name);
    for linked in ["watcher", "ztunnel", "adit-ebpf-loader", "tokio", "rustls", "aws-lc-sys", "kube"] {
        assert!(find(linked).is_some(), "{linked}");
    }
    for other in ["testbed", "proptest", "bindgen", "cmake", "adit-image"] {
        assert!(find(other).is_none(), "{other} is in no program");
    }
    let tokio = find("tokio").unwrap();
    assert_eq!(tokio["licenses"][0]["expression"], "MIT");
    assert_eq!(tokio["hashes"][0]["content"].as_str().map(str::len), Some(64));
    assert_eq!(find("watcher").unwrap()["type"], "application");
    let references: BTreeSet<&str> =
        components.iter().map(|component| component["bom-ref"].as_str().unwrap()).collect();
    assert_eq!(references.len(), components.len());
    for dependency in bill["dependencies"].as_array().unwrap() {
        for reference in dependency["dependsOn"].as_array().unwrap() {
            assert!(references.contains(reference.as_str().unwrap()), "{reference}");
        }
    }
    let error = bill::bill(&metadata, &lock, &["nobody".to_owned()]).expect_err("taken").to_string();
    assert_eq!(error, "the workspace has no package nobody");
}
