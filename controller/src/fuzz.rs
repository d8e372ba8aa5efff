//! What the fuzzer checks of this crate's parsers: properties, with seeds to start from. The seeds are also checked
//! in `cargo test`.

use crate::ca;

/// Name, check, seeds.
pub type Target = (&'static str, fn(&[u8]), fn() -> Vec<Vec<u8>>);

/// All of this crate's.
pub const TARGETS: &[Target] = &[("csr", ca::fuzz::csr, ca::fuzz::seeds)];

#[test]
fn seeds_have_the_properties() {
    for (_, check, seeds) in TARGETS {
        seeds().iter().for_each(|seed| check(seed));
    }
}
