//! What a node shows to get its first certificate, and every one after it.
//!
//! In Kubernetes that is a projected service-account token ([`TokenReviews`]), in the lab a bootstrap token
//! from a file of lines `<node> <proxy|agent> <token>`, `#` starts a comment ([`TokenFile`]).

mod review;

use std::fmt;
use std::path::PathBuf;

use mesh_api::identity::NodeRole;
use sha2::{Digest, Sha256};

pub use review::TokenReviews;

/// Judges tokens.
#[tonic::async_trait]
pub trait Tokens: fmt::Debug + Send + Sync {
    /// Whether a token is good for a node and a role now.
    async fn check(&self, node: &str, role: NodeRole, token: &str) -> Result<(), TokenError>;
}

/// Why a token is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It cannot be judged now.
    #[error("tokens cannot be judged: {0}")]
    Unavailable(String),
    /// It is good for something else, or for nothing.
    #[error("the token is not good for node {node} and role {role}: {reason}")]
    Refused {
        /// The node that was claimed.
        node: String,
        /// The role that was claimed.
        role: NodeRole,
        /// What is wrong with it.
        reason: String,
    },
}

/// A file of bootstrap tokens, read at every use.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
}

impl TokenFile {
    /// The file need not be there yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }
}

#[tonic::async_trait]
impl Tokens for TokenFile {
    async fn check(&self, node: &str, role: NodeRole, token: &str) -> Result<(), TokenError> {
        let text = tokio::fs::read_to_string(&self.path)
            .await
            .map_err(|e| TokenError::Unavailable(format!("{}: {e}", self.path.display())))?;
        if accepts(&text, node, role, token) {
            return Ok(());
        }
        Err(TokenError::Refused {
            node: node.into(),
            role,
            reason: "no line of the file says so".into(),
        })
    }
}

/// Looks at every line, and compares digests without stopping at a difference, so that the time taken says
/// nothing about a token.
fn accepts(text: &str, node: &str, role: NodeRole, token: &str) -> bool {
    let given = Sha256::digest(token);
    let role = role.to_string();
    let mut accepted = false;
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default();
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields[..] {
            [] => {}
            [n, r, t] => {
                let known = Sha256::digest(t);
                let difference = given.iter().zip(known).fold(0, |d, (a, b)| d | (a ^ b));
                accepted |= difference == 0 && n == node && r == role;
            }
            _ => tracing::warn!(
                line = number + 1,
                "tokens: expected <node> <proxy|agent> <token>"
            ),
        }
    }
    accepted && !token.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_its_node_and_role_only() {
        let text = "# lab\nnode-1 proxy s3cret\nnode-1 agent other # x\n\nbroken line\n";
        assert!(accepts(text, "node-1", NodeRole::Proxy, "s3cret"));
        assert!(accepts(text, "node-1", NodeRole::Agent, "other"));
        assert!(!accepts(text, "node-1", NodeRole::Agent, "s3cret"));
        assert!(!accepts(text, "node-2", NodeRole::Proxy, "s3cret"));
        assert!(!accepts(text, "node-1", NodeRole::Proxy, "s3cre"));
        assert!(!accepts(text, "node-1", NodeRole::Proxy, ""));
        assert!(!accepts("", "node-1", NodeRole::Proxy, ""));
    }
}
