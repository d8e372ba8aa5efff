//! The harness of the whole-mesh tests: a mesh of real processes in network namespaces, made by
//! `warren lab`, and what is needed to look at it from outside.
//!
//! A test is one [`scenario::scenario`]: it has the machine for itself, a time bound, and is failed if
//! it leaves anything behind. Nothing here waits for a fixed time and hopes: conditions are awaited
//! with a deadline ([`wait::wait_until`]).
//!
//! A step that fails panics: in a test that is the report. Diagnostics of the lab are printed then.

pub mod capture;
pub mod cgroup;
pub mod host;
pub mod http;
pub mod lab;
pub mod load;
pub mod manifest;
pub mod metrics;
pub mod peers;
pub mod pki;
pub mod process;
pub mod python;
pub mod routes;
pub mod scenario;
pub mod servers;
pub mod wait;

/// Whether the long tier was asked for (`WARREN_TEST_LONG=1`): soaks and scale.
pub fn long() -> bool {
    std::env::var("WARREN_TEST_LONG").is_ok_and(|value| value == "1")
}
