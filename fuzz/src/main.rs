//! Runs one fuzz target under libFuzzer: `FUZZ_TARGET=name warren-fuzz [libFuzzer's arguments]`.
//!
//! One program for all targets, so that there is one link. The targets are in the crates whose parsers they
//! check, each in a module `fuzz` beside the code; their seeds are written to the directory `FUZZ_SEEDS`
//! before libFuzzer looks for its corpus. `FUZZ_TARGET=list` prints the names.

#![no_main]

use std::path::Path;
use std::sync::OnceLock;

type Target = (&'static str, fn(&[u8]), fn() -> Vec<Vec<u8>>);

static TARGET: OnceLock<Target> = OnceLock::new();

libfuzzer_sys::fuzz_target!(
    init: choose(),
    |bytes: &[u8]| {
        let (_, check, _) = TARGET.get().expect("chosen before the first input");
        check(bytes);
    }
);

fn targets() -> impl Iterator<Item = Target> {
    [
        mesh_api::fuzz::TARGETS,
        warren_cni::fuzz::TARGETS,
        warren_controller::fuzz::TARGETS,
        warren_node_proxy::fuzz::TARGETS,
    ]
    .into_iter()
    .flatten()
    .copied()
}

fn choose() {
    let wanted = std::env::var("FUZZ_TARGET").unwrap_or_default();
    if wanted == "list" {
        targets().for_each(|(name, ..)| println!("{name}"));
        std::process::exit(0);
    }
    let Some(target) = targets().find(|(name, ..)| *name == wanted) else {
        eprintln!("FUZZ_TARGET={wanted:?} is no target");
        std::process::exit(2);
    };
    if let Some(directory) = std::env::var_os("FUZZ_SEEDS") {
        for (number, seed) in target.2().into_iter().enumerate() {
            std::fs::write(Path::new(&directory).join(format!("seed-{number}")), seed)
                .expect("the directory of the seeds can be written to");
        }
    }
    let _ = TARGET.set(target);
}
