//! What may be sent again, when, and how often.
