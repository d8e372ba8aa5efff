use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::{Value, json};

use super::*;
use crate::fake_api::{Answer, client, failure};

/// An API server that keeps one Lease, with versions.
fn leases() -> (Client, Arc<Mutex<Option<Value>>>) {
    let kept = Arc::new(Mutex::new(None::<Value>));
    let state = kept.clone();
    let (client, _) = client(move |asked| {
        let mut lease = state.lock();
        let version = lease
            .as_ref()
            .map(|l| l["metadata"]["resourceVersion"].clone());
        match (asked.method.as_str(), &*lease) {
            ("GET", None) => failure(404, "NotFound"),
            ("GET", Some(lease)) => Answer::Json(200, lease.clone()),
            ("POST", Some(_)) => failure(409, "AlreadyExists"),
            ("PUT", _) if version.as_ref() != asked.body.pointer("/metadata/resourceVersion") => {
                failure(409, "Conflict")
            }
            ("POST" | "PUT", _) => {
                let mut body = asked.body.clone();
                let next = version
                    .and_then(|v| v.as_str()?.parse::<u64>().ok())
                    .unwrap_or(0)
                    + 1;
                body["metadata"]["resourceVersion"] = json!(next.to_string());
                *lease = Some(body.clone());
                Answer::Json(200, body)
            }
            _ => failure(405, "MethodNotAllowed"),
        }
    });
    (client, kept)
}

fn candidate(client: &Client, replica: &str) -> Candidate {
    Candidate {
        leases: Api::namespaced(client.clone(), SYSTEM_NAMESPACE),
        replica: replica.into(),
        seen: None,
    }
}

#[tokio::test(start_paused = true)]
async fn one_leads_and_another_takes_over_when_it_is_silent() {
    let (client, kept) = leases();
    let (mut a, mut b) = (candidate(&client, "a"), candidate(&client, "b"));
    assert!(a.attempt().await.unwrap());
    assert!(!b.attempt().await.unwrap());
    // Renewals keep it, however long.
    for _ in 0..10 {
        tokio::time::advance(DURATION / 2).await;
        assert!(a.attempt().await.unwrap());
        assert!(!b.attempt().await.unwrap());
    }
    tokio::time::advance(DURATION - Duration::from_millis(1)).await;
    assert!(!b.attempt().await.unwrap());
    tokio::time::advance(Duration::from_millis(1)).await;
    assert!(b.attempt().await.unwrap());
    assert!(!a.attempt().await.unwrap());
    let lease = kept.lock().clone().unwrap();
    assert_eq!(lease["spec"]["leaseTransitions"], 1);

    b.resign().await.unwrap();
    assert!(
        a.attempt().await.unwrap(),
        "what was given back is free at once"
    );
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_cannot_renew_stops_before_another_starts() {
    let broken = Arc::new(Mutex::new(false));
    let switch = broken.clone();
    let kept = Arc::new(Mutex::new(None::<Value>));
    let (client, _) = client(move |asked| {
        if *switch.lock() {
            return failure(503, "ServiceUnavailable");
        }
        let mut body = asked.body.clone();
        match asked.method.as_str() {
            "GET" => kept.lock().clone().map_or_else(
                || failure(404, "NotFound"),
                |lease| Answer::Json(200, lease),
            ),
            _ => {
                body["metadata"]["resourceVersion"] = json!("1");
                *kept.lock() = Some(body.clone());
                Answer::Json(200, body)
            }
        }
    });
    let (leads, mut leading) = watch::channel(false);
    let (_stop, stopping) = watch::channel(false);
    let metrics = Metrics::default();
    let election = tokio::spawn(elect(client, "a".into(), metrics.clone(), leads, stopping));
    leading.wait_for(|leads| *leads).await.unwrap();
    *broken.lock() = true;
    let since = Instant::now();
    leading.wait_for(|leads| !*leads).await.unwrap();
    assert!(since.elapsed() < DURATION, "{:?}", since.elapsed());
    assert_eq!(metrics.leader.get(), 0);
    election.abort();
}
