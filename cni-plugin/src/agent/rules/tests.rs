use super::*;

#[test]
fn constants_agree_with_the_shared_names() {
    assert_eq!(TABLE_NUMBER, ROUTE_TABLE.to_string());
    assert_eq!(RULE[1], format!("{DELIVERED_MARK:#x}"));
}

#[test]
fn exclusions_come_before_the_redirect() {
    let pod = NodePod {
        exclude_inbound_ports: vec![9090, 22],
        exclude_outbound_ports: vec![5432],
        exclude_outbound_cidrs: vec![
            "10.0.0.0/8".into(),
            "10.1.0.0/16".into(),
            "192.0.2.7".into(),
            "fd00::/8".into(),
        ],
        ..NodePod::default()
    };
    let rules = Ruleset::capturing(MeshMark(0xabcd), &pod).unwrap();
    let text = rules.text();
    let outbound = "meta mark 0x0000abcd return\n\
        oifname \"lo\" return\n\
        fib daddr type local return\n\
        ip daddr { 10.0.0.0/8, 192.0.2.7/32 } return\n\
        ip6 daddr { fd00::/8 } return\n\
        tcp dport { 5432 } return\n\
        tcp flags & (syn | ack | rst | fin) == syn redirect to :15001\n";
    assert!(text.contains(outbound), "{text}");
    let inbound = "fib daddr type != local return\n\
        tcp dport { 22, 9090, 15008 } return\n\
        tcp flags & (syn | ack | rst | fin) == syn redirect to :15006\n";
    assert!(text.contains(inbound), "{text}");
    let closed = "tcp dport { 22, 9090, 15008 } return\n\
        tcp flags & (syn | ack | rst | fin) == syn socket transparent <= 1 return\n\
        tcp flags & (syn | ack | rst | fin) == syn reject with tcp reset\n";
    assert!(text.contains(closed), "{text}");
    assert!(!text.contains("udp"));
}

#[test]
fn malformed_exclusions_are_refused() {
    let pod = NodePod {
        exclude_outbound_cidrs: vec!["10.0.0.0/8; flush ruleset".into()],
        ..NodePod::default()
    };
    assert!(Ruleset::capturing(MeshMark(1), &pod).is_err());
    let pod = NodePod {
        exclude_inbound_ports: vec![70_000],
        ..NodePod::default()
    };
    assert!(Ruleset::capturing(MeshMark(1), &pod).is_err());
}

#[test]
fn released_rules_keep_translation_and_match_nothing() {
    let text = Ruleset::released(MeshMark(0xabcd)).text().to_owned();
    assert_eq!(text.matches("redirect to").count(), 2);
    for line in text.lines().filter(|line| line.contains("redirect to")) {
        assert!(
            line.contains("mark 0x00000001 meta mark 0x00000002"),
            "{line}"
        );
    }
    assert!(text.contains("chain replies"));
    assert!(!text.contains("reject"), "{text}");
}
