//! A real controller on a real API server: etcd and kube-apiserver, no nodes. What kubelets do is written by
//! the tests.
//!
//! The programs are looked for in `$WARREN_KUBE_CACHE/bin` (`~/.cache/warren-kube/bin`), where `tests/kube/build`
//! puts them, and in the path. Without `WARREN_TEST_KUBE` the tests pass, saying loudly that they did nothing.
//! Run with `--test-threads=1`: each test has servers of its own.

#![allow(clippy::unwrap_used)]

mod admission;
mod apiserver;
#[allow(dead_code)]
#[path = "../server/common.rs"]
mod common;
mod enrolment;
mod identity;
mod provider;
mod status;
mod world;

/// The servers, or the end of the test.
macro_rules! servers {
    () => {
        match crate::apiserver::ApiServer::start().await {
            Some(server) => server,
            None => return,
        }
    };
}
pub(crate) use servers;
