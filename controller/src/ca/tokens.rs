//! Bootstrap tokens of the lab: a file of lines `<node> <proxy|agent> <token>`, `#` starts a comment.
//!
//! In Kubernetes a projected service-account token takes its place.

use std::path::Path;

use mesh_api::identity::NodeRole;
use sha2::{Digest, Sha256};

/// Why a token is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read.
    #[error("tokens {path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// No line says so.
    #[error("the token is not good for node {node} and role {role}")]
    Refused {
        /// The node that was claimed.
        node: String,
        /// The role that was claimed.
        role: NodeRole,
    },
}

/// Checks a token against the file as it is now.
pub async fn check(path: &Path, node: &str, role: NodeRole, token: &str) -> Result<(), TokenError> {
    let text = tokio::fs::read_to_string(path)
        .await
        .map_err(|source| TokenError::Io {
            path: path.display().to_string(),
            source,
        })?;
    if accepts(&text, node, role, token) {
        return Ok(());
    }
    Err(TokenError::Refused {
        node: node.into(),
        role,
    })
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
