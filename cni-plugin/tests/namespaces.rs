//! The agent and the plugin against real namespaces, the stock CNI plugins and real kernel rules.
//!
//! Needs root, nftables, iproute2 and the `containernetworking-plugins`.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_api::proto::broker::{Family, Listener};
use mesh_api::proto::control::PodState;
use mesh_api::proto::mesh::NodePod;
use serde_json::json;
use support::apps::{Call, greet, serve, serve_udp, udp_echoes};
use support::controller::FakeController;
use support::proxy::Proxy;
use support::runtime::{Network, addresses};
use support::{RunningAgent, World, eventually, on_a_node, phase};
use warren_cni::agent::config::AgentConfig;
use warren_cni::agent::record::Phase;
use warren_cni::agent::status_of;

/// Agent, proxy and controller of one node, ready.
struct Mesh {
    config: AgentConfig,
    controller: Arc<FakeController>,
    agent: RunningAgent,
    proxy: Proxy,
}

fn mesh(world: &World) -> Mesh {
    let config = world.config();
    let controller = FakeController::new();
    let agent = RunningAgent::start(&config, &controller);
    let proxy = Proxy::start(&config.broker_socket, "first");
    eventually("node is ready", || {
        controller.report().is_some_and(|report| report.ready)
    });
    Mesh {
        config,
        controller,
        agent,
        proxy,
    }
}

#[test]
fn new_connections_of_a_meshed_pod_are_captured_and_delivered_transparently() {
    on_a_node(
        "new_connections_of_a_meshed_pod_are_captured_and_delivered_transparently",
        |world| {
            let Mesh {
                controller,
                agent,
                proxy,
                config,
            } = mesh(&world);
            let network = Network::new(&world, "bridge", "1.0.0");
            controller.set(NodePod {
                exclude_inbound_ports: vec![9090],
                exclude_outbound_ports: vec![5432],
                exclude_outbound_cidrs: vec!["10.77.0.1/32".into(), "fd77::1".into()],
                ..controller.pod("web", true)
            });
            controller.pod("client", false);
            let (web, client) = (world.sandbox("web"), world.sandbox("client"));
            let before = web.traces();
            let web_addresses = addresses(&network.add(&web, "web").unwrap());
            let client_addresses = addresses(&network.add(&client, "client").unwrap());
            assert_eq!(controller.registered("web"), Some(web_addresses.clone()));
            assert_eq!(
                controller.state_of("web"),
                Some(PodState::Ready),
                "reported before ADD returned"
            );
            assert_eq!(controller.state_of("client"), None);
            network.check(&web, "web").unwrap();
            network.check(&client, "client").unwrap();

            for pod in [&web, &client] {
                for port in [8080, 9090, 5432] {
                    serve(pod, port);
                }
                serve_udp(pod, 53);
            }
            for (web_address, client_address) in web_addresses.iter().zip(&client_addresses) {
                let before = proxy.accepted().len();
                // In: captured, and the app sees who calls, with the caller's own port.
                let to = SocketAddr::new(*web_address, 8080);
                let mut call = Call::open(&client, to).unwrap();
                assert_eq!(call.seen, *client_address);
                assert!(call.works());
                // Out: captured.
                let from_web = SocketAddr::new(*client_address, 8080);
                let mut out = Call::open(&web, from_web).unwrap();
                assert_eq!(out.seen, *web_address);
                assert!(out.works());
                let seen: Vec<_> = proxy
                    .accepted()
                    .drain(before..)
                    .map(|a| (a.kind, a.from, a.original))
                    .collect();
                assert_eq!(
                    seen,
                    [
                        (Listener::Inbound, *client_address, to),
                        (Listener::Outbound, *web_address, from_web)
                    ]
                );
                // Not captured: the pod's own addresses, exclusions, loopback, datagrams.
                let before = proxy.accepted().len();
                let localhost = if web_address.is_ipv4() {
                    "127.0.0.1"
                } else {
                    "::1"
                };
                Call::open(&web, to).unwrap();
                Call::open(&web, SocketAddr::new(localhost.parse().unwrap(), 8080)).unwrap();
                assert_eq!(
                    Call::open(&client, SocketAddr::new(*web_address, 9090))
                        .unwrap()
                        .seen,
                    *client_address
                );
                Call::open(&web, SocketAddr::new(*client_address, 5432)).unwrap();
                let gateway = if web_address.is_ipv4() {
                    "10.77.0.1"
                } else {
                    "fd77::1"
                };
                let refused = Call::open(&web, SocketAddr::new(gateway.parse().unwrap(), 8081));
                assert_eq!(
                    refused.err().unwrap().kind(),
                    std::io::ErrorKind::ConnectionRefused
                );
                assert!(udp_echoes(&web, SocketAddr::new(*client_address, 53)));
                assert!(udp_echoes(&client, SocketAddr::new(*web_address, 53)));
                // Nobody listens: refused in the pod itself, where a TCP probe hears it.
                let closed = Call::open(&client, SocketAddr::new(*web_address, 8088));
                assert_eq!(
                    closed.err().unwrap().kind(),
                    std::io::ErrorKind::ConnectionRefused
                );
                // Nor a tunnel: nobody accepts on it yet, but the listener is there.
                let hbone = SocketAddr::new(*web_address, 15008);
                let _ = Call::open(&client, hbone);
                let rest: Vec<_> = proxy.accepted().drain(before..).map(|a| a.kind).collect();
                assert!(rest.iter().all(|kind| *kind == Listener::Hbone), "{rest:?}");
            }

            // CHECK tells what is missing.
            web.exec("ip", &["rule", "del", "fwmark", "0x111", "lookup", "100"]);
            let error = network.check(&web, "web").unwrap_err();
            assert_eq!(error.code, 999);
            assert!(error.text.contains("fwmark"), "{}", error.text);
            web.exec("nft", &["delete", "table", "inet", "warren"]);
            assert!(
                network
                    .check(&web, "web")
                    .unwrap_err()
                    .text
                    .contains("missing")
            );

            network.delete(&client, "client", None);
            assert_eq!(phase(&config, "client"), None);
            assert!(agent.leave_all(Duration::from_secs(10)));
            eventually("listeners closed", || !web.traces().contains("15001"));
            assert_eq!(phase(&config, "web"), Some(Phase::Direct));
            // The interface and the apps are not the agent's.
            let left: Vec<String> = web
                .traces()
                .lines()
                .filter(|l| l.contains("warren") || l.contains("0x111") || l.contains("table 100"))
                .map(str::to_owned)
                .collect();
            assert_eq!(left, Vec::<String>::new(), "before: {before}");
        },
    );
}

#[test]
fn a_port_is_open_while_an_ended_connection_waits() {
    on_a_node("a_port_is_open_while_an_ended_connection_waits", |world| {
        let Mesh {
            controller,
            agent,
            proxy,
            config: _,
        } = mesh(&world);
        let network = Network::new(&world, "bridge", "1.0.0");
        let direct = controller.pod("web", false);
        controller.pod("client", false);
        let (web, client) = (world.sandbox("web"), world.sandbox("client"));
        let web_addresses = addresses(&network.add(&web, "web").unwrap());
        let client_addresses = addresses(&network.add(&client, "client").unwrap());
        greet(&web, 8080);
        let call = |web_address: &IpAddr, client_address: &IpAddr| {
            let to = SocketAddr::new(*web_address, 8080);
            Call::open_from(&client, to, Some(SocketAddr::new(*client_address, 40_000)))
        };
        let pairs: Vec<_> = web_addresses.iter().zip(&client_addresses).collect();
        for (web_address, client_address) in &pairs {
            assert!(call(web_address, client_address).unwrap().ends());
        }
        let waiting = || web.exec("ss", &["-tanH", "state", "time-wait", "sport", "= :8080"]);
        eventually("the ended connections wait", || {
            waiting().lines().count() == pairs.len()
        });
        agent.says(NodePod {
            enrolled: true,
            ..direct
        });
        eventually("enrolled", || {
            controller.state_of("web") == Some(PodState::Ready)
        });
        // Of the same ports as those.
        for (web_address, client_address) in &pairs {
            assert!(call(web_address, client_address).unwrap().ends());
        }
        assert_eq!(proxy.accepted().len(), pairs.len());
    });
}

#[test]
fn what_a_pod_forwards_is_not_captured() {
    on_a_node("what_a_pod_forwards_is_not_captured", |world| {
        let Mesh {
            controller,
            agent: _agent,
            proxy,
            config: _,
        } = mesh(&world);
        let network = Network::new(&world, "bridge", "1.0.0");
        controller.pod("web", true);
        controller.pod("client", false);
        let (web, client) = (world.sandbox("web"), world.sandbox("client"));
        let web_address = addresses(&network.add(&web, "web").unwrap())[0];
        let client_address = addresses(&network.add(&client, "client").unwrap())[0];
        // A container inside the pod, with an address of its own.
        let inner = world.sandbox("inner");
        let veth = ["type", "veth", "peer", "name", "eth0", "netns"];
        web.exec(
            "ip",
            &[&["link", "add", "in0"][..], &veth, &[&inner.name]].concat(),
        );
        web.exec("ip", &["addr", "add", "198.51.100.1/24", "dev", "in0"]);
        web.exec("ip", &["link", "set", "in0", "up"]);
        inner.exec("ip", &["addr", "add", "198.51.100.2/24", "dev", "eth0"]);
        inner.exec("ip", &["link", "set", "eth0", "up"]);
        inner.exec("ip", &["route", "add", "default", "via", "198.51.100.1"]);
        web.exec("sh", &["-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]);
        let via = web_address.to_string();
        client.exec("ip", &["route", "add", "198.51.100.0/24", "via", &via]);

        serve(&inner, 8080);
        let mut call = Call::open(&client, "198.51.100.2:8080".parse().unwrap()).unwrap();
        assert_eq!(call.seen, client_address);
        assert!(call.works());
        assert_eq!(proxy.accepted().len(), 0, "it is no connection to the pod");
        // One to the pod itself is.
        serve(&web, 8080);
        let mut call = Call::open(&client, SocketAddr::new(web_address, 8080)).unwrap();
        assert!(call.works());
        assert_eq!(proxy.accepted().len(), 1);
    });
}

#[test]
fn a_pod_that_holds_a_port_of_the_mesh_is_told_so() {
    on_a_node("a_pod_that_holds_a_port_of_the_mesh_is_told_so", |world| {
        let Mesh {
            controller,
            agent: _agent,
            proxy: _proxy,
            config: _,
        } = mesh(&world);
        let network = Network::new(&world, "bridge", "1.0.0");
        controller.pod("web", true);
        let web = world.sandbox("web");
        serve(&web, 15006);
        let error = network.add(&web, "web").unwrap_err();
        assert_eq!(error.code, 11);
        assert!(error.text.contains("listens on port"), "{}", error.text);
    });
}

#[test]
fn a_pod_joins_and_leaves_while_its_connections_live_on() {
    on_a_node(
        "a_pod_joins_and_leaves_while_its_connections_live_on",
        |world| {
            let Mesh {
                controller,
                agent,
                proxy,
                config,
            } = mesh(&world);
            let network = Network::new(&world, "bridge", "0.4.0");
            let direct = controller.pod("web", false);
            controller.pod("client", false);
            let (web, client) = (world.sandbox("web"), world.sandbox("client"));
            let web_addresses = addresses(&network.add(&web, "web").unwrap());
            let client_addresses = addresses(&network.add(&client, "client").unwrap());
            serve(&web, 8080);
            serve(&client, 8080);
            let calls = || -> Vec<Call> {
                let into = web_addresses
                    .iter()
                    .map(|a| Call::open(&client, SocketAddr::new(*a, 8080)).unwrap());
                let out = client_addresses
                    .iter()
                    .map(|a| Call::open(&web, SocketAddr::new(*a, 8080)).unwrap());
                into.chain(out).collect()
            };
            let untouched = web.traces();
            let mut early = calls();
            assert_eq!(proxy.accepted(), []);

            let enrolled = NodePod {
                enrolled: true,
                ..direct.clone()
            };
            agent.says(enrolled.clone());
            eventually("enrolled", || {
                controller.state_of("web") == Some(PodState::Ready)
            });
            assert!(
                early.iter_mut().all(Call::works),
                "connections from before enrolment"
            );
            let mut captured = calls();
            assert_eq!(proxy.accepted().len(), 4);

            // Other exclusions: the rules are replaced under the running connections.
            let excluded = NodePod {
                exclude_inbound_ports: vec![8080],
                ..enrolled.clone()
            };
            agent.says(excluded);
            eventually("exclusion in force", || {
                web.exec("nft", &["list", "table", "inet", "warren"])
                    .contains("{ 8080, 15008 }")
            });
            assert!(
                captured.iter_mut().all(Call::works),
                "after the rules were replaced"
            );
            let before = proxy.accepted().len();
            Call::open(&client, SocketAddr::new(web_addresses[0], 8080)).unwrap();
            assert_eq!(proxy.accepted().len(), before);

            agent.says(direct.clone());
            eventually("leaving", || {
                controller.state_of("web") == Some(PodState::Leaving)
            });
            assert_eq!(phase(&config, "web"), Some(Phase::Leaving));
            let before = proxy.accepted().len();
            let mut late = calls();
            assert_eq!(proxy.accepted().len(), before, "new connections are direct");
            eventually("the proxy stopped accepting", || !proxy.serves("web"));
            for calls in [&mut early, &mut captured, &mut late] {
                assert!(calls.iter_mut().all(Call::works));
            }
            // Back while it leaves: the captured ones keep working, new ones are captured.
            agent.says(enrolled);
            eventually("enrolled again", || {
                controller.state_of("web") == Some(PodState::Ready)
            });
            drop(calls());
            assert_eq!(proxy.accepted().len(), before + 4);
            assert!(captured.iter_mut().all(Call::works));
            agent.says(direct);
            eventually("leaving again", || {
                phase(&config, "web") == Some(Phase::Leaving)
            });
            eventually("the proxy stopped accepting", || !proxy.serves("web"));
            assert!(captured.iter_mut().all(Call::works));

            drop(captured);
            eventually("left", || phase(&config, "web") == Some(Phase::Direct));
            eventually("the leaving is reported", || {
                controller.state_of("web").is_none()
            });
            assert!(early.iter_mut().all(Call::works));
            assert!(late.iter_mut().all(Call::works));
            eventually("no trace", || web.traces() == untouched);
        },
    );
}

#[test]
fn pods_that_ran_before_the_plugin_are_found_and_enrolled() {
    on_a_node(
        "pods_that_ran_before_the_plugin_are_found_and_enrolled",
        |world| {
            const UID: &str = "0b5fd1ac-2a32-4c1c-8a5f-0e86ae26a0d3";
            let mut network = Network::new(&world, "bridge", "1.0.0");
            // Not in the chain yet.
            network.list["plugins"].as_array_mut().unwrap().pop();
            let (web, client) = (world.sandbox("web"), world.sandbox("client"));
            let web_addresses = addresses(&network.add(&web, UID).unwrap());
            network.add(&client, "client").unwrap();
            serve(&web, 8080);
            let to = SocketAddr::new(web_addresses[0], 8080);
            let mut early = Call::open(&client, to).unwrap();
            let untouched = web.traces();

            let Mesh {
                controller,
                agent,
                proxy,
                config,
            } = mesh(&world);
            let wanted = controller.pod(UID, true);
            agent.says(wanted.clone());
            // Of a namespace that is never asked about.
            let system = NodePod {
                uid: UID.replace('0', "1"),
                namespace: "kube-system".into(),
                ..wanted.clone()
            };
            agent.says(system);
            let status = agent.node.status();
            assert_eq!(status["notFound"], json!([format!("demo/{UID}")]));
            world.process(4242, UID, &web);
            eventually("enrolled", || {
                controller.state_of(UID) == Some(PodState::Ready)
            });
            assert_eq!(agent.node.status()["notFound"], json!([]));
            assert!(early.works(), "a connection from before enrolment");
            let mut captured = Call::open(&client, to).unwrap();
            assert_eq!(proxy.accepted().len(), 1);

            // It is on record, by the runtime's name for its namespace: found again without the process.
            agent.kill();
            std::fs::remove_dir_all(config.cni.proc_dir.join("4242")).unwrap();
            controller.forget_report();
            let agent = RunningAgent::start(&config, &controller);
            eventually("still enrolled", || {
                controller.state_of(UID) == Some(PodState::Ready)
            });
            assert!(captured.works());

            drop(captured);
            agent.says(controller.pod(UID, false));
            eventually("left", || phase(&config, UID) == Some(Phase::Direct));
            assert!(early.works());
            eventually("no trace", || web.traces() == untouched);
        },
    );
}

#[test]
fn a_pod_is_found_again_where_the_runtimes_path_leads_nowhere() {
    on_a_node(
        "a_pod_is_found_again_where_the_runtimes_path_leads_nowhere",
        |world| {
            let Mesh {
                controller,
                agent,
                proxy: _proxy,
                config,
            } = mesh(&world);
            let network = Network::new(&world, "ptp", "1.0.0");
            controller.pod("web", true);
            let mut web = world.sandbox("web");
            // As /var/run/netns, which is a link where the runtime is, and nothing where the agent is.
            let alias = world.directory.join("alias");
            std::os::unix::fs::symlink("/run/netns", &alias).unwrap();
            web.path = alias.join(&web.name);
            network.add(&web, "web").unwrap();
            std::fs::remove_file(&alias).unwrap();

            agent.kill();
            controller.forget_report();
            let _agent = RunningAgent::start(&config, &controller);
            eventually("still enrolled", || {
                controller.state_of("web") == Some(PodState::Ready)
            });
        },
    );
}

#[test]
fn a_restarted_agent_is_given_the_listeners_back() {
    on_a_node("a_restarted_agent_is_given_the_listeners_back", |world| {
        let Mesh {
            controller,
            agent,
            proxy,
            config,
        } = mesh(&world);
        let network = Network::new(&world, "ptp", "1.1.0");
        controller.pod("web", true);
        controller.pod("client", false);
        let (web, client) = (world.sandbox("web"), world.sandbox("client"));
        let web_addresses = addresses(&network.add(&web, "web").unwrap());
        network.add(&client, "client").unwrap();
        serve(&web, 8080);
        let to = SocketAddr::new(web_addresses[0], 8080);
        let mut early = Call::open(&client, to).unwrap();
        let rules = web.exec("nft", &["-a", "list", "ruleset"]);
        let mark = std::fs::read(config.state_dir.join("mark")).unwrap();

        // Killed: what runs goes on, what comes waits for sockets at most.
        agent.kill();
        assert!(early.works());
        let traces = web.traces();
        controller.forget_report();
        // With the controller away it works from what is on disk.
        controller.go_away(true);
        let agent = RunningAgent::start(&config, &controller);
        eventually("listeners taken back", || proxy.adopted() == 2);
        eventually("snapshot", || proxy.snapshots() == 2);
        let mut call = Call::open(&client, to).unwrap();
        assert!(call.works() && early.works());
        assert_eq!(web.traces(), traces);
        controller.go_away(false);
        eventually("reported", || {
            controller.state_of("web") == Some(PodState::Ready)
        });
        assert_eq!(
            web.exec("nft", &["-a", "list", "ruleset"]),
            rules,
            "nothing was applied again"
        );
        assert_eq!(std::fs::read(config.state_dir.join("mark")).unwrap(), mark);

        // A new proxy gets from the new agent what the old proxy had.
        let kept = web.exec("ss", &["-Hltne"]);
        proxy.kill();
        let proxy = Proxy::start(&config.broker_socket, "second");
        eventually("served by the next proxy", || {
            proxy.serves("web") && proxy.holds_host()
        });
        assert!(Call::open(&client, to).unwrap().works());
        assert_eq!(
            web.exec("ss", &["-Hltne"]),
            kept,
            "the same listening sockets"
        );

        // Both killed: the agent opens new ones.
        agent.kill();
        proxy.kill();
        let _agent = RunningAgent::start(&config, &controller);
        let proxy = Proxy::start(&config.broker_socket, "third");
        eventually("served after both died", || {
            proxy.serves("web") && proxy.holds_host()
        });
        assert!(Call::open(&client, to).unwrap().works());
        assert_eq!(proxy.adopted(), 0);
    });
}

#[test]
fn an_agent_restarted_while_a_pod_leaves_waits_for_its_connections() {
    on_a_node(
        "an_agent_restarted_while_a_pod_leaves_waits_for_its_connections",
        |world| {
            let Mesh {
                controller,
                agent,
                proxy,
                config,
            } = mesh(&world);
            let network = Network::new(&world, "bridge", "1.0.0");
            let pod = controller.pod("web", true);
            controller.pod("client", false);
            let (web, client) = (world.sandbox("web"), world.sandbox("client"));
            let untouched = web.traces();
            let address = addresses(&network.add(&web, "web").unwrap())[0];
            network.add(&client, "client").unwrap();
            serve(&web, 8080);
            let mut captured = Call::open(&client, SocketAddr::new(address, 8080)).unwrap();
            agent.says(NodePod {
                enrolled: false,
                ..pod
            });
            eventually("leaving", || phase(&config, "web") == Some(Phase::Leaving));
            agent.kill();
            let _agent = RunningAgent::start(&config, &controller);
            eventually("reconnected", || proxy.snapshots() == 2);
            // Longer than the agent gives proxies to come back.
            let until = Instant::now() + Duration::from_secs(4);
            while Instant::now() < until {
                assert!(captured.works());
                assert_eq!(phase(&config, "web"), Some(Phase::Leaving));
            }
            drop(captured);
            eventually("left", || phase(&config, "web") == Some(Phase::Direct));
            let traces = web.traces();
            for trace in ["warren", "0x111", "table 100", "15001"] {
                assert!(
                    !traces.contains(trace) && !untouched.contains(trace),
                    "{traces}"
                );
            }
        },
    );
}

#[test]
fn the_newest_ready_proxy_accepts_and_the_older_resumes_if_it_dies() {
    on_a_node(
        "the_newest_ready_proxy_accepts_and_the_older_resumes_if_it_dies",
        |world| {
            let Mesh {
                controller,
                agent,
                proxy: old,
                config,
            } = mesh(&world);
            let network = Network::new(&world, "bridge", "1.0.0");
            controller.pod("web", true);
            network.add(&world.sandbox("web"), "web").unwrap();
            let new = Proxy::start(&config.broker_socket, "second");
            eventually("the old one drains", || old.draining());
            assert!(new.serves("web") && new.holds_host() && !new.draining());
            // Order survives the agent: the old one may connect first, and is told again.
            agent.kill();
            let agent = RunningAgent::start(&config, &controller);
            eventually("both are back", || {
                old.snapshots() == 2 && new.snapshots() == 2
            });
            eventually("the old one drains again", || old.draining());
            assert!(!new.draining());
            // A pod that comes now goes to the new one only, and to the old one when it resumes.
            controller.pod("late", true);
            network.add(&world.sandbox("late"), "late").unwrap();
            assert!(new.serves("late") && !old.serves("late"));
            new.kill();
            eventually("the old one resumes", || {
                !old.draining() && old.serves("late")
            });
            assert!(controller.report().unwrap().ready);
            drop(agent);
        },
    );
}

#[test]
fn offers_are_checked_and_strangers_are_refused() {
    on_a_node("offers_are_checked_and_strangers_are_refused", |world| {
        let Mesh {
            controller,
            agent,
            proxy,
            config,
        } = mesh(&world);
        let network = Network::new(&world, "bridge", "1.0.0");
        for uid in ["web", "other"] {
            controller.pod(uid, true);
            network.add(&world.sandbox(uid), uid).unwrap();
        }
        // Sockets to dial with are of the pod's namespace and marked; those of the node cannot lie
        // about their source.
        let mark: u32 =
            serde_json::from_slice(&std::fs::read(config.state_dir.join("mark")).unwrap()).unwrap();
        for (uid, family) in [
            ("web", Family::V4),
            ("web", Family::V6),
            ("", Family::V4),
            ("", Family::V6),
        ] {
            let sockets = proxy.sockets(uid, family, 253);
            assert_eq!(sockets.len(), 253);
            let socket = socket2::SockRef::from(&sockets[0]);
            assert_eq!(socket.mark().unwrap(), mark);
            assert!(socket.nonblocking().unwrap());
            let foreign: SocketAddr = match family {
                Family::V6 => "[2001:db8::77]:0".parse().unwrap(),
                _ => "198.51.100.77:0".parse().unwrap(),
            };
            assert_eq!(
                socket.bind(&foreign.into()).is_ok(),
                !uid.is_empty(),
                "{uid:?} {family:?}"
            );
        }
        // A proxy that offers another pod's listeners is not believed.
        agent.kill();
        proxy.replace_listeners("web", "other");
        let agent = RunningAgent::start(&config, &controller);
        eventually("new listeners for the pod that was not given back", || {
            proxy.snapshots() == 2
                && proxy.adopted() == 2
                && controller.state_of("web") == Some(PodState::Ready)
        });
        agent.kill();
        // Processes of another user are not spoken to.
        let mut other_uid = config.clone();
        other_uid.proxy_uid = 65532;
        let _agent = RunningAgent::start(&other_uid, &controller);
        let stranger = Proxy::start(&config.broker_socket, "stranger");
        eventually("report of the new agent", || {
            controller.report().is_some_and(|report| !report.ready)
        });
        assert_eq!(stranger.snapshots(), 0);
    });
}

#[test]
fn add_fails_closed_and_nothing_else_does() {
    on_a_node("add_fails_closed_and_nothing_else_does", |world| {
        let config = world.config();
        let controller = FakeController::new();
        let network = Network::new(&world, "bridge", "1.1.0");
        let web = world.sandbox("web");
        controller.pod("web", true);
        // No agent.
        assert_eq!(network.add(&web, "web").unwrap_err().code, 11);
        network.call_alone("STATUS", json!({}), &web).unwrap();
        network
            .call_alone("GC", json!({"cni.dev/valid-attachments": []}), &web)
            .unwrap();
        // No proxy.
        let agent = RunningAgent::start(&config, &controller);
        let began = Instant::now();
        let error = network.add(&web, "web").unwrap_err();
        assert_eq!(error.code, 11);
        assert!(
            error.text.contains("no node proxy is connected"),
            "{}",
            error.text
        );
        assert!(began.elapsed() < Duration::from_secs(11));
        assert_eq!(phase(&config, "web"), None, "DEL was called");
        // A proxy that cannot serve.
        let proxy = Proxy::start(&config.broker_socket, "first");
        proxy.refuse(Some("no certificate"));
        let error = network.add(&web, "web").unwrap_err();
        assert!(error.text.contains("no certificate"), "{}", error.text);
        proxy.refuse(None);

        // The controller away: pods of namespaces that are known not to have opted in start. A pod that opted out
        // says nothing about its namespace.
        let (plain, later) = (world.sandbox("plain"), world.sandbox("later"));
        let opted_out = controller.pod("plain", false);
        network.add(&plain, "plain").unwrap();
        network.delete(&web, "web", None);
        agent.says(opted_out.clone());
        controller.go_away(true);
        assert_eq!(network.add(&web, "web").unwrap_err().code, 11, "opted in");
        controller.go_away(false);
        agent.says(NodePod {
            namespace_opted_in: false,
            ..opted_out
        });
        controller.go_away(true);
        agent.kill();
        let _agent = RunningAgent::start(&config, &controller);
        network.add(&later, "later").unwrap();
        assert_eq!(phase(&config, "later"), Some(Phase::Direct));
        let status = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(status_of(&config.cni_socket))
            .unwrap();
        assert_eq!(status["controllerConnected"], false);
        assert_eq!(status["pods"]["direct"], 2, "{status:#}");
        assert_eq!(status["unsettled"][0]["name"], "later", "{status:#}");
        assert_eq!(status["unsettled"][0]["registered"], false);
        // It joins when the controller is back and says so.
        controller.pod("later", true);
        controller.go_away(false);
        eventually("joined late", || {
            controller.state_of("later") == Some(PodState::Ready)
        });

        // The list of a runtime alone does not make a pod go, its namespace's end does.
        network
            .call_alone("GC", json!({"cni.dev/valid-attachments": []}), &web)
            .unwrap();
        assert_eq!(phase(&config, "plain"), Some(Phase::Direct));
        support::must("ip", &["netns", "del", &plain.name]);
        network
            .call_alone("GC", json!({"cni.dev/valid-attachments": []}), &web)
            .unwrap();
        assert_eq!(phase(&config, "plain"), None);
        assert_eq!(phase(&config, "later"), Some(Phase::Enrolled));
        // As a readiness probe.
        let file = world.directory.join("agent.yaml");
        let text = format!(
            "node: node-1\nnodeAddresses: [192.0.2.11]\ncniSocket: {}\n\
             controller: {{address: 'c:15012', trustBundle: /x, tokenFile: /x}}\n",
            config.cni_socket.display()
        );
        std::fs::write(&file, text).unwrap();
        let is_ready = || {
            let output = std::process::Command::new(env!("CARGO_BIN_EXE_warren-cni"))
                .args(["status", "--config"])
                .arg(&file)
                .output()
                .unwrap();
            output.status.success()
        };
        eventually("ready", is_ready);
        drop(proxy);
        eventually("not ready without a proxy", || !is_ready());
    });
}

#[test]
fn a_pod_whose_sandbox_is_made_anew_is_served_in_the_new_one() {
    on_a_node(
        "a_pod_whose_sandbox_is_made_anew_is_served_in_the_new_one",
        |world| {
            let Mesh {
                controller,
                agent: _agent,
                proxy,
                config,
            } = mesh(&world);
            let network = Network::new(&world, "bridge", "1.0.0");
            controller.pod("web", true);
            controller.pod("client", false);
            let (first, second, client) = (
                world.sandbox("web1"),
                world.sandbox("web2"),
                world.sandbox("client"),
            );
            network.add(&client, "client").unwrap();
            network.add(&first, "web").unwrap();
            let address = addresses(&network.add(&second, "web").unwrap())[0];
            // The first sandbox is deleted after the second was made.
            network.delete(&first, "web", None);
            assert_eq!(phase(&config, "web"), Some(Phase::Enrolled));
            serve(&second, 8080);
            let mut call = Call::open(&client, SocketAddr::new(address, 8080)).unwrap();
            assert!(call.works());
            assert_eq!(proxy.accepted().len(), 1);
            network.delete(&second, "web", None);
            assert_eq!(phase(&config, "web"), None);
            eventually("not served any more", || !proxy.serves("web"));
        },
    );
}

#[test]
fn uninstall_takes_every_pod_out_and_leaves_the_chain_as_it_was() {
    on_a_node(
        "uninstall_takes_every_pod_out_and_leaves_the_chain_as_it_was",
        |world| {
            let mut config = world.config();
            config.cni.install = true;
            std::fs::create_dir_all(&config.cni.conf_dir).unwrap();
            let mut network = Network::new(&world, "ptp", "0.3.1");
            let mut conf = network.list["plugins"][0].clone();
            conf["cniVersion"] = "0.3.1".into();
            conf["name"] = "wct".into();
            let (conf_file, list_file) = (
                config.cni.conf_dir.join("10-wct.conf"),
                config.cni.conf_dir.join("10-wct.conflist"),
            );
            std::fs::write(&conf_file, conf.to_string()).unwrap();
            let config_file = world.directory.join("agent.yaml");
            let yaml = json!({
                "node": config.node,
                "nodeAddresses": config.node_addresses,
                "controller": {"address": "127.0.0.1:1", "trustBundle": "/nonexistent", "tokenFile": "/nonexistent"},
                "brokerSocket": config.broker_socket,
                "cniSocket": config.cni_socket,
                "stateDir": config.state_dir,
                "cni": {"confDir": config.cni.conf_dir, "binDir": config.cni.bin_dir, "install": true},
                "proxyUid": 0,
            });
            std::fs::write(&config_file, yaml.to_string()).unwrap();
            let uninstall = |deadline: &str| {
                std::process::Command::new(env!("CARGO_BIN_EXE_warren-cni"))
                    .args(["uninstall", "--deadline", deadline, "--config"])
                    .arg(&config_file)
                    .status()
                    .unwrap()
                    .success()
            };

            let controller = FakeController::new();
            let agent = RunningAgent::start(&config, &controller);
            let proxy = Proxy::start(&config.broker_socket, "first");
            eventually("in the chain", || list_file.exists() && !conf_file.exists());
            let list: serde_json::Value =
                serde_json::from_slice(&std::fs::read(&list_file).unwrap()).unwrap();
            network.list = list;
            controller.pod("web", true);
            controller.pod("client", false);
            let (web, client) = (world.sandbox("web"), world.sandbox("client"));
            let untouched = web.exec("nft", &["list", "ruleset"]);
            let address = addresses(&network.add(&web, "web").unwrap())[0];
            network.add(&client, "client").unwrap();
            serve(&web, 8080);
            let to = SocketAddr::new(address, 8080);
            assert!(Call::open(&client, to).unwrap().works());
            assert_eq!(proxy.accepted().len(), 1);

            // Through the agent that runs.
            assert!(uninstall("20"));
            assert_eq!(
                std::fs::read_to_string(&conf_file).unwrap(),
                conf.to_string()
            );
            assert!(!list_file.exists() && !config.cni.bin_dir.join("warren-cni").exists());
            assert_eq!(phase(&config, "web"), Some(Phase::Direct));
            assert_eq!(web.exec("nft", &["list", "ruleset"]), untouched);
            assert!(Call::open(&client, to).unwrap().works());
            assert_eq!(proxy.accepted().len(), 1);

            // Without one, and with a connection that does not end: cut at the deadline.
            agent.kill();
            let agent = RunningAgent::start(&config, &controller);
            eventually("enrolled again", || {
                controller.state_of("web") == Some(PodState::Ready)
            });
            let mut captured = Call::open(&client, to).unwrap();
            assert!(captured.works());
            agent.kill();
            assert!(!uninstall("3"), "it says that connections were cut");
            assert!(!captured.works());
            assert!(!list_file.exists() && conf_file.exists());
            assert!(!web.traces().contains("warren") && !web.traces().contains("0x111"));
            assert!(!config.cni_socket.exists() && !config.state_dir.exists());
        },
    );
}

#[test]
fn a_node_is_not_ready_while_the_plugin_is_not_in_the_chain() {
    on_a_node(
        "a_node_is_not_ready_while_the_plugin_is_not_in_the_chain",
        |world| {
            let mut config = world.config();
            config.cni.install = true;
            let controller = FakeController::new();
            let _agent = RunningAgent::start(&config, &controller);
            let _proxy = Proxy::start(&config.broker_socket, "first");
            let says = |ready: bool, reason: &str| {
                let report = controller.report();
                report.is_some_and(|r| r.ready == ready && r.reason.starts_with(reason))
            };
            eventually("only the chain is missing", || {
                says(false, "no network configuration")
            });
            let list = json!({"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "ptp"}]});
            let file = config.cni.conf_dir.join("10-n.conflist");
            std::fs::write(&file, list.to_string()).unwrap();
            eventually("ready", || says(true, ""));
            std::fs::remove_file(&file).unwrap();
            eventually("not ready again", || {
                says(false, "no network configuration")
            });
        },
    );
}
