//! What a tunnel that is not ours reads, for some eighty objects: what Istio's control plane makes of
//! the same ones, field by field. A field that is not named here is not sent.
//!
//! * this file: runs `client.py`, which shares no code with ours, and compares
//! * `mesh`: objects and what is expected of them; `workloads`, `services`, `policies`: which

mod mesh;
mod policies;
mod services;
mod workloads;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, mpsc},
    thread,
    time::Instant,
};

use serde_json::{Value, json};
use testbed::{api_server::ApiServer, process::KillOnDrop, program::cache};

use self::mesh::{Mesh, NAMESPACE};
use crate::rig::{ADDRESS, AUTHORIZATION, Control, LIMIT, unique};

/// What the client has, when it is what is expected or the time is over.
fn read(control: &Control, expected: &BTreeMap<String, Value>) -> BTreeMap<String, Value> {
    let python = cache().join("grpc/bin/python");
    assert!(python.exists(), "{} is missing: make setup", python.display());
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root.pem");
    std::fs::write(&root, &control.root).unwrap();
    let mut command = Command::new(python);
    command
        .arg(here.join("tests/foreign/client.py"))
        .arg(format!("localhost:{}", control.grpc.port()))
        .arg(root)
        .arg(here.join("../../watcher/testbed/src/fakes/fake_control_plane"));
    let mut client = KillOnDrop(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
    writeln!(client.0.stdin.take().unwrap(), "{}", control.token(&unique("node"))).unwrap();
    let (sender, lines) = mpsc::channel();
    let output = BufReader::new(client.0.stdout.take().unwrap());
    thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    let (deadline, mut has) = (Instant::now() + LIMIT, BTreeMap::new());
    while let Ok(line) = lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        let all: BTreeMap<String, BTreeMap<String, Value>> = serde_json::from_str(&line).unwrap();
        has = all[ADDRESS].clone();
        has.extend(all[AUTHORIZATION].clone());
        // The API server's own service, and the pods of the tests' tokens.
        has.retain(|name, _| {
            !name.starts_with("default/kubernetes.") && !name.contains("/adit-system/bound-")
        });
        if has == *expected {
            break;
        }
    }
    has
}

#[test]
#[ignore = "needs an API server: make test"]
fn a_foreign_tunnel_reads_what_istios_control_plane_would_send() {
    let api = Arc::new(ApiServer::start());
    let control = Control::start_with_istio(Arc::clone(&api), &[]);
    let mut mesh = Mesh::default();
    workloads::nodes(&mut mesh);
    workloads::pods(&mut mesh);
    services::services(&mut mesh);
    services::endpoints(&mut mesh);
    policies::policies(&mut mesh);
    api.namespace(NAMESPACE, &json!({}));
    api.service_account(NAMESPACE, "web");
    mesh.objects.sort_by_key(|object| object["kind"] == "EndpointSlice");
    let (objects, resources) = (mesh.objects.len(), mesh.expected.len());
    assert!(objects >= 75 && resources >= 65, "{objects} objects, {resources} resources");
    println!("{objects} objects, {resources} resources");
    for object in &mesh.objects {
        api.apply(&object.to_string());
    }
    for (name, status) in &mesh.pods {
        api.set_status(NAMESPACE, name, status);
    }
    let has = read(&control, &mesh.expected);
    let names: BTreeSet<&String> = has.keys().chain(mesh.expected.keys()).collect();
    let different: Vec<String> = names
        .into_iter()
        .filter(|name| has.get(*name) != mesh.expected.get(*name))
        .map(|name| {
            format!("{name}:\n  has      {:?}\n  expected {:?}", has.get(name), mesh.expected.get(name))
        })
        .collect();
    assert!(different.is_empty(), "{}", different.join("\n"));
}
