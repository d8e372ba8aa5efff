use serde_json::Value;

use super::config::Environment;
use super::*;

fn environment(command: &str) -> Environment {
    Environment {
        command: command.into(),
        container_id: "c1".into(),
        netns: "/proc/self/ns/net".into(),
        ifname: "eth0".into(),
        args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=demo;K8S_POD_NAME=web;K8S_POD_UID=u1".into(),
    }
}

fn config(version: &str, extra: &str) -> Vec<u8> {
    format!(
        r#"{{"cniVersion":"{version}","name":"net","type":"warren-cni","socket":"/nonexistent/cni.sock",
            "excludeNamespaces":["kube-system"],"runtimeConfig":{{"x":1}}{extra}}}"#
    )
    .into_bytes()
}

const PREVIOUS: &str = r#"{"cniVersion":"1.0.0", "ips": [{"address":"10.0.0.2/24","gateway":"10.0.0.1","interface":1}],
  "interfaces":[{"name":"br0"},{"name":"eth0","sandbox":"/x"}],   "unknown":{"kept":[1.50, true]}, "dns":{}}"#;

fn with_previous(version: &str) -> Vec<u8> {
    config(version, &format!(r#","prevResult":{PREVIOUS}"#))
}

#[test]
fn version_names_all_and_needs_nothing() {
    let text = run(&environment("VERSION"), br#"{"cniVersion":"0.4.0"}"#).unwrap();
    let answer: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(answer["cniVersion"], "0.4.0");
    assert_eq!(
        answer["supportedVersions"],
        serde_json::json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"])
    );
    assert!(run(&environment("VERSION"), b"").is_ok());
}

#[test]
fn add_fails_with_try_again_while_the_agent_is_away() {
    let error = run(&environment("ADD"), &with_previous("1.0.0")).unwrap_err();
    assert_eq!(error.code(), 11);
    let json: Value = serde_json::from_str(&error.to_json("1.0.0")).unwrap();
    assert_eq!(json["code"], 11);
    assert_eq!(json["cniVersion"], "1.0.0");
    assert!(json["msg"].as_str().unwrap().contains("demo/web"));
    assert!(
        json["details"]
            .as_str()
            .unwrap()
            .contains("/nonexistent/cni.sock")
    );
}

#[test]
fn pods_that_are_not_asked_about_pass_byte_for_byte() {
    let mut excluded = environment("ADD");
    excluded.args = excluded.args.replace("demo", "kube-system");
    let mut system = environment("ADD");
    system.args = system.args.replace("demo", "warren-system");
    let mut no_pod = environment("ADD");
    no_pod.args = "IgnoreUnknown=1".into();
    for environment in [excluded, system, no_pod] {
        assert_eq!(
            run(&environment, &with_previous("1.0.0")).unwrap(),
            PREVIOUS
        );
    }
}

#[test]
fn a_previous_result_of_another_version_is_converted() {
    let mut environment = environment("ADD");
    environment.args.clear();
    let text = run(&environment, &with_previous("0.4.0")).unwrap();
    let result: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(result["cniVersion"], "0.4.0");
    assert_eq!(result["ips"][0]["version"], "4");
    assert_eq!(result["unknown"]["kept"][0], 1.5);
    let text = run(
        &environment,
        &config("1.1.0", &format!(r#","prevResult":{text}"#)),
    )
    .unwrap();
    let result: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(result["cniVersion"], "1.1.0");
    assert!(result["ips"][0].get("version").is_none());
}

#[test]
fn bad_invocations_name_their_error() {
    let code = |command, input: &[u8]| run(&environment(command), input).unwrap_err().code();
    assert_eq!(code("ADD", b"{"), 6);
    assert_eq!(code("ADD", &config("2.0.0", "")), 1);
    assert_eq!(code("ADD", br#"{"name":"x"}"#), 1);
    assert_eq!(code("ADD", &config("1.0.0", "")), 7, "no prevResult");
    assert_eq!(
        code("ADD", br#"{"cniVersion":"1.0.0","prevResult":{}}"#),
        7,
        "no socket"
    );
    assert_eq!(code("CHECK", &with_previous("0.3.1")), 1);
    assert_eq!(code("GC", &config("1.0.0", "")), 1);
    assert_eq!(code("STATUS", &config("1.0.0", "")), 1);
    assert_eq!(code("STATUS", &config("2.0.0", "")), 1);
    assert_eq!(code("FLY", &config("1.0.0", "")), 4);
    let mut no_netns = environment("ADD");
    no_netns.netns.clear();
    assert_eq!(
        run(&no_netns, &with_previous("1.0.0")).unwrap_err().code(),
        4
    );
    let mut no_uid = environment("ADD");
    no_uid.args = "K8S_POD_NAMESPACE=demo;K8S_POD_NAME=web".into();
    assert_eq!(run(&no_uid, &with_previous("1.0.0")).unwrap_err().code(), 4);
}

#[test]
fn only_add_fails_closed() {
    assert_eq!(
        run(&environment("DEL"), &with_previous("1.1.0")).unwrap(),
        ""
    );
    assert_eq!(run(&environment("DEL"), b"{").unwrap(), "");
    assert_eq!(
        run(&environment("CHECK"), &with_previous("1.1.0")).unwrap(),
        ""
    );
    let gc = config(
        "1.1.0",
        r#","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]"#,
    );
    assert_eq!(run(&environment("GC"), &gc).unwrap(), "");
    let none_left = config("1.1.0", r#","cni.dev/valid-attachments":null"#);
    assert_eq!(run(&environment("GC"), &none_left).unwrap(), "");
    assert_eq!(
        run(&environment("STATUS"), &config("1.1.0", "")).unwrap(),
        ""
    );
    let broken = run(
        &environment("STATUS"),
        br#"{"cniVersion":"1.1.0","name":"net"}"#,
    );
    assert_eq!(broken.unwrap_err().code(), 50);
}

#[test]
fn what_a_previous_result_lacks_is_not_added_and_what_is_none_is_an_error() {
    let pass = |previous: &str| {
        let mut environment = environment("ADD");
        environment.args.clear();
        run(
            &environment,
            &config("1.1.0", &format!(r#","prevResult":{previous}"#)),
        )
    };
    let text = pass(r#"{"cniVersion":"1.0.0","dns":{}}"#).unwrap();
    assert_eq!(text, r#"{"cniVersion":"1.1.0","dns":{}}"#);
    for previous in [
        "[]",
        r#"["1.1.0"]"#,
        r#""1.1.0""#,
        "1",
        r#"{"cniVersion":"1.0.0""#,
    ] {
        assert_eq!(
            pass(previous).unwrap_err().code(),
            Code::Decode as u32,
            "{previous}"
        );
    }
}
