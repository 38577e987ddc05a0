//! What a tunnel that is not ours reads, for some eighty objects: what Istio's control plane makes of
//! the same ones, field by field. A field that is not named here is not sent.
//!
//! * this file: runs `client.py`, which shares no code with ours, and compares
//! * `istiod`: Istio's control plane, at the same API server
//! * `differences`: where it sends something else
//! * `mesh`: objects and what is expected of them; `workloads`, `services`, `policies`: which
//! * `random`: objects at random, of which both make the same

mod differences;
mod istiod;
mod mesh;
mod policies;
mod random;
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
use testbed::{api_server::ApiServer, istio, process::KillOnDrop, program::cache};

use self::{
    differences::DIFFERENCES,
    istiod::Istiod,
    mesh::{Mesh, NAMESPACE},
    random::{NAMESPACES, Random},
};
use crate::rig::{ADDRESS, AUTHORIZATION, Control, LIMIT, unique};

/// Where the client reads.
struct Place<'a> {
    port: u16,
    root: &'a str,
    server_name: &'a str,
    token: String,
}

/// What the client has, when it is what is expected or the time is over.
fn read(
    place: &Place<'_>,
    names: &[&str],
    is_expected: impl Fn(&BTreeMap<String, Value>) -> bool,
) -> BTreeMap<String, Value> {
    let python = cache().join("grpc/bin/python");
    assert!(python.exists(), "{} is missing: make setup", python.display());
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root.pem");
    std::fs::write(&root, place.root).unwrap();
    let mut command = Command::new(python);
    command
        .arg(here.join("tests/foreign/client.py"))
        .arg(format!("localhost:{}", place.port))
        .arg(root)
        .arg(place.server_name)
        .arg(here.join("../../watcher/testbed/src/fakes/fake_control_plane"))
        .args(names);
    let mut client = KillOnDrop(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
    writeln!(client.0.stdin.take().unwrap(), "{}", place.token).unwrap();
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
        if is_expected(&has) {
            break;
        }
    }
    has
}

/// What differs, for people.
fn different(has: &BTreeMap<String, Value>, expected: &BTreeMap<String, Value>) -> Vec<String> {
    let names: BTreeSet<&String> = has.keys().chain(expected.keys()).collect();
    names
        .into_iter()
        .filter(|name| has.get(*name) != expected.get(*name))
        .map(|name| {
            let [has, expected] = [has, expected].map(|all| all.get(name).cloned().unwrap_or_default());
            format!("{name}:\n  has      {has}\n  expected {expected}")
        })
        .collect()
}

#[test]
#[ignore = "needs an API server: make test"]
fn a_foreign_tunnel_reads_what_istios_control_plane_sends() {
    let api = Arc::new(ApiServer::start());
    let kinds = istio::chart("base").join("files/crd-all.gen.yaml");
    api.apply(&std::fs::read_to_string(kinds).unwrap());
    let control = Control::start_at(Arc::clone(&api), &[]);
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
    let expected = &mesh.expected;
    let ours = Place {
        port: control.grpc.port(),
        root: &control.root,
        server_name: "localhost",
        token: control.token(&unique("node")),
    };
    let has = read(&ours, &[], |has| has == expected);
    let wrong = different(&has, expected);
    assert!(wrong.is_empty(), "ours\n{}", wrong.join("\n"));

    let istiod = Istiod::start(&api);
    let theirs = Place {
        port: istiod.port,
        root: &istiod.root,
        server_name: istiod::SERVER_NAME,
        token: istiod.token.clone(),
    };
    let expected = &differences::of_istio(expected);
    let has = read(&theirs, &[], |has| has == expected);
    let wrong = different(&has, expected);
    for difference in DIFFERENCES {
        println!("another one from Istio's: {}: {}", difference.what, difference.reason);
    }
    assert!(wrong.is_empty(), "Istio's\n{}\n{}", wrong.join("\n"), istiod.log());

    // The same for a tunnel that asks for what it needs: pods and services, by address and by name.
    let addresses = |place, is_expected: &dyn Fn(&BTreeMap<String, Value>) -> bool| {
        let only = |mut has: BTreeMap<String, Value>| {
            has.retain(|_, resource| resource.get("workload").or_else(|| resource.get("service")).is_some());
            has
        };
        only(read(place, ON_DEMAND, |has| is_expected(&only(has.clone()))))
    };
    let mine = addresses(&ours, &|has| has.len() >= 7);
    let theirs = addresses(&theirs, &|has| *has == mine);
    let wrong = different(&theirs, &mine);
    assert!(wrong.is_empty(), "on demand: Istio's has, ours is expected\n{}", wrong.join("\n"));
}

/// A pod, a service with three pods, a headless one, an address outside of the cluster, and one of nobody.
const ON_DEMAND: &[&str] =
    &["/10.1.0.16", "/10.96.7.9", "demo/headless.demo.svc.cluster.local", "/192.0.2.1", "/10.9.9.9"];

/// `ADIT_FOREIGN_SEED` repeats one.
#[test]
#[ignore = "needs an API server: make test"]
fn of_objects_at_random_both_control_planes_make_the_same() {
    let seed = std::env::var("ADIT_FOREIGN_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(rand::random);
    println!("ADIT_FOREIGN_SEED={seed}");
    let mut random = Random::new(seed);
    let api = Arc::new(ApiServer::start());
    let kinds = istio::chart("base").join("files/crd-all.gen.yaml");
    api.apply(&std::fs::read_to_string(kinds).unwrap());
    let control = Control::start_at(Arc::clone(&api), &[]);
    for namespace in NAMESPACES {
        api.namespace(namespace, &json!({}));
    }
    let mut objects = random.peer_authentications();
    for number in 1..=40 {
        let (pod, status) = random.pod(number);
        api.apply(&pod.to_string());
        let name = |pointer| pod.pointer(pointer).and_then(Value::as_str).unwrap();
        api.set_status(name("/metadata/namespace"), name("/metadata/name"), &status);
        if number <= 20 {
            objects.extend([random.service(number), random.policy(number)]);
        }
    }
    for object in &objects {
        api.check(object).unwrap_or_else(|error| panic!("ADIT_FOREIGN_SEED={seed}: {error}\n{object}"));
        api.apply(&object.to_string());
    }
    let istiod = Istiod::start(&api);
    let ours = Place {
        port: control.grpc.port(),
        root: &control.root,
        server_name: "localhost",
        token: control.token(&unique("node")),
    };
    let theirs = Place {
        port: istiod.port,
        root: &istiod.root,
        server_name: istiod::SERVER_NAME,
        token: istiod.token.clone(),
    };
    let is_whole = |has: &BTreeMap<String, Value>| has.len() > 40;
    let mut ours = read(&ours, &[], is_whole);
    differences::without_aliases(&mut ours);
    differences::without_unnamed(&mut ours);
    for name in random::forgotten(&objects) {
        ours.remove(&name);
    }
    let plain = |has: &BTreeMap<String, Value>| {
        let mut has = has.clone();
        differences::without_repetition(&mut has);
        differences::without_unnamed(&mut has);
        has
    };
    let theirs = plain(&read(&theirs, &[], |has| plain(has) == ours));
    let wrong = different(&theirs, &ours);
    assert!(
        wrong.is_empty(),
        "ADIT_FOREIGN_SEED={seed}: Istio's has, ours is expected\n{}",
        wrong.join("\n")
    );
}
