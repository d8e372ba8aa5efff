//! From the rules that users wrote to the rules that proxies are sent; the API's defaults are filled in.

use std::collections::BTreeMap;

use mesh_api::proto::mesh::{
    self, MatchType, RouteBackend, RouteKind, RouteMatch, RouteRetry, RouteRule,
    SessionPersistenceType, StringMatch, route_filter,
};

use super::backends::{Services, Unresolved};
use crate::providers::field::{Found, display};
use crate::providers::gateway::{
    self, BackendRef, BackendReference, Cors, GrpcRouteSpec, HeaderModifier, HttpRouteMatch,
    HttpRouteSpec, L4RouteRule, NamedMatch, PathModifier, RouteFilter, SessionPersistence, check,
    duration,
};

/// A rule, and what is wrong with it.
#[derive(Debug, Default)]
pub(super) struct Judged {
    /// `None`: nothing of what it matches is understood.
    pub(super) rule: Option<RouteRule>,
    /// Why it cannot be carried out.
    mistake: Option<String>,
    /// Backends that cannot be used.
    pub(super) unresolved: Vec<Unresolved>,
}

impl Judged {
    pub(super) fn mistake(&self) -> Option<&str> {
        self.mistake.as_deref()
    }
}

/// The rules of an HTTPRoute.
pub(super) fn http(
    spec: &HttpRouteSpec,
    namespace: &str,
    services: Services<'_>,
    found: &[Found],
) -> Vec<Judged> {
    let context = Context::new(namespace, services, RouteKind::Http, found);
    let default = [gateway::HttpRouteRule::default()];
    let rules = spec.rules.as_deref().unwrap_or(&default);
    let judge = |(i, rule): (usize, &gateway::HttpRouteRule)| {
        let timeouts = rule.timeouts.as_ref();
        let read = |text: Option<&String>| duration(text?).ok();
        let made = RouteRule {
            request_timeout_ms: read(timeouts.and_then(|t| t.request.as_ref())),
            backend_request_timeout_ms: read(timeouts.and_then(|t| t.backend_request.as_ref())),
            retry: rule.retry.as_ref().map(retry),
            ..RouteRule::default()
        };
        let parts = Parts {
            index: i,
            name: rule.name.as_deref(),
            matches: rule.matches.iter().map(http_match).collect(),
            filters: &rule.filters,
            backends: &rule.backend_refs,
            session: rule.session_persistence.as_ref(),
        };
        context.judge(parts, made)
    };
    rules.iter().enumerate().map(judge).collect()
}

/// The rules of a GRPCRoute.
pub(super) fn grpc(
    spec: &GrpcRouteSpec,
    namespace: &str,
    services: Services<'_>,
    found: &[Found],
) -> Vec<Judged> {
    let context = Context::new(namespace, services, RouteKind::Grpc, found);
    let judge = |(i, rule): (usize, &gateway::GrpcRouteRule)| {
        let parts = Parts {
            index: i,
            name: rule.name.as_deref(),
            matches: rule.matches.iter().map(grpc_match).collect(),
            filters: &rule.filters,
            backends: &rule.backend_refs,
            session: rule.session_persistence.as_ref(),
        };
        context.judge(parts, RouteRule::default())
    };
    spec.rules.iter().enumerate().map(judge).collect()
}

/// The rules of a TLSRoute or TCPRoute.
pub(super) fn l4(
    rules: &[L4RouteRule],
    kind: RouteKind,
    namespace: &str,
    services: Services<'_>,
    found: &[Found],
) -> Vec<Judged> {
    let context = Context::new(namespace, services, kind, found);
    let judge = |(i, rule): (usize, &L4RouteRule)| {
        let parts = Parts {
            index: i,
            name: rule.name.as_deref(),
            matches: Vec::new(),
            filters: &[],
            backends: &rule.backend_refs,
            session: None,
        };
        context.judge(parts, RouteRule::default())
    };
    rules.iter().enumerate().map(judge).collect()
}

/// A mistake for a reader.
pub(super) fn in_words((path, message): &Found) -> String {
    format!("{}: {message}", display(path))
}

/// What rules of one route have in common.
struct Context<'a> {
    namespace: &'a str,
    services: Services<'a>,
    kind: RouteKind,
    /// By rule, with the match they are in.
    mistakes: BTreeMap<usize, Vec<(Option<usize>, &'a Found)>>,
}

/// What the kinds' rules have in common.
struct Parts<'a> {
    index: usize,
    name: Option<&'a str>,
    matches: Vec<RouteMatch>,
    filters: &'a [RouteFilter],
    backends: &'a [BackendRef],
    session: Option<&'a SessionPersistence>,
}

impl<'a> Context<'a> {
    fn new(
        namespace: &'a str,
        services: Services<'a>,
        kind: RouteKind,
        found: &'a [Found],
    ) -> Self {
        let mut mistakes: BTreeMap<usize, Vec<_>> = BTreeMap::new();
        for mistake in found {
            if let Some((rule, of_match)) = check::rule_of(&mistake.0) {
                mistakes.entry(rule).or_default().push((of_match, mistake));
            }
        }
        Self {
            namespace,
            services,
            kind,
            mistakes,
        }
    }

    /// Completes `made`, which has what only its kind has.
    fn judge(&self, parts: Parts<'_>, made: RouteRule) -> Judged {
        let mut judged = Judged::default();
        let none = Vec::new();
        let mistakes = self.mistakes.get(&parts.index).unwrap_or(&none);
        let mut why: Vec<String> = mistakes.iter().map(|(_, f)| in_words(f)).collect();
        let mut at = |what: &str, message: &str| {
            why.push(format!("spec.rules[{}].{what}: {message}", parts.index));
        };
        let filters = self.filters(parts.filters, &mut judged.unresolved, &mut |i, message| {
            at(&format!("filters[{i}]"), message);
        });
        let mut backends = Vec::new();
        for backend in parts.backends {
            backends.push(self.backend(backend, &mut judged.unresolved));
        }
        let good = |i: &usize| !mistakes.iter().any(|(of_match, _)| *of_match == Some(*i));
        let given = parts.matches.len();
        let matches = parts.matches.into_iter().enumerate();
        let matches: Vec<RouteMatch> = matches.filter(|(i, _)| good(i)).map(|(_, m)| m).collect();
        let understood = given == 0 || !matches.is_empty();
        let name = parts.name.unwrap_or_default().to_owned();
        judged.mistake = (!why.is_empty()).then(|| why.join("; "));
        judged.rule = match &judged.mistake {
            // Without a match it would catch everything.
            Some(_) if !understood => None,
            Some(why) => Some(RouteRule {
                name,
                matches,
                invalid: why.clone(),
                ..RouteRule::default()
            }),
            None => Some(RouteRule {
                name,
                matches,
                filters,
                backends,
                session_persistence: parts.session.map(session),
                ..made
            }),
        };
        judged
    }

    fn filters(
        &self,
        filters: &[RouteFilter],
        unresolved: &mut Vec<Unresolved>,
        invalid: &mut dyn FnMut(usize, &str),
    ) -> Vec<mesh::RouteFilter> {
        let mut made = Vec::new();
        for (i, filter) in filters.iter().enumerate() {
            // GEP-1364: what is not known must not be skipped.
            if let Some(reference) = &filter.extension_ref {
                let (kind, name) = (&reference.kind, &reference.name);
                invalid(i, &format!("there is no {kind}.{} {name}", reference.group));
            }
            if filter.external_auth.is_some() {
                invalid(i, "ExternalAuth is not supported");
            }
            made.extend(
                self.filter(filter, unresolved)
                    .map(|filter| mesh::RouteFilter {
                        filter: Some(filter),
                    }),
            );
        }
        made
    }

    fn filter(
        &self,
        filter: &RouteFilter,
        unresolved: &mut Vec<Unresolved>,
    ) -> Option<route_filter::Filter> {
        use route_filter::Filter;
        if let Some(modifier) = &filter.request_header_modifier {
            return Some(Filter::RequestHeaderModifier(header_modifier(modifier)));
        }
        if let Some(modifier) = &filter.response_header_modifier {
            return Some(Filter::ResponseHeaderModifier(header_modifier(modifier)));
        }
        if let Some(redirect) = &filter.request_redirect {
            return Some(Filter::RequestRedirect(mesh::RequestRedirect {
                scheme: redirect.scheme.clone().unwrap_or_default(),
                hostname: redirect.hostname.clone().unwrap_or_default(),
                path: redirect.path.as_ref().map(path_modifier),
                port: number(redirect.port, 0),
                status_code: number(redirect.status_code, 302),
            }));
        }
        if let Some(rewrite) = &filter.url_rewrite {
            return Some(Filter::UrlRewrite(mesh::UrlRewrite {
                hostname: rewrite.hostname.clone().unwrap_or_default(),
                path: rewrite.path.as_ref().map(path_modifier),
            }));
        }
        if let Some(cors) = &filter.cors {
            return Some(Filter::Cors(cors_filter(cors)));
        }
        let mirror = filter.request_mirror.as_ref()?;
        let backend = &mirror.backend_ref;
        // A mirror that cannot be reached is left out, the request is not (HTTPRequestMirrorFilter).
        if let Err(why) = self.services.backend(backend, self.namespace, self.kind) {
            unresolved.push(why);
            return None;
        }
        let fraction = mirror.fraction.as_ref();
        Some(Filter::RequestMirror(mesh::RequestMirror {
            backend: Some(self.destination(backend)),
            numerator: number(fraction.map(|f| f.numerator).or(mirror.percent), 100),
            denominator: number(fraction.and_then(|f| f.denominator), 100),
        }))
    }

    fn backend(&self, backend: &BackendRef, unresolved: &mut Vec<Unresolved>) -> RouteBackend {
        let reference = backend.reference();
        let mut invalid = String::new();
        if let Err(why) = self.services.backend(&reference, self.namespace, self.kind) {
            invalid.clone_from(&why.1);
            unresolved.push(why);
        }
        let filters = self.filters(&backend.filters, unresolved, &mut |_, message| {
            invalid = message.to_owned();
        });
        RouteBackend {
            weight: number(backend.weight, 1),
            filters,
            invalid,
            ..self.destination(&reference)
        }
    }

    fn destination(&self, backend: &BackendReference) -> RouteBackend {
        let namespace = backend.namespace.as_deref().unwrap_or(self.namespace);
        RouteBackend {
            namespace: namespace.into(),
            service: backend.name.clone(),
            port: number(backend.port, 0),
            weight: 1,
            filters: Vec::new(),
            invalid: String::new(),
        }
    }
}

fn http_match(m: &HttpRouteMatch) -> RouteMatch {
    let path = m.path.as_ref().map(|path| {
        let kind = match path.kind.as_deref() {
            Some("Exact") => MatchType::Exact,
            Some("RegularExpression") => MatchType::Regex,
            _ => MatchType::Prefix,
        };
        StringMatch {
            r#type: kind.into(),
            value: path.value.clone().unwrap_or_else(|| "/".into()),
        }
    });
    RouteMatch {
        path,
        method: m.method.clone().unwrap_or_default(),
        headers: headers(&m.headers),
        query_params: named(&m.query_params, |name| name.to_owned()),
        ..RouteMatch::default()
    }
}

fn grpc_match(m: &gateway::GrpcRouteMatch) -> RouteMatch {
    let method = m.method.as_ref();
    let text = |value: Option<&String>| {
        let kind = method.and_then(|m| m.kind.as_deref());
        Some(string_match(kind, value?))
    };
    RouteMatch {
        headers: headers(&m.headers),
        grpc_service: text(method.and_then(|m| m.service.as_ref())),
        grpc_method: text(method.and_then(|m| m.method.as_ref())),
        ..RouteMatch::default()
    }
}

fn headers(matches: &[NamedMatch]) -> Vec<mesh::NamedMatch> {
    named(matches, str::to_ascii_lowercase)
}

/// Of one name only the first counts.
fn named(matches: &[NamedMatch], spell: impl Fn(&str) -> String) -> Vec<mesh::NamedMatch> {
    let mut made: Vec<mesh::NamedMatch> = Vec::new();
    for m in matches {
        let name = spell(&m.name);
        if made.iter().all(|other| other.name != name) {
            made.push(mesh::NamedMatch {
                name,
                value: Some(string_match(m.kind.as_deref(), &m.value)),
            });
        }
    }
    made
}

fn string_match(kind: Option<&str>, value: &str) -> StringMatch {
    let kind = match kind {
        Some("RegularExpression") => MatchType::Regex,
        _ => MatchType::Exact,
    };
    StringMatch {
        r#type: kind.into(),
        value: value.into(),
    }
}

fn header_modifier(modifier: &HeaderModifier) -> mesh::HeaderModifier {
    let headers = |list: &[gateway::Header]| {
        list.iter()
            .map(|h| mesh::Header {
                name: h.name.clone(),
                value: h.value.clone(),
            })
            .collect()
    };
    mesh::HeaderModifier {
        set: headers(&modifier.set),
        add: headers(&modifier.add),
        remove: modifier.remove.clone(),
    }
}

fn path_modifier(modifier: &PathModifier) -> mesh::PathModifier {
    use mesh::path_modifier::Modifier;
    let full = modifier.replace_full_path.clone();
    let prefix = modifier.replace_prefix_match.clone();
    mesh::PathModifier {
        modifier: full
            .map(Modifier::ReplaceFullPath)
            .or(prefix.map(Modifier::ReplacePrefixMatch)),
    }
}

fn cors_filter(cors: &Cors) -> mesh::Cors {
    mesh::Cors {
        allow_origins: cors.allow_origins.clone(),
        allow_credentials: cors.allow_credentials.unwrap_or(false),
        allow_methods: cors.allow_methods.clone(),
        allow_headers: cors.allow_headers.clone(),
        expose_headers: cors.expose_headers.clone(),
        max_age: number(cors.max_age, 5),
    }
}

fn retry(retry: &gateway::HttpRetry) -> RouteRetry {
    RouteRetry {
        codes: retry.codes.iter().map(|c| number(Some(*c), 0)).collect(),
        attempts: retry.attempts.map(|n| number(Some(n), 0)),
        backoff_ms: retry.backoff.as_deref().and_then(|d| duration(d).ok()),
    }
}

/// Session persistence of a rule or a Service.
pub(in crate::model) fn session(session: &SessionPersistence) -> mesh::SessionPersistence {
    let kind = match session.kind.as_deref() {
        Some("Header") => SessionPersistenceType::Header,
        _ => SessionPersistenceType::Cookie,
    };
    let absolute = session.absolute_timeout.as_deref();
    let cookie = session.cookie_config.as_ref();
    mesh::SessionPersistence {
        session_name: session.session_name.clone().unwrap_or_default(),
        r#type: kind.into(),
        absolute_timeout_ms: absolute.and_then(|d| duration(d).ok()).unwrap_or(0),
        permanent: cookie.and_then(|c| c.lifetime_type.as_deref()) == Some("Permanent"),
    }
}

/// A number that was checked to be in range.
fn number(value: Option<i64>, default: u32) -> u32 {
    value.and_then(|v| v.try_into().ok()).unwrap_or(default)
}
