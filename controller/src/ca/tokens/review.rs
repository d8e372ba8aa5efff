//! Service-account tokens, judged by the API server.
//!
//! A node's token is projected into a pod of Warren's own: bound to that pod, and to the audience
//! `warren-controller`, so that no token which was made for something else opens anything here. The API
//! server says whose it is (TokenReview); which node its pod is bound to is looked up as well, by name and UID,
//! because that is where the authority over pods lies.

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::core::v1::Pod;
use kube::api::PostParams;
use kube::{Api, Client};
use mesh_api::identity::NodeRole;
use mesh_api::names::SYSTEM_NAMESPACE;

use super::{TokenError, Tokens};

/// Judges tokens by asking the API server.
#[derive(Clone)]
pub struct TokenReviews {
    client: Client,
}

impl std::fmt::Debug for TokenReviews {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenReviews")
    }
}

impl TokenReviews {
    /// Asks through this client.
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    /// Whose the token is.
    async fn user(&self, token: &str) -> Result<UserInfo, Judgement> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: token.into(),
                audiences: Some(vec![AUDIENCE.into()]),
            },
            ..TokenReview::default()
        };
        let reviews = Api::<TokenReview>::all(self.client.clone());
        let review = reviews.create(&PostParams::default(), &review).await?;
        let status = review.status.unwrap_or_default();
        if status.authenticated != Some(true) {
            let said = status.error.filter(|e| !e.is_empty());
            let said = said.unwrap_or_else(|| "it is not valid".into());
            return Err(Judgement::Bad(format!("the API server says: {said}")));
        }
        // An authenticator that knows nothing of audiences leaves them out (TokenReviewStatus).
        if !status.audiences.iter().flatten().any(|a| a == AUDIENCE) {
            return Err(Judgement::Bad(format!("its audience is not {AUDIENCE}")));
        }
        Ok(status.user.unwrap_or_default())
    }

    async fn judge(&self, node: &str, role: NodeRole, token: &str) -> Result<(), Judgement> {
        if token.is_empty() {
            return Err(Judgement::Bad("there is none".into()));
        }
        let user = self.user(token).await?;
        let name = user.username.as_deref().unwrap_or_default();
        let wanted = format!("system:serviceaccount:{SYSTEM_NAMESPACE}:{}", account(role));
        if name != wanted {
            return Err(Judgement::Bad(format!(
                "it is that of {name}, expected {wanted}"
            )));
        }
        let extra = |key: &str| {
            let values = user.extra.as_ref()?.get(&format!("{EXTRA}/{key}"))?;
            values.first().map(String::as_str)
        };
        let (Some(pod_name), Some(pod_uid)) = (extra("pod-name"), extra("pod-uid")) else {
            return Err(Judgement::Bad("it is not bound to a pod".into()));
        };
        // Kubernetes before 1.32 does not tell; the pod does in any case.
        if let Some(bound) = extra("node-name").filter(|bound| *bound != node) {
            return Err(Judgement::Bad(format!("it is bound to node {bound}")));
        }
        let pods = Api::<Pod>::namespaced(self.client.clone(), SYSTEM_NAMESPACE);
        let pod = pods.get_opt(pod_name).await?;
        let pod = pod.filter(|p| p.metadata.uid.as_deref() == Some(pod_uid));
        let Some(pod) = pod else {
            let why = format!("its pod {pod_name} with UID {pod_uid} is gone");
            return Err(Judgement::Bad(why));
        };
        let spec = pod.spec.unwrap_or_default();
        let at = spec.node_name.as_deref().unwrap_or_default();
        if at != node {
            return Err(Judgement::Bad(format!(
                "its pod {pod_name} is bound to node {at:?}"
            )));
        }
        // The user says so by the token; the pod must say the same.
        if spec.service_account_name.as_deref() != Some(account(role)) {
            return Err(Judgement::Bad(format!(
                "its pod {pod_name} does not run as {}",
                account(role)
            )));
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl Tokens for TokenReviews {
    async fn check(&self, node: &str, role: NodeRole, token: &str) -> Result<(), TokenError> {
        self.judge(node, role, token)
            .await
            .map_err(|judgement| match judgement {
                Judgement::Unknown(error) => TokenError::Unavailable(error.to_string()),
                Judgement::Bad(reason) => TokenError::Refused {
                    node: node.into(),
                    role,
                    reason,
                },
            })
    }
}

enum Judgement {
    Bad(String),
    Unknown(kube::Error),
}

impl From<kube::Error> for Judgement {
    fn from(error: kube::Error) -> Self {
        Judgement::Unknown(error)
    }
}

/// The service account of Warren's own pods.
fn account(role: NodeRole) -> &'static str {
    match role {
        NodeRole::Agent => "warren-cni",
        NodeRole::Proxy => "warren-node-proxy",
    }
}

const AUDIENCE: &str = "warren-controller";
const EXTRA: &str = "authentication.kubernetes.io";

#[cfg(test)]
mod tests;
