//! The API server: how it is reached, and the CertificateSigningRequests at it.

pub mod api;
pub mod cluster;
pub mod port;
pub mod requests;
pub mod without_secrets;

pub use api::Api;
pub use cluster::{Cluster, ClusterError};
