//! Mistakes in routes and policies: the limits, enums and CEL rules of their CRDs.

use super::*;

const HTTP: &str = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r}\nspec:\n  parentRefs: [{group: '', kind: Service, name: web}]\n";

/// The mistakes in `text` as `field: message`.
fn mistakes(text: &str) -> Vec<String> {
    let parsed = parse_text(Path::new("m.yaml"), text);
    let mistakes = parsed.mistakes.iter();
    mistakes
        .map(|m| format!("{}: {}", m.field, m.message))
        .collect()
}

fn expect(text: &str, expected: &[&str]) {
    let found = mistakes(text);
    assert_eq!(found.len(), expected.len(), "{text}\n{found:#?}");
    for (found, expected) in found.iter().zip(expected) {
        assert!(found.starts_with(expected), "{text}\n{found}\n{expected}");
    }
}

/// Rules of an HTTPRoute, in flow style, and what is wrong with the first; each with the source of the rule.
#[test]
fn http_rules() {
    let backend = "backendRefs: [{name: a, port: 80}]";
    let cases: Vec<(String, Vec<&str>)> = vec![
        (backend.into(), vec![]),
        // HTTPPathMatch: CEL rules.
        ("matches: [{path: {value: a}}]".into(), vec![".matches[0].path.value: expected an absolute path, found \"a\""]),
        ("matches: [{path: {value: /a//b}}]".into(), vec![".matches[0].path.value: must not contain \"//\""]),
        ("matches: [{path: {type: Exact, value: /a%2fb}}]".into(), vec![".matches[0].path.value: must not contain \"%2f\""]),
        ("matches: [{path: {value: /a/..}}]".into(), vec![".matches[0].path.value: must not end with \"/..\""]),
        ("matches: [{path: {value: '/a b'}}]".into(), vec![".matches[0].path.value: must not contain ' '"]),
        ("matches: [{path: {type: Glob, value: /a}}]".into(), vec![".matches[0].path.type: expected Exact, PathPrefix or"]),
        ("matches: [{path: {type: RegularExpression, value: '(a'}}]".into(), vec![".matches[0].path.value: expected a regular expression"]),
        ("matches: [{method: get}]".into(), vec![".matches[0].method: expected one of GET, HEAD"]),
        // HTTPHeaderName: no pseudo-headers.
        ("matches: [{headers: [{name: ':path', value: x}]}]".into(), vec![".matches[0].headers[0].name: expected a header name"]),
        ("matches: [{queryParams: [{name: q, value: '['  , type: RegularExpression}]}]".into(), vec![".matches[0].queryParams[0].value: expected a regular"]),
        // HTTPRouteFilter: CEL rules.
        ("filters: [{type: RequestMirror}]".into(), vec![".filters[0].requestMirror: is needed for type RequestMirror"]),
        ("filters: [{type: CORS, cors: {}, urlRewrite: {}}]".into(), vec![".filters[0].urlRewrite: is only for type URLRewrite"]),
        ("filters: [{type: Teleport}]".into(), vec![".filters[0].type: expected one of RequestHeaderModifier"]),
        ("filters: [{type: CORS, cors: {}}, {type: CORS, cors: {}}]".into(), vec![".filters[1].type: CORS can be there only once"]),
        (format!("filters: [{{type: RequestRedirect, requestRedirect: {{}}}}], {backend}"), vec![".filters: with RequestRedirect there can be no backendRefs"]),
        ("filters: [{type: RequestRedirect, requestRedirect: {}}, {type: URLRewrite, urlRewrite: {}}]".into(), vec![".filters: RequestRedirect and URLRewrite cannot"]),
        ("filters: [{type: RequestRedirect, requestRedirect: {scheme: ftp, statusCode: 304, port: 0}}]".into(), vec![
            ".filters[0].requestRedirect.port: expected a number from 1 to 65535, found 0",
            ".filters[0].requestRedirect.scheme: expected http or https",
            ".filters[0].requestRedirect.statusCode: expected 301, 302, 303, 307 or 308",
        ]),
        ("filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: A, value: b}], remove: [a]}}]".into(), vec![
            ".filters[0].requestHeaderModifier.remove[0]: there is more than one action for \"a\"",
        ]),
        ("filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: A, value: \"b\\r\\nC: d\"}]}}]".into(), vec![
            ".filters[0].requestHeaderModifier.set[0].value: expected 1 to 4096 characters and no control",
        ]),
        // GEP-3171.
        ("filters: [{type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}, percent: 101, fraction: {numerator: 3, denominator: 2}}}]".into(), vec![
            ".filters[0].requestMirror.fraction: cannot stand beside percent",
            ".filters[0].requestMirror.fraction.numerator: expected a number from 0 to 2, found 3",
            ".filters[0].requestMirror.percent: expected a number from 0 to 100, found 101",
        ]),
        // GEP-726: the prefix that is replaced must be known.
        ("matches: [{path: {type: Exact, value: /a}}], filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}}}]".into(), vec![
            ".filters[0].urlRewrite.path.type: needs a rule with exactly one match, of type PathPrefix",
        ]),
        ("matches: [{}, {path: {value: /a}}], filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}}}]".into(), vec![
            ".filters[0].urlRewrite.path.type: needs a rule with exactly one match",
        ]),
        ("filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replacePrefixMatch: /b}}}]".into(), vec![
            ".filters[0].urlRewrite.path.replaceFullPath: is needed",
            ".filters[0].urlRewrite.path.replacePrefixMatch: is not for type ReplaceFullPath",
        ]),
        // GEP-1767.
        ("filters: [{type: CORS, cors: {allowOrigins: ['*', a.example], maxAge: 0}}]".into(), vec![
            ".filters[0].cors.allowOrigins: with * there can be nothing else",
            ".filters[0].cors.allowOrigins[1]: expected * or scheme://host[:port]",
            ".filters[0].cors.maxAge: expected a number from 1",
        ]),
        // BackendRef.
        ("backendRefs: [{name: a}, {name: b, port: 80, weight: 1000001}]".into(), vec![
            ".backendRefs[0].port: expected the number of the Service's port",
            ".backendRefs[1].weight: expected a number from 0 to 1000000",
        ]),
        ("backendRefs: [{name: a, port: 80, filters: [{type: URLRewrite}]}]".into(), vec![
            ".backendRefs[0].filters[0].urlRewrite: is needed",
        ]),
        // GEP-1742, GEP-2257.
        ("timeouts: {request: 1s, backendRequest: 2s}".into(), vec![".timeouts.backendRequest: must not be longer than request"]),
        ("timeouts: {request: 0s, backendRequest: 2s}".into(), vec![]),
        ("timeouts: {request: 1.5s}".into(), vec![".timeouts.request: expected a duration such as"]),
        // GEP-1731.
        ("retry: {codes: [200], attempts: 0, backoff: soon}".into(), vec![
            ".retry.attempts: expected a number from 1",
            ".retry.backoff: expected a duration",
            ".retry.codes[0]: expected a status from 400 to 599",
        ]),
        // GEP-1619.
        ("sessionPersistence: {type: Header, cookieConfig: {lifetimeType: Permanent}}".into(), vec![
            ".sessionPersistence.absoluteTimeout: is needed for a cookie of lifetimeType Permanent",
            ".sessionPersistence.cookieConfig: is only for type Cookie",
        ]),
        ("backendRef: []".into(), vec![".backendRef: there is no such field"]),
        ("timeouts: {request: 5}".into(), vec![".timeouts.request: invalid type: integer `5`, expected a string"]),
    ];
    for (rule, expected) in cases {
        let expected: Vec<String> = expected
            .iter()
            .map(|e| format!("spec.rules[0]{e}"))
            .collect();
        let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
        expect(&format!("{HTTP}  rules: [{{{rule}}}]\n"), &expected);
    }
}

#[test]
fn limits_of_a_route() {
    let many = |n: usize, entry: &str| vec![entry; n].join(", ");
    expect(
        &format!("{HTTP}  rules: [{}]\n", many(17, "{}")),
        &["spec.rules: expected at most 16 entries, found 17"],
    );
    let matches = format!("{{matches: [{}]}}", many(64, "{method: GET}"));
    expect(
        &format!("{HTTP}  rules: [{}]\n", many(3, &matches)),
        &["spec.rules: expected at most 128 matches in all rules, found 192"],
    );
    expect(
        &format!("{HTTP}  rules: [{{name: a}}, {{name: a}}, {{name: B}}]\n"),
        &[
            "spec.rules[1].name: \"a\" is taken",
            "spec.rules[2].name: expected a name",
        ],
    );
    let twice = HTTP.replace(
        "name: web}]",
        "name: web}, {group: '', kind: Service, name: web}]",
    );
    expect(&twice, &["spec.parentRefs[1]: is there twice"]);
}

#[test]
fn the_other_kinds() {
    let of = |kind: &str, spec: &str| HTTP.replace("HTTPRoute", kind) + spec;
    expect(
        &of(
            "GRPCRoute",
            "  rules: [{matches: [{method: {}}, {method: {type: Prefix, service: a}}], filters: [{type: URLRewrite, urlRewrite: {}}]}]\n",
        ),
        &[
            "spec.rules[0].filters[0].type: expected one of RequestHeaderModifier, ResponseHeaderModifier, RequestMirror, ExtensionRef, found",
            "spec.rules[0].matches[0].method: expected service, method or both",
            "spec.rules[0].matches[1].method.type: expected Exact or RegularExpression",
        ],
    );
    expect(
        &of("TLSRoute", "  hostnames: ['*.*.a']\n  rules: []\n"),
        &[
            "spec.hostnames[0]: expected a host name",
            "spec.rules: expected one rule, found 0",
        ],
    );
    expect(
        &of(
            "TCPRoute",
            "  hostnames: [a]\n  rules: [{backendRefs: []}]\n",
        ),
        &[
            "spec.hostnames: there is no such field",
            "spec.rules[0].backendRefs: expected at least one",
        ],
    );
    // Versions: each kind has its own.
    let version = |kind: &str, version: &str| {
        let spec = "  hostnames: [a.example]\n  rules: [{backendRefs: [{name: a, port: 1}]}]\n";
        let spec = if kind == "TCPRoute" {
            &spec[24..]
        } else {
            spec
        };
        mistakes(&of(kind, spec).replace("io/v1", &format!("io/{version}")))
    };
    for (kind, good, bad) in [
        ("HTTPRoute", "v1beta1", "v1alpha2"),
        ("TLSRoute", "v1alpha3", "v1beta1"),
        ("TCPRoute", "v1alpha2", "v1alpha3"),
    ] {
        assert_eq!(version(kind, "v1"), [""; 0]);
        assert_eq!(version(kind, good), [""; 0]);
        let found = version(kind, bad);
        assert!(
            found[0].starts_with("apiVersion: expected gateway.networking.k8s.io/v1 or"),
            "{found:?}"
        );
    }
}

#[test]
fn policies() {
    let policy = |spec: &str| {
        format!(
            "apiVersion: warren-mesh.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: p}}\nspec: {{targetRefs: [{{kind: Service, name: web}}], {spec}}}\n"
        )
    };
    let cases: [(&str, &[&str]); 20] = [
        ("timeouts: {request: 1s}", &[]),
        (
            "loadBalancing: {type: Fastest}",
            &["loadBalancing.type: expected one of PeakEWMA"],
        ),
        (
            "loadBalancing: {type: RingHash}",
            &["loadBalancing.hashKey: is needed"],
        ),
        (
            "loadBalancing: {hashKey: {type: SourceIP}}",
            &["loadBalancing.hashKey: is only for type RingHash"],
        ),
        (
            "loadBalancing: {type: RingHash, hashKey: {type: Cookie}}",
            &["loadBalancing.hashKey.name: expected"],
        ),
        (
            "retry: {attempts: 11}",
            &["retry.attempts: expected a number from 0 to 10, found 11"],
        ),
        (
            "retry: {conditions: [Always], grpcCodes: [OK, unavailable], statusCodes: [200]}",
            &[
                "retry.conditions[0]: expected one of ConnectFailure",
                "retry.grpcCodes[0]: expected one of CANCELLED",
                "retry.grpcCodes[1]: expected one of CANCELLED",
                "retry.statusCodes[0]: expected a status",
            ],
        ),
        (
            "retry: {backoff: {base: 1s, max: 10ms}}",
            &["retry.backoff.max: must not be shorter than base"],
        ),
        (
            "retry: {budget: {percent: 101, interval: 2h}}",
            &[
                "retry.budget.interval: expected a duration from 1000ms to 3600000ms",
                "retry.budget.percent: expected a number from 0 to 100",
            ],
        ),
        (
            "timeouts: {request: 1s, perTry: 2s}",
            &["timeouts.request: must not be shorter than perTry"],
        ),
        ("timeouts: {request: 0s, perTry: 2s}", &[]),
        (
            "circuitBreaking: {}",
            &["circuitBreaking: expected consecutiveFailures, minSuccessPercent or both"],
        ),
        (
            "circuitBreaking: {consecutiveFailures: 1, window: 1s}",
            &["circuitBreaking.window: means nothing"],
        ),
        (
            "limits: {maxPending: 1}",
            &["limits.maxInFlight: is needed"],
        ),
        (
            "rateLimit: {}",
            &["rateLimit: expected total, perCaller or overrides"],
        ),
        (
            "rateLimit: {total: {requests: 0}}",
            &["rateLimit.total.requests: expected a number from 1"],
        ),
        (
            "rateLimit: {total: {interval: 1s}}",
            &["rateLimit.total: missing field `requests`"],
        ),
        (
            "faultInjection: {delay: {duration: 1s, percent: 1, fraction: {numerator: 1}}}",
            &["faultInjection.delay.fraction: cannot stand beside percent"],
        ),
        (
            "faultInjection: {abort: {httpStatus: 200}}",
            &["faultInjection.abort.httpStatus: expected a number from 400"],
        ),
        ("timeout: {}", &["timeout: there is no such field"]),
    ];
    for (spec, expected) in cases {
        let expected: Vec<String> = expected.iter().map(|e| format!("spec.{e}")).collect();
        let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
        expect(&policy(spec), &expected);
    }
    expect(
        &policy("limits: {maxInFlight: 1}")
            .replace("{kind: Service, name: web}", "{kind: HTTPRoute, name: r}"),
        &[
            "spec.limits: is only for targets of kind Service",
            "spec.targetRefs[0].group: expected \"gateway.networking.k8s.io\" for kind HTTPRoute",
        ],
    );
    expect(
        "apiVersion: gateway.networking.x-k8s.io/v1alpha1\nkind: XBackendTrafficPolicy\nmetadata: {name: p}\n\
         spec: {targetRefs: [], retryConstraint: {budget: {interval: 1ms}, minRetryRate: {count: 0}}}\n",
        &[
            "spec.retryConstraint.budget.interval: expected a duration from 1000ms to",
            "spec.retryConstraint.minRetryRate.count: expected a number from 1",
            "spec.targetRefs: expected at least one target",
        ],
    );
}
