//! Errors as the CNI specification writes them ("Section 5: Result Types", "Error").

use std::fmt;

/// Why an invocation failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}: {details}")]
pub struct CniError {
    code: u32,
    message: String,
    details: String,
}

/// Well-known error codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Code {
    /// The runtime speaks a version that the plugin or the verb does not.
    Version = 1,
    /// A necessary environment variable is missing or malformed.
    Environment = 4,
    /// Reading failed.
    Io = 5,
    /// The network configuration is not what was expected, as JSON.
    Decode = 6,
    /// The network configuration cannot be used.
    NetworkConfig = 7,
    /// The runtime should try again later.
    TryAgain = 11,
    /// STATUS: ADD cannot be served.
    NotAvailable = 50,
    /// Warren's own: CHECK found no capture rules, or other ones.
    RulesMissing = 999,
}

impl CniError {
    /// `message` says what failed, `details` why and what to do.
    pub fn new(code: Code, message: impl Into<String>, details: impl fmt::Display) -> Self {
        Self::from_agent(code as u32, message.into(), details.to_string())
    }

    /// The agent's answer.
    pub(crate) fn from_agent(code: u32, message: String, details: String) -> Self {
        Self {
            code,
            message,
            details,
        }
    }

    /// The number of the error.
    pub fn code(&self) -> u32 {
        self.code
    }

    /// Number, message and details.
    pub(crate) fn into_parts(self) -> (u32, String, String) {
        (self.code, self.message, self.details)
    }

    pub(crate) fn with_code(self, code: Code) -> Self {
        Self {
            code: code as u32,
            ..self
        }
    }

    /// What goes to standard output.
    pub fn to_json(&self, version: &str) -> String {
        serde_json::json!({
            "cniVersion": version,
            "code": self.code,
            "msg": self.message,
            "details": self.details,
        })
        .to_string()
    }
}
