//! Compiles the protobuf files in pure Rust: no `protoc` on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "discovery.proto",
        "mesh.proto",
        "routes.proto",
        "control.proto",
        "broker.proto",
        "cni.proto",
    ];
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure()
        .bytes(".warren.mesh.v1")
        .compile_fds(descriptors)?;
    Ok(())
}
