//! Limits on requests: in flight, pending, and a rate for each caller.
