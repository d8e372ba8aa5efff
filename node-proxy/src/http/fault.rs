//! Fault injection: which requests are delayed or aborted on purpose.
