//! Web origins, as CORS compares them (HTTPCORSFilter.allowOrigins; HTML, "origin").

/// Scheme, host and port, or a pattern of such: an origin that is allowed may have one `*` in its host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// In lower case, as `host`.
    scheme: Box<str>,
    host: Box<str>,
    /// `None`: not said, and the scheme has no default.
    port: Option<u16>,
}

impl Origin {
    /// Reads `scheme://host[:port]`. `None`: it is something else, such as `null` or `*`.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.to_ascii_lowercase();
        let (scheme, authority) = text.split_once("://")?;
        // The colons of an IPv6 address are within brackets.
        let address = authority.rfind(']').map_or(0, |at| at + 1);
        let (host, port) = match authority[address..].find(':') {
            Some(at) => {
                let (host, port) = authority.split_at(address + at);
                (host, Some(number(&port[1..])?))
            }
            None => (authority, default_port(scheme)),
        };
        let good = !scheme.is_empty()
            && !scheme.contains('*')
            && !host.is_empty()
            && !host.contains(['/', ' ', '#', '?', '@'])
            && host.matches('*').count() <= 1
            && (!host.contains([':', ']']) || (host.starts_with('[') && host.ends_with(']')));
        good.then(|| Self {
            scheme: scheme.into(),
            host: host.into(),
            port,
        })
    }

    /// Whether it allows the origin of a request. `*` stands for any labels of the host, or for all of it.
    pub fn covers(&self, sent: &Self) -> bool {
        self.scheme == sent.scheme
            && self.port == sent.port
            && match self.host.split_once('*') {
                None => self.host == sent.host,
                // At least one character, so that `*.example.com` is not `.example.com`.
                Some((before, after)) => sent
                    .host
                    .strip_prefix(before)
                    .and_then(|rest| rest.strip_suffix(after))
                    .is_some_and(|any| !any.is_empty()),
            }
    }
}

/// What the API assumes where no port is said, and browsers leave out.
fn default_port(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}

fn number(port: &str) -> Option<u16> {
    let digits = port.bytes().all(|b| b.is_ascii_digit());
    port.parse().ok().filter(|port| digits && *port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_an_origin() {
        for text in [
            "https://a.example",
            "http://a.example:8080",
            "https://*.example",
            "https://*",
            "http://[::1]",
            "http://[::1]:80",
            "app://x",
        ] {
            assert!(Origin::parse(text).is_some(), "{text}");
        }
        for text in [
            "",
            "*",
            "null",
            "a.example",
            "https://",
            "://a",
            "*://a.example",
            "https://*.*.example",
            "https://a.example/",
            "https://b@a.example",
            "https://a.example:",
            "https://a.example:0",
            "https://a.example:+80",
            "https://a.example:65536",
            "https://a.example:*",
            "https://a.example:80]",
        ] {
            assert!(Origin::parse(text).is_none(), "{text}");
        }
    }

    #[test]
    fn which_origins_one_covers() {
        let cases = [
            ("https://a.example", "https://A.example", true),
            ("https://a.example", "http://a.example", false),
            ("https://a.example:443", "https://a.example", true),
            ("https://a.example", "https://a.example:443", true),
            ("http://a.example:80", "http://a.example", true),
            ("http://a.example:443", "http://a.example", false),
            ("http://[::1]", "http://[::1]:80", true),
            ("https://*", "https://evil.example:8443", false),
            ("https://*:8443", "https://a.example:8443", true),
            ("https://*.example", "https://x.y.example", true),
            ("https://*.example", "https://example", false),
            ("https://*.example", "https://.example", false),
            ("app://*", "app://x:1", false),
            ("app://*", "app://x", true),
        ];
        for (allowed, sent, expected) in cases {
            let covers = Origin::parse(allowed)
                .zip(Origin::parse(sent))
                .map(|(allowed, sent)| allowed.covers(&sent));
            assert_eq!(covers, Some(expected), "{allowed} {sent}");
        }
    }
}
