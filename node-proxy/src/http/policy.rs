//! What is in force for a Service port or a route's rule, defaults filled in.
