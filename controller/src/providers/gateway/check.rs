//! What the types of the Gateway API's objects cannot tell: its limits, its CEL rules, its enums.
//!
//! Each function names every mistake with its place. The directory refuses an object that has one, as
//! Kubernetes' API server would; the model, which may be given what a newer CRD lets pass, gives up only the
//! rule that a mistake lies in ([`rule_of`]).

mod filters;

use std::collections::BTreeSet;

use super::{
    BackendRef, BackendReference, BackendTrafficPolicySpec, GrpcRouteMatch, GrpcRouteSpec,
    HttpPathMatch, HttpRetry, HttpRouteMatch, HttpRouteSpec, HttpTimeouts, L4RouteRule, NamedMatch,
    ParentReference, SessionPersistence, TcpRouteSpec, TlsRouteSpec, duration,
};
use crate::providers::field::{Found, Report, Step, steps};
use crate::providers::is_dns_name;

/// Everything that is wrong with an HTTPRoute.
pub(crate) fn http_route(spec: &HttpRouteSpec) -> Vec<Found> {
    let mut found = Vec::new();
    let mut spec_at = Report::new(steps!["spec"], &mut found);
    parents(&spec.parent_refs, &mut spec_at);
    let rules = spec.rules.as_deref().unwrap_or_default();
    rule_names(rules.iter().map(|r| r.name.as_deref()), &mut spec_at);
    let total: usize = rules.iter().map(|r| r.matches.len()).sum();
    if total > MAX_MATCHES {
        let message = format!("expected at most {MAX_MATCHES} matches in all rules, found {total}");
        spec_at.say(steps!["rules"], message);
    }
    for (i, rule) in rules.iter().enumerate() {
        let mut at = spec_at.at(steps!["rules", i]);
        at_most("matches", rule.matches.len(), 64, &mut at);
        for (j, m) in rule.matches.iter().enumerate() {
            http_match(m, &mut at.at(steps!["matches", j]));
        }
        let place = filters::Place::Http {
            matches: Some(&rule.matches),
            has_backends: !rule.backend_refs.is_empty(),
        };
        filters::list(&rule.filters, place, &mut at);
        let place = filters::Place::Http {
            matches: Some(&rule.matches),
            has_backends: false,
        };
        backends(&rule.backend_refs, Some(place), &mut at);
        if let Some(timeouts) = &rule.timeouts {
            http_timeouts(timeouts, &mut at.at(steps!["timeouts"]));
        }
        if let Some(retry) = &rule.retry {
            http_retry(retry, &mut at.at(steps!["retry"]));
        }
        if let Some(session) = &rule.session_persistence {
            session_persistence(session, &mut at.at(steps!["sessionPersistence"]));
        }
    }
    found
}

/// Everything that is wrong with a GRPCRoute.
pub(crate) fn grpc_route(spec: &GrpcRouteSpec) -> Vec<Found> {
    let mut found = Vec::new();
    let mut spec_at = Report::new(steps!["spec"], &mut found);
    parents(&spec.parent_refs, &mut spec_at);
    let names = spec.rules.iter().map(|r| r.name.as_deref());
    rule_names(names, &mut spec_at);
    for (i, rule) in spec.rules.iter().enumerate() {
        let mut at = spec_at.at(steps!["rules", i]);
        at_most("matches", rule.matches.len(), 64, &mut at);
        for (j, m) in rule.matches.iter().enumerate() {
            grpc_match(m, &mut at.at(steps!["matches", j]));
        }
        filters::list(&rule.filters, filters::Place::Grpc, &mut at);
        backends(&rule.backend_refs, Some(filters::Place::Grpc), &mut at);
        if let Some(session) = &rule.session_persistence {
            session_persistence(session, &mut at.at(steps!["sessionPersistence"]));
        }
    }
    found
}

/// Everything that is wrong with a TLSRoute.
pub(crate) fn tls_route(spec: &TlsRouteSpec) -> Vec<Found> {
    let mut found = Vec::new();
    let mut at = Report::new(steps!["spec"], &mut found);
    parents(&spec.parent_refs, &mut at);
    if spec.hostnames.is_empty() {
        at.say(steps!["hostnames"], "expected at least one server name");
    }
    at_most("hostnames", spec.hostnames.len(), 16, &mut at);
    for (i, name) in spec.hostnames.iter().enumerate() {
        if !is_dns_name(name.strip_prefix("*.").unwrap_or(name)) {
            let message =
                format!("expected a host name such as a.example or *.example, found {name:?}");
            at.say(steps!["hostnames", i], message);
        }
    }
    l4_rules(&spec.rules, &mut at);
    found
}

/// Everything that is wrong with a TCPRoute.
pub(crate) fn tcp_route(spec: &TcpRouteSpec) -> Vec<Found> {
    let mut found = Vec::new();
    let mut at = Report::new(steps!["spec"], &mut found);
    parents(&spec.parent_refs, &mut at);
    l4_rules(&spec.rules, &mut at);
    found
}

/// Everything that is wrong with an XBackendTrafficPolicy.
pub(crate) fn backend_traffic_policy(spec: &BackendTrafficPolicySpec) -> Vec<Found> {
    let mut found = Vec::new();
    let mut at = Report::new(steps!["spec"], &mut found);
    if spec.target_refs.is_empty() {
        at.say(steps!["targetRefs"], "expected at least one target");
    }
    at_most("targetRefs", spec.target_refs.len(), 16, &mut at);
    for (i, target) in spec.target_refs.iter().enumerate() {
        named(&target.name, &mut at.at(steps!["targetRefs", i]));
    }
    let constraint = spec.retry_constraint.as_ref();
    if let Some(budget) = constraint.and_then(|c| c.budget.as_ref()) {
        let mut at = at.at(steps!["retryConstraint", "budget"]);
        range("percent", budget.percent, 0..=100, &mut at);
        let range = 1_000..=3_600_000;
        time("interval", budget.interval.as_deref(), range, &mut at);
    }
    if let Some(rate) = constraint.and_then(|c| c.min_retry_rate.as_ref()) {
        let mut at = at.at(steps!["retryConstraint", "minRetryRate"]);
        range("count", rate.count, 1..=1_000_000, &mut at);
        time("interval", rate.interval.as_deref(), 1..=3_600_000, &mut at);
    }
    if let Some(session) = &spec.session_persistence {
        session_persistence(session, &mut at.at(steps!["sessionPersistence"]));
    }
    found
}

/// The rule that a mistake lies in, if it lies in one, and the match of that rule.
pub(crate) fn rule_of(path: &[Step]) -> Option<(usize, Option<usize>)> {
    let index = |at: usize, key: &str| match (path.get(at), path.get(at + 1)) {
        (Some(Step::Key(k)), Some(Step::Index(i))) if k == key => Some(*i),
        _ => None,
    };
    let rule = index(1, "rules")?;
    Some((rule, index(3, "matches")))
}

fn parents(refs: &[ParentReference], at: &mut Report<'_>) {
    at_most("parentRefs", refs.len(), 32, at);
    for (i, parent) in refs.iter().enumerate() {
        let mut here = at.at(steps!["parentRefs", i]);
        named(&parent.name, &mut here);
        range("port", parent.port, 1..=65_535, &mut here);
        if refs[..i].contains(parent) {
            let message = "is there twice; refs to one parent differ in port or sectionName";
            here.say(steps![], message);
        }
    }
}

fn rule_names<'a>(names: impl ExactSizeIterator<Item = Option<&'a str>>, at: &mut Report<'_>) {
    at_most("rules", names.len(), 16, at);
    let mut seen = BTreeSet::new();
    for (i, name) in names.enumerate() {
        let Some(name) = name else { continue };
        if !is_dns_name(name) {
            let message = format!("expected a name of a-z, 0-9, '-' and '.', found {name:?}");
            at.say(steps!["rules", i, "name"], message);
        } else if !seen.insert(name) {
            let message = format!("{name:?} is taken by another rule");
            at.say(steps!["rules", i, "name"], message);
        }
    }
}

fn http_match(m: &HttpRouteMatch, at: &mut Report<'_>) {
    if let Some(path) = &m.path {
        path_match(path, &mut at.at(steps!["path"]));
    }
    named_matches("headers", &m.headers, true, at);
    named_matches("queryParams", &m.query_params, false, at);
    if let Some(method) = &m.method
        && !METHODS.contains(&method.as_str())
    {
        let message = format!("expected one of {}, found {method:?}", METHODS.join(", "));
        at.say(steps!["method"], message);
    }
}

/// The rules of the CRD for `HTTPPathMatch`.
fn path_match(m: &HttpPathMatch, at: &mut Report<'_>) {
    let value = m.value.as_deref().unwrap_or("/");
    if value.len() > 1024 {
        at.say(steps!["value"], "expected at most 1024 characters");
    }
    match m.kind.as_deref().unwrap_or("PathPrefix") {
        "RegularExpression" => regular_expression(value, at),
        "Exact" | "PathPrefix" => {
            let parts = ["//", "/./", "/../", "%2f", "%2F", "#"];
            let ends = ["/..", "/."];
            if !value.starts_with('/') {
                let message = format!("expected an absolute path, found {value:?}");
                at.say(steps!["value"], message);
            } else if let Some(part) = parts.iter().find(|p| value.contains(**p)) {
                at.say(steps!["value"], format!("must not contain {part:?}"));
            } else if let Some(end) = ends.iter().find(|e| value.ends_with(**e)) {
                at.say(steps!["value"], format!("must not end with {end:?}"));
            } else if let Some(c) = value.chars().find(|c| !is_path_character(*c)) {
                at.say(
                    steps!["value"],
                    format!("must not contain {c:?} unless it is percent-encoded"),
                );
            }
        }
        other => at.say(
            steps!["type"],
            format!("expected Exact, PathPrefix or RegularExpression, found {other:?}"),
        ),
    }
}

fn is_path_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-/._~!$&'()*+,;=:@%".contains(c)
}

fn named_matches(list: &str, matches: &[NamedMatch], headers: bool, at: &mut Report<'_>) {
    at_most(list, matches.len(), 16, at);
    for (i, m) in matches.iter().enumerate() {
        let mut at = at.at(steps![list, i]);
        if headers {
            header_name(&m.name, steps!["name"], &mut at);
        } else if m.name.is_empty() {
            at.say(steps!["name"], "expected the name of a query parameter");
        }
        if m.value.is_empty() || m.value.len() > 4096 {
            at.say(steps!["value"], "expected 1 to 4096 characters");
        }
        match_type(m.kind.as_deref(), &m.value, &mut at);
    }
}

fn match_type(kind: Option<&str>, value: &str, at: &mut Report<'_>) {
    match kind.unwrap_or("Exact") {
        "Exact" => {}
        "RegularExpression" => regular_expression(value, at),
        other => at.say(
            steps!["type"],
            format!("expected Exact or RegularExpression, found {other:?}"),
        ),
    }
}

/// As the proxies read it: the whole value must match.
fn regular_expression(value: &str, at: &mut Report<'_>) {
    let bounded = |text: &str| {
        regex::RegexBuilder::new(text)
            .size_limit(REGEX_BYTES)
            .build()
    };
    // Alone first, so that `a)|(b` is not made valid by what is put around it.
    let built = bounded(value).and_then(|_| bounded(&format!(r"\A(?:{value})\z")));
    if let Err(error) = built {
        let text = error.to_string();
        let reason = text.lines().last().unwrap_or_default().trim();
        at.say(
            steps!["value"],
            format!("expected a regular expression (RE2 syntax): {reason}"),
        );
    }
}

fn grpc_match(m: &GrpcRouteMatch, at: &mut Report<'_>) {
    named_matches("headers", &m.headers, true, at);
    let Some(method) = &m.method else { return };
    let mut at = at.at(steps!["method"]);
    if method.service.is_none() && method.method.is_none() {
        at.say(steps![], "expected service, method or both");
    }
    let kind = method.kind.as_deref().unwrap_or("Exact");
    for (field, value) in [("service", &method.service), ("method", &method.method)] {
        let Some(value) = value else { continue };
        match kind {
            "Exact" if value.is_empty() || value.contains('/') => {
                let message = format!("expected a name without '/', found {value:?}");
                at.say(steps![field], message);
            }
            "Exact" => {}
            "RegularExpression" => {
                let mut own = Vec::new();
                regular_expression(value, &mut Report::new(Vec::new(), &mut own));
                for (_, message) in own {
                    at.say(steps![field], message);
                }
            }
            other => at.say(
                steps!["type"],
                format!("expected Exact or RegularExpression, found {other:?}"),
            ),
        }
    }
}

fn l4_rules(rules: &[L4RouteRule], at: &mut Report<'_>) {
    rule_names(rules.iter().map(|r| r.name.as_deref()), at);
    if rules.len() != 1 {
        let message = format!("expected one rule, found {}", rules.len());
        at.say(steps!["rules"], message);
    }
    for (i, rule) in rules.iter().enumerate() {
        let mut at = at.at(steps!["rules", i]);
        if rule.backend_refs.is_empty() {
            at.say(steps!["backendRefs"], "expected at least one backend");
        }
        backends(&rule.backend_refs, None, &mut at);
    }
}

fn backends(refs: &[BackendRef], filters: Option<filters::Place<'_>>, at: &mut Report<'_>) {
    at_most("backendRefs", refs.len(), 16, at);
    for (i, backend) in refs.iter().enumerate() {
        let mut at = at.at(steps!["backendRefs", i]);
        backend_reference(&backend.reference(), &mut at);
        range("weight", backend.weight, 0..=1_000_000, &mut at);
        match filters {
            Some(place) => filters::list(&backend.filters, place, &mut at),
            None if backend.filters.is_empty() => {}
            None => at.say(steps!["filters"], "there is no such field"),
        }
    }
}

fn backend_reference(backend: &BackendReference, at: &mut Report<'_>) {
    named(&backend.name, at);
    range("port", backend.port, 1..=65_535, at);
    let core = backend.group.as_deref().unwrap_or_default().is_empty();
    let service = backend.kind.as_deref().unwrap_or("Service") == "Service";
    if core && service && backend.port.is_none() {
        at.say(steps!["port"], "expected the number of the Service's port");
    }
}

/// GEP-1742: an attempt cannot be given longer than the whole.
fn http_timeouts(timeouts: &HttpTimeouts, at: &mut Report<'_>) {
    let whole = time("request", timeouts.request.as_deref(), 0..=u64::MAX, at);
    let backend = timeouts.backend_request.as_deref();
    let each = time("backendRequest", backend, 0..=u64::MAX, at);
    if let (Some(whole), Some(each)) = (whole, each)
        && whole > 0
        && each > whole
    {
        at.say(steps!["backendRequest"], "must not be longer than request");
    }
}

/// GEP-1731.
fn http_retry(retry: &HttpRetry, at: &mut Report<'_>) {
    for (i, code) in retry.codes.iter().enumerate() {
        if !(400..=599).contains(code) {
            let message = format!("expected a status from 400 to 599, found {code}");
            at.say(steps!["codes", i], message);
        }
    }
    range("attempts", retry.attempts, 1..=1_000, at);
    time("backoff", retry.backoff.as_deref(), 0..=u64::MAX, at);
}

/// GEP-1619.
fn session_persistence(session: &SessionPersistence, at: &mut Report<'_>) {
    let kind = session.kind.as_deref().unwrap_or("Cookie");
    if !["Cookie", "Header"].contains(&kind) {
        let message = format!("expected Cookie or Header, found {kind:?}");
        at.say(steps!["type"], message);
    }
    if let Some(name) = &session.session_name {
        header_name(name, steps!["sessionName"], at);
        if name.len() > 128 {
            at.say(steps!["sessionName"], "expected at most 128 characters");
        }
    }
    let absolute = session.absolute_timeout.as_deref();
    time("absoluteTimeout", absolute, 0..=u64::MAX, at);
    let Some(cookie) = &session.cookie_config else {
        return;
    };
    if kind == "Header" {
        at.say(steps!["cookieConfig"], "is only for type Cookie");
    }
    match cookie.lifetime_type.as_deref().unwrap_or("Session") {
        "Session" => {}
        "Permanent" if session.absolute_timeout.is_none() => at.say(
            steps!["absoluteTimeout"],
            "is needed for a cookie of lifetimeType Permanent",
        ),
        "Permanent" => {}
        other => at.say(
            steps!["cookieConfig", "lifetimeType"],
            format!("expected Session or Permanent, found {other:?}"),
        ),
    }
}

/// A header's name: RFC 9110, section 5.6.2. Pseudo-headers cannot be named.
fn header_name(name: &str, path: Vec<Step>, at: &mut Report<'_>) {
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    if name.is_empty() || name.len() > 256 || !name.bytes().all(token) {
        let message = format!("expected a header name, found {name:?}");
        at.say(path, message);
    }
}

fn named(name: &str, at: &mut Report<'_>) {
    if name.is_empty() {
        at.say(steps!["name"], "expected the name of the object");
    }
}

fn at_most(list: &str, length: usize, most: usize, at: &mut Report<'_>) {
    if length > most {
        let message = format!("expected at most {most} entries, found {length}");
        at.say(steps![list], message);
    }
}

/// Checks a number that may be absent.
pub(crate) fn range(
    field: &str,
    number: Option<i64>,
    allowed: std::ops::RangeInclusive<i64>,
    at: &mut Report<'_>,
) {
    if let Some(number) = number.filter(|n| !allowed.contains(n)) {
        let (from, to) = allowed.into_inner();
        let message = format!("expected a number from {from} to {to}, found {number}");
        at.say(steps![field], message);
    }
}

/// Checks a duration that may be absent; milliseconds.
pub(crate) fn time(
    field: &str,
    text: Option<&str>,
    allowed: std::ops::RangeInclusive<u64>,
    at: &mut Report<'_>,
) -> Option<u64> {
    let text = text?;
    match duration(text) {
        Ok(value) if allowed.contains(&value) => return Some(value),
        Ok(_) => {
            let (from, to) = allowed.into_inner();
            let message = format!("expected a duration from {from}ms to {to}ms, found {text:?}");
            at.say(steps![field], message);
        }
        Err(message) => at.say(steps![field], message),
    }
    None
}

/// Matches of all rules together.
const MAX_MATCHES: usize = 128;
/// Compiled size of one expression: a bound on what a route costs each proxy.
const REGEX_BYTES: usize = 1 << 20;
const METHODS: [&str; 9] = [
    "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH",
];

#[cfg(test)]
mod tests;
