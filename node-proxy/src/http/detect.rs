//! From the first bytes of a connection to its protocol.
