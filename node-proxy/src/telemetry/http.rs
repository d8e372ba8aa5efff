//! Metrics of requests.
