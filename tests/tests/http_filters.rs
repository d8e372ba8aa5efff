//! Line 3, what the filters of a rule do: redirects with the exact `Location`, rewrites with the exact
//! path, changed headers, CORS. Each row names its GEP or field.

use serde_json::{Value, json};
use warren_tests::routes::Expect::{Field, From, Path, Saw, Status};
use warren_tests::routes::{Case, Expect, Probe, and, check, path, to};

const V1: Expect = From("v1");

#[test]
fn redirects_and_rewrites() {
    check(&[redirects(), rewrites()]);
}

#[test]
fn headers_and_cors() {
    check(&[modifiers(), cors()]);
}

/// A rule for a prefix with one filter and no backend.
fn redirect(prefix: &str, fields: &Value) -> Value {
    json!({"matches": [path("PathPrefix", prefix)], "filters": [{"type": "RequestRedirect", "requestRedirect": fields}]})
}

fn redirects() -> Case {
    let location = |path, status, location| {
        Probe(
            path,
            &[],
            vec![Status(status), Field("location", Some(location))],
        )
    };
    let replace =
        |text: &str| json!({"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": text}});
    Case {
        name: "redirect",
        shows: "HTTPRequestRedirectFilter: status, hostname, scheme, port, path (GEP-726)",
        routes: vec![
            json!({"rules": [
                redirect("/host", &json!({"hostname": "example.org"})),
                redirect("/301", &json!({"hostname": "example.org", "statusCode": 301})),
                redirect("/303", &json!({"hostname": "example.org", "statusCode": 303})),
                redirect("/307", &json!({"hostname": "example.org", "statusCode": 307})),
                redirect("/308", &json!({"hostname": "example.org", "statusCode": 308})),
                redirect("/https", &json!({"scheme": "https"})),
                redirect("/http", &json!({"scheme": "http"})),
                redirect("/port", &json!({"port": 8083})),
                redirect("/port80", &json!({"port": 80})),
                redirect("/https443", &json!({"scheme": "https", "port": 443})),
                redirect("/https80", &json!({"scheme": "https", "port": 80})),
                redirect("/all", &json!({"scheme": "https", "hostname": "example.org", "port": 8443, "statusCode": 301,
                    "path": {"type": "ReplaceFullPath", "replaceFullPath": "/full"}})),
            ]}),
            json!({"rules": [
                redirect("/full", &json!({"path": {"type": "ReplaceFullPath", "replaceFullPath": "/else"}})),
                redirect("/prefix", &replace("/xyz")),
                redirect("/empty", &replace("")),
                redirect("/root", &replace("/")),
                redirect("/slashed", &replace("/xyz/")),
            ]}),
        ],
        probes: vec![
            location("/host", 302, "http://example.org/host"),
            location("/host/a%20b?c=d", 302, "http://example.org/host/a%20b?c=d"),
            location("/301", 301, "http://example.org/301"),
            location("/303", 303, "http://example.org/303"),
            location("/307", 307, "http://example.org/307"),
            location("/308", 308, "http://example.org/308"),
            location("/https/a", 302, "https://redirect/https/a"),
            location("/http", 302, "http://redirect/http"),
            location(":8080/https", 302, "https://redirect/https"),
            location(":8080/http", 302, "http://redirect/http"),
            location(":8080/host", 302, "http://example.org:8080/host"),
            location("/port", 302, "http://redirect:8083/port"),
            location("/port80", 302, "http://redirect/port80"),
            location(":8080/port80", 302, "http://redirect/port80"),
            location("/https443", 302, "https://redirect/https443"),
            location("/https80", 302, "https://redirect:80/https80"),
            location("/all/and/more", 301, "https://example.org:8443/full"),
            location("/full/gone", 302, "http://redirect/else"),
            location("/prefix/bar", 302, "http://redirect/xyz/bar"),
            location("/prefix", 302, "http://redirect/xyz"),
            location("/prefix/", 302, "http://redirect/xyz/"),
            location("/empty/bar", 302, "http://redirect/bar"),
            location("/empty", 302, "http://redirect/"),
            location("/root/bar", 302, "http://redirect/bar"),
            location("/root", 302, "http://redirect/"),
            location("/slashed/bar", 302, "http://redirect/xyz/bar"),
            Probe(
                "/host",
                &["-H", "host: asked.example"],
                vec![
                    Status(302),
                    Field("location", Some("http://example.org/host")),
                ],
            ),
            Probe(
                "/https",
                &["-H", "host: asked.example:80"],
                vec![
                    Status(302),
                    Field("location", Some("https://asked.example/https")),
                ],
            ),
            Probe(
                "/301",
                &["--http2-prior-knowledge"],
                vec![
                    Status(301),
                    Field("location", Some("http://example.org/301")),
                ],
            ),
        ],
    }
}

fn rewrites() -> Case {
    let rewrite = |prefix: &str, fields: Value| {
        json!({"matches": [path("PathPrefix", prefix)], "backendRefs": to("v1"),
            "filters": [{"type": "URLRewrite", "urlRewrite": fields}]})
    };
    let replace =
        |text: &str| json!({"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": text}});
    let becomes = |path, seen| Probe(path, &[], vec![V1, Path(seen)]);
    Case {
        name: "rewrite",
        shows: "HTTPURLRewriteFilter: ReplaceFullPath, ReplacePrefixMatch table, hostname (GEP-726)",
        routes: vec![json!({"rules": [
            rewrite("/full", json!({"path": {"type": "ReplaceFullPath", "replaceFullPath": "/one"}})),
            rewrite("/foo", replace("/xyz")),
            rewrite("/empty", replace("")),
            rewrite("/root", replace("/")),
            rewrite("/slashed/", replace("/xyz/")),
            rewrite("/host", json!({"hostname": "rewritten.example"})),
            rewrite("/both", and(json!({"hostname": "rewritten.example"}), &replace("/b"))),
            {"matches": [path("PathPrefix", "/headers")], "backendRefs": to("v1"), "filters": [
                {"type": "URLRewrite", "urlRewrite": replace("/h")},
                {"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "x-set", "value": "yes"}]}}]},
        ]})],
        probes: vec![
            becomes("/full/path", "/one"),
            becomes("/full?a=b", "/one?a=b"),
            becomes("/foo/bar", "/xyz/bar"),
            becomes("/foo/bar?q=/foo", "/xyz/bar?q=/foo"),
            becomes("/foo", "/xyz"),
            becomes("/foo/", "/xyz/"),
            becomes("/foo/a%2Fb//c", "/xyz/a%2Fb//c"),
            becomes("/empty/bar", "/bar"),
            becomes("/empty", "/"),
            becomes("/root/bar", "/bar"),
            becomes("/root", "/"),
            becomes("/root/", "/"),
            becomes("/slashed/bar", "/xyz/bar"),
            becomes("/host/kept", "/host/kept"),
            Probe(
                "/host",
                &[],
                vec![V1, Saw("host", Some("rewritten.example"))],
            ),
            Probe("/foo", &[], vec![V1, Saw("host", Some("rewrite"))]),
            Probe(
                "/both/x",
                &[],
                vec![V1, Path("/b/x"), Saw("host", Some("rewritten.example"))],
            ),
            Probe(
                "/headers/x",
                &[],
                vec![V1, Path("/h/x"), Saw("x-set", Some("yes"))],
            ),
        ],
    }
}

fn modifiers() -> Case {
    let change = json!({
        "set": [{"name": "X-Set", "value": "new"}], "add": [{"name": "x-add", "value": "more"}], "remove": ["X-Remove"],
    });
    let request = json!([{"type": "RequestHeaderModifier", "requestHeaderModifier": change}]);
    let response = json!([{"type": "ResponseHeaderModifier", "responseHeaderModifier": {
        "set": [{"name": "Content-Type", "value": "text/changed"}, {"name": "x-new", "value": "1"}],
        "add": [{"name": "x-server", "value": "through the mesh"}], "remove": ["date"]}}]);
    let sent: &[&str] = &[
        "-H",
        "x-set: old",
        "-H",
        "X-ADD: first",
        "-H",
        "x-remove: gone",
        "-H",
        "x-other: kept",
    ];
    let seen = vec![
        Saw("x-set", Some("new")),
        Saw("x-add", Some("first,more")),
        Saw("x-remove", None),
        Saw("x-other", Some("kept")),
    ];
    let fresh = vec![
        Saw("x-set", Some("new")),
        Saw("x-add", Some("more")),
        Saw("x-remove", None),
    ];
    let answered = vec![
        Status(200),
        Field("content-type", Some("text/changed")),
        Field("x-new", Some("1")),
        Field("x-server", Some("v1,through the mesh")),
        Field("date", None),
    ];
    let backend = |filters: &Value| json!([{"name": "v1", "port": 80, "filters": filters}]);
    Case {
        name: "modifiers",
        shows: "RequestHeaderModifier, ResponseHeaderModifier of rules and of backends (GEP-1323)",
        routes: vec![json!({"rules": [
            {"matches": [path("Exact", "/request")], "backendRefs": to("v1"), "filters": request},
            {"matches": [path("Exact", "/response")], "backendRefs": to("v1"), "filters": response},
            {"matches": [path("Exact", "/backend/request")], "backendRefs": backend(&request)},
            {"matches": [path("Exact", "/backend/response")], "backendRefs": backend(&response)},
            {"matches": [path("Exact", "/redirected")], "filters": [
                {"type": "RequestRedirect", "requestRedirect": {"hostname": "example.org"}},
                {"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": "x-new", "value": "1"}]}}]},
        ]})],
        probes: vec![
            Probe("/request", sent, seen.clone()),
            Probe("/request", &[], fresh.clone()),
            Probe("/request", &["--http2-prior-knowledge"], fresh.clone()),
            Probe("/backend/request", sent, seen),
            Probe("/backend/request", &[], fresh),
            Probe("/response", &[], answered.clone()),
            Probe("/backend/response", &[], answered),
            Probe(
                "/redirected",
                &[],
                vec![Status(302), Field("x-new", Some("1"))],
            ),
        ],
    }
}

fn cors() -> Case {
    let filter = |cors: Value| json!([{"type": "CORS", "cors": cors}]);
    let on = |prefix: &str, cors: Value| json!({"matches": [path("PathPrefix", prefix)], "backendRefs": to("v1"), "filters": filter(cors)});
    const ORIGIN: &str = "access-control-allow-origin";
    const METHODS: &str = "access-control-allow-methods";
    const HEADERS: &str = "access-control-allow-headers";
    const PREFLIGHT: &[&str] = &[
        "-X",
        "OPTIONS",
        "-H",
        "origin: https://app.example.org",
        "-H",
        "access-control-request-method: PUT",
        "-H",
        "access-control-request-headers: x-token",
    ];
    const OTHER: &[&str] = &[
        "-X",
        "OPTIONS",
        "-H",
        "origin: https://evil.example",
        "-H",
        "access-control-request-method: PUT",
    ];
    const SIMPLE: &[&str] = &["-H", "origin: https://app.example.org"];
    const APP: Option<&str> = Some("https://app.example.org");
    Case {
        name: "cors",
        shows: "HTTPCORSFilter (GEP-1767): preflights answered, origins, wildcards, credentials",
        routes: vec![json!({"rules": [
            on("/listed", json!({"allowOrigins": ["https://app.example.org"], "allowMethods": ["GET", "PUT"],
                "allowHeaders": ["x-token"], "exposeHeaders": ["x-server"], "maxAge": 60})),
            on("/any", json!({"allowOrigins": ["*"], "allowMethods": ["*"], "allowHeaders": ["*"]})),
            on("/credentials", json!({"allowOrigins": ["https://*.example.org"], "allowMethods": ["*"],
                "allowHeaders": ["*"], "allowCredentials": true})),
            {"matches": [path("PathPrefix", "/redirected")], "filters": [
                {"type": "CORS", "cors": {"allowOrigins": ["https://app.example.org"], "allowMethods": ["*"]}},
                {"type": "RequestRedirect", "requestRedirect": {"hostname": "example.org"}}]},
        ]})],
        probes: vec![
            Probe(
                "/listed",
                PREFLIGHT,
                vec![
                    Field(ORIGIN, APP),
                    Field(METHODS, Some("GET, PUT")),
                    Field(HEADERS, Some("x-token")),
                    Field("access-control-max-age", Some("60")),
                    Field("access-control-allow-credentials", None),
                    Field("x-server", None),
                ],
            ),
            Probe(
                "/listed",
                OTHER,
                vec![Field(ORIGIN, None), Field("x-server", None)],
            ),
            Probe(
                "/listed",
                SIMPLE,
                vec![
                    V1,
                    Field(ORIGIN, APP),
                    Field("access-control-expose-headers", Some("x-server")),
                ],
            ),
            Probe(
                "/listed",
                &["-H", "origin: https://evil.example"],
                vec![Field(ORIGIN, None)],
            ),
            Probe("/listed", &[], vec![V1, Field(ORIGIN, None)]),
            Probe("/any", SIMPLE, vec![V1, Field(ORIGIN, Some("*"))]),
            Probe(
                "/any",
                PREFLIGHT,
                vec![
                    Field(ORIGIN, Some("*")),
                    Field("access-control-max-age", Some("5")),
                ],
            ),
            Probe(
                "/credentials",
                PREFLIGHT,
                vec![
                    Field(ORIGIN, APP),
                    Field("access-control-allow-credentials", Some("true")),
                    Field(METHODS, Some("PUT")),
                    Field(HEADERS, Some("x-token")),
                ],
            ),
            Probe(
                "/credentials",
                SIMPLE,
                vec![
                    V1,
                    Field(ORIGIN, APP),
                    Field("access-control-allow-credentials", Some("true")),
                ],
            ),
            Probe(
                "/credentials",
                &["-H", "origin: https://example.org"],
                vec![Field(ORIGIN, None)],
            ),
            Probe(
                "/redirected",
                SIMPLE,
                vec![
                    Status(302),
                    Field("location", Some("http://example.org/redirected")),
                    Field(ORIGIN, APP),
                ],
            ),
            Probe(
                "/redirected",
                PREFLIGHT,
                vec![Field(ORIGIN, APP), Field("location", None)],
            ),
            // OPTIONS without the headers of a preflight is the app's own.
            Probe("/any", &["-X", "OPTIONS"], vec![V1]),
        ],
    }
}
