//! Filters: each one by itself, and which may stand together.

use mesh_api::headers::{refuse_remove, refuse_set};
use mesh_api::origin::Origin;

use super::{at_most, backend_reference, header_name, range};
use crate::providers::field::{Report, steps};
use crate::providers::gateway::{
    Cors, HeaderModifier, HttpRouteMatch, PathModifier, RequestMirror, RequestRedirect,
    RouteFilter, UrlRewrite,
};
use crate::providers::is_dns_name;

/// Where filters stand: it decides which of them may.
#[derive(Clone, Copy)]
pub(super) enum Place<'a> {
    Http {
        matches: Option<&'a [HttpRouteMatch]>,
        has_backends: bool,
    },
    Grpc,
}

/// Checks the list `filters`.
pub(super) fn list(filters: &[RouteFilter], place: Place<'_>, at: &mut Report<'_>) {
    at_most("filters", filters.len(), 16, at);
    let has = |kind: &str| filters.iter().any(|f| f.kind == kind);
    if has("RequestRedirect") && has("URLRewrite") {
        at.say(
            steps!["filters"],
            "RequestRedirect and URLRewrite cannot stand together",
        );
    }
    if let Place::Http { has_backends, .. } = place
        && has_backends
        && has("RequestRedirect")
    {
        at.say(
            steps!["filters"],
            "with RequestRedirect there can be no backendRefs",
        );
    }
    for (i, filter) in filters.iter().enumerate() {
        let mut at = at.at(steps!["filters", i]);
        let repeated = filters[..i].iter().any(|f| f.kind == filter.kind);
        if repeated && ONCE.contains(&filter.kind.as_str()) {
            let message = format!("{} can be there only once", filter.kind);
            at.say(steps!["type"], message);
        }
        one(filter, place, &mut at);
    }
}

fn one(filter: &RouteFilter, place: Place<'_>, at: &mut Report<'_>) {
    let RouteFilter {
        kind,
        request_header_modifier,
        response_header_modifier,
        request_mirror,
        request_redirect,
        url_rewrite,
        cors,
        external_auth,
        extension_ref,
    } = filter;
    let fields = [
        (
            "RequestHeaderModifier",
            "requestHeaderModifier",
            request_header_modifier.is_some(),
        ),
        (
            "ResponseHeaderModifier",
            "responseHeaderModifier",
            response_header_modifier.is_some(),
        ),
        ("RequestMirror", "requestMirror", request_mirror.is_some()),
        ("ExtensionRef", "extensionRef", extension_ref.is_some()),
        (
            "RequestRedirect",
            "requestRedirect",
            request_redirect.is_some(),
        ),
        ("URLRewrite", "urlRewrite", url_rewrite.is_some()),
        ("CORS", "cors", cors.is_some()),
        ("ExternalAuth", "externalAuth", external_auth.is_some()),
    ];
    let allowed = match place {
        Place::Http { .. } => &fields[..],
        Place::Grpc => &fields[..4],
    };
    if !allowed.iter().any(|(k, ..)| k == kind) {
        let names: Vec<&str> = allowed.iter().map(|(k, ..)| *k).collect();
        let message = format!("expected one of {}, found {kind:?}", names.join(", "));
        at.say(steps!["type"], message);
        return;
    }
    for (of, field, set) in fields {
        if of == kind && !set {
            at.say(steps![field], format!("is needed for type {kind}"));
        } else if of != kind && set {
            at.say(steps![field], format!("is only for type {of}"));
        }
    }
    for (field, modifier) in [
        ("requestHeaderModifier", request_header_modifier),
        ("responseHeaderModifier", response_header_modifier),
    ] {
        if let Some(modifier) = modifier {
            header_modifier(modifier, &mut at.at(steps![field]));
        }
    }
    if let Some(mirror) = request_mirror {
        request_mirror_filter(mirror, &mut at.at(steps!["requestMirror"]));
    }
    if let Some(redirect) = request_redirect {
        redirect_filter(redirect, place, &mut at.at(steps!["requestRedirect"]));
    }
    if let Some(rewrite) = url_rewrite {
        rewrite_filter(rewrite, place, &mut at.at(steps!["urlRewrite"]));
    }
    if let Some(cors) = cors {
        cors_filter(cors, &mut at.at(steps!["cors"]));
    }
}

fn header_modifier(modifier: &HeaderModifier, at: &mut Report<'_>) {
    let mut names: Vec<String> = Vec::new();
    let mut claim = |name: &str, list: &str, i: usize, at: &mut Report<'_>| {
        let lower = name.to_ascii_lowercase();
        if names.contains(&lower) {
            let message = format!("there is more than one action for {name:?}");
            at.say(steps![list, i], message);
        }
        names.push(lower);
    };
    for (list, headers) in [("set", &modifier.set), ("add", &modifier.add)] {
        at_most(list, headers.len(), 16, at);
        for (i, header) in headers.iter().enumerate() {
            header_name(&header.name, steps![list, i, "name"], at);
            if let Some(why) = refuse_set(&header.name) {
                at.say(steps![list, i, "name"], format!("{:?} {why}", header.name));
            }
            claim(&header.name, list, i, at);
            let value = &header.value;
            let control = |b: u8| (b < 0x20 && b != b'\t') || b == 0x7f;
            if value.is_empty() || value.len() > 4096 || value.bytes().any(control) {
                let message = "expected 1 to 4096 characters and no control characters";
                at.say(steps![list, i, "value"], message);
            }
        }
    }
    at_most("remove", modifier.remove.len(), 16, at);
    for (i, name) in modifier.remove.iter().enumerate() {
        header_name(name, steps!["remove", i], at);
        if let Some(why) = refuse_remove(name) {
            at.say(steps!["remove", i], format!("{name:?} {why}"));
        }
        claim(name, "remove", i, at);
    }
}

/// GEP-3171.
fn request_mirror_filter(mirror: &RequestMirror, at: &mut Report<'_>) {
    backend_reference(&mirror.backend_ref, &mut at.at(steps!["backendRef"]));
    range("percent", mirror.percent, 0..=100, at);
    let Some(fraction) = &mirror.fraction else {
        return;
    };
    if mirror.percent.is_some() {
        at.say(steps!["fraction"], "cannot stand beside percent");
    }
    let mut at = at.at(steps!["fraction"]);
    range(
        "denominator",
        fraction.denominator,
        1..=i32::MAX.into(),
        &mut at,
    );
    let most = fraction.denominator.unwrap_or(100).max(0);
    range("numerator", Some(fraction.numerator), 0..=most, &mut at);
}

fn redirect_filter(redirect: &RequestRedirect, place: Place<'_>, at: &mut Report<'_>) {
    if let Some(scheme) = &redirect.scheme
        && !["http", "https"].contains(&scheme.as_str())
    {
        let message = format!("expected http or https, found {scheme:?}");
        at.say(steps!["scheme"], message);
    }
    hostname(redirect.hostname.as_deref(), at);
    range("port", redirect.port, 1..=65_535, at);
    if let Some(code) = redirect.status_code
        && ![301, 302, 303, 307, 308].contains(&code)
    {
        let message = format!("expected 301, 302, 303, 307 or 308, found {code}");
        at.say(steps!["statusCode"], message);
    }
    if let Some(path) = &redirect.path {
        path_modifier(path, place, &mut at.at(steps!["path"]));
    }
}

fn rewrite_filter(rewrite: &UrlRewrite, place: Place<'_>, at: &mut Report<'_>) {
    hostname(rewrite.hostname.as_deref(), at);
    if let Some(path) = &rewrite.path {
        path_modifier(path, place, &mut at.at(steps!["path"]));
    }
}

fn hostname(name: Option<&str>, at: &mut Report<'_>) {
    if let Some(name) = name.filter(|n| !is_dns_name(n)) {
        let message = format!("expected a host name, found {name:?}");
        at.say(steps!["hostname"], message);
    }
}

/// The prefix that is replaced must be known: exactly one match, of type PathPrefix (CEL rule of HTTPRoute).
fn path_modifier(modifier: &PathModifier, place: Place<'_>, at: &mut Report<'_>) {
    let PathModifier {
        kind,
        replace_full_path,
        replace_prefix_match,
    } = modifier;
    let (needed, other) = match kind.as_str() {
        "ReplaceFullPath" => (
            ("replaceFullPath", replace_full_path),
            ("replacePrefixMatch", replace_prefix_match),
        ),
        "ReplacePrefixMatch" => (
            ("replacePrefixMatch", replace_prefix_match),
            ("replaceFullPath", replace_full_path),
        ),
        unknown => {
            let message =
                format!("expected ReplaceFullPath or ReplacePrefixMatch, found {unknown:?}");
            at.say(steps!["type"], message);
            return;
        }
    };
    match needed.1 {
        None => at.say(steps![needed.0], format!("is needed for type {kind}")),
        Some(value) if value.len() > 1024 => {
            at.say(steps![needed.0], "expected at most 1024 characters");
        }
        // A path with a line break in it would be a header of its own in a Location.
        Some(value) if value.bytes().any(|b| b <= 0x20 || b == 0x7f) => {
            at.say(
                steps![needed.0],
                "must not contain spaces or control characters",
            );
        }
        Some(_) => {}
    }
    if other.1.is_some() {
        at.say(steps![other.0], format!("is not for type {kind}"));
    }
    if let Place::Http {
        matches: Some(matches),
        ..
    } = place
        && kind == "ReplacePrefixMatch"
    {
        let prefix = |m: &HttpRouteMatch| {
            let kind = m.path.as_ref().and_then(|p| p.kind.as_deref());
            kind.unwrap_or("PathPrefix") == "PathPrefix"
        };
        // No match at all is the default one, prefix `/`.
        if matches.len() > 1 || !matches.iter().all(prefix) {
            let message = "needs a rule with exactly one match, of type PathPrefix";
            at.say(steps!["type"], message);
        }
    }
}

/// GEP-1767.
fn cors_filter(cors: &Cors, at: &mut Report<'_>) {
    for (list, values) in [
        ("allowMethods", &cors.allow_methods),
        ("allowHeaders", &cors.allow_headers),
        ("exposeHeaders", &cors.expose_headers),
    ] {
        at_most(list, values.len(), 64, at);
        for (i, value) in values.iter().enumerate() {
            header_name(value, steps![list, i], at);
        }
        if values.len() > 1 && values.iter().any(|v| v == "*") {
            at.say(steps![list], "with * there can be nothing else");
        }
    }
    at_most("allowOrigins", cors.allow_origins.len(), 64, at);
    for (i, origin) in cors.allow_origins.iter().enumerate() {
        if origin != "*" && Origin::parse(origin).is_none() {
            let message = format!("expected * or scheme://host[:port], found {origin:?}");
            at.say(steps!["allowOrigins", i], message);
        }
    }
    if cors.allow_origins.len() > 1 && cors.allow_origins.iter().any(|o| o == "*") {
        at.say(steps!["allowOrigins"], "with * there can be nothing else");
    }
    range("maxAge", cors.max_age, 1..=i32::MAX.into(), at);
}

/// Filters that the CRD's CEL rules let stand only once in a list.
const ONCE: [&str; 6] = [
    "CORS",
    "ExternalAuth",
    "RequestHeaderModifier",
    "ResponseHeaderModifier",
    "RequestRedirect",
    "URLRewrite",
];
