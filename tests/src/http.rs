//! HTTP from inside pods: what the servers and clients of the tests say, and how they are asked.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cgroup::CpuGroup;
use crate::lab::{Lab, PodRef};
use crate::process::Background;
use crate::scenario::{Scenario, binary};

/// Port of `mesh-http`: HTTP/1 and HTTP/2.
pub const HTTP: u16 = 8080;
/// Port of `mesh-http` that answers the bytes of a request as they came.
pub const RAW: u16 = 8081;
/// Port of `mesh-http` that counts and is told what to do.
pub const ADMIN: u16 = 8082;

/// What became of the requests of a `mesh-requests`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RequestReport {
    /// Requests sent.
    pub started: u64,
    /// Answered with 2xx, the body read to its end.
    pub ok: u64,
    /// Connections opened.
    pub connects: u64,
    /// Answers by status.
    pub statuses: BTreeMap<u16, u64>,
    /// Answers by the server that gave them (`x-server`).
    pub servers: BTreeMap<String, u64>,
    /// Answers that are no success by `warren-proxy-error`.
    pub causes: BTreeMap<String, u64>,
    /// Requests without an answer by the step they failed at.
    pub failed: BTreeMap<String, u64>,
    /// The first of those.
    pub failures: Vec<String>,
    /// For each second since the start, how many ended how: `server status`, or `failed step`.
    pub timeline: Vec<BTreeMap<String, u64>>,
    /// Median from the request to the end of the answer.
    pub p50_ms: f64,
    /// 99th percentile of the same.
    pub p99_ms: f64,
    /// The longest.
    pub slowest_ms: f64,
    /// Open loop: the generator's own delay against its schedule.
    pub lag_ms: f64,
    /// How long it ran.
    pub seconds: f64,
}

impl RequestReport {
    /// Share of the answers with that status, among all requests.
    pub fn status_share(&self, status: u16) -> f64 {
        self.statuses.get(&status).copied().unwrap_or_default() as f64 / self.started.max(1) as f64
    }

    /// Share of the answers that came from that server, among all requests.
    pub fn server_share(&self, server: &str) -> f64 {
        self.servers.get(server).copied().unwrap_or_default() as f64 / self.started.max(1) as f64
    }

    /// Share of the requests that were not answered with 2xx.
    pub fn failed_share(&self) -> f64 {
        (self.started - self.ok) as f64 / self.started.max(1) as f64
    }

    /// Panics unless every request was answered with 2xx.
    #[track_caller]
    pub fn expect_no_failure(&self, what: &str) {
        assert!(self.started > 0, "{what}: no request was sent");
        assert_eq!(self.started, self.ok, "{what}: {self:#?}");
    }
}

/// A `mesh-requests` to its end.
#[track_caller]
pub fn requests(lab: &Lab, pod: PodRef<'_>, args: &[&str]) -> RequestReport {
    let program = binary("mesh-requests").display().to_string();
    let command = [&[program.as_str()], args].concat();
    let done = lab
        .exec_within(pod, &command, Duration::from_secs(120))
        .expect_ok();
    report(&done.stdout)
}

/// [`requests`] with the processor time of the group.
#[track_caller]
pub fn requests_within(
    lab: &Lab,
    pod: PodRef<'_>,
    group: &CpuGroup,
    args: &[&str],
) -> RequestReport {
    let program = binary("mesh-requests").display().to_string();
    let command = group.around(&[&[program.as_str()], args].concat());
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let done = lab
        .exec_within(pod, &command, Duration::from_secs(120))
        .expect_ok();
    report(&done.stdout)
}

/// A `mesh-requests` that runs until it is told to stop.
#[derive(Debug)]
pub struct Requests {
    process: Background,
    stop: std::path::PathBuf,
}

impl Requests {
    /// Returns once the first request was answered.
    #[track_caller]
    pub fn start(s: &Scenario, lab: &Lab, pod: PodRef<'_>, args: &[&str]) -> Self {
        let stop = s.fresh_path("stop");
        let program = binary("mesh-requests").display().to_string();
        let stop_text = stop.display().to_string();
        let command = [&[program.as_str(), "--stop", &stop_text], args].concat();
        let mut process = lab.exec_background(pod, &command);
        process.wait_for_line(Duration::from_secs(20), |line| line == "serving");
        Self { process, stop }
    }

    /// Lets it end and returns its report.
    #[track_caller]
    pub fn stop(self) -> RequestReport {
        std::fs::write(&self.stop, "").expect("the scenario's directory can be written");
        let done = self.process.finish(Duration::from_secs(60)).expect_ok();
        report(&done.stdout)
    }
}

#[track_caller]
fn report(stdout: &str) -> RequestReport {
    let line = stdout.lines().rfind(|l| l.starts_with('{'));
    let line = line.unwrap_or_else(|| panic!("no report: {stdout}"));
    serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))
}

/// An answer as curl prints it with `-i`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// Status lines, those of interim answers included, without reason phrases.
    pub statuses: Vec<String>,
    /// Fields of the last head in their order and spelling.
    pub fields: Vec<(String, String)>,
    /// The body.
    pub body: String,
}

impl Answer {
    /// The final status.
    pub fn status(&self) -> u16 {
        let last = self.statuses.last().and_then(|l| l.split(' ').nth(1));
        last.and_then(|s| s.parse().ok()).unwrap_or_default()
    }

    /// Values of a field, joined as RFC 9110 (5.3) allows.
    pub fn field(&self, name: &str) -> Option<String> {
        let values: Vec<&str> = self
            .fields
            .iter()
            .filter(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, v)| v.as_str())
            .collect();
        (!values.is_empty()).then(|| values.join(", "))
    }

    /// What `mesh-http` says it saw.
    #[track_caller]
    pub fn seen(&self) -> Value {
        serde_json::from_str(self.body.trim()).unwrap_or_else(|e| panic!("{e}: {self:#?}"))
    }

    /// Which `mesh-http` answered; empty: none.
    pub fn server(&self) -> String {
        self.field("x-server").unwrap_or_default()
    }

    /// A header as `mesh-http` saw it, values joined.
    #[track_caller]
    pub fn seen_header(&self, name: &str) -> Option<String> {
        let seen = self.seen();
        let headers = seen["headers"].as_array().expect("mesh-http lists headers");
        let values: Vec<&str> = headers
            .iter()
            .filter(|pair| pair[0].as_str() == Some(name))
            .filter_map(|pair| pair[1].as_str())
            .collect();
        (!values.is_empty()).then(|| values.join(","))
    }

    /// Reads the output of `curl -i`.
    pub fn parse(text: &str) -> Self {
        let mut answer = Self::default();
        let mut rest = text;
        while rest.starts_with("HTTP/") {
            let (head, after) = rest.split_once("\r\n\r\n").unwrap_or((rest, ""));
            let mut lines = head.split("\r\n");
            let status = lines.next().unwrap_or_default();
            let status: Vec<&str> = status.splitn(3, ' ').take(2).collect();
            answer.statuses.push(status.join(" "));
            answer.fields = lines
                .filter_map(|l| l.split_once(':'))
                .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
                .collect();
            rest = after;
        }
        answer.body = rest.to_owned();
        answer
    }
}

/// `curl -s -i` with those arguments in a pod. An exit code other than 0 is an error with curl's words.
#[track_caller]
pub fn try_curl(lab: &Lab, pod: PodRef<'_>, args: &[&str]) -> Result<Answer, String> {
    let fixed = ["curl", "-q", "-sS", "-i", "--max-time", "20"];
    let done = lab.exec_within(pod, &[&fixed[..], args].concat(), Duration::from_secs(30));
    if done.ok() {
        Ok(Answer::parse(&done.stdout))
    } else {
        Err(done.to_string())
    }
}

/// [`try_curl`] that must work.
#[track_caller]
pub fn curl(lab: &Lab, pod: PodRef<'_>, args: &[&str]) -> Answer {
    try_curl(lab, pod, args).unwrap_or_else(|e| panic!("{e}"))
}

/// Asks the admin port of a pod's `mesh-http` from inside that pod, where nothing is captured.
#[track_caller]
pub fn admin(lab: &Lab, pod: PodRef<'_>, path: &str, body: Option<&str>) -> Value {
    let url = format!("http://127.0.0.1:{ADMIN}{path}");
    let mut args = vec![url.as_str()];
    if let Some(body) = body {
        args.extend(["-d", body]);
    }
    curl(lab, pod, &args).seen()
}

/// How many requests a pod's `mesh-http` got since it was last reset.
#[track_caller]
pub fn count(lab: &Lab, pod: PodRef<'_>) -> u64 {
    admin(lab, pod, "/count", None)["requests"]
        .as_u64()
        .expect("mesh-http counts")
}

/// Whether the data path counts HTTP requests; one that carries HTTP as TCP does not.
pub const HTTP_IS_COUNTED: bool = true;

/// `warren_http_requests_total` of a node, seen from the caller's side.
#[track_caller]
pub fn http_requests_total(lab: &Lab, node: &str) -> f64 {
    lab.metrics(node)
        .sum("warren_http_requests_total", &[("reporter", "source")])
}

/// Panics unless the caller's node counted at least so many requests since `before`.
#[track_caller]
pub fn expect_http_counted(lab: &Lab, node: &str, before: f64, at_least: u64, what: &str) {
    if !HTTP_IS_COUNTED {
        return;
    }
    let grown = http_requests_total(lab, node) - before;
    assert!(
        grown >= at_least as f64,
        "{what}: {grown} requests counted, {at_least} sent\n{}",
        lab.metrics(node).describe("warren_http_requests_total")
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_with_an_interim_one_before_it() {
        let text = "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nX-oDD: a\r\nx-odd: b\r\n\r\nbody\r\n\r\n";
        let answer = Answer::parse(text);
        assert_eq!(answer.statuses, ["HTTP/1.1 103", "HTTP/1.1 200"]);
        assert_eq!(
            (answer.status(), answer.field("x-odd")),
            (200, Some("a, b".into()))
        );
        assert_eq!(answer.fields[0].0, "X-oDD");
        assert_eq!(answer.body, "body\r\n\r\n");
    }
}
