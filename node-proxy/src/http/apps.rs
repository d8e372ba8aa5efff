//! Connections to apps, kept for the next request.
