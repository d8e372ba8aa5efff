#!/usr/bin/env python3
"""Writes the Grafana dashboards into the chart. Run it after a change here; `make charts` fails if they differ.

    deploy/dashboards/make.py [--check]

A panel is a title, a unit, and queries with their legends. Only metrics of docs/reference/metrics.md and controller.md, and only
labels that the programs set themselves, but for `instance`: what a scrape adds differs between clusters.
"""

import json
import pathlib
import sys

TARGET = pathlib.Path(__file__).resolve().parents[1] / "charts/warren/dashboards"
RATE = "[$__rate_interval]"


def rate(metric, labels="", by=""):
    by = f" by ({by})" if by else ""
    return f"sum{by} (rate({metric}{{{labels}}}{RATE}))"


def share(metric, good, labels):
    return f"{rate(metric, f'{labels},{good}')} / {rate(metric, labels)}"


def quantiles(metric, labels):
    buckets = rate(f"{metric}_bucket", labels, "le")
    return [(f"histogram_quantile(0.{q}, {buckets})", f"p{q}") for q in (50, 95, 99)]


def success(labels):
    return f"{rate(HTTP, f'{labels},{GOOD}')} / {rate(HTTP, f'{labels},{JUDGED}')}"


def failures(labels, by):
    """A selector has no "or"; that of two queries takes a series once that is in both."""
    rates = " or ".join(f"rate({HTTP}{{{labels},{bad}}}{RATE})" for bad in BAD)
    return f"sum by ({by}) ({rates})"


def or_zero(query):
    """For what should never happen: a flat line at zero says more than an empty panel."""
    return f"{query} or vector(0)"


HTTP = "warren_http_requests_total"
# What a success is stands in docs/reference/metrics.md and cli/src/cluster/stat.rs: keep them equal. A gRPC call fails with an HTTP
# status of 200.
BAD_STATUS = "0|5.."
BAD_GRPC = "2|4|8|12|13|14|15"
# The answer broke off after its head: the status had gone to the caller by then.
CUT = "upstream_reset|upstream_protocol|tunnel_reset|request_timeout|idle_timeout|try_timeout"
# That a caller went away says nothing about the service.
JUDGED = 'response_flags!="cancelled"'
GOOD = f'status!~"{BAD_STATUS}",grpc_status!~"{BAD_GRPC}",response_flags!~"cancelled|{CUT}"'
BAD = (f'status=~"{BAD_STATUS}",{JUDGED}', f'grpc_status=~"{BAD_GRPC}",{JUDGED}', f'response_flags=~"{CUT}"')
SOURCE = 'reporter="source"'
SERVICE = 'reporter="source",destination_service=~"$service"'
NODE = 'instance=~"$instance"'

DASHBOARDS = {
    "mesh": (
        "Warren: mesh",
        [],
        [
            ("Requests", "reqps", [(rate(HTTP, SOURCE), "requests")]),
            ("Success rate", "percentunit", [(success(SOURCE), "success")]),
            ("Latency", "s", quantiles("warren_http_request_duration_seconds", SOURCE)),
            ("Busiest services", "reqps", [(f"topk(10, {rate(HTTP, SOURCE, 'destination_service')})", "{{destination_service}}")]),
            ("Failing services", "reqps", [
                (or_zero(f"topk(10, {failures(SOURCE, 'destination_service')})"), "{{destination_service}}")]),
            ("Requests ended or changed by the mesh", "reqps", [
                (or_zero(rate(HTTP, SOURCE + ',response_flags!=""', "response_flags")), "{{response_flags}}")]),
            ("Connections opened", "cps", [(rate("warren_tcp_connections_opened_total", SOURCE, "security"), "{{security}}")]),
            ("Connections refused or failed", "cps", [
                (or_zero(rate("warren_tcp_connections_failed_total", "", "reason")), "{{reason}}")]),
            ("Connections with proven identities", "percentunit", [
                (share("warren_tcp_connections_opened_total", 'security="mutual_tls"', 'reporter="destination"'), "mutual TLS")]),
            ("Bytes", "Bps", [
                (rate("warren_tcp_sent_bytes_total", SOURCE), "TCP, to destinations"),
                (rate("warren_tcp_received_bytes_total", SOURCE), "TCP, back"),
                (rate("warren_http_request_bytes_sum", SOURCE), "HTTP requests"),
                (rate("warren_http_response_bytes_sum", SOURCE), "HTTP responses")]),
            ("Plaintext between meshed pods", "cps", [
                (or_zero(rate("warren_plaintext_allowed_total", "", "reason")), "{{reason}}")]),
            ("Pods by phase of enrolment", "short", [("max by (phase) (warren_controller_pods)", "{{phase}}")]),
            ("Nodes", "short", [
                ("count(max by (node) (warren_controller_node_ready) == 1)", "ready"),
                (or_zero("count(max by (node) (warren_controller_node_ready) == 0)"), "not ready")]),
            ("Controller: streams and mistakes", "short", [
                ("sum by (role) (warren_controller_streams)", "streams of {{role}}"),
                ("max(warren_controller_manifest_mistakes)", "mistakes in objects"),
                ("max(warren_controller_enrolment_failures)", "pods that cannot be enrolled")]),
        ],
    ),
    "service": (
        "Warren: service",
        [("service", f"label_values({HTTP}, destination_service)")],
        [
            ("Requests by caller", "reqps", [(rate(HTTP, SERVICE, "source_namespace, source_workload"), "{{source_namespace}}/{{source_workload}}")]),
            ("Success rate", "percentunit", [(success(SERVICE), "success")]),
            ("Latency", "s", quantiles("warren_http_request_duration_seconds", SERVICE)),
            ("Responses by status", "reqps", [(rate(HTTP, SERVICE, "status"), "{{status}}")]),
            ("Requests by workload that answered", "reqps", [(rate(HTTP, SERVICE, "destination_workload"), "{{destination_workload}}")]),
            ("Requests by route and backend", "reqps", [(rate(HTTP, SERVICE, "route, backend"), "{{route}} {{backend}}")]),
            ("In flight", "short", [(f"sum(warren_http_requests_in_flight{{{SERVICE}}})", "requests")]),
            ("Retries", "reqps", [
                (or_zero(rate("warren_http_retries_total", SERVICE)), "retries"),
                (or_zero(rate("warren_http_retry_budget_exhausted_total", SERVICE)), "not made, budget used up")]),
            ("Ended or changed by the mesh", "reqps", [
                (or_zero(rate(HTTP, SERVICE + ',response_flags!=""', "response_flags")), "{{response_flags}}")]),
            ("gRPC statuses", "reqps", [(or_zero(rate(HTTP, SERVICE + ',protocol="grpc"', "grpc_status")), "{{grpc_status}}")]),
            ("Sizes, p95", "bytes", [
                (f"histogram_quantile(0.95, {rate('warren_http_request_bytes_bucket', SERVICE, 'le')})", "requests"),
                (f"histogram_quantile(0.95, {rate('warren_http_response_bytes_bucket', SERVICE, 'le')})", "responses")]),
            ("Connections of callers", "cps", [
                (rate("warren_tcp_connections_opened_total", SERVICE, "security"), "{{security}}"),
                (or_zero(rate("warren_tcp_connections_failed_total", SERVICE, "reason")), "failed: {{reason}}")]),
        ],
    ),
    "node-proxy": (
        "Warren: node proxy",
        [("instance", "label_values(warren_pods, instance)")],
        [
            ("CPU", "short", [(f"rate(process_cpu_seconds_total{{{NODE}}}{RATE}) and on (instance) warren_pods", "{{instance}}")]),
            ("Memory", "bytes", [(f"process_resident_memory_bytes{{{NODE}}} and on (instance) warren_pods", "{{instance}}")]),
            ("Descriptors", "percentunit", [(f"process_open_fds{{{NODE}}} / process_max_fds{{{NODE}}} and on (instance) warren_pods", "{{instance}}")]),
            ("Pods", "short", [(f"warren_pods{{{NODE}}}", "{{instance}}")]),
            ("Requests in flight", "short", [(f"sum by (instance) (warren_http_requests_in_flight{{{NODE}}})", "{{instance}}")]),
            ("Tunnels and streams", "short", [
                (f"sum by (side) (warren_tunnels_open{{{NODE}}})", "tunnels, {{side}}"),
                (f"sum by (side) (warren_tunnel_streams_open{{{NODE}}})", "streams, {{side}}")]),
            ("Agent and controller", "bool", [
                (f"warren_broker_connected{{{NODE}}}", "agent, {{instance}}"),
                (f"warren_xds_connected{{{NODE}}}", "controller, {{instance}}")]),
            ("Discovery", "short", [
                (f"sum by (type) (warren_xds_resources{{{NODE}}})", "{{type}}"),
                (or_zero(rate("warren_xds_messages_total", NODE + ',result="nack"')), "rejected a second")]),
            ("Sockets in stock", "short", [(f"sum by (family) (warren_broker_sockets_available{{{NODE}}})", "{{family}}")]),
            ("Sockets from the agent", "short", [
                (rate("warren_broker_socket_requests_total", NODE, "result"), "asked: {{result}}"),
                (or_zero(rate("warren_broker_sockets_recycled_total", NODE)), "used again")]),
            ("Fullest budgets", "percentunit", [
                (f"topk(10, warren_workload_used{{{NODE}}} / warren_workload_limit{{{NODE}}})", "{{namespace}}/{{pod}} {{resource}}")]),
            ("Refused for a budget", "ops", [
                (or_zero(f"topk(10, {rate('warren_workload_refusals_total', NODE, 'namespace, pod, resource')})"), "{{namespace}}/{{pod}} {{resource}}")]),
            ("Not accepted, not logged, not traced", "ops", [
                (or_zero(rate("warren_accept_errors_total", NODE, "reason")), "accept: {{reason}}"),
                (or_zero(rate("warren_access_log_dropped_total", NODE)), "access log lines"),
                (or_zero(rate("warren_trace_spans_dropped_total", NODE)), "spans")]),
            ("Age of the worker", "s", [(f"time() - process_start_time_seconds{{{NODE}}} and on (instance) warren_pods", "{{instance}}")]),
        ],
    ),
    "identity": (
        "Warren: identity",
        [],
        [
            ("Certificates on nodes", "short", [("sum by (state) (warren_certificates)", "{{state}}")]),
            ("First to end", "s", [("bottomk(10, warren_certificate_expiry_timestamp_seconds - time())", "{{identity}}")]),
            ("Certificates asked for by proxies", "ops", [(rate("warren_certificate_issues_total", "", "result"), "{{result}}")]),
            ("Certificates signed", "ops", [(rate("warren_controller_certificates_issued_total", "", "kind"), "{{kind}}")]),
            ("Certificates refused", "ops", [
                (or_zero(rate("warren_controller_certificates_refused_total", "", "kind, reason")), "{{kind}}: {{reason}}")]),
            ("Root: time left", "s", [("min(warren_controller_root_not_after_timestamp_seconds) - time()", "signing root")]),
            ("Roots trusted", "short", [("max(warren_controller_trusted_roots)", "roots")]),
            ("Handshakes between nodes", "ops", [
                (rate("warren_tunnel_handshakes_total", 'result=~"ok|resumed"', "side, result"), "{{side}}: {{result}}")]),
            ("Handshakes that failed", "ops", [
                (or_zero(rate("warren_tunnel_handshakes_total", 'result!~"ok|resumed"', "side, result")), "{{side}}: {{result}}")]),
            ("Who calls whom", "reqps", [
                (f"topk(20, {rate(HTTP, 'reporter=' + chr(34) + 'destination' + chr(34), 'source_principal, destination_principal')})",
                 "{{source_principal}} → {{destination_principal}}")]),
            ("Refused for identity", "cps", [
                (or_zero(rate("warren_tcp_connections_failed_total", 'reason=~"plaintext_refused|source_mismatch|unknown_source|not_local|tunnel_identity|no_certificate|certificate_expired"', "reason")), "{{reason}}")]),
            ("Handshakes with the controller", "ops", [(rate("warren_controller_tls_handshakes_total", "", "result"), "{{result}}")]),
        ],
    ),
}

SOURCE_OF_DATA = {"type": "prometheus", "uid": "${datasource}"}


def dashboard(uid, title, variables, panels):
    return {
        "uid": f"warren-{uid}",
        "title": title,
        "tags": ["warren"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [
            {"name": "datasource", "type": "datasource", "query": "prometheus"},
            *(
                {"name": name, "type": "query", "datasource": SOURCE_OF_DATA, "query": query, "refresh": 2,
                 "multi": True, "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
                for name, query in variables
            ),
        ]},
        "panels": [panel(number, *content) for number, content in enumerate(panels)],
    }


def panel(number, title, unit, queries):
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE_OF_DATA,
        # Three in a row of 24.
        "gridPos": {"x": number % 3 * 8, "y": number // 3 * 8, "w": 8, "h": 8},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": SOURCE_OF_DATA, "expr": query, "legendFormat": legend}
            for i, (query, legend) in enumerate(queries)
        ],
    }


def main():
    stale = []
    for uid, content in DASHBOARDS.items():
        text = json.dumps(dashboard(uid, *content), indent=1, ensure_ascii=False) + "\n"
        file = TARGET / f"{uid}.json"
        if not file.exists() or file.read_text() != text:
            stale.append(file.name)
            if "--check" not in sys.argv:
                file.write_text(text)
    if "--check" in sys.argv and stale:
        sys.exit(f"not as deploy/dashboards/make.py writes them: {', '.join(stale)}")


if __name__ == "__main__":
    main()
