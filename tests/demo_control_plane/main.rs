//! The embedded control plane with its clients: kube, and kubectl if it is available.

#![allow(clippy::unwrap_used, reason = "a test fails when something unexpected happens")]

mod faults;
mod kubectl;

use std::collections::BTreeMap;
use std::time::Duration;

use aws_lc_rs::digest;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::ByteString;
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use pintle::demo::control_plane::{self, ControlPlane, Observation, Options};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use serde_json::json;
use x509_parser::prelude::{FromDer as _, X509Certificate};

const KUBELET: &str = "kubernetes.io/kube-apiserver-client-kubelet";
const SERVING: &str = "kubernetes.io/kubelet-serving";
/// Longer than anything here takes; turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(30);

fn options() -> Options {
    Options { approval_delay: Duration::ZERO, ..Options::default() }
}

async fn client(kubeconfig: &str) -> Client {
    let kubeconfig = Kubeconfig::from_yaml(kubeconfig).unwrap();
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    config.default_retry = false; // The test checks the server's own responses.
    Client::try_from(config).unwrap()
}

async fn bootstrap(control_plane: &ControlPlane) -> Client {
    client(&control_plane.bootstrap_kubeconfig()).await
}

async fn admin(control_plane: &ControlPlane) -> Client {
    client(&control_plane.admin_kubeconfig().unwrap()).await
}

fn requests(client: &Client) -> Api<CertificateSigningRequest> {
    Api::all(client.clone())
}

/// A request for a node's certificate with these names.
fn request(
    name: &str,
    signer: &str,
    node: &str,
    alternative_names: &[&str],
    key: &KeyPair,
) -> CertificateSigningRequest {
    let names: Vec<String> = alternative_names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(DnType::CommonName, format!("system:node:{node}"));
    let pem = params.serialize_request(key).unwrap().pem().unwrap();
    let usage = if signer == SERVING { "server auth" } else { "client auth" };
    let mut object = CertificateSigningRequest::default();
    object.metadata.name = Some(name.to_owned());
    object.spec = CertificateSigningRequestSpec {
        request: ByteString(pem.into_bytes()),
        signer_name: signer.to_owned(),
        usages: Some(vec!["digital signature".to_owned(), usage.to_owned()]),
        ..CertificateSigningRequestSpec::default()
    };
    object
}

fn leaf_pem(object: &CertificateSigningRequest) -> Option<String> {
    let pem = object.status.as_ref()?.certificate.as_ref()?;
    Some(String::from_utf8(pem.0.clone()).unwrap())
}

fn conditions(object: &CertificateSigningRequest) -> BTreeMap<String, (String, String)> {
    let conditions = object.status.clone().unwrap_or_default().conditions.unwrap_or_default();
    let said = |text: Option<String>| text.unwrap_or_default();
    conditions.into_iter().map(|each| (each.type_, (said(each.reason), said(each.message)))).collect()
}

/// Watches a request until `wanted` returns true for it.
async fn watch_until(
    client: &Client,
    name: &str,
    wanted: impl Fn(&CertificateSigningRequest) -> bool,
) -> CertificateSigningRequest {
    let params = WatchParams::default().fields(&format!("metadata.name={name}"));
    let watching = async {
        let mut events = requests(client).watch(&params, "0").await.unwrap().boxed();
        while let Some(event) = events.try_next().await.unwrap() {
            match event {
                WatchEvent::Added(object) | WatchEvent::Modified(object) if wanted(&object) => return object,
                _ => {}
            }
        }
        panic!("the watch ended");
    };
    tokio::time::timeout(PATIENCE, watching).await.unwrap()
}

async fn enrol(control_plane: &ControlPlane, name: &str, node: &str) -> (String, String) {
    let (client, key) = (bootstrap(control_plane).await, KeyPair::generate().unwrap());
    let object = request(name, KUBELET, node, &[], &key);
    requests(&client).create(&PostParams::default(), &object).await.unwrap();
    let issued = watch_until(&client, name, |object| leaf_pem(object).is_some()).await;
    (leaf_pem(&issued).unwrap(), key.serialize_pem())
}

/// A kubeconfig with an issued pair.
fn kubeconfig(control_plane: &ControlPlane, (certificate, key): &(String, String)) -> String {
    let user =
        json!({ "client-certificate-data": STANDARD.encode(certificate), "client-key-data": STANDARD.encode(key) });
    let authority = STANDARD.encode(control_plane.certificate_authority_pem());
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{
            "name": "c",
            "cluster": { "server": control_plane.server_url(), "certificate-authority-data": authority },
        }],
        "users": [{ "name": "u", "user": user }],
        "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
        "current-context": "x",
    })
    .to_string()
}

fn code(error: kube::Error) -> u16 {
    match error {
        kube::Error::Api(status) => status.code,
        other => panic!("not a response: {other:?}"),
    }
}

#[tokio::test]
async fn a_bootstrap_token_enrols_a_node_and_its_certificate_authenticates() {
    let control_plane = control_plane::start(options()).await.unwrap();
    let mut observations = control_plane.observe();
    let pair = enrol(&control_plane, "csr-1", "worker").await;

    let (_, block) = x509_parser::pem::parse_x509_pem(pair.0.as_bytes()).unwrap();
    let (_, leaf) = X509Certificate::from_der(&block.contents).unwrap();
    assert_eq!(leaf.subject().to_string(), "O=system:nodes, CN=system:node:worker");
    assert!(leaf.extended_key_usage().unwrap().unwrap().value.client_auth);
    assert!(leaf.key_usage().unwrap().unwrap().value.digital_signature());
    assert!(!leaf.is_ca());
    let life = leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp();
    assert_eq!(life, 8760 * 3600);
    assert_eq!(pair.0.matches("BEGIN CERTIFICATE").count(), 1);

    let stored = control_plane.certificate_signing_requests().remove(0);
    assert_eq!(
        conditions(&stored)["Approved"],
        ("AutoApproved".to_owned(), "Auto approving kubelet client certificate after SubjectAccessReview.".to_owned())
    );
    assert!(stored.spec.username.as_deref().unwrap().starts_with("system:bootstrap:"));
    assert_eq!(stored.spec.groups.unwrap(), ["system:bootstrappers", "system:authenticated"]);

    let node = client(&kubeconfig(&control_plane, &pair)).await;
    let who: SelfSubjectReview =
        Api::all(node.clone()).create(&PostParams::default(), &SelfSubjectReview::default()).await.unwrap();
    let user = who.status.unwrap().user_info.unwrap();
    assert_eq!(user.username.as_deref(), Some("system:node:worker"));
    assert_eq!(user.groups.unwrap(), ["system:nodes", "system:authenticated"]);
    let digest = digest::digest(&digest::SHA256, &block.contents);
    let digest: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let credential_id = format!("X509SHA256={digest}");
    assert_eq!(user.extra.unwrap()["authentication.kubernetes.io/credential-id"], std::slice::from_ref(&credential_id));

    let mut seen = Vec::new();
    while let Ok(observation) = observations.try_recv() {
        seen.push(observation);
    }
    let position = |wanted: fn(&Observation) -> bool| seen.iter().position(wanted).unwrap();
    let created = position(|each| matches!(each, Observation::Created { .. }));
    let approved = position(|each| matches!(each, Observation::Approved { .. }));
    let issued = position(|each| matches!(each, Observation::Issued { .. }));
    assert!(created < approved && approved < issued, "{seen:?}");
    let Observation::Issued { serial, .. } = &seen[issued] else { unreachable!() };
    assert!(seen.contains(&Observation::Authenticated {
        user: "system:node:worker".to_owned(),
        serial: Some(serial.clone()),
        credential_id: Some(credential_id),
    }));

    // A node may renew its own certificate and no other, and may not delete requests.
    let key = KeyPair::generate().unwrap();
    let renewal = request("csr-2", KUBELET, "worker", &[], &key);
    requests(&node).create(&PostParams::default(), &renewal).await.unwrap();
    let renewed = watch_until(&node, "csr-2", |object| leaf_pem(object).is_some()).await;
    assert!(conditions(&renewed)["Approved"].1.starts_with("Auto approving self kubelet client certificate"));
    let other = request("csr-3", KUBELET, "other", &[], &key);
    assert_eq!(code(requests(&node).create(&PostParams::default(), &other).await.unwrap_err()), 403);
    assert_eq!(code(requests(&node).delete("csr-2", &DeleteParams::default()).await.unwrap_err()), 403);
    let patch = Patch::Merge(json!({ "status": {} }));
    let patched = requests(&node).patch_approval("csr-2", &PatchParams::default(), &patch).await;
    assert_eq!(code(patched.unwrap_err()), 403);
}

#[tokio::test]
async fn requests_are_validated_as_by_the_api_server() {
    let control_plane = control_plane::start(options()).await.unwrap();
    let (client, key) = (bootstrap(&control_plane).await, KeyPair::generate().unwrap());
    let (api, post) = (requests(&client), PostParams::default());
    let good = request("csr-1", KUBELET, "worker", &[], &key);
    api.create(&post, &good).await.unwrap();
    assert_eq!(code(api.create(&post, &good).await.unwrap_err()), 409);
    assert_eq!(code(api.get("absent").await.unwrap_err()), 404);

    let refused = async |change: fn(&mut CertificateSigningRequest)| {
        let mut object = good.clone();
        object.metadata.name = Some("csr-2".to_owned());
        change(&mut object);
        code(api.create(&post, &object).await.unwrap_err())
    };
    // C24: the API server's minimum.
    assert_eq!(refused(|object| object.spec.expiration_seconds = Some(599)).await, 422);
    assert_eq!(refused(|object| object.spec.usages = None).await, 422);
    assert_eq!(refused(|object| object.spec.usages = Some(vec!["swimming".to_owned()])).await, 422);
    assert_eq!(refused(|object| object.spec.signer_name = "kubelet".to_owned()).await, 422);
    assert_eq!(refused(|object| object.spec.request = ByteString(b"not PEM".to_vec())).await, 422);
    // A flipped bit in the signature: the request does not prove possession.
    let flipped = refused(|object| {
        let mut block = pem::parse(&object.spec.request.0).unwrap().into_contents();
        *block.last_mut().unwrap() ^= 1;
        object.spec.request = ByteString(pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", block)).into_bytes());
    });
    assert_eq!(flipped.await, 422);

    // C16: with usages that the signer rejects, a request is not approved automatically; if approved manually, it
    // gets Failed.
    let mut odd = request("odd", KUBELET, "worker", &[], &key);
    odd.spec.usages.as_mut().unwrap().push("server auth".to_owned());
    api.create(&post, &odd).await.unwrap();
    let approved = json!({ "status": { "conditions": [{ "type": "Approved", "status": "True" }] } });
    let admin = admin(&control_plane).await;
    requests(&admin).patch_approval("odd", &PatchParams::default(), &Patch::Merge(&approved)).await.unwrap();
    let failed = watch_until(&client, "odd", |object| conditions(object).contains_key("Failed")).await;
    assert_eq!(conditions(&failed)["Failed"].0, "SignerValidationFailure");
    assert!(leaf_pem(&failed).is_none());

    // Approved cannot become Denied.
    let denied = json!({ "status": { "conditions": [
        { "type": "Approved", "status": "True" }, { "type": "Denied", "status": "True" },
    ] } });
    let both = requests(&admin).patch_approval("odd", &PatchParams::default(), &Patch::Merge(&denied)).await;
    assert_eq!(code(both.unwrap_err()), 422);
}

#[tokio::test]
async fn requests_without_a_valid_credential_get_401_with_a_date() {
    let control_plane = control_plane::start(options()).await.unwrap();
    let mut kubeconfig: serde_json::Value = serde_saphyr::from_str(&control_plane.bootstrap_kubeconfig()).unwrap();
    kubeconfig["users"][0]["user"] = json!({ "token": "000000.0000000000000000" });
    let wrong = client(&kubeconfig.to_string()).await;
    assert_eq!(code(requests(&wrong).list(&ListParams::default()).await.unwrap_err()), 401);
    kubeconfig["users"][0]["user"] = json!({});
    let anonymous = client(&kubeconfig.to_string()).await;
    assert_eq!(code(requests(&anonymous).list(&ListParams::default()).await.unwrap_err()), 401);
    assert_eq!(anonymous.apiserver_version().await.unwrap().minor, "36");

    let request = http::Request::get("/apis/certificates.k8s.io/v1").body(kube::client::Body::empty()).unwrap();
    let answer = anonymous.send(request).await.unwrap();
    assert_eq!((answer.status().as_u16(), answer.headers().contains_key("date")), (401, true));

    // A user that authenticates, but has no role.
    let pair = control_plane.client_kubeconfig("jane", &["developers"], Duration::from_secs(60)).unwrap();
    assert_eq!(code(requests(&client(&pair).await).list(&ListParams::default()).await.unwrap_err()), 403);
}

#[tokio::test]
async fn an_expired_certificate_gets_401_on_old_and_new_connections() {
    let options = Options { cluster_signing_duration: Duration::from_secs(3), ..options() };
    let control_plane = control_plane::start(options).await.unwrap();
    let pair = enrol(&control_plane, "csr-1", "worker").await;
    let kubeconfig = kubeconfig(&control_plane, &pair);
    let node = client(&kubeconfig).await;
    requests(&node).list(&ListParams::default()).await.unwrap();
    let expired = async {
        loop {
            match requests(&node).list(&ListParams::default()).await {
                Ok(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                Err(error) => return code(error),
            }
        }
    };
    assert_eq!(tokio::time::timeout(PATIENCE, expired).await.unwrap(), 401);
    let newcomer = client(&kubeconfig).await;
    assert_eq!(code(requests(&newcomer).list(&ListParams::default()).await.unwrap_err()), 401);
}

#[tokio::test]
async fn watches_resume_from_a_resource_version_and_end_after_their_timeout() {
    let control_plane = control_plane::start(Options { manual_approval: true, ..options() }).await.unwrap();
    let (client, key) = (bootstrap(&control_plane).await, KeyPair::generate().unwrap());
    let api = requests(&client);
    api.create(&PostParams::default(), &request("csr-1", KUBELET, "a", &[], &key)).await.unwrap();
    let list = api.list(&ListParams::default()).await.unwrap();
    assert_eq!(list.items.len(), 1);
    let version = list.metadata.resource_version.unwrap();
    api.create(&PostParams::default(), &request("csr-2", KUBELET, "b", &[], &key)).await.unwrap();
    assert!(control_plane.delete_certificate_signing_request("csr-1"));
    assert!(!control_plane.delete_certificate_signing_request("csr-1"));

    let params = WatchParams::default().timeout(1);
    let events: Vec<_> = api.watch(&params, &version).await.unwrap().try_collect().await.unwrap();
    let seen: Vec<_> = events
        .iter()
        .map(|event| match event {
            WatchEvent::Added(object) => ("added", object.metadata.name.as_deref().unwrap()),
            WatchEvent::Deleted(object) => ("deleted", object.metadata.name.as_deref().unwrap()),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(seen, [("added", "csr-2"), ("deleted", "csr-1")]);
    let by_name = ListParams::default().fields("metadata.name=csr-1");
    assert!(api.list(&by_name).await.unwrap().items.is_empty());
}

#[tokio::test]
async fn every_key_algorithm_of_the_agent_is_signed() {
    // C17
    let control_plane = control_plane::start(options()).await.unwrap();
    let client = bootstrap(&control_plane).await;
    let algorithms = [
        ("p256", &rcgen::PKCS_ECDSA_P256_SHA256),
        ("p384", &rcgen::PKCS_ECDSA_P384_SHA384),
        ("ed25519", &rcgen::PKCS_ED25519),
        ("rsa", &rcgen::PKCS_RSA_SHA256),
    ];
    for (name, algorithm) in algorithms {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let object = request(name, KUBELET, "worker", &[], &key);
        requests(&client).create(&PostParams::default(), &object).await.unwrap();
        let issued = watch_until(&client, name, |object| leaf_pem(object).is_some()).await;
        let pair = (leaf_pem(&issued).unwrap(), key.serialize_pem());
        let node = self::client(&kubeconfig(&control_plane, &pair)).await;
        requests(&node).get(name).await.unwrap();
    }
}
