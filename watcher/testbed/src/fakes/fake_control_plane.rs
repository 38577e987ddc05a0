//! A control plane that shares no code with the tunnel: the gRPC implementation of Python, with
//! protobuf definitions written for it alone.

use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{ChildStdin, Stdio},
    sync::mpsc,
    thread,
};

use serde_json::Value;

use crate::{command::run, netns::TestNetns, process::KillOnDrop, program::cache, wait::LIMIT};

/// The process of the control plane, in the netns of a node.
#[derive(Debug)]
pub struct FakeControlPlane {
    commands: ChildStdin,
    heard: mpsc::Receiver<Value>,
    /// Its port on loopback; 0 on a socket.
    pub port: u64,
    _process: KillOnDrop,
}

impl FakeControlPlane {
    /// Starts it on `port` of loopback (0: a free one), with a certificate for `localhost` and for
    /// the name of Istio's, whose root is `xds-root.pem` in `folder`.
    pub fn start(folder: &Path, netns: &TestNetns, port: u64) -> Self {
        let mut started = Self::listen(folder, netns, &format!("127.0.0.1:{port}"));
        started.port = started.receive("listening")["listening"].as_u64().expect("a port");
        started
    }

    /// Starts it on the Unix socket `socket`, without TLS.
    pub fn start_at_socket(folder: &Path, netns: &TestNetns, socket: &Path) -> Self {
        let started = Self::listen(folder, netns, &format!("unix:{}", socket.display()));
        started.receive("listening");
        started
    }

    fn listen(folder: &Path, netns: &TestNetns, at: &str) -> Self {
        let python = cache().join("grpc/bin/python");
        assert!(python.exists(), "{} is missing: make setup", python.display());
        let (certificate, key) = server_certificate(folder);
        let mut command = netns.command(python.to_str().expect("UTF-8 path"));
        command
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/src/fakes/fake_control_plane/control_plane.py"))
            .args([&certificate, &key])
            .arg(at)
            .args([folder.join("xds-root.pem"), folder.join("root.key")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().expect("python");
        let (commands, said) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        let (sender, heard) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(said).lines().map_while(Result::ok) {
                let _ = sender.send(serde_json::from_str(&line).expect("JSON"));
            }
        });
        Self { commands, heard, port: 0, _process: KillOnDrop(child) }
    }

    /// The next line of this kind that it prints; others are skipped.
    pub fn receive(&self, kind: &str) -> Value {
        loop {
            let said = self.heard.recv_timeout(LIMIT).unwrap_or_else(|_| panic!("no {kind}"));
            if said.get(kind).is_some_and(|value| !value.is_null()) {
                return said;
            }
        }
    }

    /// The next request of this type that it received.
    pub fn request(&self, of: &str) -> Value {
        loop {
            let request = self.receive("request");
            if request["request"] == of {
                return request;
            }
        }
    }

    /// Sends it a command; `control_plane.py` lists them.
    pub fn send(&mut self, command: &Value) {
        writeln!(self.commands, "{command}").expect("the control plane reads");
    }
}

/// For localhost, from a root of its own.
fn server_certificate(folder: &Path) -> (PathBuf, PathBuf) {
    let (certificate, key) = (folder.join("server.crt"), folder.join("server.key"));
    if !certificate.exists() {
        run(&format!(
            "cd {}; openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout root.key \
             -out xds-root.pem -subj /O=xds -days 1; openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 \
             -nodes -keyout server.key -out server.csr -subj /CN=x; echo subjectAltName=DNS:localhost,DNS:istiod.istio-system.svc > san; \
             openssl x509 -req -in server.csr -CA xds-root.pem -CAkey root.key -set_serial 5 -days 1 -extfile san \
             -out server.crt",
            folder.display()
        ));
    }
    (certificate, key)
}
