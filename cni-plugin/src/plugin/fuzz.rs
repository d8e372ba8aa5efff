//! The verbs as a runtime calls them, for what is no pod: the agent is not asked.

use serde_json::Value;

use super::config::NetworkConfig;
use super::{Environment, VERSIONS, result, run};

const VERBS: [&str; 4] = ["ADD", "CHECK", "STATUS", "VERSION"];

/// An answer is what the specification says: the previous result, changed in nothing but what its version asks for;
/// or an error of a version that is spoken.
pub(crate) fn verbs(bytes: &[u8]) {
    let Some((verb, input)) = bytes.split_first() else {
        return;
    };
    let verb = VERBS[usize::from(*verb) % VERBS.len()];
    let environment = Environment {
        command: verb.into(),
        container_id: "c1".into(),
        netns: "/proc/self/ns/net".into(),
        ifname: "eth0".into(),
        args: String::new(),
    };
    let parsed = NetworkConfig::parse(input).ok();
    let previous = parsed
        .as_ref()
        .and_then(|config| config.previous.as_deref());
    if let Some(previous) = previous {
        // Whatever it says of addresses: no panic.
        let _ = result::addresses(previous);
    }
    match run(&environment, input) {
        Ok(text) if verb == "ADD" => {
            let config = parsed.expect("ADD reads its configuration");
            let previous = config.previous.expect("ADD needs a previous result");
            passed_on(previous.get(), &text, &config.version);
        }
        Ok(text) if verb == "VERSION" => {
            let answer: Value = serde_json::from_str(&text).expect("JSON");
            assert!(VERSIONS.contains(&answer["cniVersion"].as_str().expect("a version")));
        }
        Ok(text) => assert_eq!(text, ""),
        Err(error) => {
            let text = error.to_json(&super::config::version_of(input));
            let error: Value = serde_json::from_str(&text).expect("JSON");
            assert!(VERSIONS.contains(&error["cniVersion"].as_str().expect("a version")));
            assert!(error["code"].is_u64() && error["msg"].is_string());
        }
    }
}

fn passed_on(previous: &str, text: &str, version: &str) {
    let before: Value = serde_json::from_str(previous).expect("it was read");
    let after: Value = serde_json::from_str(text).expect("JSON");
    let (mut before, mut after) = (before, after);
    if before.get("cniVersion").and_then(Value::as_str) == Some(version) {
        assert_eq!(text, previous);
        return;
    }
    assert_eq!(after["cniVersion"], version);
    for result in [&mut before, &mut after] {
        let result = result.as_object_mut().expect("a result is an object");
        result.shift_remove("cniVersion");
        for ip in result
            .get_mut("ips")
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            if let Some(ip) = ip.as_object_mut() {
                ip.shift_remove("version");
            }
        }
    }
    assert_eq!(before, after);
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let config = |verb: u8, version: &str, previous: &str| {
        let text = format!(
            r#"{{"cniVersion":"{version}","name":"n","type":"warren-cni","socket":"/run/w","prevResult":{previous}}}"#
        );
        [&[verb][..], text.as_bytes()].concat()
    };
    let result = r#"{"cniVersion":"1.0.0","interfaces":[{"name":"veth0"},{"name":"eth0","sandbox":"/n"}],"ips":[{"address":"10.1.0.5/16","gateway":"10.1.0.1","interface":1},{"address":"fd00::5/64"}],"routes":[{"dst":"0.0.0.0/0"}],"dns":{}}"#;
    let old = r#"{"cniVersion":"0.3.1","ips":[{"version":"4","address":"10.1.0.5/16"}]}"#;
    vec![
        config(0, "1.0.0", result),
        config(0, "0.4.0", result),
        config(0, "1.1.0", old),
        config(0, "1.1.0", "[]"),
        config(0, "1.1.0", r#"{"cniVersion":"1.0.0"}"#),
        config(1, "1.0.0", result),
        config(2, "1.1.0", "null"),
        config(3, "0.3.1", "{}"),
        vec![3, b'{'],
    ]
}
