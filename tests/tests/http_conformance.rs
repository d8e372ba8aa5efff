//! Line 2: h2spec against the proxy's server side, and gRPC's own interoperability client and server through
//! one and two proxies. What is excepted is listed with its reason; an exception that passes is named, so
//! that the list does not outlive them.
//!
//! The programs are built from `tests/conformance/go.mod` by `scripts/install-deps.sh test`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use warren_tests::http::{HTTP, expect_http_counted, http_requests_total};
use warren_tests::lab::PodRef;
use warren_tests::manifest::{CLIENT, FAR, NEAR, Pod, account, meshed_namespace, service_of};
use warren_tests::scenario::scenario;

const H2SPEC_PORT: u16 = 81;
const INTEROP: u16 = 10000;

/// Section and title of h2spec's cases that may fail, and why.
const EXCEPTIONS: &[(&str, &str, &str)] = &[(
    "http2/3.5",
    "Sends invalid connection preface",
    "what is no preface may be HTTP/1 and is refused in HTTP/1, which the tool reads as half a frame",
)];

#[test]
fn h2spec_against_the_proxy() {
    scenario(Duration::from_secs(240), |s| {
        let mut manifests = vec![meshed_namespace("demo"), account("demo", "client")];
        manifests.push(Pod::idle("demo", "client", "node-1"));
        for ((_, name), node) in [(NEAR, "node-1"), (FAR, "node-2")] {
            manifests.push(account("demo", name));
            manifests.push(Pod::http("demo", name, node).build());
            manifests.push(service_of(
                "demo",
                name,
                &[(H2SPEC_PORT, HTTP, Some("kubernetes.io/h2c"))],
            ));
        }
        let lab = s.lab(2, &manifests);
        let before = http_requests_total(&lab, "node-1");
        for (_, name) in [NEAR, FAR] {
            let file = s.fresh_path("h2spec.xml");
            let (h2spec, report) = (tool("h2spec"), file.display().to_string());
            let command = [
                h2spec.as_str(),
                "-h",
                name,
                "-p",
                "81",
                "-o",
                "3",
                "-j",
                &report,
            ];
            let done = lab.exec_within(CLIENT, &command, Duration::from_secs(100));
            let report = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{e}: {done}"));
            let cases = cases(&report);
            assert!(cases.len() > 90, "{} cases: {report}", cases.len());
            let failed: Vec<_> = cases
                .iter()
                .filter(|(_, passed)| !**passed)
                .map(|(case, _)| case)
                .collect();
            let excepted = |(section, title): &&(String, String)| {
                EXCEPTIONS
                    .iter()
                    .any(|(s, t, _)| s == section && t == title)
            };
            let bad: Vec<_> = failed.iter().filter(|case| !excepted(case)).collect();
            assert!(
                bad.is_empty(),
                "h2spec to {name}: {bad:#?}\n{}",
                done.stdout
            );
            for (section, title, _) in EXCEPTIONS {
                if cases.get(&((*section).into(), (*title).into())) == Some(&true) {
                    println!("{section} {title:?} passes to {name}: the exception can go");
                }
            }
            println!(
                "h2spec to {name}: {} of {} cases",
                cases.len() - failed.len(),
                cases.len()
            );
        }
        expect_http_counted(&lab, "node-1", before, 50, "h2spec");
    });
}

/// Cases of a JUnit report by section and title, and whether they passed.
fn cases(report: &str) -> BTreeMap<(String, String), bool> {
    let attribute = |text: &str, name: &str| {
        let rest = text
            .split(&format!(" {name}=\""))
            .nth(1)
            .unwrap_or_default();
        rest.split('"').next().unwrap_or_default().to_owned()
    };
    let mut cases = BTreeMap::new();
    for case in report.split("<testcase").skip(1) {
        let case = case.split("</testcase>").next().unwrap_or_default();
        let failed = ["<failure", "<error"]
            .iter()
            .any(|mark| case.contains(mark));
        cases.insert(
            (attribute(case, "package"), attribute(case, "classname")),
            !failed,
        );
    }
    cases
}

/// gRPC's interoperability cases (grpc/grpc, doc/interop-test-descriptions.md) that need no credentials.
const GRPC_CASES: [&str; 14] = [
    "empty_unary",
    "large_unary",
    "client_streaming",
    "server_streaming",
    "ping_pong",
    "empty_stream",
    "timeout_on_sleeping_server",
    "cancel_after_begin",
    "cancel_after_first_response",
    "status_code_and_message",
    "special_status_message",
    "custom_metadata",
    "unimplemented_method",
    "unimplemented_service",
];

#[test]
fn grpc_interoperability() {
    scenario(Duration::from_secs(180), |s| {
        let mut manifests = vec![meshed_namespace("demo"), account("demo", "client")];
        manifests.push(Pod::idle("demo", "client", "node-1"));
        let server = tool("grpc-interop-server");
        for ((_, name), node) in [(NEAR, "node-1"), (FAR, "node-2")] {
            manifests.push(account("demo", name));
            let command = [
                server.as_str(),
                &format!("--port={INTEROP}"),
                "--use_tls=false",
            ];
            manifests.push(
                Pod::new("demo", name, node)
                    .command(&command)
                    .ready_tcp(INTEROP)
                    .build(),
            );
            let ports = [
                (INTEROP, INTEROP, None),
                (INTEROP + 1, INTEROP, Some("grpc")),
            ];
            manifests.push(service_of("demo", name, &ports));
        }
        let lab = s.lab(2, &manifests);
        let before = http_requests_total(&lab, "node-1");
        let client = tool("grpc-interop-client");
        let mut failed = Vec::new();
        let pod: PodRef<'_> = CLIENT;
        for (_, name) in [NEAR, FAR] {
            for port in [INTEROP, INTEROP + 1] {
                for case in GRPC_CASES {
                    let done = lab.exec(
                        pod,
                        &[
                            &client,
                            "--use_tls=false",
                            &format!("--server_host={name}"),
                            &format!("--server_port={port}"),
                            &format!("--test_case={case}"),
                        ],
                    );
                    if !done.ok() {
                        failed.push(format!("{case} to {name}:{port}: {done}"));
                    }
                }
            }
        }
        assert!(
            failed.is_empty(),
            "{} failed:\n{}",
            failed.len(),
            failed.join("\n")
        );
        // Of ports that do not say what they carry none need be counted: a server whose SETTINGS come before
        // the client's first bytes has spoken first. One case ends before anything is sent.
        let least = 2 * (GRPC_CASES.len() as u64 - 1);
        expect_http_counted(&lab, "node-1", before, least, "interoperability cases");
    });
}

/// A program of `target/tools`.
#[track_caller]
fn tool(name: &str) -> String {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map(PathBuf::from);
    let path = workspace
        .unwrap_or_default()
        .join("target/tools")
        .join(name);
    assert!(
        path.exists(),
        "{} is missing: scripts/install-deps.sh test",
        path.display()
    );
    path.display().to_string()
}
