//! Line 9: many idle connections through one pair of proxies, and many idle pods on one node: what they
//! cost, and that it is given back.

use std::time::Duration;

use warren_tests::host::{allocated_kib, descriptors, rss_kib};
use warren_tests::lab::Lab;
use warren_tests::load::{HoldReport, Running};
use warren_tests::long;
use warren_tests::manifest::{CLIENT, ECHO, Pod, account, near_and_far};
use warren_tests::scenario::{binary, scenario};
use warren_tests::wait::{let_run, wait_until};

const NODES: [&str; 2] = ["node-1", "node-2"];

#[test]
fn idle_connections_are_cheap_and_give_everything_back() {
    // Of the hard limit, 4,000 are left for what is not a connection.
    let connections = if long() {
        15_000.min(descriptor_limit() - 4_000)
    } else {
        2_000
    };
    scenario(Duration::from_secs(if long() { 900 } else { 200 }), |s| {
        let mut manifests = near_and_far();
        let server = binary("mesh-echo").display().to_string();
        manifests.push(
            Pod::new("demo", "far", "node-2")
                .command(&[&server, "--processes", "4"])
                .ready_tcp(ECHO)
                .build(),
        );
        // The later document is the pod; the earlier one of the same name goes.
        let first = manifests
            .iter()
            .position(|m| m["kind"] == "Pod" && m["metadata"]["name"] == "far");
        manifests.remove(first.expect("near_and_far has the pod"));
        let lab = s.lab(2, &manifests);

        // A first round, so that what is allocated once is not counted.
        hold(s, &lab, 200)
            .stop::<HoldReport>()
            .expect_unbroken("the first round");
        let before = wait_until("stocks to settle", Duration::from_secs(60), || {
            settled(&lab)
        });

        let held = hold(s, &lab, connections);
        // Idle means idle: nothing ends or grows by itself.
        let_run(Duration::from_secs(10));
        let during = NODES.map(|node| Usage::of(&lab, node));
        for ((node, before), during) in NODES.iter().zip(&before).zip(&during) {
            let each = (during.rss_kib.saturating_sub(before.rss_kib)) as f64 / connections as f64;
            println!(
                "{node}: {connections} idle connections: {} KiB -> {} KiB, {each:.2} KiB each; \
                 descriptors {} -> {}",
                before.rss_kib, during.rss_kib, before.descriptors, during.descriptors
            );
            assert!(each < 12.0, "{node}: {each:.2} KiB for an idle connection");
        }
        let report: HoldReport = held.stop();
        report.expect_unbroken("idle connections");
        assert_eq!(report.held, connections);

        wait_until(
            "memory and descriptors to come back",
            // What a tunnel keeps for its next streams goes when it is released, idle for five minutes.
            Duration::from_secs(if long() { 400 } else { 120 }),
            || {
                for (node, before) in NODES.iter().zip(&before) {
                    let now = Usage::of(&lab, node);
                    // A sixteenth of what the connections took may stay in the allocator; stocks vary.
                    let allowed = before.allocated_kib + 3_000 + connections / 3;
                    if now.allocated_kib > allowed || now.descriptors > before.descriptors + 100 {
                        return Err(format!("{node}: {now:?}, before {before:?}"));
                    }
                }
                Ok(())
            },
        );
        for (node, before) in NODES.iter().zip(&before) {
            println!(
                "{node}: afterwards {:?}, before {before:?}",
                Usage::of(&lab, node)
            );
        }
    });
}

#[test]
fn a_hundred_idle_pods_fit_in_little_memory() {
    let pods = if long() { 100 } else { 20 };
    scenario(Duration::from_secs(300), |s| {
        let mut manifests = near_and_far();
        manifests.push(account("demo", "idle"));
        for i in 0..pods {
            let pod = Pod::new("demo", &format!("idle-{i}"), "node-1").account("idle");
            manifests.push(pod.build());
        }
        let lab = s.lab(2, &manifests);
        let enrolled = (0..pods)
            .filter(|i| lab.is_enrolled(("demo", &format!("idle-{i}"))))
            .count();
        assert_eq!(enrolled, pods, "all pods are enrolled");
        hold(s, &lab, 10)
            .stop::<HoldReport>()
            .expect_unbroken("traffic beside the idle pods");
        let_run(Duration::from_secs(2));
        let usage = Usage::of(&lab, "node-1");
        println!("node-1 with {pods} idle enrolled pods: {usage:?}");
        assert!(usage.rss_kib < 60_000, "{usage:?}");
    });
}

#[derive(Clone, Copy, Debug)]
struct Usage {
    rss_kib: u64,
    allocated_kib: u64,
    descriptors: usize,
}

impl Usage {
    #[track_caller]
    fn of(lab: &Lab, node: &str) -> Self {
        let proxy = lab.node(node).supervisor;
        Self {
            rss_kib: rss_kib(proxy),
            allocated_kib: allocated_kib(proxy),
            descriptors: descriptors(proxy),
        }
    }
}

/// Both nodes' usage once it has not grown or shrunk for a second.
fn settled(lab: &Lab) -> Result<[Usage; 2], String> {
    let first = NODES.map(|node| Usage::of(lab, node));
    let_run(Duration::from_secs(1));
    let second = NODES.map(|node| Usage::of(lab, node));
    let close = first.iter().zip(&second).all(|(a, b)| {
        a.descriptors.abs_diff(b.descriptors) < 20 && a.rss_kib.abs_diff(b.rss_kib) < 200
    });
    if close {
        Ok(second)
    } else {
        Err(format!("{first:?} -> {second:?}"))
    }
}

#[track_caller]
fn hold(s: &warren_tests::scenario::Scenario, lab: &Lab, connections: u64) -> Running {
    Running::hold(
        s,
        lab,
        CLIENT,
        &format!("far:{ECHO}"),
        (connections, 4),
        None,
    )
}

fn descriptor_limit() -> u64 {
    use nix::sys::resource::{Resource, getrlimit};
    getrlimit(Resource::RLIMIT_NOFILE).map_or(20_000, |(_, hard)| hard)
}
