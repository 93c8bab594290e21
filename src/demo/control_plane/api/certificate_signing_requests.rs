//! The resource `certificatesigningrequests.certificates.k8s.io`, with /approval and /status.

use std::sync::Arc;
use std::time::Duration;

use hyper::{Method, Response, StatusCode};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use serde_json::{Value, json};

use super::super::authorization::authorize;
use super::super::object::now;
use super::super::registry::Stored;
use super::super::status::{Failure, GROUP, RESOURCE};
use super::super::table::{IncludeObject, table};
use super::super::watching::{WatchRequest, watch};
use super::negotiation::{Representation, representation};
use super::{Body, Call, JSON, json, streaming};

/// How often a patch is retried after a conflicting update, as in kube-apiserver.
const PATCH_ATTEMPTS: usize = 5;

/// Handles a request below the resource's path. `object` is empty, NAME, or NAME/SUBRESOURCE.
pub(super) async fn answer(call: Call, object: &[&str]) -> Result<Response<Body>, Failure> {
    let method = call.method.clone();
    match (method, object) {
        (Method::GET, []) if call.query.is_true("watch") => start_watch(&call),
        (Method::GET, []) => list(&call),
        (Method::POST, []) => create(call).await,
        (Method::GET, [name]) => get(&call, name, ""),
        (Method::DELETE, [name]) => delete(call, name).await,
        (Method::GET, [name, subresource @ ("approval" | "status")]) => get(&call, name, subresource),
        (Method::PUT, [name, subresource @ ("approval" | "status")]) => replace(call, name, subresource).await,
        (Method::PATCH, [name, subresource @ ("approval" | "status")]) => patch(call, name, subresource).await,
        (_, [] | [_] | [_, "approval" | "status"]) => Err(Failure::method_not_allowed()),
        _ => Err(Failure::no_such_path()),
    }
}

async fn create(mut call: Call) -> Result<Response<Body>, Failure> {
    authorize(&call.user, "create", "", "")?;
    let representation = representation(&call.accept)?;
    let sent = decode(call.read(&[JSON]).await?)?;
    let dry_run = call.query.get("dryRun").is_some();
    let stored = call.cluster.create(sent, &call.user, dry_run)?;
    one(StatusCode::CREATED, &call, &stored, representation)
}

fn get(call: &Call, name: &str, subresource: &str) -> Result<Response<Body>, Failure> {
    authorize(&call.user, "get", name, subresource)?;
    let representation = representation(&call.accept)?;
    one(StatusCode::OK, call, &call.cluster.registry.get(name)?, representation)
}

fn list(call: &Call) -> Result<Response<Body>, Failure> {
    authorize(&call.user, "list", "", "")?;
    let (representation, selector) = (representation(&call.accept)?, call.query.selector()?);
    let (version, mut objects) = call.cluster.registry.list();
    objects.retain(|object| selector.matches(object));
    let version = version.to_string();
    let document = match representation {
        Representation::Table => {
            table(objects.iter().map(Arc::as_ref), &version, included(call), true, now().0.as_second())
        }
        Representation::Object => json!({
            "kind": "CertificateSigningRequestList",
            "apiVersion": "certificates.k8s.io/v1",
            "metadata": { "resourceVersion": version },
            "items": objects.iter().map(|object| json!(**object)).collect::<Vec<_>>(),
        }),
    };
    json(StatusCode::OK, &document)
}

fn start_watch(call: &Call) -> Result<Response<Body>, Failure> {
    authorize(&call.user, "watch", "", "")?;
    let table = match representation(&call.accept)? {
        Representation::Table => Some(included(call)),
        Representation::Object => None,
    };
    let request = WatchRequest {
        resource_version: call.query.number("resourceVersion")?,
        selector: call.query.selector()?,
        table,
        timeout: call.query.number("timeoutSeconds")?.map(Duration::from_secs),
        initial_events: call.query.is_true("sendInitialEvents"),
    };
    streaming(watch(Arc::clone(&call.cluster), request))
}

async fn replace(mut call: Call, name: &str, subresource: &str) -> Result<Response<Body>, Failure> {
    authorize(&call.user, "update", name, subresource)?;
    let representation = representation(&call.accept)?;
    let sent = decode(call.read(&[JSON]).await?)?;
    let stored = update(&call, name, subresource, &sent)?;
    one(StatusCode::OK, &call, &stored, representation)
}

async fn patch(mut call: Call, name: &str, subresource: &str) -> Result<Response<Body>, Failure> {
    authorize(&call.user, "patch", name, subresource)?;
    let representation = representation(&call.accept)?;
    // status.conditions has no patchStrategy, so for these subresources a strategic merge patch is a merge patch.
    const ACCEPTED: [&str; 2] = ["application/merge-patch+json", "application/strategic-merge-patch+json"];
    let patch = call.read(&ACCEPTED).await?;
    let mut attempt = 1;
    loop {
        let mut document = json!(*call.cluster.registry.get(name)?);
        merge(&mut document, &patch);
        match update(&call, name, subresource, &decode(document)?) {
            // A concurrent update was faster. A patch without a resourceVersion applies to any version.
            Err(failure) if failure.code == 409 && attempt < PATCH_ATTEMPTS => attempt += 1,
            updated => return one(StatusCode::OK, &call, &updated?, representation),
        }
    }
}

fn update(call: &Call, name: &str, subresource: &str, sent: &CertificateSigningRequest) -> Result<Stored, Failure> {
    match subresource {
        "approval" => call.cluster.update_approval(name, sent),
        _ => call.cluster.update_status(name, sent),
    }
}

async fn delete(mut call: Call, name: &str) -> Result<Response<Body>, Failure> {
    authorize(&call.user, "delete", name, "")?;
    let options = call.read(&[JSON]).await?;
    let object = call.cluster.delete(name, options["preconditions"]["uid"].as_str())?;
    json(
        StatusCode::OK,
        &json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Success",
            "details": { "name": name, "group": GROUP, "kind": RESOURCE, "uid": object.metadata.uid },
        }),
    )
}

fn one(
    code: StatusCode,
    call: &Call,
    object: &Stored,
    representation: Representation,
) -> Result<Response<Body>, Failure> {
    let document = match representation {
        Representation::Object => json!(**object),
        Representation::Table => {
            let version = object.metadata.resource_version.clone().unwrap_or_default();
            table([&**object], &version, included(call), true, now().0.as_second())
        }
    };
    json(code, &document)
}

fn included(call: &Call) -> IncludeObject {
    IncludeObject::from_query(call.query.get("includeObject"))
}

fn decode(document: Value) -> Result<CertificateSigningRequest, Failure> {
    serde_json::from_value(document).map_err(|error| {
        Failure::bad_request(format!(
            "the object provided is not a certificates.k8s.io/v1 CertificateSigningRequest: {error}"
        ))
    })
}

/// Applies a merge patch (RFC 7396, section 2).
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let Value::Object(target) = target else { return };
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merge_patches_follow_rfc_7396() {
        let mut target = json!({ "a": "b", "c": { "d": "e", "f": "g" } });
        merge(&mut target, &json!({ "a": "z", "c": { "f": null }, "l": [1], "n": { "x": { "y": null } } }));
        assert_eq!(target, json!({ "a": "z", "c": { "d": "e" }, "l": [1], "n": { "x": {} } }));
    }
}
