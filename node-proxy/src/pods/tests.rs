use mesh_api::proto::mesh::{NodePod, Probe as ProtoProbe};

use super::*;

fn record() -> NodePod {
    NodePod {
        uid: "uid-1".into(),
        namespace: "demo".into(),
        name: "web-0".into(),
        service_account: "web".into(),
        addresses: vec![vec![10, 0, 0, 1].into(), vec![0; 16].into()],
        enrolled: true,
        mode: Mode::Strict.into(),
        exclude_inbound_ports: vec![9000],
        exclude_outbound_ports: vec![443],
        exclude_outbound_cidrs: vec!["10.1.0.0/16".into()],
        probes: vec![
            ProtoProbe {
                port: 8080,
                handler: Some(probe::Handler::HttpGet(probe::HttpGet {
                    path: "/ok".into(),
                })),
            },
            ProtoProbe {
                port: 99_999,
                handler: None,
            },
        ],
        owner: String::new(),
        zone: String::new(),
        namespace_opted_in: false,
    }
}

#[test]
fn the_controllers_record_is_converted() {
    let info = PodInfo::from_proto(&record()).unwrap();
    assert_eq!((&*info.owner, info.strict), ("web-0", true));
    assert_eq!(
        info.probes,
        [Probe {
            port: 8080,
            kind: ProbeKind::HttpGet("/ok".into())
        }]
    );
    assert_eq!(
        info.identity("td").unwrap().as_str(),
        "spiffe://td/ns/demo/sa/web"
    );
    assert!(info.has_v6());
}

#[test]
fn what_is_wrong_with_a_record_is_named() {
    let wrong = |edit: fn(&mut NodePod)| {
        let mut record = record();
        edit(&mut record);
        PodInfo::from_proto(&record).unwrap_err().to_string()
    };
    assert_eq!(wrong(|r| r.uid.clear()), "pod without uid");
    assert_eq!(
        wrong(|r| r.addresses[0].truncate(3)),
        "pod demo/web-0: an address of 3 bytes"
    );
    assert_eq!(
        wrong(|r| r.exclude_outbound_ports[0] = 65_536),
        "pod demo/web-0: port 65536 is out of range"
    );
    assert_eq!(
        wrong(|r| r.exclude_outbound_cidrs[0] = "10.1".into()),
        "pod demo/web-0: \"10.1\" is not a CIDR"
    );
}

#[tokio::test]
async fn captured_connections_are_awaited() {
    let captured = Captured::default();
    captured.none().await;
    let (first, second) = (captured.enter(), captured.enter());
    let none = captured.none();
    tokio::pin!(none);
    drop(first);
    assert_eq!(captured.open(), 1);
    assert!(futures::poll!(&mut none).is_pending());
    drop(second);
    none.await;
}
