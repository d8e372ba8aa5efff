//! Line 3, which routes count: for callers of which namespace, at which address and port, and which kind.
//! Each row names its GEP or field.

use std::time::Duration;

use serde_json::json;
use warren_tests::http::{HTTP, curl};
use warren_tests::lab::PodRef;
use warren_tests::routes::{
    CLIENT, http_route, http_route_of, path, routed, routed_lab, wait_for_route,
};
use warren_tests::scenario::scenario;
use warren_tests::wait::wait_until;

const CONSUMER: PodRef<'_> = ("consumer", "client");
const V2: PodRef<'_> = ("demo", "v2");

#[test]
fn which_routes_count_for_whom() {
    scenario(Duration::from_secs(150), |s| {
        let lab = routed_lab(s, &["shared", "ports", "section", "plain", "kinds"]);
        let mark = |value: &str| {
            json!([{"backendRefs": [{"name": "v1", "port": 80}],
            "filters": [{"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": "x-by", "value": value}]}}]}])
        };
        let by = |pod: PodRef<'_>, url: &str| {
            let answer = curl(&lab, pod, &[url]);
            (answer.server(), answer.field("x-by").unwrap_or_default())
        };
        let is = |server: &str, by: &str| (server.to_owned(), by.to_owned());

        // Producer routes count for every namespace.
        routed(&lab, "shared", mark("producer"));
        wait_for_route(&lab, CONSUMER, "shared.demo", "shared");
        assert_eq!(
            by(CLIENT, "http://shared/"),
            is("v1", "producer"),
            "GEP-1294 producer route"
        );
        assert_eq!(
            by(CONSUMER, "http://shared.demo/"),
            is("v1", "producer"),
            "GEP-1294 producer route"
        );
        // Consumer routes count for their namespace and replace the producer's there.
        let parent = json!({"group": "", "kind": "Service", "name": "shared", "namespace": "demo"});
        let consumer = http_route_of(
            "consumer",
            "own",
            &parent,
            &json!([{
            "matches": [path("PathPrefix", "/only")], "backendRefs": [{"name": "v2", "namespace": "demo", "port": 80}],
            "filters": [{"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": "x-by", "value": "consumer"}]}}]}]),
        );
        lab.apply(std::slice::from_ref(&consumer)).expect_ok();
        wait_for_route(&lab, CONSUMER, "shared.demo", "own");
        assert_eq!(
            by(CONSUMER, "http://shared.demo/only"),
            is("v2", "consumer"),
            "GEP-1294 consumer route, no ReferenceGrant"
        );
        assert_eq!(
            curl(&lab, CONSUMER, &["http://shared.demo/"]).status(),
            404,
            "the producer's rules are replaced"
        );
        assert_eq!(
            by(CLIENT, "http://shared/only"),
            is("v1", "producer"),
            "other namespaces do not see it"
        );
        lab.delete(&[consumer]).expect_ok();
        wait_until(
            "the producer's route to count again",
            Duration::from_secs(10),
            || {
                let now = by(CONSUMER, "http://shared.demo/");
                if now == is("v1", "producer") {
                    Ok(())
                } else {
                    Err(format!("{now:?}"))
                }
            },
        );

        // port and sectionName.
        for (name, more) in [
            ("ports", json!({"port": 8080})),
            ("section", json!({"sectionName": "p8080"})),
        ] {
            let mut parent = json!({"group": "", "kind": "Service", "name": name});
            for (key, value) in more.as_object().into_iter().flatten() {
                parent[key] = value.clone();
            }
            lab.apply(&[http_route_of("demo", name, &parent, &mark(name))])
                .expect_ok();
            wait_for_route(&lab, CLIENT, &format!("{name}:8080"), name);
            assert_eq!(
                by(CLIENT, &format!("http://{name}:8080/")),
                is("v1", name),
                "parentRef {more}"
            );
            assert_eq!(
                by(CLIENT, &format!("http://{name}/")),
                is("v2", ""),
                "another port than {more}"
            );
        }
        assert_eq!(
            by(CLIENT, "http://shared:8080/"),
            is("v1", "producer"),
            "a parentRef without port: all ports"
        );

        // Addresses.
        let pod = lab.pod(V2);
        for ip in &pod.ips {
            let at = if ip.is_ipv6() {
                format!("[{ip}]")
            } else {
                ip.to_string()
            };
            assert_eq!(
                by(CLIENT, &format!("http://{at}:{HTTP}/")),
                is("v2", ""),
                "a pod's address is not routed (GEP-1324)"
            );
            let host = curl(
                &lab,
                CLIENT,
                &["-H", "host: shared", &format!("http://{at}:{HTTP}/")],
            );
            assert_eq!(
                host.field("x-by"),
                None,
                "nor is it with the Host of a Service"
            );
        }
        for ip in lab.service_ips(("demo", "shared")) {
            let at = if ip.is_ipv6() {
                format!("[{ip}]")
            } else {
                ip.to_string()
            };
            assert_eq!(
                by(CLIENT, &format!("http://{at}/")),
                is("v1", "producer"),
                "ClusterIP {ip}"
            );
            let host = curl(
                &lab,
                CLIENT,
                &["-H", "host: plain", &format!("http://{at}/")],
            );
            assert_eq!(
                host.field("x-by").as_deref(),
                Some("producer"),
                "the address counts, not the Host"
            );
        }
        assert_eq!(
            by(CLIENT, "http://plain/"),
            is("v2", ""),
            "a Service without routes"
        );
        let asked = curl(&lab, CLIENT, &["-H", "host: shared", "http://plain/"]);
        assert_eq!(asked.field("x-by"), None, "MeshFrontendHostname");

        // One level only: what comes to `shared` by a route does not go by its routes.
        routed(
            &lab,
            "plain",
            json!([{"backendRefs": [{"name": "shared", "port": 80}]}]),
        );
        assert_eq!(
            by(CLIENT, "http://plain/"),
            is("v2", ""),
            "a backend's own routes are not applied (GEP-1294)"
        );

        // GRPCRoute wins over HTTPRoute on the same Service, and back.
        routed(&lab, "kinds", mark("http"));
        assert_eq!(by(CLIENT, "http://kinds/"), is("v1", "http"));
        let grpc = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "GRPCRoute", "metadata": {"name": "kinds", "namespace": "demo"},
            "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "kinds"}], "rules": [{"matches": [{"method": {"service": "a.B"}}], "backendRefs": [{"name": "v1", "port": 80}]}]}});
        lab.apply(std::slice::from_ref(&grpc)).expect_ok();
        wait_until(
            "the HTTPRoute to have lost (GEP-1294, kind conflict)",
            Duration::from_secs(10),
            || {
                let answer = curl(&lab, CLIENT, &["http://kinds/"]);
                if answer.field("x-by").is_none() {
                    Ok(())
                } else {
                    Err(format!("{answer:?}"))
                }
            },
        );
        lab.delete(&[grpc]).expect_ok();
        wait_until(
            "the HTTPRoute to count again",
            Duration::from_secs(10),
            || {
                let now = by(CLIENT, "http://kinds/");
                if now == is("v1", "http") {
                    Ok(())
                } else {
                    Err(format!("{now:?}"))
                }
            },
        );

        // The last route goes: plain again.
        lab.delete(&[http_route("demo", "kinds", "kinds", &mark("http"))])
            .expect_ok();
        wait_until("no route to be attached", Duration::from_secs(10), || {
            let now = by(CLIENT, "http://kinds/");
            if now == is("v2", "") {
                Ok(())
            } else {
                Err(format!("{now:?}"))
            }
        });
    });
}
