//! `list`: the labs of this machine, also those that only left something behind.

use std::collections::BTreeSet;

use super::names::{LABS, LabName};
use super::{down, netns, status};

/// Names of all labs of which there is anything.
pub(crate) fn names() -> BTreeSet<LabName> {
    let entries = std::fs::read_dir(LABS).into_iter().flatten().flatten();
    let with_state = entries.filter_map(|e| e.file_name().to_str()?.parse().ok());
    let with_namespaces = netns::list("warren-")
        .into_iter()
        .filter_map(|n| LabName::of_netns(&n));
    with_state.chain(with_namespaces).collect()
}

/// Prints them.
pub(crate) fn list() {
    let rows: Vec<Vec<String>> = names()
        .iter()
        .map(|name| {
            let up = down::daemon_pid(name).is_some();
            let status = status::read(name).unwrap_or_default();
            let ready = status.pods.iter().filter(|p| p.ready).count();
            vec![
                name.to_string(),
                if up {
                    "up".into()
                } else {
                    "leftovers; run `warren lab down`".into()
                },
                status.nodes.len().to_string(),
                format!("{ready}/{}", status.pods.len()),
            ]
        })
        .collect();
    if rows.is_empty() {
        super::view::say(format_args!(
            "there is no lab; `warren lab up -f FILE` starts one"
        ));
        return;
    }
    super::view::print(&["NAME", "STATE", "NODES", "PODS READY"], &rows);
}
