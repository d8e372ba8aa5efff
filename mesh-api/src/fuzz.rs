//! What the fuzzer checks of this crate's parsers: properties, with seeds to start from. The seeds are also checked
//! in `cargo test`.

use std::cell::OnceCell;
use std::io::Read as _;
use std::os::fd::{AsFd, BorrowedFd};

use prost::Message;

use crate::identity::{Identity, NodeIdentity};
use crate::proto::broker::{Ack, ToAgent, ToProxy, to_proxy};
use crate::proto::{cni, discovery};
use crate::seqpacket::{Connection, Listener, MAX_BYTES};

/// Name, check, seeds.
pub type Target = (&'static str, fn(&[u8]), fn() -> Vec<Vec<u8>>);

/// All of this crate's.
pub const TARGETS: &[Target] = &[
    ("identity", identity, identity_seeds),
    ("packet", packet, packet_seeds),
];

/// An accepted identity is its text, made of what SPIFFE allows, and of one kind only.
fn identity(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let workload = text.parse::<Identity>();
    let node = text.parse::<NodeIdentity>();
    assert!(
        workload.is_err() || node.is_err(),
        "{text:?} is two identities"
    );
    if workload.is_ok() || node.is_ok() {
        assert!(is_spiffe_id(text), "{text:?}");
    }
    if let Ok(id) = workload {
        assert_eq!(id.as_str(), text);
        let again = Identity::new(id.trust_domain(), id.namespace(), id.service_account());
        assert_eq!(again.as_ref(), Ok(&id));
        let name = id.server_name();
        assert!(rustls_pki_types::ServerName::try_from(name.as_str()).is_ok());
    }
    if let Ok(id) = node {
        assert_eq!(id.to_string(), text);
    }
}

/// SPIFFE ID, sections 2.1 to 2.4.
fn is_spiffe_id(text: &str) -> bool {
    let lower = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-._".contains(c);
    let segment = |s: &str| {
        !matches!(s, "" | "." | "..")
            && s.chars()
                .all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
    };
    let parts = text
        .strip_prefix("spiffe://")
        .and_then(|rest| rest.split_once('/'));
    text.len() <= 2048
        && parts.is_some_and(|(domain, path)| {
            !domain.is_empty() && domain.chars().all(lower) && path.split('/').all(segment)
        })
}

fn identity_seeds() -> Vec<Vec<u8>> {
    [
        "spiffe://cluster.local/ns/demo/sa/web",
        "spiffe://td/warren/node/node-1/proxy",
        "spiffe://td/warren/node/n/agent",
        "spiffe://td/ns/../sa/b",
        "spiffe://td:1/ns/a/sa/b",
        "spiffe://u@td/ns/a/sa/b",
        "spiffe://td/ns/a%2f/sa/b",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}

/// A packet is one message and its descriptors, or an error; either way no descriptor stays open. What was
/// understood means the same when it is encoded anew.
fn packet(bytes: &[u8]) {
    let Some((head, payload)) = bytes.split_first() else {
        return;
    };
    let fds = usize::from(head >> 2);
    match head & 3 {
        0 => carried::<ToProxy>(payload, fds),
        1 => carried::<ToAgent>(payload, fds),
        2 => carried::<cni::Request>(payload, fds),
        _ => carried::<discovery::DeltaDiscoveryResponse>(payload, fds),
    }
}

fn carried<M: Message + Default + PartialEq + std::fmt::Debug>(payload: &[u8], fds: usize) {
    thread_local!(static WIRE: OnceCell<Wire> = const { OnceCell::new() });
    let decoded = M::decode(payload).ok();
    if let Some(message) = &decoded {
        let again = message.encode_to_vec();
        assert_eq!(M::decode(&again[..]).as_ref(), Ok(message));
    }
    if payload.is_empty() || payload.len() > MAX_BYTES {
        return;
    }
    WIRE.with(|wire| {
        let wire = wire.get_or_init(Wire::new);
        let (mut reader, writer) = std::io::pipe().expect("a pipe");
        let given: Vec<BorrowedFd<'_>> = (0..fds).map(|_| writer.as_fd()).collect();
        let received = wire.runtime.block_on(async {
            wire.client
                .send_bytes(payload, &given)
                .await
                .expect("room for one packet");
            wire.server.receive::<M>().await
        });
        drop(writer);
        match (received, decoded) {
            (Ok(Some((message, came))), Some(decoded)) => {
                assert!(message == decoded);
                assert_eq!(came.len(), fds);
            }
            (Err(error), None) => assert_eq!(error.kind(), std::io::ErrorKind::InvalidData),
            (received, _) => panic!("{:?}", received.map(|some| some.map(|(_, fds)| fds))),
        }
        // Ends only when no copy of the writing end is open.
        assert_eq!(reader.read(&mut [0]).expect("a pipe"), 0);
    });
}

/// A connection that all packets of a thread go through.
struct Wire {
    runtime: tokio::runtime::Runtime,
    client: Connection,
    server: Connection,
}

impl Wire {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let name = format!("warren-fuzz-{}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&directory).expect("a directory");
        let (client, server) = runtime.block_on(async {
            let path = directory.join("packet");
            let listener = Listener::bind(&path).expect("a listener");
            let client = Connection::connect(&path).expect("a connection");
            (client, listener.accept().await.expect("a connection"))
        });
        std::fs::remove_dir_all(&directory).expect("an own directory");
        Self {
            runtime,
            client,
            server,
        }
    }
}

fn packet_seeds() -> Vec<Vec<u8>> {
    let ack = ToProxy {
        id: 7,
        body: Some(to_proxy::Body::Ack(Ack {
            of: 3,
            error: "no".into(),
        })),
    };
    let response = discovery::DeltaDiscoveryResponse {
        type_url: "type.googleapis.com/x".into(),
        removed_resources: vec!["a/b".into()],
        ..Default::default()
    };
    vec![
        [&[0][..], &ack.encode_to_vec()].concat(),
        [&[3 << 2][..], &ack.encode_to_vec()].concat(),
        [&[3][..], &response.encode_to_vec()].concat(),
        vec![1, 8, 1],
        vec![2, 8, 1],
        vec![5 << 2, 0xff, 0xff],
    ]
}

#[test]
fn seeds_have_the_properties() {
    for (_, check, seeds) in TARGETS {
        seeds().iter().for_each(|seed| check(seed));
    }
}
