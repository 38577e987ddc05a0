//! Generates the messages from `proto/`, with a compiler written in Rust: no `protoc` is needed.

use std::path::Path;

use prost::Message as _;

#[expect(clippy::disallowed_methods, reason = "Cargo tells a build script its folder in a variable")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(
        [
            "proto/zds.proto",
            "proto/citadel.proto",
            "proto/discovery.proto",
            "proto/workload.proto",
            "proto/authorization.proto",
        ],
        ["proto"],
    )?;
    let descriptors = Path::new(&std::env::var("OUT_DIR")?).join("descriptors");
    std::fs::write(descriptors, files.encode_to_vec())?;
    // Equal messages must be equal bytes: a control plane tells versions apart by them.
    tonic_prost_build::configure().btree_map(".istio.workload.Workload.services").compile_fds(files)?;
    Ok(())
}
