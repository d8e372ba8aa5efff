//! Routes as a controller of any version may send them, and requests of any shape.

use ::http::{HeaderMap, Method, Request, Response, Uri};
use mesh_api::proto::mesh;
use prost::Message;

use super::compile::{Route, build};
use super::filter::{self, Outcome, RequestContext};
use super::{Match, RouteSet};
use crate::fuzz::{Input, headers, part};
use crate::table::Target;

/// Two routes: in whatever order they came, a request gets the same rule of them; its filters leave something that can be
/// sent; a backend is chosen whatever the random number.
pub(crate) fn route(bytes: &[u8]) {
    let mut input = Input(bytes);
    let kind = mesh::RouteKind::try_from(i32::from(input.byte() % 4) + 1).unwrap_or_default();
    let routes: Vec<Route> = ["a", "b"]
        .into_iter()
        .filter_map(|name| compiled(kind, name, input.part()))
        .collect();
    let Some(parts) = request(&mut input) else {
        return;
    };
    let forwards: Vec<&Route> = routes.iter().collect();
    let backwards: Vec<&Route> = routes.iter().rev().collect();
    let policy = |_: &Route, _: &super::compile::RuleSpec| std::sync::Arc::default();
    let (Some(set), Some(other)) = (build(&forwards, policy), build(&backwards, policy)) else {
        // Of a kind that has no set without a rule.
        assert!(routes.iter().all(|route| route.rules.is_empty()));
        return;
    };
    let sni = parts.uri.host();
    match (&set, &other) {
        (RouteSet::Tls(a), RouteSet::Tls(b)) => {
            let name = |rule: Option<&std::sync::Arc<super::Rule>>| rule.map(|r| r.route.clone());
            assert_eq!(name(a.find(sni)), name(b.find(sni)));
            return;
        }
        (RouteSet::Tcp(a), RouteSet::Tcp(b)) => {
            assert_eq!(a.rule().route, b.rule().route);
            return;
        }
        _ => {}
    }
    let found = set.find(&parts);
    assert_eq!(said(found), said(other.find(&parts)));
    let Some(found) = found else { return };
    if let Some(prefix) = found.prefix {
        assert!(parts.uri.path().starts_with(prefix) && !prefix.ends_with('/'));
    }
    for random in [0, u64::MAX / 2, u64::MAX] {
        // Total: every number leads somewhere.
        let _ = found.rule.choose(random);
    }
    apply(found, &parts);
}

fn compiled(kind: mesh::RouteKind, name: &str, bytes: &[u8]) -> Option<Route> {
    let mut wire = mesh::Route::decode(bytes).ok()?;
    wire.set_kind(kind);
    wire.namespace = "demo".into();
    wire.name = name.into();
    let prefix = match kind {
        mesh::RouteKind::Http | mesh::RouteKind::Unspecified => "httproute",
        mesh::RouteKind::Grpc => "grpcroute",
        mesh::RouteKind::Tls => "tlsroute",
        mesh::RouteKind::Tcp => "tcproute",
    };
    let mut targets = |_: &str, _: u16| std::sync::Arc::new(Target::default());
    Route::compile(&format!("{prefix}/demo/{name}"), wire, &mut targets).ok()
}

fn request(input: &mut Input<'_>) -> Option<::http::request::Parts> {
    let mut parts = Request::new(()).into_parts().0;
    parts.method = Method::from_bytes(input.part()).ok()?;
    parts.uri = Uri::try_from(input.part()).ok()?;
    parts.headers = headers(input.part());
    Some(parts)
}

fn said(found: Option<Match<'_>>) -> Option<String> {
    found.map(|found| {
        format!(
            "{:?} {:?} {:?}",
            found.rule.route, found.rule.name, found.prefix
        )
    })
}

fn apply(found: Match<'_>, parts: &::http::request::Parts) {
    let context = RequestContext {
        prefix: found.prefix,
        service_port: 80,
    };
    let mut sent = Request::new(()).into_parts().0;
    sent.method = parts.method.clone();
    sent.uri = parts.uri.clone();
    sent.headers = parts.headers.clone();
    let origin = filter::origin(&found.rule.filters, &sent.headers);
    let mut response = match filter::apply_request(&found.rule.filters, &mut sent, &context) {
        Outcome::Continue => Response::new(()),
        Outcome::Respond(response) => response,
    }
    .into_parts()
    .0;
    // A target that was rewritten is one still.
    let target = sent.uri.to_string();
    assert!(target.parse::<Uri>().is_ok(), "{target:?}");
    assert!(
        parts.uri.path().is_empty() || sent.uri.path().starts_with('/') || sent.uri.path() == "*"
    );
    filter::apply_response(&found.rule.filters, origin.as_ref(), &mut response);
    one_line(&sent.headers);
    one_line(&response.headers);
}

/// No value that would be another header on the wire.
fn one_line(headers: &HeaderMap) {
    for value in headers.values() {
        assert!(
            !value
                .as_bytes()
                .iter()
                .any(|b| matches!(b, b'\r' | b'\n' | 0))
        );
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let text = |kind: mesh::MatchType, value: &str| {
        Some(mesh::StringMatch {
            r#type: kind.into(),
            value: value.into(),
        })
    };
    let named = |name: &str, value: &str| mesh::NamedMatch {
        name: name.into(),
        value: text(mesh::MatchType::Exact, value),
    };
    let backend = mesh::RouteBackend {
        namespace: "demo".into(),
        service: "web".into(),
        port: 80,
        weight: 3,
        ..Default::default()
    };
    let rule = |path: Option<mesh::StringMatch>| mesh::RouteRule {
        name: "r".into(),
        matches: vec![mesh::RouteMatch {
            path,
            headers: vec![named("x-a", "1")],
            ..Default::default()
        }],
        backends: vec![backend.clone()],
        ..Default::default()
    };
    let route = |created: i64, rules: Vec<mesh::RouteRule>| {
        let route = mesh::Route {
            created,
            rules,
            hostnames: vec!["*.example.com".into(), "a.example.com".into()],
            ..Default::default()
        };
        part(&route.encode_to_vec())
    };
    let asked = [
        part(b"GET"),
        part(b"http://a.example.com/shop/cart?q=1"),
        part(b"x-a: 1\norigin: https://a.example.com"),
    ]
    .concat();
    let prefix = rule(text(mesh::MatchType::Prefix, "/shop"));
    let exact = rule(text(mesh::MatchType::Exact, "/shop/cart"));
    let regex = rule(text(mesh::MatchType::Regex, "/s[a-z]+/.*"));
    let mut rewritten = prefix.clone();
    rewritten.filters = filters();
    let two = |kind: u8, a: Vec<u8>, b: Vec<u8>| [&[kind][..], &a, &b, &asked].concat();
    vec![
        two(0, route(1, vec![prefix.clone()]), route(2, vec![exact])),
        two(0, route(1, vec![regex]), route(1, vec![prefix.clone()])),
        two(0, route(1, vec![rewritten]), route(2, vec![])),
        two(
            1,
            route(1, vec![mesh::RouteRule::default()]),
            route(2, vec![]),
        ),
        two(
            2,
            route(
                1,
                vec![mesh::RouteRule {
                    matches: vec![],
                    ..prefix.clone()
                }],
            ),
            route(2, vec![prefix.clone()]),
        ),
        two(
            3,
            route(1, vec![mesh::RouteRule::default()]),
            route(2, vec![mesh::RouteRule::default()]),
        ),
    ]
}

fn filters() -> Vec<mesh::RouteFilter> {
    use mesh::path_modifier::Modifier;
    use mesh::route_filter::Filter;

    let header = |name: &str, value: &str| mesh::Header {
        name: name.into(),
        value: value.into(),
    };
    let edit = mesh::HeaderModifier {
        set: vec![header("x-set", "1"), header("host", "b")],
        add: vec![header("x-a", "2")],
        remove: vec!["x-gone".into()],
    };
    let modifier = Some(mesh::PathModifier {
        modifier: Some(Modifier::ReplacePrefixMatch("/new".into())),
    });
    let cors = mesh::Cors {
        allow_origins: vec!["https://*.example.com".into()],
        allow_methods: vec!["GET".into()],
        allow_credentials: true,
        max_age: 5,
        ..Default::default()
    };
    [
        Filter::RequestHeaderModifier(edit.clone()),
        Filter::ResponseHeaderModifier(edit),
        Filter::Cors(cors),
        Filter::UrlRewrite(mesh::UrlRewrite {
            hostname: "b.example.com".into(),
            path: modifier.clone(),
        }),
        Filter::RequestRedirect(mesh::RequestRedirect {
            scheme: "https".into(),
            path: modifier,
            status_code: 302,
            ..Default::default()
        }),
    ]
    .map(|filter| mesh::RouteFilter {
        filter: Some(filter),
    })
    .into()
}
