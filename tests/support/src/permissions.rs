//! Who may ask the control plane for what: its static tokens and its role bindings.

use serde_json::{Value, json};

use crate::options::StaticToken;

/// The group of whoever has no certificate yet.
pub(crate) const GROUP: &str = "system:bootstrappers";
/// A bearer token of that group.
pub(crate) const STATIC_TOKEN: &str = "static-bootstrap-token";

/// The contents of `--token-auth-file`: token, user, uid, groups.
pub(crate) fn token_file(tokens: &[StaticToken]) -> String {
    let bootstrap =
        StaticToken { token: STATIC_TOKEN.into(), username: "static-bootstrap".into(), groups: vec![GROUP.into()] };
    std::iter::once(&bootstrap)
        .chain(tokens)
        .map(|line| format!("{},{},{},\"{}\"\n", line.token, line.username, line.username, line.groups.join(",")))
        .collect()
}

/// Bootstrap credentials may create requests and have a node's approved; nodes have their own renewals approved.
pub(crate) fn role_bindings() -> Value {
    let binding = |name: &str, role: &str, group: &str| {
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": group}],
        })
    };
    let approve = "system:certificates.k8s.io:certificatesigningrequests";
    json!({
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            binding("bootstrappers-create", "system:node-bootstrapper", GROUP),
            binding("bootstrappers-approve", &format!("{approve}:nodeclient"), GROUP),
            binding("nodes-approve", &format!("{approve}:selfnodeclient"), "system:nodes"),
        ],
    })
}
