//! Generated from `mesh-api/proto`.

#![allow(missing_docs, unreachable_pub, clippy::all, rustdoc::all)]

/// The incremental xDS transport.
pub mod discovery {
    tonic::include_proto!("envoy.service.discovery.v3");
}

// Generated code refers to other packages by their full path from a common parent.
mod warren {
    pub(super) mod mesh {
        pub mod v1 {
            tonic::include_proto!("warren.mesh.v1");
        }
    }
    pub(super) mod control {
        pub mod v1 {
            tonic::include_proto!("warren.control.v1");
        }
    }
    pub(super) mod broker {
        pub mod v1 {
            tonic::include_proto!("warren.broker.v1");
        }
    }
    pub(super) mod cni {
        pub mod v1 {
            tonic::include_proto!("warren.cni.v1");
        }
    }
}
pub use warren::broker::v1 as broker;
pub use warren::cni::v1 as cni;
pub use warren::control::v1 as control;
pub use warren::mesh::v1 as mesh;

/// Type URL of a resource, as in `DeltaDiscoveryRequest.type_url`.
pub trait Resource: prost::Message + Default {
    const TYPE_URL: &'static str;
}

macro_rules! resource {
    ($($name:ident),*) => {$(
        impl Resource for mesh::$name {
            const TYPE_URL: &'static str =
                concat!("type.googleapis.com/warren.mesh.v1.", stringify!($name));
        }
    )*};
}
resource!(
    Workload,
    NodePod,
    Service,
    EndpointSlice,
    MeshConfig,
    Route,
    BackendTrafficPolicy,
    TrafficPolicy
);
