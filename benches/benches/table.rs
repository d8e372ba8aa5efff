//! What a new connection asks of the table: whose address, which Service, which endpoint.
//!
//! Sizes are of a mesh that is large for one table: 10,000 meshed pods, 1,000 Services of 10 endpoints.

mod fixture;

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use fixture::{fill, mesh_config};
use mesh_api::names::address_to_bytes;
use mesh_api::proto::mesh;
use warren_node_proxy::table::{Kind, ServiceLookup, Table};

const PODS: u32 = 10_000;
const SERVICES: u32 = 1_000;
const ENDPOINTS: u32 = 10;

fn lookups(criterion: &mut Criterion) {
    let table = full_table();
    let mut turn = 0u32;
    // A stride that is prime to the sizes, so that the processor's cache is not flattered.
    let mut next = move |size: u32| {
        turn = turn.wrapping_add(7919);
        turn % size
    };
    criterion.bench_function("table/workload by address", |b| {
        b.iter(|| table.workload(black_box(pod(next(PODS)))));
    });
    criterion.bench_function("table/address outside the mesh", |b| {
        b.iter(|| table.workload(black_box(IpAddr::from([192, 0, 2, 1]))));
    });
    criterion.bench_function("table/service by address", |b| {
        b.iter(|| table.service(black_box(SocketAddr::new(cluster_ip(next(SERVICES)), 80))));
    });
    criterion.bench_function("table/pick an endpoint", |b| {
        b.iter(|| {
            let lookup = table.service(SocketAddr::new(cluster_ip(next(SERVICES)), 80));
            let ServiceLookup::Port(port) = lookup else {
                panic!("every address of the round is a Service");
            };
            port.endpoints
                .pick(black_box(false), &[])
                .map(|pending| pending.address())
        });
    });
}

fn full_table() -> Arc<Table> {
    let table = Table::new("node-1");
    fill(
        &table,
        Kind::MeshConfig,
        vec![("mesh".into(), mesh_config())],
    );
    let workloads = (0..PODS).map(|index| {
        let workload = mesh::Workload {
            uid: format!("uid-{index}"),
            namespace: "bench".into(),
            name: format!("pod-{index}"),
            service_account: format!("account-{}", index % 100),
            addresses: vec![address_to_bytes(pod(index))],
            node: format!("node-{}", index % 100),
            node_addresses: vec![address_to_bytes(IpAddr::from([10, 0, 0, 1]))],
            state: mesh::EnrolmentState::Enforced.into(),
            tunnel: mesh::TunnelKind::Warren.into(),
            owner: format!("app-{}", index % 100),
            ..Default::default()
        };
        (workload.uid.clone(), workload)
    });
    fill(&table, Kind::Workload, workloads.collect());
    let slices = (0..SERVICES).map(|index| {
        let endpoint = |number: u32| mesh::Endpoint {
            address: address_to_bytes(pod((index * ENDPOINTS + number) % PODS)),
            ready: true,
            serving: true,
            ..Default::default()
        };
        let slice = mesh::EndpointSlice {
            namespace: "bench".into(),
            name: format!("service-{index}-1"),
            service: format!("service-{index}"),
            ports: vec![mesh::EndpointPort {
                name: "http".into(),
                port: 8080,
            }],
            endpoints: (0..ENDPOINTS).map(endpoint).collect(),
        };
        (format!("bench/{}", slice.name), slice)
    });
    fill(&table, Kind::EndpointSlice, slices.collect());
    let services = (0..SERVICES).map(|index| {
        let service = mesh::Service {
            namespace: "bench".into(),
            name: format!("service-{index}"),
            addresses: vec![address_to_bytes(cluster_ip(index))],
            ports: vec![mesh::ServicePort {
                name: "http".into(),
                port: 80,
                ..Default::default()
            }],
            ..Default::default()
        };
        (format!("bench/{}", service.name), service)
    });
    fill(&table, Kind::Service, services.collect());
    table
}

fn pod(index: u32) -> IpAddr {
    IpAddr::from(Ipv4Addr::from(
        u32::from(Ipv4Addr::new(10, 64, 0, 0)) + index,
    ))
}

fn cluster_ip(index: u32) -> IpAddr {
    IpAddr::from(Ipv4Addr::from(
        u32::from(Ipv4Addr::new(10, 96, 0, 1)) + index,
    ))
}

criterion_group!(benches, lookups);
criterion_main!(benches);
