//! Where the objects come from that users write: a directory of manifests (Kubernetes' API follows).

pub mod directory;
