//! Line 1, continued: gRPC of all four kinds and WebSocket, with clients and servers in Python, pass through
//! the mesh unchanged; so do clients of HTTP/1 that close their sending side, or wait to be asked for a body.

use std::time::Duration;

use serde_json::{Value, json};
use warren_tests::http::{HTTP, expect_http_counted, http_requests_total};
use warren_tests::lab::Lab;
use warren_tests::manifest::{CLIENT, FAR, NEAR};
use warren_tests::peers::{DECLARED, GRPC, GRPC_H2C, NGINX, WEBSOCKET, peers};
use warren_tests::python::{interpreter, python};
use warren_tests::scenario::scenario;

#[test]
fn grpc_of_all_kinds() {
    scenario(Duration::from_secs(120), |s| {
        let lab = peers(s);
        let counted = http_requests_total(&lab, "node-1");
        for server in [NEAR, FAR] {
            for port in [GRPC, GRPC + DECLARED, GRPC_H2C] {
                let target = format!("{}:{port}", server.1);
                let said = run_python(&lab, "grpc_client.py", &["kinds", &target]);
                expect_all_kinds(&target, server.1, &said);
            }
        }
        // Ten to each server on each port that says what it carries. On the others a server whose SETTINGS
        // come before the client's first bytes has spoken first, which is TCP.
        expect_http_counted(&lab, "node-1", counted, 40, "gRPC calls");
    });
}

fn expect_all_kinds(target: &str, server: &str, said: &Value) {
    let unary = &said["unary"];
    assert_eq!(
        (&unary["code"], &unary["answer"]["server"]),
        (&json!(0), &json!(server)),
        "{target}: {unary}"
    );
    assert_eq!(unary["answer"]["text"], "hello", "{target}: {unary}");
    let has = |list: &Value, key: &str, value: &str| {
        list.as_array()
            .is_some_and(|l| l.contains(&json!([key, value])))
    };
    let metadata = &unary["answer"]["metadata"];
    for (key, value) in [
        ("x-text", "kept as it is"),
        ("x-data-bin", "0001feff"),
        ("x-twice", "1"),
        ("x-twice", "2"),
    ] {
        assert!(has(metadata, key, value), "{target}: {key} in {metadata}");
    }
    assert!(
        has(&unary["initial"], "x-server", server),
        "{target}: {unary}"
    );
    assert!(
        has(&unary["trailing"], "x-trailing-bin", "0001ff"),
        "{target}: {unary}"
    );
    // The caller's deadline arrives.
    let remaining = unary["answer"]["remaining"].as_f64().unwrap_or_default();
    assert!(remaining > 5.0 && remaining < 11.0, "{target}: {unary}");
    assert_eq!(
        said["large"]["answer"]["length"],
        4 << 20,
        "{target}: {}",
        said["large"]
    );
    let stream = said["server_stream"].as_array().map_or(0, Vec::len);
    assert_eq!(
        (stream, &said["server_stream"][199]),
        (200, &json!("message 199")),
        "{target}"
    );
    let counts = (
        &said["client_stream"]["count"],
        &said["client_stream"]["size"],
    );
    assert_eq!(counts, (&json!(100), &json!(100_000)), "{target}");
    assert_eq!(
        (&said["bidi"], &said["empty_bidi"]),
        (&json!(50), &json!(0)),
        "{target}"
    );
    let fail = &said["fail"];
    assert_eq!(
        (&fail["code"], &fail["details"]),
        (&json!(9), &json!("a message with % and \u{fc}")),
        "{target}: {fail}"
    );
    assert!(
        has(&fail["trailing"], "x-reason", "asked to fail"),
        "{target}: {fail}"
    );
    let early = &said["early"];
    assert_eq!(
        (&early["code"], &early["details"]),
        (&json!(7), &json!("trailers only")),
        "{target}: {early}"
    );
    let deadline = &said["deadline"];
    assert_eq!(deadline["code"], 4, "{target}: {deadline}");
    assert!(
        deadline["waited"].as_f64().is_some_and(|w| w < 3.0),
        "{target}: {deadline}"
    );
    assert_eq!(said["cancelled"], 1, "{target}");
}

#[test]
fn websocket_both_ways() {
    scenario(Duration::from_secs(90), |s| {
        let lab = peers(s);
        for server in [NEAR, FAR] {
            // On a tunnel a large head is before what the connection becomes.
            for (port, size) in [(WEBSOCKET, 0), (WEBSOCKET + DECLARED, 7000)] {
                let url = format!("ws://{}:{port}/chat?room=1", server.1);
                let said = run_python(&lab, "websocket_client.py", &[&url, &size.to_string()]);
                for (what, wanted) in [
                    ("subprotocol", json!("echo")),
                    ("compression", json!("permessage-deflate")),
                    ("text", json!("hell\u{f6}")),
                    ("fragments", json!("in three fragments")),
                    ("pong", json!(true)),
                    ("many", json!(2000)),
                    ("closed", json!([4321, "as asked"])),
                    ("own close", json!([1001, "going"])),
                ] {
                    assert_eq!(said[what], wanted, "{url}: {what} of {said}");
                }
                for size in [0, 1, 125, 126, 65535, 65536, 5_000_000] {
                    assert_eq!(
                        said[format!("binary {size}")],
                        true,
                        "{url}: {size} of {said}"
                    );
                }
                let who = &said["who"];
                assert_eq!(who["path"], "/chat?room=1", "{url}: {who}");
                let headers = who["headers"].as_array().cloned().unwrap_or_default();
                for (name, value) in [
                    ("X-oDD-Case", "Kept"),
                    ("x-first", &"1".repeat(size)),
                    ("x-second", &"2".repeat(size)),
                ] {
                    assert!(headers.contains(&json!([name, value])), "{url}: {who}");
                }
            }
        }
    });
}

#[test]
fn a_client_that_closes_its_sending_side_is_answered() {
    scenario(Duration::from_secs(90), |s| {
        let lab = peers(s);
        let one = "GET /1?delay=300 HTTP/1.0\r\n\r\n";
        let body = "POST /1?delay=300 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc";
        let chunks = "POST /1?delay=300 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n\
             3\r\nabc\r\n0\r\n\r\n";
        let batch = "GET /1?delay=100 HTTP/1.1\r\nHost: a\r\n\r\n\
             POST /2?delay=100 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc\
             GET /3?delay=100 HTTP/1.1\r\nHost: a\r\n\r\n";
        for server in [NEAR, FAR] {
            for (sent, answers) in [(one, 1), (body, 1), (chunks, 1), (batch, 3)] {
                let (heard, _) = talk(&lab, server.1, HTTP + DECLARED, sent, "", true);
                let what = format!("{}: {sent:?}: {heard:?}", server.1);
                assert_eq!(heard.matches(" 200 OK\r\n").count(), answers, "{what}");
                for number in 1..=answers {
                    assert!(heard.contains(&format!("\"/{number}?delay=")), "{what}");
                }
            }
        }
    });
}

#[test]
fn a_body_is_asked_for_by_its_server_alone() {
    scenario(Duration::from_secs(90), |s| {
        let lab = peers(s);
        let expecting = |path: &str| {
            format!(
                "POST {path} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 7\r\nConnection: close\r\n\r\n"
            )
        };
        for server in [NEAR, FAR] {
            // It asks when it begins to read.
            let sent = expecting("/wait?read=500");
            let (heard, waited) = talk(&lab, server.1, HTTP + DECLARED, &sent, "content", false);
            let what = format!("{}: {heard:?} after {waited} s", server.1);
            assert!(heard.starts_with("HTTP/1.1 100 Continue\r\n"), "{what}");
            assert!(waited > 0.4, "asked for by a proxy: {what}");
            assert_eq!(heard.matches("HTTP/1.1 ").count(), 2, "{what}");
            assert!(heard.contains("\"body\":7"), "{what}");
            // It does not want it.
            let sent = expecting("/small");
            let (heard, _) = talk(&lab, server.1, NGINX + DECLARED, &sent, "content", false);
            assert!(
                heard.starts_with("HTTP/1.1 405 "),
                "{}: {heard:?}",
                server.1
            );
        }
    });
}

/// Sends bytes from the client, closes its sending side if it is to, sends `content` once it is asked for, and reads to the
/// end. What came, and after how many seconds the first of it.
#[track_caller]
fn talk(lab: &Lab, host: &str, port: u16, sent: &str, content: &str, close: bool) -> (String, f64) {
    const SOCKET: &str = r#"
import json, socket, sys, time
host, port = sys.argv[1], int(sys.argv[2])
sent, content, close = map(json.loads, sys.argv[3:])
with socket.create_connection((host, port), 10) as connection:
    connection.settimeout(20)
    began = time.monotonic()
    connection.sendall(sent.encode())
    if close:
        connection.shutdown(socket.SHUT_WR)
    heard, waited = b"", 0
    while data := connection.recv(65536):
        waited = waited or time.monotonic() - began
        heard += data
        if content and heard.startswith(b"HTTP/1.1 100"):
            connection.sendall(content.encode())
            content = ""
print(json.dumps({"heard": heard.decode("latin-1"), "waited": waited}))
"#;
    let python = interpreter().display().to_string();
    let port = port.to_string();
    let [sent, content, close] = [json!(sent), json!(content), json!(close)].map(|v| v.to_string());
    let command: [&str; 8] = [&python, "-c", SOCKET, host, &port, &sent, &content, &close];
    let done = lab
        .exec_within(CLIENT, &command, Duration::from_secs(40))
        .expect_ok();
    let said: Value =
        serde_json::from_str(done.stdout.trim()).unwrap_or_else(|e| panic!("{e}: {done}"));
    let heard = said["heard"].as_str().unwrap_or_default().to_owned();
    (heard, said["waited"].as_f64().unwrap_or_default())
}

#[track_caller]
fn run_python(lab: &Lab, peer: &str, args: &[&str]) -> Value {
    let command = python(peer, args);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let done = lab
        .exec_within(CLIENT, &command, Duration::from_secs(60))
        .expect_ok();
    serde_json::from_str(done.stdout.trim()).unwrap_or_else(|e| panic!("{e}: {done}"))
}
