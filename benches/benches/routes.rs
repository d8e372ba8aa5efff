//! What routing asks of a request: which rule, which backend. 0, 1 and 100 routes attached to one Service port; a
//! request through both proxies costs tens of microseconds, of which 100 routes may take 5 %.

mod fixture;

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use fixture::{fill, mesh_config};
use http::Request;
use mesh_api::names::address_to_bytes;
use mesh_api::proto::mesh;
use warren_node_proxy::http::route::Choice;
use warren_node_proxy::table::{Kind, ServiceLookup, ServicePort, Table};

fn routing(criterion: &mut Criterion) {
    for routes in [0, 1, 100] {
        let port = port_with(routes);
        // The last one's: nothing is found early.
        let path = format!("/team-{}/items/7?full=1", routes.max(1) - 1);
        let request = Request::builder()
            .uri(path)
            .header("host", "web.bench")
            .header("user-agent", "bench")
            .header("accept", "*/*")
            .body(())
            .expect("the request is valid")
            .into_parts()
            .0;
        criterion.bench_function(&format!("routes/{routes} attached"), |b| {
            b.iter(|| {
                let rules = port.http.load();
                let set = rules.routes_for(black_box("bench"))?;
                let found = set.find(black_box(&request))?;
                match found.rule.choose(black_box(1 << 63)) {
                    Choice::Backend(backend) => backend.service_port(),
                    Choice::Invalid(_) | Choice::None => panic!("the backend is the Service"),
                }
            });
        });
    }
}

/// A Service port with HTTPRoutes of a prefix, an exact path and a header match each.
fn port_with(routes: usize) -> Arc<ServicePort> {
    let table = Table::new("node-1");
    let settings = vec![("mesh".into(), mesh_config())];
    fill(&table, Kind::MeshConfig, settings);
    let address = [10, 96, 0, 1].into();
    let service = mesh::Service {
        namespace: "bench".into(),
        name: "web".into(),
        addresses: vec![address_to_bytes(address)],
        ports: vec![mesh::ServicePort {
            port: 80,
            ..Default::default()
        }],
        ..Default::default()
    };
    fill(&table, Kind::Service, vec![("bench/web".into(), service)]);
    let all = (0..routes).map(|number| {
        let route = route(number);
        (format!("httproute/bench/{}", route.name), route)
    });
    fill(&table, Kind::Route, all.collect());
    match table.service((address, 80).into()) {
        ServiceLookup::Port(port) => port,
        other => panic!("the Service was just put in: {other:?}"),
    }
}

fn route(number: usize) -> mesh::Route {
    let path = |kind: mesh::MatchType, value: String| mesh::RouteMatch {
        path: Some(mesh::StringMatch {
            r#type: kind.into(),
            value,
        }),
        ..Default::default()
    };
    let exact = path(mesh::MatchType::Exact, format!("/exact-{number}"));
    let prefix = path(mesh::MatchType::Prefix, format!("/team-{number}"));
    let header = mesh::RouteMatch {
        headers: vec![mesh::NamedMatch {
            name: "team".into(),
            value: Some(mesh::StringMatch {
                r#type: mesh::MatchType::Exact.into(),
                value: number.to_string(),
            }),
        }],
        ..prefix.clone()
    };
    mesh::Route {
        kind: mesh::RouteKind::Http.into(),
        namespace: "bench".into(),
        name: format!("route-{number}"),
        created: number as i64,
        parents: vec![mesh::RouteParent {
            namespace: "bench".into(),
            service: "web".into(),
            ..Default::default()
        }],
        rules: vec![mesh::RouteRule {
            matches: vec![header, exact, prefix],
            backends: vec![mesh::RouteBackend {
                namespace: "bench".into(),
                service: "web".into(),
                port: 80,
                weight: 1,
                ..Default::default()
            }],
            ..Default::default()
        }],
        ..Default::default()
    }
}

criterion_group!(benches, routing);
criterion_main!(benches);
