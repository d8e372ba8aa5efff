use super::*;

#[test]
fn a_connection_is_counted_once_opened_and_once_closed() {
    let telemetry = Telemetry::new();
    let id = Identity::new("cluster.local", "demo", "client").unwrap();
    let source = Party::meshed(&"client".into(), &id);
    let labels = TcpLabels {
        reporter: Reporter::Source,
        source,
        destination: Party::unknown(),
        service: Some("web.demo".into()),
        security: Security::MutualTls,
    };
    let open = telemetry.open(&labels);
    open.sent.add(5);
    telemetry.fail(&labels, ProxyError::NoEndpoint);
    let before = telemetry.encode();
    drop(open);
    let after = telemetry.encode();
    let line = |text: &str, name: &str| {
        text.lines()
            .find(|l| l.starts_with(name) && l.contains(r#"source_workload="client""#))
            .map(str::to_owned)
    };
    assert!(
        line(&before, "warren_tcp_connections_opened_total")
            .unwrap()
            .ends_with(" 1")
    );
    assert!(
        line(&before, "warren_tcp_connections_closed_total")
            .unwrap()
            .ends_with(" 0")
    );
    assert!(
        line(&after, "warren_tcp_connections_closed_total")
            .unwrap()
            .ends_with(" 1")
    );
    assert!(
        line(&after, "warren_tcp_sent_bytes_total")
            .unwrap()
            .ends_with(" 5")
    );
    assert!(
        line(&after, "warren_tcp_connections_failed_total")
            .unwrap()
            .contains(r#"reason="no_endpoint""#)
    );
}

fn tcp_labels(source: &str) -> TcpLabels {
    let id = Identity::new("cluster.local", "demo", source).unwrap();
    TcpLabels {
        reporter: Reporter::Source,
        source: Party::meshed(&source.into(), &id),
        destination: Party::unknown(),
        service: None,
        security: Security::Plaintext,
    }
}

#[test]
fn connections_beyond_the_limit_are_counted_as_other() {
    let bounds = Bounds {
        series: 1,
        ..Bounds::default()
    };
    let telemetry = Telemetry::with(bounds, trace::Tracer::off());
    for source in ["a", "b", "c"] {
        telemetry.open(&tcp_labels(source));
        telemetry.fail(&tcp_labels(source), ProxyError::NotReady);
    }
    let text = telemetry.encode();
    for line in [
        r#"warren_tcp_connections_closed_total{reporter="source",source_workload="other",source_namespace="other",source_principal="other",destination_workload="other",destination_namespace="other",destination_principal="other",destination_service="other",security="other"} 2"#,
        r#"warren_tcp_connections_failed_total{reporter="source",source_workload="other",source_namespace="other",source_principal="other",destination_workload="other",destination_namespace="other",destination_principal="other",destination_service="other",security="other",reason="other"} 2"#,
    ] {
        assert!(text.lines().any(|l| l == line), "{line} in {text}");
    }
}

#[test]
fn a_connections_series_outlives_it_by_the_expiry() {
    let telemetry = Telemetry::new();
    let start = Instant::now();
    let at = |seconds| start + std::time::Duration::from_secs(seconds);
    let labels = tcp_labels("client");
    let open = telemetry.tcp.open(&labels, start);
    telemetry.tcp.fail(&labels, ProxyError::NotReady, start);
    telemetry.tcp.sweep(at(1000));
    let has = |name: &str| telemetry.encode().contains(&format!("{name}{{"));
    assert!(has("warren_tcp_connections_opened_total"));
    assert!(!has("warren_tcp_connections_failed_total"));
    drop(open);
    telemetry.tcp.sweep(at(1899));
    assert!(has("warren_tcp_connections_opened_total"));
    telemetry.tcp.sweep(at(1900));
    assert!(!has("warren_tcp_connections_opened_total"));
}
