//! pintle keeps a Kubernetes node's identity turning.
