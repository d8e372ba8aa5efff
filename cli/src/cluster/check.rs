//! `warren check`: what stands in the way of the mesh, each thing by a name that does not change.
//!
//! [`facts`] asks the cluster once; the checks are functions of what it said, so that each can be tested with a planted
//! fault. `docs/reference/check.md` explains every one of them.

mod facts;
mod installed;
mod prerequisites;
#[cfg(test)]
mod tests;

use std::process::ExitCode;

use serde::Serialize;

use self::facts::Facts;
use super::connect;
use crate::args::{Check as Options, Output};
use crate::error::{Context, Result};

/// One thing to look at.
struct Check {
    /// Its name; the anchor of its explanation, too.
    id: &'static str,
    /// What is expected.
    expects: &'static str,
    /// What to do if it is not so.
    hint: &'static str,
    look: fn(&Facts) -> Finding,
}

/// What was seen.
#[derive(Clone, Debug, PartialEq)]
enum Finding {
    Ok,
    /// It works, but not as one may think.
    Warning(String),
    Failed(String),
    /// It cannot be told, and why.
    Unknown(String),
}

impl Finding {
    /// Failed if anything is named.
    fn failed_for(what: Vec<String>) -> Self {
        match what.is_empty() {
            true => Self::Ok,
            false => Self::Failed(list(&what)),
        }
    }

    /// A warning if anything is named.
    fn warning_for(what: Vec<String>) -> Self {
        match what.is_empty() {
            true => Self::Ok,
            false => Self::Warning(list(&what)),
        }
    }
}

/// Prints what was found. Exit codes: 0 nothing failed, 1 something did, 2 the cluster cannot be asked.
pub(crate) async fn run(options: Options) -> Result<ExitCode> {
    let facts = async { Facts::gather(&connect(&options.cluster).await?, options.pre).await };
    let facts = match facts.await {
        Ok(facts) => facts,
        Err(error) => {
            eprintln!("warren: {error}");
            return Ok(ExitCode::from(2));
        }
    };
    let results = results(&facts, options.pre);
    match options.output {
        Output::Json => {
            let json = serde_json::json!({"checks": results});
            println!(
                "{}",
                serde_json::to_string_pretty(&json).context("the result")?
            );
        }
        Output::Table => print!("{}", text(&results)),
    }
    let failed = results.iter().any(|result| result.result == "failed");
    Ok(ExitCode::from(u8::from(failed)))
}

/// All checks, or those that are worth asking before Warren is there.
fn checks(pre: bool) -> impl Iterator<Item = &'static Check> {
    let installed: &[Check] = if pre { &[] } else { installed::CHECKS };
    prerequisites::CHECKS.iter().chain(installed)
}

#[derive(Debug, Serialize)]
struct Outcome {
    id: &'static str,
    expects: &'static str,
    /// `ok`, `warning`, `failed` or `unknown`.
    result: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
    #[serde(skip_serializing_if = "str::is_empty")]
    hint: &'static str,
    docs: String,
}

fn results(facts: &Facts, pre: bool) -> Vec<Outcome> {
    checks(pre)
        .map(|check| {
            let (result, message) = match (check.look)(facts) {
                Finding::Ok => ("ok", String::new()),
                Finding::Warning(message) => ("warning", message),
                Finding::Failed(message) => ("failed", message),
                Finding::Unknown(message) => ("unknown", message),
            };
            Outcome {
                id: check.id,
                expects: check.expects,
                result,
                hint: if result == "ok" { "" } else { check.hint },
                message,
                docs: format!("docs/reference/check.md#{}", check.id),
            }
        })
        .collect()
}

fn text(results: &[Outcome]) -> String {
    let mut text = String::new();
    for outcome in results {
        let sign = match outcome.result {
            "ok" => "ok     ",
            "warning" => "WARNING",
            "failed" => "FAILED ",
            _ => "unknown",
        };
        text += &format!("{sign}  {}: {}\n", outcome.id, outcome.expects);
        if outcome.result != "ok" {
            for line in outcome.message.lines() {
                text += &format!("         {line}\n");
            }
            text += &format!("         -> {} ({})\n", outcome.hint, outcome.docs);
        }
    }
    let count = |result| {
        results
            .iter()
            .filter(|outcome| outcome.result == result)
            .count()
    };
    text += &format!(
        "{} ok, {} warnings, {} failed, {} unknown\n",
        count("ok"),
        count("warning"),
        count("failed"),
        count("unknown")
    );
    text
}

/// One a line, and not without end.
fn list(what: &[String]) -> String {
    let mut lines: Vec<String> = what.iter().take(MOST_NAMED).cloned().collect();
    if what.len() > MOST_NAMED {
        lines.push(format!("and {} more", what.len() - MOST_NAMED));
    }
    lines.join("\n")
}

const MOST_NAMED: usize = 20;
