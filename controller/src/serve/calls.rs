//! The unary calls: certificates and enrolment.

use std::sync::Arc;

use mesh_api::identity::{Identity, NodeIdentity, NodeRole};
use mesh_api::names::address_from_bytes;
use mesh_api::proto::control::certificates_server::Certificates;
use mesh_api::proto::control::enrolment_server::Enrolment;
use mesh_api::proto::control::{
    IssueNodeRequest, IssueResponse, IssueWorkloadRequest, NodeReport, NodeReportResponse,
    RegisterPodRequest, RegisterPodResponse, Role,
};
use tonic::{Request, Response, Status};

use super::peer::node_of;
use crate::ca::tokens::{TokenError, Tokens};
use crate::ca::{Authority, CaError, Issued};
use crate::enrolment::RegisterError;
use crate::hub::Hub;
use crate::metrics::{Kind, Refusal};
use crate::providers::is_dns_name;

/// Signs what the caller has a right to.
pub(super) struct CertificatesService {
    pub(super) hub: Arc<Hub>,
    pub(super) authority: Arc<Authority>,
    pub(super) tokens: Arc<dyn Tokens>,
}

#[tonic::async_trait]
impl Certificates for CertificatesService {
    async fn issue_node(
        &self,
        request: Request<IssueNodeRequest>,
    ) -> Result<Response<IssueResponse>, Status> {
        let request = request.into_inner();
        let role = match request.role() {
            Role::Proxy => NodeRole::Proxy,
            Role::Agent => NodeRole::Agent,
            Role::Unspecified => {
                return Err(self.refuse(
                    "node",
                    "role",
                    Status::invalid_argument("role is not set"),
                ));
            }
        };
        let identity = NodeIdentity {
            domain: self.authority.trust_domain().into(),
            node: request.node,
            role,
        };
        // The name becomes part of a certificate: it must read back as what was checked.
        if !is_dns_name(&identity.node) {
            let why = Status::invalid_argument("node is not the name of a node");
            return Err(self.refuse("node", "name", why));
        }
        let checked = self.tokens.check(&identity.node, role, &request.token);
        if let Err(error) = checked.await {
            tracing::warn!("certificate of a node refused: {error}");
            let status = match &error {
                TokenError::Refused { .. } => Status::unauthenticated(error.to_string()),
                TokenError::Unavailable(_) => Status::unavailable("tokens cannot be judged now"),
            };
            return Err(self.refuse("node", "token", status));
        }
        self.answer("node", self.authority.issue_node(&identity, &request.csr))
    }

    async fn issue_workload(
        &self,
        request: Request<IssueWorkloadRequest>,
    ) -> Result<Response<IssueResponse>, Status> {
        let node = node_of(&request, Some(NodeRole::Proxy))
            .map_err(|status| self.refuse("workload", "caller", status))?;
        let request = request.into_inner();
        let identity: Identity = request
            .identity
            .parse()
            .map_err(|e| format!("{e}"))
            .map_err(|e| self.refuse("workload", "identity", Status::invalid_argument(e)))?;
        if !self.hub.identity_on_node(&identity, &node.node) {
            tracing::warn!(node = node.node, %identity, "certificate refused: no such pod on the node");
            let why = format!(
                "no pod bound to node {} has the identity {identity} now",
                node.node
            );
            return Err(self.refuse("workload", "not-on-node", Status::permission_denied(why)));
        }
        self.answer(
            "workload",
            self.authority.issue_workload(&identity, &request.csr),
        )
    }
}

impl CertificatesService {
    fn answer(
        &self,
        kind: &'static str,
        issued: Result<Issued, CaError>,
    ) -> Result<Response<IssueResponse>, Status> {
        match issued {
            Ok(issued) => {
                self.hub
                    .metrics()
                    .issued
                    .get_or_create_owned(&Kind { kind })
                    .inc();
                Ok(Response::new(IssueResponse {
                    chain: issued.chain,
                    trust_bundle: issued.trust_bundle,
                }))
            }
            Err(CaError::Csr(e)) => {
                Err(self.refuse(kind, "request", Status::invalid_argument(e.to_string())))
            }
            Err(e) => {
                tracing::error!("{e}");
                Err(self.refuse(kind, "authority", Status::unavailable(e.to_string())))
            }
        }
    }

    fn refuse(&self, kind: &'static str, reason: &'static str, status: Status) -> Status {
        let refusal = Refusal { kind, reason };
        self.hub
            .metrics()
            .refused
            .get_or_create_owned(&refusal)
            .inc();
        status
    }
}

/// Takes what agents say of their pods.
pub(super) struct EnrolmentService {
    pub(super) hub: Arc<Hub>,
}

#[tonic::async_trait]
impl Enrolment for EnrolmentService {
    async fn register_pod(
        &self,
        request: Request<RegisterPodRequest>,
    ) -> Result<Response<RegisterPodResponse>, Status> {
        let node = node_of(&request, Some(NodeRole::Agent))?;
        let request = request.into_inner();
        let bad = request
            .addresses
            .iter()
            .any(|a| address_from_bytes(a).is_none());
        if bad || request.addresses.len() > MAX_ADDRESSES {
            return Err(Status::invalid_argument(format!(
                "addresses: expected at most {MAX_ADDRESSES}, of 4 or 16 bytes each"
            )));
        }
        let pod = self
            .hub
            .register(&node.node, &request)
            .await
            .map_err(|e| match e {
                RegisterError::NotFound { .. } => Status::not_found(e.to_string()),
                RegisterError::AddressTaken { .. } => Status::failed_precondition(e.to_string()),
                RegisterError::NotRecorded => Status::unavailable(e.to_string()),
            })?;
        Ok(Response::new(RegisterPodResponse { pod: Some(pod) }))
    }

    async fn report(
        &self,
        request: Request<NodeReport>,
    ) -> Result<Response<NodeReportResponse>, Status> {
        let node = node_of(&request, Some(NodeRole::Agent))?;
        self.hub.report(&node.node, request.get_ref()).await;
        Ok(Response::new(NodeReportResponse {}))
    }
}

/// A pod has one or two; more interfaces may give it more.
const MAX_ADDRESSES: usize = 16;
