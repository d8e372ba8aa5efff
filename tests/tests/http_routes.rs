//! Line 3, what a rule matches: every row of the matching and precedence rules of HTTPRoute against the
//! running proxy, each naming its GEP or field. What a rule then does is in `http_filters.rs`, where the
//! request goes in `http_backends.rs`.

use serde_json::json;
use warren_tests::routes::Expect::{Field, From, Saw, Status};
use warren_tests::routes::{Case, Expect, and, check, headers, path, probe, queries, rule, to};

const V1: Expect = From("v1");
const V2: Expect = From("v2");

#[test]
fn matches_and_their_precedence() {
    check(&matching());
}

fn matching() -> Vec<Case> {
    let none = Status(404);
    vec![
        Case {
            name: "path",
            shows: "HTTPPathMatch Exact and PathPrefix, by element; 404 where nothing matches (GEP-1426)",
            routes: vec![json!({"rules": [
                rule(json!([path("Exact", "/exact"), path("Exact", "/with/slash/")]), "v1"),
                rule(json!([path("PathPrefix", "/abc"), path("PathPrefix", "/slash/")]), "v2"),
            ]})],
            probes: vec![
                probe("/exact", &[], V1),
                probe("/exact?query=1", &[], V1),
                probe("/exact", &["--http2-prior-knowledge"], V1),
                probe("/exact", &["--http1.0"], V1),
                probe("/Exact", &[], none.clone()),
                probe("/exact/", &[], none.clone()),
                probe("/exact/more", &[], none.clone()),
                probe("/with/slash/", &[], V1),
                probe("/with/slash", &[], none.clone()),
                probe("/abc", &[], V2),
                probe("/abc/", &[], V2),
                probe("/abc/def", &[], V2),
                probe("/abc?x", &[], V2),
                probe("/abcd", &[], none.clone()),
                probe("/ABC", &[], none.clone()),
                probe("/slash", &[], V2),
                probe("/slash/x", &[], V2),
                probe("/slashes", &[], none.clone()),
                probe("/", &[], none.clone()),
                probe("/other", &[], Field("warren-proxy-error", Some("no_route"))),
            ],
        },
        Case {
            name: "any",
            shows: "HTTPRouteRule.matches: none is the prefix /",
            routes: vec![json!({"rules": [{"backendRefs": to("v1")}]})],
            probes: vec![
                probe("/", &[], V1),
                probe("/any/thing?at=all", &["-X", "DELETE"], V1),
                // OPTIONS * has no path that could match a prefix other than everything.
                probe("/", &["-X", "OPTIONS"], V1),
            ],
        },
        Case {
            name: "regex",
            shows: "HTTPPathMatch RegularExpression: the whole path",
            routes: vec![
                json!({"rules": [rule(json!([path("RegularExpression", "/v[0-9]+/(a|b)")]), "v1")]}),
            ],
            probes: vec![
                probe("/v12/a", &[], V1),
                probe("/v1/b?c", &[], V1),
                probe("/v1/ab", &[], none.clone()),
                probe("/x/v1/a", &[], none.clone()),
            ],
        },
        Case {
            name: "method",
            shows: "HTTPRouteMatch.method",
            routes: vec![
                json!({"rules": [rule(json!([{"method": "GET"}]), "v1"), rule(json!([{"method": "POST"}]), "v2")]}),
            ],
            probes: vec![
                probe("/", &[], V1),
                probe("/", &["-d", "x"], V2),
                probe("/", &["-X", "PUT"], none.clone()),
                probe("/", &["-X", "get"], none.clone()),
            ],
        },
        Case {
            name: "headers",
            shows: "HTTPHeaderMatch: names in any case, AND in a match, OR of matches, the first of a name counts",
            routes: vec![json!({"rules": [
                rule(json!([headers(&[("Version", "one"), ("color", "red")]), headers(&[("single", "yes")])]), "v1"),
                rule(json!([{"headers": [{"type": "RegularExpression", "name": "agent", "value": "v[0-9]+"}]}]), "v2"),
                rule(json!([headers(&[("twice", "first"), ("TWICE", "second")])]), "v2"),
            ]})],
            probes: vec![
                probe("/", &["-H", "version: one", "-H", "COLOR: red"], V1),
                probe(
                    "/",
                    &[
                        "--http2-prior-knowledge",
                        "-H",
                        "version: one",
                        "-H",
                        "color: red",
                    ],
                    V1,
                ),
                probe("/", &["-H", "version: one"], none.clone()),
                probe(
                    "/",
                    &["-H", "version: One", "-H", "color: red"],
                    none.clone(),
                ),
                probe("/any/path", &["-H", "single: yes"], V1),
                probe("/", &["-H", "agent: v12"], V2),
                probe("/", &["-H", "agent: xv12"], none.clone()),
                probe("/", &["-H", "twice: first"], V2),
                probe("/", &["-H", "twice: second"], none.clone()),
            ],
        },
        Case {
            name: "query",
            shows: "HTTPQueryParamMatch: exact names, the first of a repeated one (MeshHTTPRouteQueryParamMatching)",
            routes: vec![json!({"rules": [
                rule(json!([queries(&[("animal", "whale")])]), "v1"),
                rule(json!([queries(&[("animal", "dolphin"), ("color", "blue")])]), "v2"),
                rule(json!([{"queryParams": [{"type": "RegularExpression", "name": "id", "value": "[0-9]+"}]}]), "v2"),
                rule(json!([and(path("PathPrefix", "/path5"), &json!({}))]), "v1"),
            ]})],
            probes: vec![
                probe("/?animal=whale", &[], V1),
                probe("/?x=y&animal=whale&z", &[], V1),
                probe("/?animal=whale&animal=dolphin", &[], V1),
                probe("/?animal=dolphin&animal=whale", &[], none.clone()),
                probe("/?Animal=whale", &[], none.clone()),
                probe("/?animal=dolphin", &[], none.clone()),
                probe("/?color=blue&animal=dolphin", &[], V2),
                probe("/?animal=%77hale", &[], V1),
                probe("/?id=42", &[], V2),
                probe("/?id=42x", &[], none.clone()),
                probe("/path5?animal=dolphin&color=blue", &[], V1),
            ],
        },
        Case {
            name: "precedence",
            shows: "HTTPRouteRule.matches: Exact, longest prefix, method, headers, queries, first rule",
            routes: vec![json!({"rules": [
                rule(json!([path("PathPrefix", "/")]), "v1"),
                rule(json!([path("PathPrefix", "/long")]), "v2"),
                rule(json!([path("Exact", "/long/exact")]), "v1"),
                rule(json!([and(path("PathPrefix", "/m"), &headers(&[("a", "1"), ("b", "2")]))]), "v1"),
                rule(json!([and(path("PathPrefix", "/m"), &json!({"method": "GET"}))]), "v2"),
                rule(json!([and(path("PathPrefix", "/h"), &headers(&[("a", "1")]))]), "v1"),
                rule(json!([and(path("PathPrefix", "/h"), &headers(&[("a", "1"), ("b", "2")]))]), "v2"),
                rule(json!([and(path("PathPrefix", "/q"), &queries(&[("a", "1"), ("b", "2")]))]), "v1"),
                rule(json!([and(path("PathPrefix", "/q"), &headers(&[("a", "1")]))]), "v2"),
                rule(json!([path("PathPrefix", "/same")]), "v2"),
                rule(json!([path("PathPrefix", "/same")]), "v1"),
                rule(json!([headers(&[("everywhere", "1")])]), "v2"),
            ]})],
            probes: vec![
                probe("/x", &[], V1),
                probe("/long", &[], V2),
                probe("/longer", &[], V1),
                probe("/long/exact", &[], V1),
                probe("/long/exact/not", &[], V2),
                probe("/m", &["-H", "a: 1", "-H", "b: 2"], V2),
                probe("/m", &["-H", "a: 1", "-H", "b: 2", "-X", "PUT"], V1),
                probe("/h", &["-H", "a: 1"], V1),
                probe("/h", &["-H", "a: 1", "-H", "b: 2"], V2),
                probe("/q?a=1&b=2", &["-H", "a: 1"], V2),
                probe("/q?a=1&b=2", &[], V1),
                probe("/same", &[], V2),
                // A match of headers alone has the path prefix /, which is shorter than /long.
                probe("/x", &["-H", "everywhere: 1"], V2),
                probe("/long", &["-H", "everywhere: 1"], V2),
                probe("/long/exact", &["-H", "everywhere: 1"], V1),
            ],
        },
        Case {
            name: "routes",
            shows: "precedence across routes: the match first, then the older route, then namespace/name",
            routes: vec![
                json!({"created": "2026-03-01T00:00:00Z", "rules": [
                    rule(json!([path("PathPrefix", "/age")]), "v1"), rule(json!([path("Exact", "/age/exact")]), "v1")]}),
                json!({"created": "2026-01-01T00:00:00Z", "rules": [
                    rule(json!([path("PathPrefix", "/age")]), "v2"), rule(json!([path("PathPrefix", "/tie")]), "v1")]}),
                json!({"created": "2026-01-01T00:00:00Z", "rules": [rule(json!([path("PathPrefix", "/tie")]), "v2")]}),
            ],
            probes: vec![
                probe("/age", &[], V2),
                probe("/age/exact", &[], V1),
                probe("/tie", &[], V1),
            ],
        },
        Case {
            name: "hosts",
            shows: "GEP-1426: matched by ClusterIP; neither Host nor hostnames count in a mesh",
            routes: vec![
                json!({"hostnames": ["somewhere.example"], "rules": [rule(json!([path("PathPrefix", "/")]), "v1")]}),
            ],
            probes: vec![
                probe("/", &[], V1),
                probe("/", &["-H", "host: path"], V1),
                probe("/", &["-H", "host: somewhere.example"], V1),
                probe(
                    "/",
                    &["-H", "host: somewhere.example"],
                    Saw("host", Some("somewhere.example")),
                ),
            ],
        },
        Case {
            name: "named",
            shows: "GEP-995: named rules",
            routes: vec![json!({"rules": [
                and(json!({"name": "first"}), &rule(json!([path("Exact", "/named")]), "v1")),
                rule(json!([path("Exact", "/unnamed")]), "v2"),
            ]})],
            probes: vec![probe("/named", &[], V1), probe("/unnamed", &[], V2)],
        },
    ]
}
