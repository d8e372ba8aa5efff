//! `warren stat`: success rate, requests a second and latency of each Service, straight from the node proxies of its
//! callers: what they saw in a window of a few seconds.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, Client};
use mesh_api::errors::ProxyError;
use mesh_api::names::{METRICS_PORT, SYSTEM_NAMESPACE};
use serde::Serialize;

use super::connect;
use super::metrics::{Metrics, Series};
use crate::args::{Output, Stat};
use crate::error::{Context, Error, Result};

/// Prints a row for each Service.
pub(crate) async fn run(options: Stat) -> Result<ExitCode> {
    let window = Duration::from_secs(options.window);
    let from: Box<dyn Source> = match options.lab {
        Some(lab) => Box::new(lab),
        None => Box::new(connect(&options.cluster).await?),
    };
    let start = Instant::now();
    let before = from.read().await?;
    tokio::time::sleep(window).await;
    let after = from.read().await?;
    let seconds = start.elapsed().as_secs_f64();
    let mut grown = Metrics::default();
    for (proxy, metrics) in &after {
        // One that came meanwhile began with nothing.
        let nothing = Metrics::default();
        grown.add(metrics.since(before.get(proxy).unwrap_or(&nothing)));
    }
    let mut rows = rows(&grown, seconds);
    if let Some(namespace) = &options.namespace {
        rows.retain(|row| row.service.ends_with(&format!(".{namespace}")));
    }
    match options.output {
        Output::Json => println!(
            "{}",
            serde_json::to_string_pretty(&rows).context("the result")?
        ),
        Output::Table => print!("{}", table(&rows)),
    }
    Ok(ExitCode::SUCCESS)
}

/// Where node proxies are.
trait Source {
    /// What each proxy says now.
    fn read(&self) -> futures::future::BoxFuture<'_, Result<BTreeMap<String, Metrics>>>;
}

impl Source for Client {
    fn read(&self) -> futures::future::BoxFuture<'_, Result<BTreeMap<String, Metrics>>> {
        Box::pin(async move {
            let pods: Api<Pod> = Api::namespaced(self.clone(), SYSTEM_NAMESPACE);
            let proxies = ListParams::default().labels("app.kubernetes.io/name=warren-node-proxy");
            let found = pods
                .list(&proxies)
                .await
                .context("the node proxies' pods")?;
            let names = found.into_iter().filter_map(|pod| pod.metadata.name);
            let read: Vec<_> = stream::iter(names)
                .map(|name| async move {
                    let text = fetch(self, &name, METRICS_PORT, "/metrics").await;
                    (name, text)
                })
                .buffer_unordered(AT_ONCE)
                .collect()
                .await;
            let mut metrics = BTreeMap::new();
            for (name, text) in read {
                match text {
                    Ok(text) => {
                        metrics.insert(name, Metrics::parse(&text));
                    }
                    Err(error) => eprintln!("warren: {error}; left out"),
                }
            }
            match metrics.is_empty() {
                true => Err(Error::new("no node proxy answers; see `warren check`")),
                false => Ok(metrics),
            }
        })
    }
}

impl Source for crate::lab::names::LabName {
    fn read(&self) -> futures::future::BoxFuture<'_, Result<BTreeMap<String, Metrics>>> {
        Box::pin(async move {
            let read = crate::lab::proxy_metrics(self).await?;
            let parsed = |(node, text): (String, String)| (node, Metrics::parse(&text));
            Ok(read.into_iter().map(parsed).collect())
        })
    }
}

/// What a pod of Warren's answers, through the API server.
pub(super) async fn fetch(client: &Client, pod: &str, port: u16, path: &str) -> Result<String> {
    let uri = format!("/api/v1/namespaces/{SYSTEM_NAMESPACE}/pods/{pod}:{port}/proxy{path}");
    let request = http::Request::get(uri)
        .body(Vec::new())
        .context("a request")?;
    let answer = tokio::time::timeout(PATIENCE, client.request_text(request)).await;
    let answer = answer.map_err(|_| Error::new(format!("{pod} does not answer on port {port}")))?;
    answer.context(format!("{pod}, port {port}"))
}

/// A Service as its callers saw it. Latencies are in seconds; none without a request. The success rate is of the
/// requests whose callers waited for the end; none without one.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    service: String,
    success_rate: Option<f64>,
    requests_per_second: f64,
    p50: Option<f64>,
    p95: Option<f64>,
    p99: Option<f64>,
    retries_per_second: f64,
}

fn rows(grown: &Metrics, seconds: f64) -> Vec<Row> {
    #[derive(Default)]
    struct Seen {
        requests: f64,
        /// Those that ended well or badly.
        judged: f64,
        good: f64,
        retries: f64,
        /// Upper bound -> requests at most that long.
        buckets: Vec<(f64, f64)>,
    }
    let mut services: BTreeMap<String, Seen> = BTreeMap::new();
    let of_callers =
        |name| (grown.named(name)).filter(|(series, _)| series.label("reporter") == "source");
    for (series, count) in of_callers("warren_http_requests_total") {
        let seen = services.entry(service(series)).or_default();
        seen.requests += count;
        if let Some(good) = succeeded(series) {
            seen.judged += count;
            seen.good += if good { count } else { 0.0 };
        }
    }
    for (series, count) in of_callers("warren_http_retries_total") {
        services.entry(service(series)).or_default().retries += count;
    }
    for (series, count) in of_callers("warren_http_request_duration_seconds_bucket") {
        let bound = match series.label("le") {
            "+Inf" => f64::INFINITY,
            bound => bound.parse().unwrap_or(f64::INFINITY),
        };
        let buckets = &mut services.entry(service(series)).or_default().buckets;
        match buckets.iter_mut().find(|(other, _)| *other == bound) {
            Some((_, sum)) => *sum += count,
            None => buckets.push((bound, count)),
        }
    }
    (services.into_iter())
        .filter(|(_, seen)| seen.requests > 0.0)
        .map(|(service, mut seen)| {
            seen.buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
            Row {
                service,
                success_rate: (seen.judged > 0.0).then_some(seen.good / seen.judged),
                requests_per_second: seen.requests / seconds,
                p50: quantile(0.50, &seen.buckets),
                p95: quantile(0.95, &seen.buckets),
                p99: quantile(0.99, &seen.buckets),
                retries_per_second: seen.retries / seconds,
            }
        })
        .collect()
}

/// The Service that was called, else the workload.
fn service(series: &Series) -> String {
    match series.label("destination_service") {
        "unknown" | "" => format!(
            "{}.{} (no Service)",
            series.label("destination_workload"),
            series.label("destination_namespace")
        ),
        service => service.to_owned(),
    }
}

/// Whether requests were answered in full, with neither a server's error nor a gRPC status that means one. `None`:
/// their callers went away, which says nothing about the Service. As the dashboards have it
/// (`deploy/dashboards/make.py`) and `docs/reference/metrics.md` explains.
fn succeeded(series: &Series) -> Option<bool> {
    match ProxyError::from_name(series.label("response_flags")) {
        Some(ProxyError::Cancelled) => return None,
        Some(error) if CUT.contains(&error) => return Some(false),
        _ => {}
    }
    let status = series.label("status");
    let failed = status == "0"
        || status.starts_with('5')
        || GRPC_FAILURES.contains(&series.label("grpc_status"));
    Some(!failed)
}

/// As Prometheus estimates it: evenly spread within a bucket; the last finite bound for what is beyond it.
fn quantile(q: f64, buckets: &[(f64, f64)]) -> Option<f64> {
    let total = buckets
        .last()
        .map(|(_, count)| *count)
        .filter(|count| *count > 0.0)?;
    let rank = q * total;
    let place = buckets.iter().position(|(_, count)| *count >= rank)?;
    let (upper, count) = buckets[place];
    let (lower, below) = match place {
        0 => (0.0, 0.0),
        place => buckets[place - 1],
    };
    if upper.is_infinite() {
        return Some(lower);
    }
    Some(lower + (upper - lower) * (rank - below) / (count - below).max(f64::MIN_POSITIVE))
}

fn table(rows: &[Row]) -> String {
    let width = rows
        .iter()
        .map(|row| row.service.len())
        .max()
        .unwrap_or(0)
        .max(7);
    let mut text = format!(
        "{:width$}  {:>8}  {:>9}  {:>9}  {:>9}  {:>9}  {:>9}\n",
        "SERVICE", "SUCCESS", "REQ/S", "P50", "P95", "P99", "RETRIES/S"
    );
    let share = |rate: Option<f64>| match rate {
        None => "-".to_owned(),
        Some(rate) => format!("{:.2}%", rate * 100.0),
    };
    let time = |seconds: Option<f64>| match seconds {
        None => "-".to_owned(),
        Some(seconds) if seconds < 1.0 => format!("{:.1}ms", seconds * 1e3),
        Some(seconds) => format!("{seconds:.2}s"),
    };
    for row in rows {
        text += &format!(
            "{:width$}  {:>8}  {:>9.1}  {:>9}  {:>9}  {:>9}  {:>9.1}\n",
            row.service,
            share(row.success_rate),
            row.requests_per_second,
            time(row.p50),
            time(row.p95),
            time(row.p99),
            row.retries_per_second,
        );
    }
    if rows.is_empty() {
        text += "no requests in this time\n";
    }
    text
}

/// Why an answer breaks off after its head. The status has gone to the caller by then, and stays as it was.
const CUT: [ProxyError; 6] = [
    ProxyError::UpstreamReset,
    ProxyError::UpstreamProtocol,
    ProxyError::TunnelReset,
    ProxyError::RequestTimeout,
    ProxyError::IdleTimeout,
    ProxyError::TryTimeout,
];
/// UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS.
const GRPC_FAILURES: [&str; 7] = ["2", "4", "8", "12", "13", "14", "15"];
/// Proxies that are read at once.
const AT_ONCE: usize = 32;
const PATIENCE: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_what_its_callers_saw() {
        let labels = r#"reporter="source",destination_service="web.demo""#;
        let text = format!(
            "warren_http_requests_total{{{labels},status=\"200\",grpc_status=\"\"}} 90\n\
             warren_http_requests_total{{{labels},status=\"200\",grpc_status=\"14\"}} 4\n\
             warren_http_requests_total{{{labels},status=\"503\",grpc_status=\"\"}} 3\n\
             warren_http_requests_total{{{labels},status=\"200\",response_flags=\"upstream_reset\"}} 2\n\
             warren_http_requests_total{{{labels},status=\"200\",response_flags=\"cancelled\"}} 20\n\
             warren_http_requests_total{{{labels},status=\"0\",response_flags=\"cancelled\"}} 30\n\
             warren_http_requests_total{{{labels},status=\"0\",grpc_status=\"\"}} 1\n\
             warren_http_requests_total{{reporter=\"destination\",destination_service=\"web.demo\",status=\"200\"}} 95\n\
             warren_http_requests_total{{{},status=\"200\"}} 0\n\
             warren_http_retries_total{{{labels}}} 20\n\
             warren_http_request_duration_seconds_bucket{{{labels},le=\"0.001\",route=\"\"}} 30\n\
             warren_http_request_duration_seconds_bucket{{{labels},le=\"0.001\",route=\"a\"}} 20\n\
             warren_http_request_duration_seconds_bucket{{{labels},le=\"0.01\",route=\"\"}} 96\n\
             warren_http_request_duration_seconds_bucket{{{labels},le=\"+Inf\",route=\"\"}} 100\n",
            labels.replace("web", "idle"),
        );
        let rows = rows(&Metrics::parse(&text), 10.0);
        let expected = Row {
            service: "web.demo".into(),
            success_rate: Some(0.9),
            requests_per_second: 15.0,
            p50: Some(0.001),
            p95: Some(0.001 + 0.009 * 45.0 / 46.0),
            p99: Some(0.01),
            retries_per_second: 2.0,
        };
        assert_eq!(rows, [expected]);
        assert_eq!(
            table(&rows),
            "SERVICE    SUCCESS      REQ/S        P50        P95        P99  RETRIES/S\n\
             web.demo    90.00%       15.0      1.0ms      9.8ms     10.0ms        2.0\n"
        );
    }

    #[test]
    fn a_cut_answer_is_a_failure_and_a_cancelled_request_neither() {
        let judged = |status: &str, grpc: &str, flag: &str| {
            let labels =
                format!("status=\"{status}\",grpc_status=\"{grpc}\",response_flags=\"{flag}\"");
            let metrics = Metrics::parse(&format!("requests{{{labels}}} 1\n"));
            let (series, _) = metrics.named("requests").next().unwrap();
            succeeded(series)
        };
        let cut = [
            "upstream_reset",
            "upstream_protocol",
            "tunnel_reset",
            "request_timeout",
            "idle_timeout",
            "try_timeout",
        ];
        for flag in cut {
            assert_eq!(judged("200", "", flag), Some(false), "{flag}");
            assert_eq!(judged("200", "0", flag), Some(false), "{flag}");
        }
        for status in ["0", "200", "503"] {
            assert_eq!(judged(status, "", "cancelled"), None, "{status}");
        }
        assert_eq!(judged("200", "14", "cancelled"), None);
        for good in ["", "fault_delay"] {
            assert_eq!(judged("200", "", good), Some(true), "{good}");
        }
        for status in ["301", "404", "429"] {
            assert_eq!(judged(status, "", ""), Some(true), "{status}");
        }
        for status in ["0", "500", "503"] {
            assert_eq!(judged(status, "", ""), Some(false), "{status}");
        }
        for code in 0..=16 {
            let good = ![2, 4, 8, 12, 13, 14, 15].contains(&code);
            assert_eq!(judged("200", &code.to_string(), ""), Some(good), "{code}");
        }
    }

    /// Nobody waited for an answer: there is no rate, not one of 0 or 100 %.
    #[test]
    fn without_a_judged_request_there_is_no_success_rate() {
        let text = "warren_http_requests_total{reporter=\"source\",destination_service=\"web.demo\",\
                    status=\"0\",response_flags=\"cancelled\"} 5\n";
        let rows = rows(&Metrics::parse(text), 1.0);
        assert_eq!(rows[0].success_rate, None);
        assert_eq!(rows[0].requests_per_second, 5.0);
        let shown = table(&rows);
        let columns: Vec<&str> = shown.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(columns[..3], ["web.demo", "-", "5.0"]);
    }

    #[test]
    fn calls_of_pod_addresses_are_named_after_the_workload() {
        let text = "warren_http_requests_total{reporter=\"source\",destination_service=\"unknown\",\
                    destination_workload=\"db\",destination_namespace=\"demo\",status=\"200\"} 1\n";
        assert_eq!(
            rows(&Metrics::parse(text), 1.0)[0].service,
            "db.demo (no Service)"
        );
    }
}
