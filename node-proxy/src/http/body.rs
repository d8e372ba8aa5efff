//! The one streaming body type.
