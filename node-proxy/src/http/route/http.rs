//! HTTPRoutes: by path, method, headers and query (HTTPRouteMatch).
//!
//! Precedence (HTTPRouteRule.matches), across all rules of all routes: exact path, longest prefix, has
//! a method, most headers, most query parameters, oldest route, `namespace/name`, first rule. The place of
//! regular expressions is the implementation's choice: after exact paths and before prefixes, longest
//! expression first, so that a catch-all prefix does not hide them.
//!
//! Costs: exact paths are one look-up. Prefixes are one look-up for each *distinct length* among the rules' prefixes
//! at which the path has the end of an element; so neither many routes nor a path of many elements is slow. Only
//! regular expressions are tried one after the other.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use ::http::Method;
use ::http::request::Parts;
use mesh_api::proto::mesh;
use mesh_api::proto::mesh::MatchType;
use regex::Regex;

use super::compile::Rank;
use super::matching::{Conditions, HeaderMatch, QueryMatch, regex};
use super::{Match, Rule};

/// The HTTPRoutes of a group.
#[derive(Debug, Default)]
pub struct HttpRoutes {
    exact: HashMap<Box<str>, Vec<Candidate>>,
    regex: Vec<(Regex, Candidate)>,
    prefix: HashMap<Box<str>, Vec<Candidate>>,
    /// Lengths of the keys of `prefix`, longest first.
    lengths: Vec<usize>,
}

/// One match of one rule, apart from its path.
#[derive(Debug)]
struct Candidate {
    conditions: Conditions,
    rule: Arc<Rule>,
}

/// One match of a rule, compiled.
#[derive(Debug, Clone)]
pub(super) struct HttpMatch {
    path: Path,
    conditions: Conditions,
}

#[derive(Debug, Clone)]
enum Path {
    Exact(Box<str>),
    Regex(Regex),
    /// Without the trailing `/`.
    Prefix(Box<str>),
}

impl HttpMatch {
    pub(super) fn compile(of: &mesh::RouteMatch) -> Result<Self, String> {
        let method = match of.method.as_str() {
            "" => None,
            name => Some(
                Method::from_bytes(name.as_bytes())
                    .map_err(|_| format!("matches.method: {name:?} is no method"))?,
            ),
        };
        Ok(Self {
            path: Path::compile(of.path.as_ref())?,
            conditions: Conditions {
                method,
                headers: HeaderMatch::compile_all(&of.headers)?,
                query: QueryMatch::compile_all(&of.query_params)?,
            },
        })
    }

    /// The path whose requests it is for, if it can be said: a session's cookie is for it.
    pub(super) fn cookie_path(&self) -> Option<&str> {
        match &self.path {
            Path::Exact(path) => Some(path),
            Path::Prefix(prefix) if !prefix.is_empty() => Some(prefix),
            Path::Prefix(_) => Some("/"),
            Path::Regex(_) => None,
        }
    }
}

impl Path {
    fn compile(of: Option<&mesh::StringMatch>) -> Result<Self, String> {
        let Some(of) = of else {
            return Ok(Self::Prefix("".into()));
        };
        let absolute = || match of.value.starts_with('/') {
            true => Ok(of.value.as_str()),
            false => Err(format!(
                "matches.path: {:?} does not begin with a slash",
                of.value
            )),
        };
        match MatchType::try_from(of.r#type) {
            Ok(MatchType::Exact) => Ok(Self::Exact(absolute()?.into())),
            Ok(MatchType::Prefix) => {
                let prefix = absolute()?;
                Ok(Self::Prefix(
                    prefix.strip_suffix('/').unwrap_or(prefix).into(),
                ))
            }
            Ok(MatchType::Regex) => Ok(Self::Regex(regex("matches.path", &of.value)?)),
            Err(_) => Err(format!(
                "matches.path: type {} is not known to this proxy",
                of.r#type
            )),
        }
    }
}

impl HttpRoutes {
    /// From every match of every rule of the group.
    pub(super) fn new(mut matches: Vec<(HttpMatch, Rank, Arc<Rule>)>) -> Self {
        matches.sort_by_cached_key(|(of, rank, _)| {
            let Conditions {
                method,
                headers,
                query,
            } = &of.conditions;
            let length = match &of.path {
                Path::Regex(expression) => expression.as_str().len(),
                // Of one key all have the same.
                Path::Exact(_) | Path::Prefix(_) => 0,
            };
            (
                Reverse(length),
                Reverse(method.is_some()),
                Reverse(headers.len()),
                Reverse(query.len()),
                rank.clone(),
            )
        });
        let mut routes = Self::default();
        for (HttpMatch { path, conditions }, _, rule) in matches {
            let candidate = Candidate { conditions, rule };
            match path {
                Path::Exact(path) => routes.exact.entry(path).or_default().push(candidate),
                Path::Regex(path) => routes.regex.push((path, candidate)),
                Path::Prefix(path) => routes.prefix.entry(path).or_default().push(candidate),
            }
        }
        routes.lengths = routes.prefix.keys().map(|prefix| prefix.len()).collect();
        routes.lengths.sort_unstable_by(|a, b| b.cmp(a));
        routes.lengths.dedup();
        routes
    }

    /// The rule for a request.
    pub fn find(&self, request: &Parts) -> Option<Match<'_>> {
        let path = request.uri.path();
        let mut by_path = self.exact.get(path).into_iter().flatten();
        if let Some(candidate) = by_path.find(|c| c.is_met(request)) {
            return Some(Match {
                rule: &candidate.rule,
                prefix: None,
            });
        }
        let by_regex = self
            .regex
            .iter()
            .find(|(expression, candidate)| expression.is_match(path) && candidate.is_met(request));
        if let Some((_, candidate)) = by_regex {
            return Some(Match {
                rule: &candidate.rule,
                prefix: None,
            });
        }
        for length in &self.lengths {
            // Everything is under `/`, also what has no path (`*` of OPTIONS, CONNECT).
            let is_element =
                *length == 0 || matches!(path.as_bytes().get(*length), None | Some(b'/'));
            let Some(start) = path.get(..*length).filter(|_| is_element) else {
                continue;
            };
            let Some((prefix, candidates)) = self.prefix.get_key_value(start) else {
                continue;
            };
            if let Some(candidate) = candidates.iter().find(|c| c.is_met(request)) {
                return Some(Match {
                    rule: &candidate.rule,
                    prefix: Some(prefix),
                });
            }
        }
        None
    }
}

impl HttpRoutes {
    #[cfg(test)]
    pub(super) fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    pub(super) fn rules(&self) -> impl Iterator<Item = &Arc<Rule>> {
        let by_path = self.exact.values().chain(self.prefix.values()).flatten();
        by_path
            .chain(self.regex.iter().map(|(_, candidate)| candidate))
            .map(|candidate| &candidate.rule)
    }
}

impl Candidate {
    fn is_met(&self, request: &Parts) -> bool {
        self.conditions.are_met(request, self.rule.cors)
    }
}
