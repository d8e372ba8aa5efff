//! Filters of rules and backends, as pure functions over the heads of requests and responses.
//!
//! They apply in the order of their list (HTTPRouteRule.filters): to a request first those of the rule, then
//! those of the chosen backend; to a response those of the backend first, then those of the rule, the way
//! back being the reverse of the way there.

use std::sync::Arc;

use ::http::header::ORIGIN;
use ::http::{HeaderMap, HeaderValue, Response, request, response};
use mesh_api::proto::mesh;
use mesh_api::proto::mesh::route_filter::Filter as Wire;

use super::compile::Targets;
use super::{Backend, scale};

mod cors;
mod headers;
mod url;

pub use cors::Cors;
pub use headers::HeaderEdit;
pub use url::{PathChange, Redirect, Rewrite};

/// One filter.
#[derive(Debug, Clone)]
pub enum Filter {
    /// RequestHeaderModifier.
    RequestHeaders(HeaderEdit),
    /// ResponseHeaderModifier.
    ResponseHeaders(HeaderEdit),
    /// RequestRedirect.
    Redirect(Redirect),
    /// URLRewrite.
    Rewrite(Rewrite),
    /// RequestMirror.
    Mirror(Mirror),
    /// CORS.
    Cors(Cors),
}

/// Sends a share of the requests to another backend too, whose answers count for nothing.
#[derive(Debug, Clone)]
pub struct Mirror {
    /// Where to; its weight means nothing.
    pub backend: Arc<Backend>,
    numerator: u32,
    denominator: u32,
}

/// What filters ask of a request beside its head.
#[derive(Debug, Clone, Copy)]
pub struct RequestContext<'a> {
    /// [`super::Match::prefix`].
    pub prefix: Option<&'a str>,
    /// Port of the Service the request was sent to: redirects without a port go there.
    pub service_port: u16,
}

/// What became of a request.
#[derive(Debug)]
pub enum Outcome {
    /// It goes on.
    Continue,
    /// It is answered here. A redirect goes back through the response filters yet, a preflight's answer is complete.
    Respond(Response<()>),
}

/// Applies the request's side of a list of filters.
pub fn apply_request(
    filters: &[Filter],
    request: &mut request::Parts,
    context: &RequestContext<'_>,
) -> Outcome {
    for filter in filters {
        match filter {
            Filter::RequestHeaders(edit) => edit.apply_to_request(request),
            Filter::Redirect(redirect) => {
                return Outcome::Respond(redirect.answer(request, context));
            }
            Filter::Rewrite(rewrite) => rewrite.apply(request, context.prefix),
            Filter::Cors(cors) => {
                if let Some(answer) = cors.preflight(request) {
                    return Outcome::Respond(answer);
                }
            }
            Filter::ResponseHeaders(_) | Filter::Mirror(_) => {}
        }
    }
    Outcome::Continue
}

/// Applies the response's side of a list of filters. `origin`: see [`origin`].
pub fn apply_response(
    filters: &[Filter],
    origin: Option<&HeaderValue>,
    response: &mut response::Parts,
) {
    for filter in filters {
        match filter {
            Filter::ResponseHeaders(edit) => edit.apply(&mut response.headers),
            Filter::Cors(cors) => {
                if let Some(origin) = origin {
                    cors.answer(origin, &mut response.headers);
                }
            }
            Filter::RequestHeaders(_)
            | Filter::Redirect(_)
            | Filter::Rewrite(_)
            | Filter::Mirror(_) => {}
        }
    }
}

/// The request's origin where the filters will ask for it: to be kept, from before the request's filters are
/// applied, for [`apply_response`].
pub fn origin(filters: &[Filter], request: &HeaderMap) -> Option<HeaderValue> {
    let asked = filters.iter().any(|f| matches!(f, Filter::Cors(_)));
    request.get(ORIGIN).filter(|_| asked).cloned()
}

/// Where copies of a request go. `random` gives numbers that are uniform over all of `u64`. A backend that
/// cannot be used gets no copy.
pub fn mirrors(
    filters: &[Filter],
    mut random: impl FnMut() -> u64,
) -> impl Iterator<Item = &Arc<Backend>> {
    filters.iter().filter_map(move |filter| match filter {
        Filter::Mirror(mirror) => {
            let drawn = scale(random(), mirror.denominator.into());
            let wanted = drawn < mirror.numerator.into() && !mirror.backend.is_invalid();
            wanted.then_some(&mirror.backend)
        }
        _ => None,
    })
}

impl Filter {
    pub(super) fn mirror(&self) -> Option<&Backend> {
        match self {
            Self::Mirror(mirror) => Some(&mirror.backend),
            _ => None,
        }
    }
}

/// Also says why requests cannot pass these filters: one of them cannot be carried out, and must not be skipped
/// (HTTPRouteFilter: they get an error).
pub(super) fn compile(
    filters: &[mesh::RouteFilter],
    targets: &mut Targets<'_>,
) -> (Vec<Filter>, Option<Arc<str>>) {
    let mut compiled = Vec::with_capacity(filters.len());
    let mut invalid = None;
    for filter in filters {
        match Filter::compile(filter, targets) {
            Ok(filter) => compiled.push(filter),
            Err(reason) => {
                invalid.get_or_insert(reason.into());
            }
        }
    }
    (compiled, invalid)
}

impl Filter {
    fn compile(filter: &mesh::RouteFilter, targets: &mut Targets<'_>) -> Result<Self, String> {
        Ok(match &filter.filter {
            Some(Wire::RequestHeaderModifier(edit)) => {
                Filter::RequestHeaders(HeaderEdit::compile("requestHeaderModifier", edit)?)
            }
            Some(Wire::ResponseHeaderModifier(edit)) => {
                Filter::ResponseHeaders(HeaderEdit::compile("responseHeaderModifier", edit)?)
            }
            Some(Wire::RequestRedirect(redirect)) => Filter::Redirect(Redirect::compile(redirect)?),
            Some(Wire::UrlRewrite(rewrite)) => Filter::Rewrite(Rewrite::compile(rewrite)?),
            Some(Wire::RequestMirror(mirror)) => Filter::Mirror(Mirror::compile(mirror, targets)?),
            Some(Wire::Cors(cors)) => Filter::Cors(Cors::compile(cors)?),
            None => return Err("a filter is not known to this proxy".into()),
        })
    }
}

impl Mirror {
    fn compile(mirror: &mesh::RequestMirror, targets: &mut Targets<'_>) -> Result<Self, String> {
        let mesh::RequestMirror {
            backend,
            numerator,
            denominator,
        } = mirror;
        let backend = backend.as_ref().ok_or("requestMirror.backend: missing")?;
        if *denominator == 0 || numerator > denominator {
            return Err(format!(
                "requestMirror: {numerator} of {denominator} is no share"
            ));
        }
        Ok(Self {
            backend: Arc::new(Backend::compile(backend, targets)?),
            numerator: *numerator,
            denominator: *denominator,
        })
    }
}

#[cfg(test)]
mod tests;
