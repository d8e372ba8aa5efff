//! Filters, each with the GEP or API field its rule comes from.

use ::http::header::LOCATION;
use ::http::{HeaderMap, StatusCode};
use mesh_api::proto::mesh::path_modifier::Modifier;

use super::*;
use crate::http::route::tests::{get, request};
use crate::table::Target;

fn filter(wire: Wire) -> Filter {
    try_filter(wire).unwrap()
}

fn try_filter(wire: Wire) -> Result<Filter, String> {
    let filters = [mesh::RouteFilter { filter: Some(wire) }];
    let mut place = |service: &str, _: u16| {
        let target = Target::default();
        if service.ends_with("/absent") {
            target.set_absent();
        }
        Arc::new(target)
    };
    match compile(&filters, &mut place) {
        (mut compiled, None) => Ok(compiled.remove(0)),
        (compiled, Some(reason)) => {
            assert!(compiled.is_empty());
            Err(reason.to_string())
        }
    }
}

fn edit(set: &[(&str, &str)], add: &[(&str, &str)], remove: &[&str]) -> mesh::HeaderModifier {
    let pairs = |all: &[(&str, &str)]| {
        let pair = |(name, value): &(&str, &str)| mesh::Header {
            name: (*name).into(),
            value: (*value).into(),
        };
        all.iter().map(pair).collect()
    };
    mesh::HeaderModifier {
        set: pairs(set),
        add: pairs(add),
        remove: remove.iter().map(|name| (*name).into()).collect(),
    }
}

const CONTEXT: RequestContext<'_> = RequestContext {
    prefix: None,
    service_port: 80,
};

fn pass(filters: &[Filter], mut request: request::Parts, prefix: Option<&str>) -> request::Parts {
    let context = RequestContext { prefix, ..CONTEXT };
    match apply_request(filters, &mut request, &context) {
        Outcome::Continue => request,
        Outcome::Respond(response) => panic!("{response:?}"),
    }
}

fn answered(filters: &[Filter], mut request: request::Parts) -> Response<()> {
    match apply_request(filters, &mut request, &CONTEXT) {
        Outcome::Respond(response) => response,
        Outcome::Continue => panic!("the request goes on"),
    }
}

fn values(headers: &HeaderMap, name: &str) -> Vec<String> {
    let values = headers.get_all(name).iter();
    values.map(|v| v.to_str().unwrap().to_owned()).collect()
}

#[test]
fn headers_are_set_added_and_removed() {
    // HTTPHeaderFilter; the cases are those of the conformance test MeshHTTPRouteRequestHeaderModifier.
    type Pairs = &'static [(&'static str, &'static str)];
    #[rustfmt::skip]
    let cases: [(&str, mesh::HeaderModifier, Pairs, &str, &[&str]); 11] = [
        ("set, absent before", edit(&[("X-Set", "new")], &[], &[]), &[], "x-set", &["new"]),
        ("set replaces", edit(&[("X-Set", "new")], &[], &[]), &[("x-set", "old")], "x-set", &["new"]),
        ("set replaces all", edit(&[("X-Set", "new")], &[], &[]), &[("x-set", "a"), ("x-set", "b")], "x-set", &["new"]),
        ("add, absent before", edit(&[], &[("X-Add", "new")], &[]), &[], "x-add", &["new"]),
        ("add appends `existing,new`", edit(&[], &[("X-Add", "new")], &[]), &[("x-add", "old")], "x-add", &["old,new"]),
        ("add to several", edit(&[], &[("X-Add", "new")], &[]), &[("x-add", "a"), ("x-add", "b")], "x-add", &["a", "b", "new"]),
        ("remove", edit(&[], &[], &["X-Remove"]), &[("x-remove", "a"), ("x-remove", "b")], "x-remove", &[]),
        ("remove, absent before", edit(&[], &[], &["X-Remove"]), &[], "x-remove", &[]),
        ("names have no case", edit(&[("X-SET", "new")], &[], &[]), &[("x-sEt", "old")], "x-set", &["new"]),
        ("others stay", edit(&[("X-Set", "new")], &[], &[]), &[("x-other", "old")], "x-other", &["old"]),
        ("cookies are not joined", edit(&[], &[("Set-Cookie", "b=2")], &[]), &[("set-cookie", "a=1")], "set-cookie", &["a=1", "b=2"]),
    ];
    for (what, edit, before, name, after) in cases {
        let at_request = filter(Wire::RequestHeaderModifier(edit.clone()));
        let passed = pass(&[at_request], request("GET", "/", before), None);
        assert_eq!(values(&passed.headers, name), after, "{what}");

        let at_response = filter(Wire::ResponseHeaderModifier(edit));
        let untouched = pass(
            std::slice::from_ref(&at_response),
            request("GET", "/", before),
            None,
        );
        assert_eq!(
            untouched.headers,
            request("GET", "/", before).headers,
            "{what}"
        );
        let mut response = Response::new(()).into_parts().0;
        response.headers = request("GET", "/", before).headers;
        apply_response(&[at_response], None, &mut response);
        assert_eq!(values(&response.headers, name), after, "{what}");
    }
}

#[test]
fn the_host_is_set_where_the_request_has_it() {
    let set = || {
        [filter(Wire::RequestHeaderModifier(edit(
            &[("Host", "new.test")],
            &[],
            &[],
        )))]
    };
    let http1 = pass(&set(), request("GET", "/x?y", &[("host", "old")]), None);
    assert_eq!(values(&http1.headers, "host"), ["new.test"]);
    let http2 = pass(&set(), get("http://old:80/x?y"), None);
    assert_eq!(http2.uri, "http://new.test/x?y");
    assert!(http2.headers.is_empty());
    let remove = filter(Wire::RequestHeaderModifier(edit(
        &[],
        &[("host", "b")],
        &["host"],
    )));
    let kept = pass(&[remove], request("GET", "/", &[("host", "old")]), None);
    assert_eq!(values(&kept.headers, "host"), ["old"]);
}

#[test]
fn headers_that_frame_a_message_or_are_the_meshs_own_cannot_be_changed() {
    let hop_by_hop = ["Transfer-Encoding", "Connection", "TE", "keep-alive"];
    let others = [
        "Content-Length",
        "Trailer",
        "warren-client-id",
        "Warren-Target",
        ":path",
        "a b",
    ];
    let refused = |edit: mesh::HeaderModifier| {
        let text = try_filter(Wire::RequestHeaderModifier(edit)).unwrap_err();
        assert!(text.starts_with("requestHeaderModifier: "), "{text}");
    };
    for name in hop_by_hop.into_iter().chain(others) {
        refused(edit(&[(name, "x")], &[], &[]));
        refused(edit(&[], &[(name, "x")], &[]));
    }
    for name in others {
        refused(edit(&[], &[], &[name]));
    }
    let bad = edit(&[("a", "x\r\ny: z")], &[], &[]);
    assert!(try_filter(Wire::ResponseHeaderModifier(bad)).is_err());
}

#[test]
fn headers_of_one_connection_need_no_removing() {
    // RFC 9110, 7.6.1: they do not pass. What the proxy says of itself in such a header stays.
    let names = ["Connection", "keep-alive", "TE", "upgrade", "X-Gone"];
    let remove = edit(&[], &[], &names);
    let filters = [filter(Wire::RequestHeaderModifier(remove))];
    let sent = [("te", "trailers"), ("x-gone", "1")];
    let passed = pass(&filters, request("POST", "/", &sent), None);
    assert_eq!(values(&passed.headers, "te"), ["trailers"]);
    assert!(values(&passed.headers, "x-gone").is_empty());
}

#[test]
fn values_are_text_of_any_language() {
    // HTTPHeader.value has no pattern; RFC 9110, 5.5: obs-text.
    let edit = edit(&[("x-set", "  é ")], &[("x-add", "ü")], &[]);
    let filters = [filter(Wire::RequestHeaderModifier(edit))];
    let passed = pass(&filters, request("GET", "/", &[("x-add", "a")]), None);
    assert_eq!(passed.headers["x-set"].as_bytes(), "é".as_bytes());
    assert_eq!(passed.headers["x-add"].as_bytes(), "a,ü".as_bytes());
}

fn path_change(modifier: Modifier) -> Option<mesh::PathModifier> {
    Some(mesh::PathModifier {
        modifier: Some(modifier),
    })
}

fn full(path: &str) -> Option<mesh::PathModifier> {
    path_change(Modifier::ReplaceFullPath(path.into()))
}

fn prefix(path: &str) -> Option<mesh::PathModifier> {
    path_change(Modifier::ReplacePrefixMatch(path.into()))
}

fn redirect() -> mesh::RequestRedirect {
    mesh::RequestRedirect {
        status_code: 302,
        ..Default::default()
    }
}

#[test]
fn redirects_name_the_exact_location() {
    // HTTPRequestRedirectFilter: scheme, hostname, path, port; GEP-726 for the path.
    let scheme = |scheme: &str| mesh::RequestRedirect {
        scheme: scheme.into(),
        ..redirect()
    };
    let hostname = |hostname: &str| mesh::RequestRedirect {
        hostname: hostname.into(),
        ..redirect()
    };
    let port = |port: u32| mesh::RequestRedirect { port, ..redirect() };
    let path = |path: Option<mesh::PathModifier>| mesh::RequestRedirect { path, ..redirect() };
    #[rustfmt::skip]
    let cases = [
        // (what, filter, Service port, Host, path, Location)
        ("nothing changes but what is said", redirect(), 80, "web.demo", "/x?y=1", "http://web.demo/x?y=1"),
        ("hostname", hostname("example.com"), 80, "web.demo", "/x?y=1", "http://example.com/x?y=1"),
        ("the port of Host is not the port", hostname("example.com"), 80, "web.demo:9", "/", "http://example.com/"),
        ("hostname, Service port", hostname("example.com"), 8080, "web.demo", "/", "http://example.com:8080/"),
        ("no port, no scheme: the Service port", redirect(), 8080, "web.demo", "/", "http://web.demo:8080/"),
        ("443 is not http's", redirect(), 443, "web.demo", "/", "http://web.demo:443/"),
        ("scheme: its well-known port", scheme("https"), 8080, "web.demo:8080", "/x", "https://web.demo/x"),
        ("scheme: its well-known port", scheme("http"), 8080, "web.demo", "/x", "http://web.demo/x"),
        ("scheme without a well-known port", scheme("ws"), 8080, "web.demo", "/x", "ws://web.demo:8080/x"),
        ("schemes have no case", scheme("HTTPS"), 80, "web.demo", "/", "https://web.demo/"),
        ("port", port(8083), 80, "web.demo", "/", "http://web.demo:8083/"),
        ("port 80 of http is left out", port(80), 8080, "web.demo", "/", "http://web.demo/"),
        ("port 443 of http is not", port(443), 80, "web.demo", "/", "http://web.demo:443/"),
        ("port 443 of https is left out", mesh::RequestRedirect { port: 443, ..scheme("https") }, 80, "web.demo", "/", "https://web.demo/"),
        ("port 80 of https is not", mesh::RequestRedirect { port: 80, ..scheme("https") }, 80, "web.demo", "/", "https://web.demo:80/"),
        ("scheme and port", mesh::RequestRedirect { port: 8443, ..scheme("https") }, 80, "web.demo", "/", "https://web.demo:8443/"),
        ("all of it", mesh::RequestRedirect { hostname: "example.org".into(), port: 8443, path: full("/new"), ..scheme("https") }, 80, "web.demo", "/old?q=1", "https://example.org:8443/new?q=1"),
        ("ReplaceFullPath", path(full("/full")), 80, "web.demo", "/a/b", "http://web.demo/full"),
        ("ReplaceFullPath with a query", path(full("/full?x=1")), 80, "web.demo", "/a/b?y=2", "http://web.demo/full?x=1"),
        ("an IPv6 address", redirect(), 80, "[fd00::1]:80", "/", "http://[fd00::1]/"),
        ("an IPv6 address", redirect(), 81, "[fd00::1]", "/", "http://[fd00::1]:81/"),
    ];
    for (what, wire, service_port, host, uri, location) in cases {
        let filters = [filter(Wire::RequestRedirect(wire))];
        let context = RequestContext {
            service_port,
            ..CONTEXT
        };
        let absolute = format!("http://{host}{uri}");
        for mut request in [request("GET", uri, &[("host", host)]), get(&absolute)] {
            let Outcome::Respond(response) = apply_request(&filters, &mut request, &context) else {
                panic!("{what}: the request goes on");
            };
            assert_eq!(response.status(), 302, "{what}");
            assert_eq!(response.headers()[LOCATION], location, "{what}");
        }
    }
    let filters = [filter(Wire::RequestRedirect(scheme("https")))];
    let hostless = answered(&filters, get("/x"));
    assert_eq!(hostless.headers()[LOCATION], "/x", "HTTP/1.0 without Host");
}

#[test]
fn redirects_have_five_codes() {
    // HTTPRequestRedirectFilter.statusCode; the default of 302 is filled in by the controller.
    for code in [301, 302, 303, 307, 308] {
        let wire = mesh::RequestRedirect {
            status_code: code,
            ..redirect()
        };
        let response = answered(&[filter(Wire::RequestRedirect(wire))], get("http://a/"));
        assert_eq!(u32::from(response.status().as_u16()), code);
    }
    for code in [0, 200, 300, 304, 400, 70_000] {
        let wire = mesh::RequestRedirect {
            status_code: code,
            ..redirect()
        };
        let text = try_filter(Wire::RequestRedirect(wire)).unwrap_err();
        assert!(text.contains("statusCode"), "{text}");
    }
    for wire in [
        mesh::RequestRedirect {
            port: 70_000,
            ..redirect()
        },
        mesh::RequestRedirect {
            hostname: "a b".into(),
            ..redirect()
        },
        mesh::RequestRedirect {
            scheme: "1 2".into(),
            ..redirect()
        },
        mesh::RequestRedirect {
            path: full("/a b"),
            ..redirect()
        },
    ] {
        assert!(try_filter(Wire::RequestRedirect(wire)).is_err());
    }
}

#[test]
fn paths_are_replaced_as_the_table_says() {
    // HTTPPathModifier.replacePrefixMatch, table in its documentation. The prefix is as it was matched.
    #[rustfmt::skip]
    let cases = [
        // (path, prefix, replacement, new path)
        ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
        ("/foo", "/foo", "/xyz", "/xyz"),
        ("/foo/", "/foo", "/xyz", "/xyz/"),
        ("/foo/bar", "/foo", "", "/bar"),
        ("/foo/", "/foo", "", "/"),
        ("/foo", "/foo", "", "/"),
        ("/foo/", "/foo", "/", "/"),
        ("/foo", "/foo", "/", "/"),
        ("/foo/bar", "/foo", "/", "/bar"),
        ("/foo", "/foo", "/xyz/", "/xyz"),
        ("/a/b", "", "/xyz", "/xyz/a/b"),
        ("/", "", "/xyz", "/xyz/"),
        ("/foo//bar", "/foo", "/xyz", "/xyz//bar"),
        ("/foo/bar", "/foo", "xyz", "/xyz/bar"),
    ];
    for (path, matched, replacement, expected) in cases {
        let rewrite = mesh::UrlRewrite {
            path: prefix(replacement),
            ..Default::default()
        };
        let filters = [filter(Wire::UrlRewrite(rewrite))];
        for query in ["", "?q=1"] {
            let passed = pass(&filters, get(&format!("{path}{query}")), Some(matched));
            assert_eq!(
                passed.uri,
                format!("{expected}{query}").as_str(),
                "{path} {replacement}"
            );
            let absolute = pass(
                &filters,
                get(&format!("http://web{path}{query}")),
                Some(matched),
            );
            assert_eq!(
                absolute.uri,
                format!("http://web{expected}{query}").as_str()
            );
        }
        let wire = mesh::RequestRedirect {
            path: prefix(replacement),
            ..redirect()
        };
        let mut of = get(&format!("http://web{path}"));
        let context = RequestContext {
            prefix: Some(matched),
            ..CONTEXT
        };
        let filters = [filter(Wire::RequestRedirect(wire))];
        let Outcome::Respond(response) = apply_request(&filters, &mut of, &context) else {
            panic!("the request goes on");
        };
        assert_eq!(
            response.headers()[LOCATION],
            format!("http://web{expected}").as_str()
        );
    }
    // Without a prefix there is nothing to replace (the API allows it with one prefix match only).
    let rewrite = mesh::UrlRewrite {
        path: prefix("/xyz"),
        ..Default::default()
    };
    assert_eq!(
        pass(&[filter(Wire::UrlRewrite(rewrite))], get("/foo"), None).uri,
        "/foo"
    );
}

#[test]
fn urls_are_rewritten() {
    // HTTPURLRewriteFilter: hostname, path.replaceFullPath.
    let rewrite = |hostname: &str, path: Option<mesh::PathModifier>| {
        let hostname = hostname.into();
        [filter(Wire::UrlRewrite(mesh::UrlRewrite {
            hostname,
            path,
        }))]
    };
    let host = [("host", "old:8080")];
    let passed = pass(
        &rewrite("", full("/one/two")),
        request("GET", "/a/b?q=1", &host),
        None,
    );
    assert_eq!(passed.uri, "/one/two?q=1");
    assert_eq!(values(&passed.headers, "host"), ["old:8080"]);
    let passed = pass(
        &rewrite("new.test", None),
        request("GET", "/a/b?q=1", &host),
        None,
    );
    assert_eq!(passed.uri, "/a/b?q=1");
    assert_eq!(values(&passed.headers, "host"), ["new.test"]);
    let passed = pass(
        &rewrite("new.test", full("/")),
        get("http://old:8080/a/b"),
        None,
    );
    assert_eq!(passed.uri, "http://new.test/");
    let both = request("GET", "http://old/a", &host);
    let passed = pass(&rewrite("new.test", None), both, None);
    assert_eq!(passed.uri, "http://new.test/a");
    assert_eq!(values(&passed.headers, "host"), ["new.test"]);
}

#[test]
fn filters_apply_in_the_order_of_their_list() {
    // HTTPRouteRule.filters.
    let set = |value: &str| filter(Wire::RequestHeaderModifier(edit(&[("a", value)], &[], &[])));
    let add = || filter(Wire::RequestHeaderModifier(edit(&[], &[("a", "3")], &[])));
    let passed = pass(&[set("1"), set("2"), add()], get("/"), None);
    assert_eq!(values(&passed.headers, "a"), ["2,3"]);
    let passed = pass(&[add(), set("1")], get("/"), None);
    assert_eq!(values(&passed.headers, "a"), ["1"]);
}

#[test]
fn a_share_of_requests_is_mirrored() {
    // HTTPRequestMirrorFilter: percent, fraction; neither: all of them.
    let mirror = |service: &str, numerator: u32, denominator: u32| {
        try_filter(Wire::RequestMirror(mesh::RequestMirror {
            backend: Some(mesh::RouteBackend {
                namespace: "demo".into(),
                service: service.into(),
                port: 80,
                ..Default::default()
            }),
            numerator,
            denominator,
        }))
    };
    for (numerator, denominator, expected) in [
        (100, 100, 10_000),
        (0, 100, 0),
        (20, 100, 2000),
        (1, 1000, 10),
        (1, 1, 10_000),
    ] {
        let filters = [mirror("copy", numerator, denominator).unwrap()];
        let mut copies: usize = 0;
        for turn in 0..10_000u64 {
            copies += mirrors(&filters, || u64::MAX / 10_000 * turn).count();
        }
        assert!(
            copies.abs_diff(expected) <= 1,
            "{numerator}/{denominator}: {copies}"
        );
    }
    let both = [mirror("a", 1, 1).unwrap(), mirror("b", 1, 1).unwrap()];
    let to: Vec<_> = mirrors(&both, || 0)
        .map(|b| b.service.1.to_string())
        .collect();
    assert_eq!(to, ["a", "b"]);
    let missing = [mirror("absent", 1, 1).unwrap()];
    assert_eq!(
        mirrors(&missing, || 0).count(),
        0,
        "BackendNotFound: dropped"
    );
    assert!(mirror("a", 1, 0).is_err());
    assert!(mirror("a", 2, 1).is_err());
}

mod cors;
