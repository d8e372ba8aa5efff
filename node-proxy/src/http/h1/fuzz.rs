//! HTTP/1 as two parsers may read it. Beside the codec stands a second reader, written from the grammar alone and in
//! no way clever ([`strict`]): what the codec takes for a message must be exactly that message to it.

pub(crate) mod bodies;
pub(crate) mod connections;
pub(crate) mod heads;
mod strict;
