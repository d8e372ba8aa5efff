//! Where certificates come from.

use std::time::Duration;

use futures::future::BoxFuture;
use mesh_api::client::Controller;
use mesh_api::identity::Identity;
use mesh_api::proto::control::IssueWorkloadRequest;
use mesh_api::proto::control::certificates_client::CertificatesClient;
use tonic::Code;

/// Signs certificates for the workloads of this node.
pub trait Issuer: Send + Sync {
    /// Waits until it can be asked.
    fn reachable(&self) -> BoxFuture<'_, ()>;

    /// The chain (DER, leaf first) for a signing request.
    fn issue(
        &self,
        identity: &Identity,
        csr: Vec<u8>,
    ) -> BoxFuture<'_, Result<Vec<Vec<u8>>, IssueError>>;
}

/// Why there is no certificate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IssueError {
    /// It could not be asked.
    #[error("the controller could not be asked: {0}")]
    Unreachable(String),
    /// It said no.
    #[error("the controller refused: {0}")]
    Refused(String),
}

impl IssueError {
    /// Value of the metric label `result`.
    pub const fn name(&self) -> &'static str {
        match self {
            IssueError::Unreachable(_) => "unreachable",
            IssueError::Refused(_) => "refused",
        }
    }
}

/// The mesh's controller.
pub struct ControllerIssuer(pub Controller);

impl Issuer for ControllerIssuer {
    fn reachable(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.0.channel().await;
        })
    }

    fn issue(
        &self,
        identity: &Identity,
        csr: Vec<u8>,
    ) -> BoxFuture<'_, Result<Vec<Vec<u8>>, IssueError>> {
        let request = IssueWorkloadRequest {
            identity: identity.to_string(),
            csr,
        };
        Box::pin(async move {
            let call = async {
                let mut client = CertificatesClient::new(self.0.channel().await);
                client.issue_workload(request).await
            };
            match tokio::time::timeout(TIMEOUT, call).await {
                Ok(Ok(response)) => Ok(response.into_inner().chain),
                Ok(Err(status)) => {
                    let text = format!("{}: {}", status.code(), status.message());
                    Err(match status.code() {
                        Code::Unavailable | Code::Cancelled | Code::Unknown => {
                            IssueError::Unreachable(text)
                        }
                        _ => IssueError::Refused(text),
                    })
                }
                Err(_) => Err(IssueError::Unreachable("no answer in time".into())),
            }
        })
    }
}

const TIMEOUT: Duration = Duration::from_secs(10);
