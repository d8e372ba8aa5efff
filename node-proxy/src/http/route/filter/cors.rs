//! CORS (HTTPCORSFilter, GEP-1767; the protocol is that of the Fetch standard, "CORS protocol").
//!
//! A preflight is answered here: 204, with the headers of the filter if the origin is allowed and without
//! them if it is not. Other requests pass, and their answers get the headers. With credentials a browser does
//! not take `*` for an answer, so what was asked for is echoed.

use std::fmt::Write;

use ::http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
};
use ::http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, request};
use mesh_api::origin::Origin;
use mesh_api::proto::mesh;

use crate::http::route::matching::preflight_method;

/// Which origins may read the answers, and how.
#[derive(Debug, Clone)]
pub struct Cors {
    origins: Box<[Allowed]>,
    credentials: bool,
    methods: List,
    headers: List,
    expose: List,
    max_age: HeaderValue,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Allowed {
    Any,
    /// `null`, or whatever else has no scheme and host.
    Opaque(Box<str>),
    Origin(Origin),
}

/// What a header lists.
#[derive(Debug, Clone)]
enum List {
    None,
    Any,
    Of(HeaderValue),
}

impl Cors {
    pub(super) fn compile(cors: &mesh::Cors) -> Result<Self, String> {
        let mesh::Cors {
            allow_origins,
            allow_credentials,
            allow_methods,
            allow_headers,
            expose_headers,
            max_age,
        } = cors;
        Ok(Self {
            origins: allow_origins.iter().map(|o| Allowed::compile(o)).collect(),
            credentials: *allow_credentials,
            methods: List::compile("cors.allowMethods", allow_methods)?,
            headers: List::compile("cors.allowHeaders", allow_headers)?,
            expose: List::compile("cors.exposeHeaders", expose_headers)?,
            max_age: HeaderValue::from(*max_age),
        })
    }

    /// The answer, if the request is a preflight.
    pub(super) fn preflight(&self, request: &request::Parts) -> Option<Response<()>> {
        preflight_method(request)?;
        let origin = request.headers.get(ORIGIN)?;
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::NO_CONTENT;
        let headers = response.headers_mut();
        if !self.allow(origin, headers) {
            return Some(response);
        }
        let asked = |name: HeaderName| request.headers.get(name);
        let methods = asked(ACCESS_CONTROL_REQUEST_METHOD);
        if let Some(methods) = self.methods.answer(self.credentials, methods) {
            headers.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
        }
        let names = asked(ACCESS_CONTROL_REQUEST_HEADERS);
        if let Some(names) = self.headers.answer(self.credentials, names) {
            headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, names);
        }
        headers.insert(ACCESS_CONTROL_MAX_AGE, self.max_age.clone());
        self.add_exposed(headers);
        Some(response)
    }

    /// Adds the headers to the answer of a request from `origin`.
    pub(super) fn answer(&self, origin: &HeaderValue, headers: &mut HeaderMap) {
        if self.allow(origin, headers) {
            self.add_exposed(headers);
        }
    }

    /// On preflights too: Fetch does not ask for it there, the API's conformance tests do.
    fn add_exposed(&self, headers: &mut HeaderMap) {
        // With credentials no list stands for all headers, and there is no question to echo.
        if let Some(names) = self.expose.answer(self.credentials, None) {
            headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, names);
        }
    }

    /// The headers of every answer to an origin that is allowed.
    fn allow(&self, origin: &HeaderValue, headers: &mut HeaderMap) -> bool {
        let Ok(text) = origin.to_str() else {
            return false;
        };
        let sent = Origin::parse(text);
        let matches = |allowed: &Allowed| allowed.is_match(text, sent.as_ref());
        if !self.origins.iter().any(matches) {
            return false;
        }
        let any = self.origins.contains(&Allowed::Any) && !self.credentials;
        let allowed = match any {
            true => HeaderValue::from_static("*"),
            false => {
                headers.append(VARY, HeaderValue::from_static("origin"));
                origin.clone()
            }
        };
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, allowed);
        if self.credentials {
            headers.insert(
                ACCESS_CONTROL_ALLOW_CREDENTIALS,
                HeaderValue::from_static("true"),
            );
        }
        true
    }
}

impl Allowed {
    fn compile(text: &str) -> Self {
        match Origin::parse(text) {
            Some(origin) => Self::Origin(origin),
            None if text == "*" => Self::Any,
            None => Self::Opaque(text.into()),
        }
    }

    /// `sent` is what `text` is, if it is an origin of scheme and host.
    fn is_match(&self, text: &str, sent: Option<&Origin>) -> bool {
        match self {
            Self::Any => true,
            Self::Opaque(wanted) => wanted.eq_ignore_ascii_case(text),
            Self::Origin(wanted) => sent.is_some_and(|sent| wanted.covers(sent)),
        }
    }
}

impl List {
    fn compile(field: &str, all: &[String]) -> Result<Self, String> {
        if all.iter().any(|one| one == "*") {
            return Ok(Self::Any);
        }
        let mut text = String::new();
        for one in all {
            let separator = if text.is_empty() { "" } else { ", " };
            // Writing to a String cannot fail.
            let _ = write!(text, "{separator}{one}");
        }
        match HeaderValue::try_from(text) {
            Ok(_) if all.is_empty() => Ok(Self::None),
            Ok(list) => Ok(Self::Of(list)),
            Err(_) => Err(format!("{field}: {all:?} cannot be in a header")),
        }
    }

    fn answer(&self, credentials: bool, asked: Option<&HeaderValue>) -> Option<HeaderValue> {
        match self {
            Self::None => None,
            Self::Any if credentials => asked.cloned(),
            Self::Any => Some(HeaderValue::from_static("*")),
            Self::Of(list) => Some(list.clone()),
        }
    }
}
