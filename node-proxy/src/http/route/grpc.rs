//! GRPCRoutes: by service, method and headers (GRPCRouteMatch).
//!
//! Precedence (GRPCRouteRule.matches), across all rules of all routes: most characters in a matching service, in
//! a matching method, most headers, oldest route, `namespace/name`, first rule. Exact values go before
//! regular expressions, whose place is the implementation's choice.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use ::http::request::Parts;
use mesh_api::proto::mesh;

use super::compile::Rank;
use super::matching::{Conditions, HeaderMatch, TextMatch};
use super::{Match, Rule};

/// The GRPCRoutes of a group.
#[derive(Debug, Default)]
pub struct GrpcRoutes {
    /// `service/method`, both exact.
    exact: HashMap<Box<str>, Vec<Candidate>>,
    /// By exact service, any method or by expression.
    service: HashMap<Box<str>, Vec<Candidate>>,
    /// All others.
    rest: Vec<Candidate>,
}

#[derive(Debug)]
struct Candidate {
    of: GrpcMatch,
    rule: Arc<Rule>,
}

/// One match of a rule, compiled.
#[derive(Debug, Clone)]
pub(super) struct GrpcMatch {
    service: Option<TextMatch>,
    method: Option<TextMatch>,
    conditions: Conditions,
}

impl GrpcMatch {
    pub(super) fn compile(of: &mesh::RouteMatch) -> Result<Self, String> {
        let text = |field: &str, text: &Option<mesh::StringMatch>| {
            let text = text.as_ref().filter(|text| !text.value.is_empty());
            text.map(|text| TextMatch::compile(field, text)).transpose()
        };
        Ok(Self {
            service: text("matches.grpcService", &of.grpc_service)?,
            method: text("matches.grpcMethod", &of.grpc_method)?,
            conditions: Conditions {
                headers: HeaderMatch::compile_all(&of.headers)?,
                ..Conditions::default()
            },
        })
    }
}

impl GrpcRoutes {
    /// From every match of every rule of the group.
    pub(super) fn new(mut matches: Vec<(GrpcMatch, Rank, Arc<Rule>)>) -> Self {
        matches.sort_by_cached_key(|(of, rank, _)| {
            let headers = Reverse(of.conditions.headers.len());
            (
                weight(&of.service),
                weight(&of.method),
                headers,
                rank.clone(),
            )
        });
        let mut routes = Self::default();
        for (of, _, rule) in matches {
            let place = match (&of.service, &of.method) {
                (Some(TextMatch::Exact(service)), Some(TextMatch::Exact(method))) => {
                    let path = format!("{service}/{method}");
                    routes.exact.entry(path.into()).or_default()
                }
                (Some(TextMatch::Exact(service)), _) => {
                    routes.service.entry(service.clone()).or_default()
                }
                _ => &mut routes.rest,
            };
            place.push(Candidate { of, rule });
        }
        routes
    }

    /// The rule for a request. The path is `/service/method` (gRPC over HTTP/2, "Requests").
    pub fn find(&self, request: &Parts) -> Option<Match<'_>> {
        let path = request.uri.path();
        let call = path.strip_prefix('/').and_then(|call| {
            let (service, method) = call.split_once('/')?;
            (!method.contains('/')).then_some((call, service, method))
        });
        let indexed = call.and_then(|(call, service, method)| {
            let exact = self.exact.get(call).into_iter().flatten();
            let by_service = self.service.get(service).into_iter().flatten();
            exact
                .chain(by_service)
                .find(|c| c.is_met(request, Some((service, method))))
        });
        let call = call.map(|(_, service, method)| (service, method));
        let found = indexed.or_else(|| self.rest.iter().find(|c| c.is_met(request, call)))?;
        Some(Match {
            rule: &found.rule,
            prefix: None,
        })
    }
}

impl GrpcRoutes {
    pub(super) fn rules(&self) -> impl Iterator<Item = &Arc<Rule>> {
        let by_name = self.exact.values().chain(self.service.values()).flatten();
        by_name.chain(&self.rest).map(|candidate| &candidate.rule)
    }
}

impl Candidate {
    fn is_met(&self, request: &Parts, call: Option<(&str, &str)>) -> bool {
        let part = |wanted: &Option<TextMatch>, part: Option<&str>| match wanted {
            None => true,
            Some(wanted) => part.is_some_and(|part| wanted.is_match(part)),
        };
        part(&self.of.service, call.map(|(service, _)| service))
            && part(&self.of.method, call.map(|(_, method)| method))
            && self.of.conditions.are_met(request, self.rule.cors)
    }
}

/// Less comes first.
fn weight(text: &Option<TextMatch>) -> (u8, Reverse<usize>) {
    match text {
        Some(TextMatch::Exact(text)) => (0, Reverse(text.chars().count())),
        Some(TextMatch::Regex(expression)) => (1, Reverse(expression.as_str().len())),
        None => (2, Reverse(0)),
    }
}
