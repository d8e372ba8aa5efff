//! W3C trace context, sampling, and export over OTLP.
