//! The client against an agent made here, over a real socket.

use std::collections::HashSet;
use std::os::fd::OwnedFd;

use mesh_api::identity::Identity;
use mesh_api::proto::broker::{
    AddPod, Drain, Listener as Kind, Resume, SnapshotEnd, Sockets, ToProxy, Welcome, to_agent,
    to_proxy,
};
use mesh_api::seqpacket::Listener;

use super::*;
use crate::process::lifecycle::Phase;

mod harness;

use harness::*;

#[tokio::test]
async fn a_pod_is_acknowledged_when_table_and_certificate_are_there_and_ready_follows_the_last() {
    let proxy = Proxy::start();
    let (mut agent, hello) = proxy.agent().await;
    assert!(
        hello.held_pods.is_empty() && !hello.holds_host_listeners && !hello.instance.is_empty()
    );
    agent
        .send(to_proxy::Body::Welcome(Welcome::default()), &[])
        .await;
    let (first, second, host) = (
        Listeners::pod("one"),
        Listeners::pod("two"),
        Listeners::host(),
    );
    agent.send(host.as_host(), &host.sockets).await;
    let one = agent.send(first.as_pod(), &first.sockets).await;
    let two = agent.send(second.as_pod(), &second.sockets).await;
    let end = agent
        .send(to_proxy::Body::SnapshotEnd(SnapshotEnd {}), &[])
        .await;

    let mut pods = HashSet::from([one, two]);
    let mut complete = false;
    loop {
        let (message, _) = agent.receive().await;
        match message.body.unwrap() {
            to_agent::Body::Ack(ack) if ack.of == end => {
                assert_eq!(pods.len(), 2, "nothing is served without a table");
                assert!(!proxy.broker.state().borrow().ready);
                proxy.load_table();
                proxy.authority.permits.add_permits(1);
                complete = true;
            }
            to_agent::Body::Ack(ack) if pods.remove(&ack.of) => {
                assert!(complete && ack.error.is_empty(), "{ack:?}");
            }
            to_agent::Body::Ready(_) => {
                assert!(
                    pods.is_empty(),
                    "both share an identity, so one certificate serves both"
                );
                break;
            }
            _ => {}
        }
    }
    assert!(proxy.broker.state().borrow().ready);
    let pods = &proxy.broker.roster.parts.pods;
    assert!(pods.by_address([10, 0, 0, 1].into()).is_some());
    assert_eq!(
        **proxy.broker.roster.parts.host.addresses.load(),
        [std::net::IpAddr::from([10, 0, 0, 9])]
    );
}

#[tokio::test]
async fn nothing_is_accepted_before_the_certificates_of_all_pods_are_there() {
    let proxy = Proxy::start();
    proxy.load_table();
    proxy.authority.permits.add_permits(1);
    let (mut agent, _) = proxy.agent().await;
    agent
        .send(to_proxy::Body::Welcome(Welcome::default()), &[])
        .await;
    let (host, one, two) = (
        Listeners::host(),
        Listeners::pod("one"),
        Listeners::pod("two"),
    );
    agent.send(host.as_host(), &host.sockets).await;
    let one = agent.send(one.as_pod(), &one.sockets).await;
    let as_another = match two.as_pod() {
        to_proxy::Body::AddPod(mut add) => {
            add.pod.as_mut().unwrap().service_account = "another".into();
            to_proxy::Body::AddPod(add)
        }
        other => other,
    };
    let two = agent.send(as_another, &two.sockets).await;
    agent
        .send(to_proxy::Body::SnapshotEnd(SnapshotEnd {}), &[])
        .await;
    // One of the two identities has its certificate.
    let identities = Arc::clone(&proxy.broker.roster.parts.identities);
    let mut changed = identities.changed();
    let one_is_held = |_: &u64| {
        let held = |account| {
            let identity = Identity::new("cluster.local", "demo", account).unwrap();
            identities.get(&identity).is_some()
        };
        held("web") != held("another")
    };
    let held = tokio::time::timeout(PATIENCE, changed.wait_for(one_is_held)).await;
    held.unwrap().unwrap();
    agent.send(remove("other"), &[]).await;
    loop {
        let (message, _) = agent.receive().await;
        match message.body.unwrap() {
            to_agent::Body::Ack(ack) => assert!(ack.of != one && ack.of != two, "served too early"),
            to_agent::Body::PodDrained(_) => break,
            _ => {}
        }
    }
    proxy.authority.permits.add_permits(1);
    let mut acknowledged = HashSet::new();
    while acknowledged.len() < 2 {
        let (message, _) = agent.receive().await;
        if let Some(to_agent::Body::Ack(ack)) = message.body
            && (ack.of == one || ack.of == two)
        {
            assert_eq!(ack.error, "");
            acknowledged.insert(ack.of);
        }
    }
}

#[tokio::test]
async fn a_restarted_agent_is_offered_what_it_lacks_and_the_very_same_sockets() {
    let proxy = Proxy::able();
    let pod = Listeners::pod("one");
    let mut agent = proxy.agent_with(&[&pod]).await;
    agent.ready().await;
    drop(agent);

    let (mut agent, hello) = proxy.agent().await;
    assert_eq!(
        (hello.held_pods, hello.holds_host_listeners),
        (vec!["one".to_owned()], true)
    );
    let want = Welcome {
        want_pods: vec!["one".into()],
        want_host_listeners: true,
    };
    agent.send(to_proxy::Body::Welcome(want), &[]).await;
    let (offer, sockets) = agent.offer().await;
    assert_eq!(
        (offer.pod_uid.as_str(), &offer.listeners),
        ("one", &pod.kinds)
    );
    assert_eq!(ports(&sockets), ports(&pod.sockets));
    let (offer, sockets) = agent.offer().await;
    assert_eq!((offer.pod_uid.as_str(), sockets.len()), ("", 1));

    // It is served all along; the new agent needs no descriptor to hear so.
    let add = agent.send(without_listeners(pod.as_pod()), &[]).await;
    assert_eq!(agent.answer_to(add).await, "");
    agent
        .send(to_proxy::Body::SnapshotEnd(SnapshotEnd {}), &[])
        .await;
    agent.ready().await;
}

#[tokio::test]
async fn a_removed_pod_is_reported_as_drained_after_its_last_captured_connection() {
    let proxy = Proxy::able();
    let pod = Listeners::pod("one");
    let mut agent = proxy.agent_with(&[&pod]).await;
    agent.ready().await;
    let served = proxy.broker.roster.parts.pods.by_uid("one").unwrap();
    let connection = served.captured.enter();

    let removed = agent.send(remove("one"), &[]).await;
    assert_eq!(agent.answer_to(removed).await, "");
    assert!(proxy.broker.roster.parts.pods.by_uid("one").is_none());
    // A pod nobody knows is drained.
    agent.send(remove("other"), &[]).await;
    assert_eq!(agent.drained().await, "other");
    // The agent is replaced, the connection ends, and the next agent is told.
    drop(agent);
    let mut agent = proxy.agent_with(&[]).await;
    agent.ready().await;
    drop(connection);
    assert_eq!(agent.drained().await, "one");
}

#[tokio::test]
async fn a_pod_that_comes_back_keeps_its_account_and_is_not_reported() {
    let proxy = Proxy::able();
    let pod = Listeners::pod("one");
    let mut agent = proxy.agent_with(&[&pod]).await;
    agent.ready().await;
    let served = proxy.broker.roster.parts.pods.by_uid("one").unwrap();
    let connection = served.captured.enter();
    let removed = agent.send(remove("one"), &[]).await;
    assert_eq!(agent.answer_to(removed).await, "");
    assert!(*served.leaving.borrow(), "its connections are told");
    let again = Listeners::pod("one");
    let add = agent.send(again.as_pod(), &again.sockets).await;
    assert_eq!(agent.answer_to(add).await, "");
    assert!(!*served.leaving.borrow(), "new ones need not end");
    drop(connection);
    assert!(Arc::ptr_eq(
        &served,
        &proxy.broker.roster.parts.pods.by_uid("one").unwrap()
    ));
    agent.send(remove("other"), &[]).await;
    assert_eq!(agent.drained().await, "other", "and not `one`");
}

#[tokio::test]
async fn a_pod_is_found_by_addresses_that_are_told_of_after_it() {
    let proxy = Proxy::able();
    let pod = Listeners::pod("one");
    let mut agent = proxy.agent_with(&[]).await;
    let to_proxy::Body::AddPod(mut early) = pod.as_pod() else {
        unreachable!("as_pod makes no other")
    };
    early.pod.as_mut().unwrap().addresses.clear();
    let early = to_proxy::Body::AddPod(early);
    let add = agent.send(early, &pod.sockets).await;
    assert_eq!(agent.answer_to(add).await, "");
    let pods = &proxy.broker.roster.parts.pods;
    let address = "10.0.0.1".parse().unwrap();
    assert!(pods.by_address(address).is_none());
    let update = agent.send(without_listeners(pod.as_pod()), &[]).await;
    assert_eq!(agent.answer_to(update).await, "");
    assert!(pods.by_address(address).is_some());
    agent.send(remove("one"), &[]).await;
    assert_eq!(agent.drained().await, "one");
    assert!(pods.by_address(address).is_none());
}

#[tokio::test]
async fn pods_that_a_snapshot_does_not_name_leave() {
    let proxy = Proxy::able();
    let (one, two) = (Listeners::pod("one"), Listeners::pod("two"));
    let mut agent = proxy.agent_with(&[&one, &two]).await;
    agent.ready().await;
    drop(agent);
    let mut agent = proxy.agent_with(&[&one]).await;
    assert_eq!(agent.drained().await, "two");
    let pods = &proxy.broker.roster.parts.pods;
    assert!(pods.by_uid("one").is_some() && pods.by_uid("two").is_none());
}

#[tokio::test]
async fn drain_and_resume_hold_for_their_connection() {
    let proxy = Proxy::able();
    let mut agent = proxy.agent_with(&[]).await;
    agent.ready().await;
    let drain = agent.send(to_proxy::Body::Drain(Drain {}), &[]).await;
    assert_eq!(agent.answer_to(drain).await, "");
    assert_eq!(*proxy.accepts.lock(), [false]);
    let resume = agent.send(to_proxy::Body::Resume(Resume {}), &[]).await;
    assert_eq!(agent.answer_to(resume).await, "");
    assert_eq!(*proxy.accepts.lock(), [false, true]);

    agent.send(to_proxy::Body::Drain(Drain {}), &[]).await;
    proxy.phase(Phase::Drained).await;
    drop(agent);
    let mut agent = proxy.agent_with(&[]).await;
    agent.ready().await;
    assert_eq!(*proxy.accepts.lock(), [false, true, false, true]);

    // What an operator drained stays so, and is not said to be ready.
    proxy.broker.lifecycle.drain();
    drop(agent);
    let mut agent = proxy.agent_with(&[]).await;
    agent.send(remove("other"), &[]).await;
    assert_eq!(agent.drained().await, "other");
    assert_eq!(proxy.broker.lifecycle.phase(), Phase::Drained);
    proxy.broker.lifecycle.resume();
    agent.ready().await;
}

#[tokio::test]
async fn sockets_are_asked_for_and_go_to_the_stock_that_lacks_them() {
    let proxy = Proxy::able();
    let pod = Listeners::pod("one");
    let mut agent = proxy.agent_with(&[&pod]).await;
    let mut filled = HashSet::new();
    let mut refused = false;
    while filled.len() < 2 {
        let (message, _) = agent.receive().await;
        let Some(to_agent::Body::NeedSockets(need)) = message.body else {
            continue;
        };
        if need.pod_uid.is_empty() && !std::mem::replace(&mut refused, true) {
            // Asked for again before long.
            let answer = Sockets {
                of: message.id,
                error: "out of descriptors".into(),
            };
            agent.send(to_proxy::Body::Sockets(answer), &[]).await;
            continue;
        }
        let sockets: Vec<OwnedFd> = (0..need.count)
            .map(|_| std::fs::File::open("/dev/null").unwrap().into())
            .collect();
        let answer = Sockets {
            of: message.id,
            error: String::new(),
        };
        agent.send(to_proxy::Body::Sockets(answer), &sockets).await;
        filled.insert(need.pod_uid);
    }
    let stock = &proxy.broker.roster.parts.host.stock;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    assert!(stock.take(false, deadline).await.is_some());
    let pod = proxy.broker.roster.parts.pods.by_uid("one").unwrap();
    assert!(pod.stock.take(false, deadline).await.is_some());
}

#[tokio::test]
async fn faulty_messages_are_answered_with_the_fault_and_cost_nothing_else() {
    let proxy = Proxy::able();
    let good = Listeners::pod("one");
    let mut agent = proxy.agent_with(&[]).await;
    let faults: [(to_proxy::Body, Vec<OwnedFd>, &str); 5] = [
        (good.as_pod(), vec![], "3 listeners are named and 0 came"),
        (
            without_listeners(good.as_pod()),
            vec![],
            "LISTENER_OUTBOUND is missing",
        ),
        (
            good.as_pod(),
            (0..3)
                .map(|_| std::fs::File::open("/dev/null").unwrap().into())
                .collect(),
            "LISTENER_OUTBOUND is not a listening socket",
        ),
        (
            match Listeners::open("one", &[Kind::TunnelV4; 3]).as_pod() {
                to_proxy::Body::AddPod(add) => to_proxy::Body::AddPod(add),
                other => other,
            },
            Listeners::pod("one").sockets,
            "a listener of kind 4 does not belong here",
        ),
        (
            to_proxy::Body::AddPod(AddPod::default()),
            vec![],
            "AddPod without a pod",
        ),
    ];
    for (body, sockets, fault) in faults {
        let id = agent.send(body, &sockets).await;
        let answer = agent.answer_to(id).await;
        assert!(answer.contains(fault), "{answer}");
    }
    // From an agent that knows more than this proxy.
    agent
        .connection
        .send(&ToProxy { id: 7, body: None }, &[])
        .await
        .unwrap();
    assert!(agent.answer_to(7).await.contains("does not know"));
    agent.acknowledge(4711).await;
    let add = agent.send(good.as_pod(), &good.sockets).await;
    assert_eq!(agent.answer_to(add).await, "");
}

#[tokio::test]
async fn garbage_and_truncated_packets_end_the_connection_and_nothing_else() {
    use nix::sys::socket::{
        AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind, listen, send,
        socket,
    };
    use std::os::fd::AsRawFd;

    let mut proxy = Proxy::able();
    let pod = Listeners::pod("one");
    let mut agent = proxy.agent_with(&[&pod]).await;
    agent.ready().await;
    // The next agents speak without the library.
    proxy.agents = None;
    drop(agent);
    std::fs::remove_file(&proxy.socket).unwrap();
    let raw = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    bind(raw.as_raw_fd(), &UnixAddr::new(&proxy.socket).unwrap()).unwrap();
    listen(&raw, Backlog::new(8).unwrap()).unwrap();
    let garbage: Vec<u8> = vec![0xff; 100];
    let oversized: Vec<u8> = vec![0; mesh_api::seqpacket::MAX_BYTES + 1];
    let packets = [garbage, oversized, vec![0x0a, 0x7f]];
    let raw = tokio::task::spawn_blocking(move || {
        for packet in packets {
            // Blocks until the client has come back.
            let connection = accept(raw.as_raw_fd()).unwrap();
            send(connection, &packet, MsgFlags::MSG_NOSIGNAL).unwrap();
            // Its Hello, and then the end it puts to this.
            let mut buffer = [0u8; 4096];
            while nix::sys::socket::recv(connection, &mut buffer, MsgFlags::empty())
                .is_ok_and(|n| n > 0)
            {}
            nix::unistd::close(connection).unwrap();
        }
        raw
    });
    tokio::time::timeout(PATIENCE, raw).await.unwrap().unwrap();

    std::fs::remove_file(&proxy.socket).unwrap();
    proxy.agents = Some(Listener::bind(&proxy.socket).unwrap());
    let (_agent, hello) = proxy.agent().await;
    assert_eq!(hello.held_pods, ["one"]);
    assert!(
        proxy
            .broker
            .roster
            .parts
            .pods
            .by_address([10, 0, 0, 1].into())
            .is_some()
    );
}
