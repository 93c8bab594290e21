//! Version and discovery documents, which kubectl requests first.

use serde_json::{Value, json};

/// `/version`: the Kubernetes release whose behaviour this follows.
pub(super) fn version() -> Value {
    json!({
        "major": "1",
        "minor": "36",
        "gitVersion": "v1.36.0+pintle-demo",
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "",
        "compiler": "rustc",
        "platform": "linux/amd64",
    })
}

/// The discovery document for a path, if there is one.
pub(super) fn document(segments: &[&str]) -> Option<Value> {
    Some(match segments {
        ["api"] => json!({ "kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": [] }),
        ["api", "v1"] => resources("v1", json!([])),
        ["apis"] => json!({
            "kind": "APIGroupList",
            "apiVersion": "v1",
            "groups": GROUPS.map(group),
        }),
        ["apis", name] if GROUPS.contains(name) => {
            let mut document = group(name);
            document["kind"] = json!("APIGroup");
            document["apiVersion"] = json!("v1");
            document
        }
        ["apis", "certificates.k8s.io", "v1"] => {
            let resource = |name: &str, verbs: &[&str]| {
                json!({
                    "name": name,
                    "singularName": "",
                    "namespaced": false,
                    "kind": "CertificateSigningRequest",
                    "verbs": verbs,
                })
            };
            let verbs = ["create", "delete", "get", "list", "watch"];
            let mut requests = resource("certificatesigningrequests", &verbs);
            requests["singularName"] = json!("certificatesigningrequest");
            requests["shortNames"] = json!(["csr"]);
            resources(
                "certificates.k8s.io/v1",
                json!([
                    requests,
                    resource("certificatesigningrequests/approval", &["get", "patch", "update"]),
                    resource("certificatesigningrequests/status", &["get", "patch", "update"]),
                ]),
            )
        }
        ["apis", "authentication.k8s.io", "v1"] => {
            resources("authentication.k8s.io/v1", review("selfsubjectreviews", "SelfSubjectReview"))
        }
        ["apis", "authorization.k8s.io", "v1"] => {
            resources("authorization.k8s.io/v1", review("selfsubjectaccessreviews", "SelfSubjectAccessReview"))
        }
        _ => return None,
    })
}

const GROUPS: [&str; 3] = ["authentication.k8s.io", "authorization.k8s.io", "certificates.k8s.io"];

fn group(name: &str) -> Value {
    let version = json!({ "groupVersion": format!("{name}/v1"), "version": "v1" });
    json!({ "name": name, "versions": [version], "preferredVersion": version })
}

fn resources(group_version: &str, resources: Value) -> Value {
    json!({ "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources })
}

fn review(name: &str, kind: &str) -> Value {
    json!([{
        "name": name,
        "singularName": kind.to_lowercase(),
        "namespaced": false,
        "kind": kind,
        "verbs": ["create"],
    }])
}
