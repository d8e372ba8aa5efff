//! The runtime's network configurations: whatever other programs wrote there, nothing of theirs is changed.

use std::cell::OnceCell;
use std::sync::Arc;

use serde_json::{Value, json};

use super::{Chain, as_list, is_ours, remove_entries};

/// Our entry comes in once and not first, everyone else's stay as they are and in their order; a second look
/// changes nothing; removal leaves what was there.
pub(crate) fn chain(bytes: &[u8]) {
    thread_local!(static CHAIN: OnceCell<Chain> = const { OnceCell::new() });
    let Ok(original) = serde_json::from_slice::<Value>(bytes) else {
        return;
    };
    if !original.is_object() {
        return;
    }
    let usable = original["plugins"]
        .as_array()
        .is_some_and(|list| !list.is_empty());
    let list = match (usable, original["type"].is_string()) {
        (true, _) => original,
        (false, true) => as_list(original),
        (false, false) => return,
    };
    let others = |list: &Value| -> Vec<Value> {
        let plugins = list["plugins"].as_array().expect("a list");
        plugins
            .iter()
            .filter(|plugin| !is_ours(plugin))
            .cloned()
            .collect()
    };
    if others(&list).is_empty() {
        return;
    }
    CHAIN.with(|chain| {
        let chain = chain.get_or_init(own);
        let mut with = list.clone();
        chain.insert(&mut with);
        assert_eq!(others(&with), others(&list));
        let plugins = with["plugins"].as_array().expect("a list");
        let ours: Vec<_> = (0..plugins.len())
            .filter(|i| is_ours(&plugins[*i]))
            .collect();
        assert!(
            ours.len() == 1 && ours[0] > 0 && plugins[ours[0]] == chain.entry,
            "{with}"
        );
        assert!(!chain.insert(&mut with), "a second look changes nothing");

        assert!(remove_entries(&mut with));
        let mut without = list;
        remove_entries(&mut without);
        assert_eq!(with, without);
    });
}

fn own() -> Chain {
    Chain {
        conf_dir: "/nowhere".into(),
        bin_dir: "/nowhere".into(),
        entry: json!({ "type": super::PLUGIN, "socket": "/run/w" }),
        verified: Arc::default(),
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    [
        r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp","ipam":{"type":"host-local"}},{"type":"portmap"}]}"#,
        r#"{"cniVersion":"0.4.0","name":"n","type":"bridge","x":[1,2]}"#,
        r#"{"plugins":[{"type":"warren-cni"},{"type":"a"},{"type":"warren-cni","old":1},{"type":"b"}]}"#,
        r#"{"plugins":[{"type":"a"},{"type":"warren-cni","socket":"/run/w"}]}"#,
        r#"{"plugins":[1,null,{"type":["warren-cni"]}]}"#,
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}
