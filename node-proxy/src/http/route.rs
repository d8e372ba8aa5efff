//! Routes of the Gateway API, compiled for matching.
