//! The embedded control plane for synchronous tests, whose agent is a child process.

#![allow(dead_code, reason = "each test file uses a part of this module")]

use std::ops::Deref;
use std::time::Duration;

use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use pintle::demo::control_plane::{self, ControlPlane, Options};
use tokio::runtime::Runtime;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer as _;

/// Timeout for waiting; nothing here takes that long.
pub(crate) const DEADLINE: Duration = Duration::from_secs(90);

/// An embedded control plane, and its runtime.
pub(crate) struct Embedded {
    control_plane: ControlPlane,
    runtime: Runtime,
}

impl Embedded {
    /// Starts one that approves immediately and issues certificates with this lifetime.
    pub(crate) fn signing_for(seconds: u64) -> Self {
        Self::start(Options {
            cluster_signing_duration: Duration::from_secs(seconds),
            approval_delay: Duration::ZERO,
            manual_approval: false,
        })
    }

    pub(crate) fn start(options: Options) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("a runtime can be made");
        let control_plane = runtime.block_on(control_plane::start(options)).expect("a port is free");
        Self { control_plane, runtime }
    }

    pub(crate) fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// The requests for this node's certificate.
    pub(crate) fn requests_of(&self, node: &str) -> Vec<CertificateSigningRequest> {
        let prefix = format!("pintle-{node}-");
        let requests = self.control_plane.certificate_signing_requests().into_iter();
        requests
            .filter(|request| {
                let name = request.metadata.name.as_deref().unwrap_or_default();
                name.strip_prefix(&prefix).is_some_and(|hash| !hash.contains('-'))
            })
            .collect()
    }
}

impl Deref for Embedded {
    type Target = ControlPlane;

    fn deref(&self) -> &ControlPlane {
        &self.control_plane
    }
}

/// The SubjectPublicKeyInfo (DER) in a certificate request.
pub(crate) fn public_key_of(request: &CertificateSigningRequest) -> Vec<u8> {
    let request = pem::parse(&request.spec.request.0).expect("a request is PEM");
    let (_, request) = X509CertificationRequest::from_der(request.contents()).expect("PKCS#10");
    request.certification_request_info.subject_pki.raw.to_vec()
}
