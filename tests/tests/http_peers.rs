//! Line 1: servers and clients that no one here wrote pass through the mesh unchanged, on one node and
//! between nodes, on ports that say what they carry (`appProtocol`) and on ports that do not. "Unchanged"
//! is compared with what the same client gets beside the server, where nothing is captured. gRPC and WebSocket
//! are in `http_streams.rs`.

use std::time::Duration;

use serde_json::{Value, json};
use warren_tests::http::{Answer, HTTP, RAW, curl, expect_http_counted, http_requests_total};
use warren_tests::lab::PodRef;
use warren_tests::manifest::{CLIENT, FAR, NEAR};
use warren_tests::peers::{DECLARED, HTTP_H2C, NGINX, NGINX_H2, PYTHON_10, PYTHON_11, peers};
use warren_tests::scenario::scenario;

/// One request with curl: the server's port, path and query, curl's arguments.
type Case = (u16, &'static str, &'static [&'static str]);

const H2: &str = "--http2-prior-knowledge";
const CASES: &[Case] = &[
    (NGINX, "/small", &[]),
    (NGINX, "/small", &["-I"]),
    (NGINX, "/small", &["--http1.0"]),
    (NGINX, "/small", &["-X", "POST", "-d", "not allowed here"]),
    (NGINX, "/large", &["-I"]),
    (NGINX, "/large", &["-r", "5-9999"]),
    (NGINX, "/large", &["-r", "-100"]),
    (NGINX, "/large", &["-r", "99999999-"]),
    (NGINX, "/text", &["-H", "accept-encoding: gzip"]),
    (NGINX, "/text", &["-I", "-H", "accept-encoding: gzip"]),
    (
        NGINX,
        "/text",
        &["-H", "if-modified-since: Fri, 01 Jan 2100 00:00:00 GMT"],
    ),
    (NGINX, "/missing", &[]),
    (NGINX_H2, "/small", &[H2]),
    (NGINX_H2, "/small", &[H2, "-I"]),
    (NGINX_H2, "/large", &[H2, "-r", "5-9999"]),
    (NGINX_H2, "/text", &[H2, "-H", "accept-encoding: gzip"]),
    (NGINX_H2, "/missing", &[H2]),
    (PYTHON_11, "/small", &[]),
    (PYTHON_11, "/small", &["-I"]),
    (PYTHON_11, "/small", &["--http1.0"]),
    (PYTHON_11, "/missing", &[]),
    (PYTHON_11, "/", &["-X", "DELETE"]),
    (PYTHON_10, "/small", &[]),
    (PYTHON_10, "/small", &["-I"]),
    (PYTHON_10, "/small", &["--http1.0"]),
    (PYTHON_10, "/missing", &[]),
    (
        HTTP,
        "/a/b?c=d&e",
        &["-H", "x-one: 1", "-H", "X-Two:  spaced  "],
    ),
    (HTTP, "/", &["-H", "cookie: a=b; c=d", "-H", "te: trailers"]),
    (HTTP, "/%2e%2E/%2f//a/../b/./c?%20", &["--path-as-is"]),
    (HTTP, "/", &["-H", "host: another.example:8080"]),
    (HTTP, "/", &["--http1.0"]),
    (HTTP, "/post", &["-d", "a body"]),
    (HTTP, "/post", &["-d", "", "-H", "content-length: 0"]),
    (
        HTTP,
        "/chunks",
        &["-d", "a body in chunks", "-H", "transfer-encoding: chunked"],
    ),
    (
        HTTP,
        "/wait",
        &["-d", "a body after 100", "-H", "expect: 100-continue"],
    ),
    (HTTP, "/put", &["-X", "PUT", "-d", "a body"]),
    (HTTP, "/patch", &["-X", "PATCH", "-d", "a body"]),
    (HTTP, "/delete", &["-X", "DELETE"]),
    (HTTP, "/options", &["-X", "OPTIONS"]),
    (HTTP, "/head", &["-I"]),
    (HTTP, "/?code=204", &[]),
    (HTTP, "/?code=304", &[]),
    (HTTP, "/?code=418", &[]),
    (HTTP, "/?code=500", &[]),
    (HTTP, "/?slow=5&size=100000", &[]),
    (HTTP, "/?trailers=1&size=1000", &["-H", "te: trailers"]),
    (
        HTTP,
        "/a?b",
        &[H2, "-H", "x-one: 1", "-H", "cookie: a=b; c=d"],
    ),
    (HTTP, "/head", &[H2, "-I"]),
    (HTTP, "/post", &[H2, "-d", "a body"]),
    (HTTP, "/?code=204", &[H2]),
    (HTTP, "/?code=500", &[H2]),
    (HTTP, "/?trailers=1&size=1000", &[H2, "-H", "te: trailers"]),
    (HTTP, "/?slow=5&size=100000", &[H2]),
    (
        RAW,
        "/case",
        &[
            "-H",
            "X-oDD-Case: as it is",
            "-H",
            "x-REPEATED: 1",
            "-H",
            "X-Repeated: 2",
        ],
    ),
    (RAW, "/early", &[]),
    (RAW, "/post", &["-d", "a body"]),
];

/// The same with a head of 12 KB from the client and of 40 KB from the server (`header=BYTES`): on a tunnel they are before the body.
const LARGE_HEADS: &[Case] = &[
    (HTTP, "/a?b", &[]),
    (HTTP, "/a?header=40000", &[]),
    (HTTP, "/a?header=40000", &["--http1.0"]),
    (HTTP, "/a?header=40000", &["-I"]),
    (HTTP, "/a?header=40000&code=204", &[]),
    (HTTP, "/a?header=40000&code=304", &[]),
    (HTTP, "/a?header=40000&trailers=1&size=1000", &[]),
    (HTTP, "/a?header=40000", &["-d", "a body"]),
    (
        HTTP,
        "/a",
        &["-d", "a body in chunks", "-H", "transfer-encoding: chunked"],
    ),
    (
        HTTP,
        "/a",
        &["-d", "a body after 100", "-H", "expect: 100-continue"],
    ),
    (HTTP, "/a?header=40000", &[H2]),
    (HTTP, "/a?header=40000", &[H2, "-I"]),
    (HTTP, "/a?header=40000&code=204", &[H2]),
    (HTTP, "/a?header=40000", &[H2, "-d", "a body"]),
    (PYTHON_11, "/small", &[]),
    (NGINX, "/small", &[]),
];

#[test]
fn answers_are_those_without_the_mesh() {
    scenario(Duration::from_secs(240), |s| {
        let lab = peers(s);
        let cookie = format!("cookie: {}\n", "c".repeat(6_000));
        let token = format!("x-token: {}\nX-short: 1\n", "t".repeat(6_000));
        let head = format!("@{}", s.file("head", &(cookie + &token)).display());
        let large = |case: &Case| (*case, Some(head.as_str()));
        let cases = CASES.iter().map(|case| (*case, None));
        let cases: Vec<_> = cases.chain(LARGE_HEADS.iter().map(large)).collect();
        let counted = http_requests_total(&lab, "node-1");
        let mut sent = 0;
        let mut changed = Vec::new();
        for server in [NEAR, FAR] {
            for ((target, path, args), head) in &cases {
                let mut ports = vec![*target, target + DECLARED];
                if *target == HTTP && args.contains(&H2) {
                    ports.push(HTTP_H2C);
                }
                let args = [*args, &head.map_or(vec![], |head| vec!["-H", head])].concat();
                for port in ports {
                    let url = format!("http://{}:{port}{path}", server.1);
                    let beside = format!("::127.0.0.1:{target}");
                    let direct = [&["--connect-to", &beside, &url][..], &args].concat();
                    let direct = comparable(curl(&lab, server, &direct));
                    let meshed = [&[url.as_str()][..], &args].concat();
                    let meshed = comparable(curl(&lab, CLIENT, &meshed));
                    sent += 1;
                    if direct != meshed {
                        changed.push(format!(
                            "{args:?} {url}\ndirect {direct:#?}\nmeshed {meshed:#?}"
                        ));
                    }
                }
            }
        }
        assert!(
            changed.is_empty(),
            "{} of {sent} changed:\n{}",
            changed.len(),
            changed.join("\n")
        );
        expect_http_counted(&lab, "node-1", counted, sent, "curl");
    });
}

#[test]
fn large_files_kept_connections_and_pipelined_requests() {
    scenario(Duration::from_secs(120), |s| {
        let lab = peers(s);
        let sum = |pod: PodRef<'_>, url: &str, more: &str| {
            let script =
                format!("set -o pipefail; curl -q -sS --max-time 30 {more} {url} | sha256sum");
            lab.exec_within(pod, &["bash", "-c", &script], Duration::from_secs(40))
                .expect_ok()
                .stdout
        };
        let upload = s
            .file("upload", &"0123456789".repeat(500_000))
            .display()
            .to_string();
        for server in [NEAR, FAR] {
            let name = server.1;
            let direct = sum(server, &format!("http://127.0.0.1:{NGINX}/large"), "");
            for port in [NGINX, NGINX + DECLARED] {
                assert_eq!(
                    sum(CLIENT, &format!("http://{name}:{port}/large"), ""),
                    direct
                );
            }
            for port in [NGINX_H2, NGINX_H2 + DECLARED] {
                assert_eq!(
                    sum(CLIENT, &format!("http://{name}:{port}/large"), H2),
                    direct
                );
            }
            // Uploads of a length known, unknown, and announced: the server's digest of what came.
            let digest = |pod: PodRef<'_>, url: &str, more: &[&str]| {
                let args = ["--data-binary", &format!("@{upload}"), url];
                let seen = curl(&lab, pod, &[&args[..], more].concat()).seen();
                assert_eq!(seen["body"], 5_000_000, "{seen}");
                seen["digest"].clone()
            };
            let direct = digest(server, &format!("http://127.0.0.1:{HTTP}/"), &[]);
            for port in [HTTP, HTTP + DECLARED] {
                let url = format!("http://{name}:{port}/");
                for more in [
                    &["-H", "expect:"][..],
                    &["-H", "expect: 100-continue"],
                    &["-H", "transfer-encoding: chunked"],
                    &[H2],
                ] {
                    assert_eq!(digest(CLIENT, &url, more), direct, "{url} {more:?}");
                }
            }
            for port in [NGINX, NGINX + DECLARED] {
                // Five requests on one connection, one of them HEAD, one without success.
                let url = |path: &str| format!("http://{name}:{port}{path}");
                let head = [
                    "curl",
                    "-q",
                    "-sS",
                    "-o",
                    "/dev/null",
                    "-w",
                    "%{http_code} %{num_connects}\\n",
                ];
                let (small, missing) = (url("/small"), url("/missing"));
                let urls = [small.as_str(), &missing, &small, &missing, &small];
                let outputs = ["-o", "/dev/null"].repeat(4);
                let done = lab
                    .exec(CLIENT, &[&head[..], &outputs, &urls].concat())
                    .expect_ok();
                assert_eq!(
                    done.stdout, "200 1\n404 0\n200 0\n404 0\n200 0\n",
                    "port {port}"
                );

                let pipelined = "GET /small HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n".repeat(3)
                    + "HEAD /small HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n"
                    + "GET /missing HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n";
                let script = format!(
                    "exec 3<>/dev/tcp/{name}/{port}; printf '{pipelined}' >&3; timeout 10 cat <&3"
                );
                let done = lab.exec(CLIENT, &["bash", "-c", &script]).expect_ok();
                assert_eq!(done.stdout.matches("HTTP/1.1 200 OK").count(), 4, "{done}");
                assert_eq!(done.stdout.matches("\r\n\r\nsmall\n").count(), 3, "{done}");
                assert_eq!(
                    done.stdout.matches("HTTP/1.1 404 Not Found").count(),
                    1,
                    "{done}"
                );
            }
        }
    });
}

#[test]
fn load_generators_see_no_error() {
    scenario(Duration::from_secs(120), |s| {
        let lab = peers(s);
        let counted = http_requests_total(&lab, "node-1");
        for server in [NEAR, FAR] {
            for (port, path, more) in [
                (NGINX_H2, "/small", &["-c", "4", "-m", "10"][..]),
                (NGINX_H2 + DECLARED, "/small", &["-c", "4", "-m", "10"]),
                (HTTP_H2C, "/", &["-c", "2", "-m", "32", "-d", "/etc/passwd"]),
                (NGINX, "/small", &["--h1", "-c", "8"]),
                (NGINX + DECLARED, "/small", &["--h1", "-c", "8"]),
            ] {
                let url = format!("http://{}:{port}{path}", server.1);
                let command = [&["h2load", "-n", "2000"], more, &[&url]].concat();
                let done = lab
                    .exec_within(CLIENT, &command, Duration::from_secs(60))
                    .expect_ok();
                let good =
                    "2000 total, 2000 started, 2000 done, 2000 succeeded, 0 failed, 0 errored";
                assert!(done.stdout.contains(good), "{done}");
                assert!(done.stdout.contains("2000 2xx, 0 3xx"), "{done}");
            }
            for port in [NGINX, PYTHON_11, NGINX + DECLARED, PYTHON_11 + DECLARED] {
                let url = format!("http://{}:{port}/small", server.1);
                let command = ["wrk", "-t", "1", "-c", "8", "-d", "2s", &url];
                let done = lab.exec(CLIENT, &command).expect_ok();
                let bad = ["Socket errors", "Non-2xx"]
                    .iter()
                    .any(|b| done.stdout.contains(b));
                assert!(!bad && done.stdout.contains("Requests/sec"), "{done}");
            }
        }
        expect_http_counted(&lab, "node-1", counted, 20_000, "h2load and wrk");
    });
}

/// What the mesh adds to a request on purpose; everything else must be as it was.
const ADDED: [&str; 2] = ["warren-client-id", "traceparent"];

/// What is about one connection and therefore each side's own (RFC 9110, section 7.6.1).
const HOP: [&str; 2] = ["connection", "keep-alive"];

/// Without what differs between any two requests. Fields keep spelling and the order of values; the
/// order of different names means nothing (RFC 9110, section 5.3). Of a name that comes several times in
/// different spellings the first one counts.
fn comparable(mut answer: Answer) -> (Vec<String>, Vec<(String, String)>, Value) {
    let body = match serde_json::from_str::<Value>(&answer.body) {
        Ok(mut seen) => {
            if let Some(object) = seen.as_object_mut() {
                object.remove("peer");
                object.remove("nth");
            }
            if let Some(headers) = seen["headers"].as_array_mut() {
                headers.retain(|pair| !ADDED.iter().chain(&HOP).any(|a| pair[0] == **a));
                headers.sort_by_key(|pair| pair[0].to_string());
            }
            if let Some(head) = seen["head"].as_str() {
                let mut lines = head.split("\r\n");
                let first = lines.next().unwrap_or_default();
                let pairs = lines.filter_map(|l| l.split_once(':'));
                let pairs = pairs.map(|(name, value)| (name.to_owned(), value.to_owned()));
                seen["head"] = json!([first, own(pairs.collect())]);
            }
            // Its length depends on the caller's address.
            answer
                .fields
                .retain(|(name, _)| !name.eq_ignore_ascii_case("content-length"));
            seen
        }
        Err(_) => json!(answer.body),
    };
    let seen_here = answer.field("content-type").as_deref() == Some("application/json");
    let bodiless = seen_here && answer.body.is_empty();
    let mut fields = own(answer.fields);
    fields.retain(|(name, _)| {
        let length = bodiless && name.eq_ignore_ascii_case("content-length");
        !length && !name.eq_ignore_ascii_case("date")
    });
    // Whether 100 comes depends on whether the body came first (RFC 9110, section 10.1.1).
    answer.statuses.retain(|status| !status.ends_with(" 100"));
    (answer.statuses, fields, body)
}

/// The fields that are the message's own, by name.
fn own(fields: Vec<(String, String)>) -> Vec<(String, String)> {
    let lower = |(name, _): &(String, String)| name.to_ascii_lowercase();
    let mut fields: Vec<_> = fields
        .into_iter()
        .filter(|f| !ADDED.iter().chain(&HOP).any(|other| lower(f) == *other))
        .collect();
    fields.sort_by_key(lower);
    for at in 1..fields.len() {
        if lower(&fields[at]) == lower(&fields[at - 1]) {
            fields[at].0 = fields[at - 1].0.clone();
        }
    }
    fields
}
