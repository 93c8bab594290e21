//! What a test may choose of its control plane.

/// How a control plane is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// The release of kube-apiserver and kube-controller-manager.
    pub release: Release,
    /// `--cluster-signing-duration`: the lifetime of certificates, in Go's format (`30s`, `1h`). Empty leaves the flag out.
    pub cluster_signing_duration: String,
    /// Leave kubelets' requests pending until somebody approves them: the approving controller is not started.
    pub manual_approval: bool,
    /// Write the audit log that [`ControlPlane::audit_events`](crate::ControlPlane::audit_events) reads.
    pub audit: bool,
    /// More bearer tokens for `--token-auth-file`.
    pub static_tokens: Vec<StaticToken>,
    /// More flags for kube-apiserver; a flag given here overrides the same flag of the test bed.
    pub api_server_flags: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            release: Release::Newest,
            cluster_signing_duration: "1h".into(),
            manual_approval: false,
            audit: true,
            static_tokens: Vec::new(),
            api_server_flags: Vec::new(),
        }
    }
}

/// A release of Kubernetes that the test bed can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// That of `tests/cluster`.
    Newest,
    /// 1.21, of `tests/cluster-1.21`: its signer counts lifetimes from five minutes before the present, and its API server
    /// has no SelfSubjectReview, so [`ControlPlane::who_is`](crate::ControlPlane::who_is) always fails.
    V1_21,
}

/// A line of `--token-auth-file`.
#[derive(Clone, Debug)]
pub struct StaticToken {
    /// The bearer token.
    pub token: String,
    /// The user it stands for.
    pub username: String,
    /// The user's groups.
    pub groups: Vec<String>,
}
