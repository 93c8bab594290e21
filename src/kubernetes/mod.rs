//! The API server: how it is reached, and the CertificateSigningRequests at it.

pub mod api;
mod authorities;
pub mod certificate_signing_requests;
pub mod cluster;
mod credential_error;
pub mod kubeconfig;
pub mod port;
pub mod proxy;

pub use api::Api;
pub use cluster::{Cluster, ClusterError};
pub use proxy::Proxy;
