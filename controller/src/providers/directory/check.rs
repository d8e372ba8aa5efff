//! What the types cannot tell: names, ports, addresses, and Warren's own labels and annotations.

use super::locate::Step;
use super::object::Object;

/// Everything that is wrong with an object, as path and expectation.
pub(super) fn mistakes(object: &Object) -> Vec<(Vec<Step>, String)> {
    let mut found = Vec::new();
    if object
        .metadata()
        .name
        .as_deref()
        .unwrap_or_default()
        .is_empty()
    {
        found.push((
            vec![Step::Key("metadata".into()), Step::Key("name".into())],
            "expected the name of the object".into(),
        ));
    }
    found
}
