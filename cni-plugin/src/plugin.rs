//! The CNI verbs, versions 0.3.1 to 1.1.0 of the specification.
//!
//! The plugin is chained after whatever made the pod's interface. It changes nothing itself: at ADD
//! it hands the pod's network namespace to the agent and passes the previous result on when the
//! agent says that the pod may start.
//!
//! Only ADD fails closed. DEL and GC always succeed (the agent collects what is left over), STATUS
//! fails when the plugin's own configuration is broken, CHECK when capture rules are missing. Pods of
//! excluded namespaces, and namespaces that are no pods, pass without the agent.

use std::io::{Read, Write};
use std::process::ExitCode;

use serde_json::value::RawValue;

mod call;
mod config;
mod error;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod result;
#[cfg(test)]
mod tests;

use config::{Environment, NetworkConfig, PodArgs};
pub use error::{CniError, Code};

/// Versions of the specification that the plugin speaks, oldest first.
pub const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// Reads environment and standard input, writes the result or error to standard output.
pub fn main() -> ExitCode {
    let mut input = Vec::new();
    let read = std::io::stdin().lock().read_to_end(&mut input);
    let environment = Environment::from_process();
    let outcome = match read {
        Ok(_) => run(&environment, &input),
        Err(e) => Err(CniError::new(Code::Io, "standard input cannot be read", e)),
    };
    let (text, code) = match outcome {
        Ok(text) => (text, ExitCode::SUCCESS),
        Err(error) => (
            error.to_json(&config::version_of(&input)),
            ExitCode::FAILURE,
        ),
    };
    // A runtime that no longer reads cannot be told anything.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    code
}

/// One invocation: what goes to standard output.
pub fn run(environment: &Environment, input: &[u8]) -> Result<String, CniError> {
    match environment.command.as_str() {
        "VERSION" => Ok(version(input)),
        "ADD" => add(environment, input),
        "DEL" => {
            if let Err(error) = del(environment, input) {
                eprintln!("warren-cni: DEL: {error}; the agent will collect what is left");
            }
            Ok(String::new())
        }
        "CHECK" => check(environment, input),
        "GC" => gc(input),
        "STATUS" => status(input),
        other => Err(CniError::new(
            Code::Environment,
            format!("CNI_COMMAND is {other:?}"),
            "expected ADD, DEL, CHECK, GC, STATUS or VERSION",
        )),
    }
}

fn version(input: &[u8]) -> String {
    serde_json::json!({
        "cniVersion": config::version_of(input),
        "supportedVersions": VERSIONS,
    })
    .to_string()
}

fn add(environment: &Environment, input: &[u8]) -> Result<String, CniError> {
    let config = NetworkConfig::parse(input)?;
    let previous = previous_result(&config)?;
    let attachment = environment.attachment()?;
    match environment.pod(&config)? {
        Some(pod) => call::add(&config, &attachment, &pod, result::addresses(previous)?)?,
        None => log(&config, "not a pod that Warren asks about; passed on"),
    }
    result::in_version(previous, &config.version)
}

fn del(environment: &Environment, input: &[u8]) -> Result<(), CniError> {
    let config = NetworkConfig::parse(input)?;
    let container = environment.container()?;
    // A DEL may come without the arguments of the ADD: the container's id is enough.
    let uid = PodArgs::parse(&environment.args).map_or(String::new(), |pod| pod.uid);
    call::del(&config, container, uid)
}

fn check(environment: &Environment, input: &[u8]) -> Result<String, CniError> {
    let config = NetworkConfig::parse(input)?;
    config.requires("CHECK", "0.4.0")?;
    previous_result(&config)?;
    let attachment = environment.attachment()?;
    if let Some(pod) = environment.pod(&config)? {
        call::check(&config, &attachment, &pod)?;
    }
    Ok(String::new())
}

fn gc(input: &[u8]) -> Result<String, CniError> {
    let config = NetworkConfig::parse(input)?;
    config.requires("GC", "1.1.0")?;
    if let Err(error) = call::gc(&config) {
        eprintln!("warren-cni: GC: {error}; the agent collects leftovers itself");
    }
    Ok(String::new())
}

fn status(input: &[u8]) -> Result<String, CniError> {
    let config = NetworkConfig::parse(input).map_err(|error| match error.code() {
        // A version that is not spoken is that, whatever the verb.
        version if version == Code::Version as u32 => error,
        _ => error.with_code(Code::NotAvailable),
    })?;
    config.requires("STATUS", "1.1.0")?;
    Ok(String::new())
}

fn previous_result(config: &NetworkConfig) -> Result<&RawValue, CniError> {
    config.previous.as_deref().ok_or_else(|| {
        CniError::new(
            Code::NetworkConfig,
            "no prevResult in the network configuration",
            "warren-cni makes no interface: chain it after the plugin that does",
        )
    })
}

fn log(config: &NetworkConfig, message: &str) {
    if config.verbose {
        eprintln!("warren-cni: {message}");
    }
}
