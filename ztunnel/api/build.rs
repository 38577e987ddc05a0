//! Generates the messages from `proto/`, with a compiler written in Rust: no `protoc` is needed.

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
    tonic_prost_build::configure().compile_fds(files)?;
    Ok(())
}
