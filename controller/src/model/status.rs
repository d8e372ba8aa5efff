//! What Warren says of routes and policies: the conditions that their status carries, as data.
//!
//! One entry for each Service (or target) that an object names; types and reasons are those of the Gateway
//! API (GEP-1294, GEP-1364, GEP-713).

use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Serialize;

use crate::providers::ObjectKey;
use crate::providers::gateway::ParentReference;

/// What there is to say of one object.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ObjectStatus {
    /// Kind, such as `HTTPRoute`.
    pub kind: &'static str,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// `metadata.generation` of what was judged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// One for each parent or target, in the order of the object.
    pub parents: Vec<ParentStatus>,
}

/// What there is to say of an object's attachment to one parent.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ParentStatus {
    /// The reference as the object has it.
    pub parent_ref: ParentReference,
    /// By type.
    pub conditions: Vec<Condition>,
}

/// One condition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Condition {
    /// `Accepted`, `ResolvedRefs`, `PartiallyInvalid` or `Conflicted`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// `True` or `False`.
    pub status: &'static str,
    /// One word.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

/// What in an object could not be used, for the log and its owner.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Warning {
    /// Which object.
    pub object: ObjectKey,
    /// What was expected.
    pub message: String,
}

impl Warning {
    pub(super) fn new(kind: &str, namespace: &str, name: &str, message: String) -> Self {
        let object = ObjectKey {
            kind: kind.into(),
            namespace: namespace.into(),
            name: name.into(),
        };
        Self { object, message }
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.message)
    }
}

impl ObjectStatus {
    pub(super) fn new(kind: &'static str, metadata: &ObjectMeta) -> Self {
        Self {
            kind,
            namespace: metadata.namespace.clone().unwrap_or_default(),
            name: metadata.name.clone().unwrap_or_default(),
            observed_generation: metadata.generation,
            parents: Vec::new(),
        }
    }

    /// Which object.
    pub fn object(&self) -> ObjectKey {
        ObjectKey {
            kind: self.kind.into(),
            namespace: self.namespace.clone(),
            name: self.name.clone(),
        }
    }

    /// `Kind namespace/name`
    pub fn key(&self) -> String {
        self.object().to_string()
    }

    /// Whether there is nothing to complain of.
    pub fn is_good(&self) -> bool {
        let mut all = self.parents.iter().flat_map(|p| &p.conditions);
        all.all(Condition::is_good)
    }
}

impl Condition {
    pub(super) fn new(kind: &'static str, status: bool, reason: &'static str) -> Self {
        Self {
            kind,
            status: if status { "True" } else { "False" },
            reason,
            message: String::new(),
        }
    }

    pub(super) fn saying(mut self, message: impl Into<String>) -> Self {
        self.message = message.into();
        self
    }

    pub(crate) fn is_good(&self) -> bool {
        let positive = matches!(self.kind, "Accepted" | "ResolvedRefs");
        (self.status == "True") == positive
    }
}
