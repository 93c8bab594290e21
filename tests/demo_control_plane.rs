//! The embedded control plane with its clients: kube, and kubectl if it is available.

#![allow(clippy::unwrap_used, reason = "a test fails when something unexpected happens")]

use std::collections::BTreeMap;
use std::process::{Child, Command, Output, Stdio};
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
async fn c28_the_approver_denies_and_the_signer_fails_once_each() {
    let control_plane = control_plane::start(options()).await.unwrap();
    let (client, key) = (bootstrap(&control_plane).await, KeyPair::generate().unwrap());
    let create = async |name: &str| {
        let object = request(name, KUBELET, "worker", &[], &key);
        requests(&client).create(&PostParams::default(), &object).await.unwrap();
    };
    control_plane.change_faults(|faults| faults.deny_next = true);
    create("denied").await;
    watch_until(&client, "denied", |object| conditions(object).contains_key("Denied")).await;
    control_plane.change_faults(|faults| faults.fail_next_signing = true);
    create("failed").await;
    let failed = watch_until(&client, "failed", |object| conditions(object).contains_key("Failed")).await;
    assert!(conditions(&failed).contains_key("Approved"));
    create("issued").await;
    watch_until(&client, "issued", |object| leaf_pem(object).is_some()).await;
    assert_eq!(control_plane.faults(), control_plane::Faults::default());
}

#[tokio::test]
async fn c28_the_signers_clock_is_ahead_and_it_drops_a_name() {
    let control_plane = control_plane::start(options()).await.unwrap();
    control_plane.change_faults(|faults| {
        faults.signing_clock_offset_seconds = 3600;
        faults.drop_subject_alternative_name = true;
    });
    let (bootstrapper, key) = (bootstrap(&control_plane).await, KeyPair::generate().unwrap());
    let object = request("serving", SERVING, "worker", &["worker.example", "10.0.0.1"], &key);
    requests(&bootstrapper).create(&PostParams::default(), &object).await.unwrap();
    // C13: no controller in Kubernetes approves serving certificates.
    let approved = json!({ "status": { "conditions": [{ "type": "Approved", "status": "True", "reason": "Test" }] } });
    let admin = admin(&control_plane).await;
    let patched = requests(&admin).patch_approval("serving", &PatchParams::default(), &Patch::Merge(&approved)).await;
    assert!(conditions(&patched.unwrap()).contains_key("Approved"));
    let issued = watch_until(&bootstrapper, "serving", |object| leaf_pem(object).is_some()).await;
    let pem = leaf_pem(&issued).unwrap();
    let (_, block) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap();
    let (_, leaf) = X509Certificate::from_der(&block.contents).unwrap();
    assert!(!leaf.validity().is_valid(), "notBefore is in the future");
    let names = leaf.subject_alternative_name().unwrap().unwrap().value;
    assert_eq!(names.general_names.len(), 1);
    assert_eq!(names.general_names[0].to_string(), "IPAddress(0a:00:00:01)");
}

#[tokio::test]
async fn the_server_can_be_overloaded_failing_hung_and_unreachable() {
    let control_plane = control_plane::start(options()).await.unwrap();
    let client = bootstrap(&control_plane).await;
    let list = async || requests(&client).list(&ListParams::default()).await;
    list().await.unwrap();

    // C20: the response has Retry-After, in the header and in the Status.
    control_plane.change_faults(|faults| {
        faults.too_many_requests = 2;
        faults.retry_after = Some(Duration::from_secs(7));
    });
    let path = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
    let asked = http::Request::get(path).body(kube::client::Body::empty()).unwrap();
    let answer = client.send(asked).await.unwrap();
    assert_eq!((answer.status().as_u16(), answer.headers()["retry-after"].to_str().unwrap()), (429, "7"));
    let kube::Error::Api(status) = list().await.unwrap_err() else { panic!() };
    assert_eq!((status.code, status.details.unwrap().retry_after_seconds), (429, 7));
    list().await.unwrap();

    control_plane.change_faults(|faults| faults.internal_errors = 1);
    assert_eq!(code(list().await.unwrap_err()), 500);
    list().await.unwrap();

    control_plane.change_faults(|faults| faults.hang = true);
    assert!(tokio::time::timeout(Duration::from_millis(300), list()).await.is_err());
    control_plane.change_faults(|faults| faults.hang = false);
    tokio::time::timeout(PATIENCE, list()).await.unwrap().unwrap();

    let url = control_plane.server_url();
    let mut events = requests(&client).watch(&WatchParams::default(), "0").await.unwrap().boxed();
    control_plane.go_away().await;
    let cut = tokio::time::timeout(PATIENCE, events.next()).await.unwrap();
    assert!(!matches!(cut, Some(Ok(_))), "{cut:?}");
    assert!(matches!(list().await.unwrap_err(), kube::Error::Service(_) | kube::Error::HyperError(_)));
    control_plane.come_back().await;
    assert_eq!(control_plane.server_url(), url);
    list().await.unwrap();
}

#[tokio::test]
async fn c07_with_a_new_client_ca_old_certificates_get_401_and_bootstrap_works() {
    let control_plane = control_plane::start(options()).await.unwrap();
    let pair = enrol(&control_plane, "csr-1", "worker").await;
    let node = client(&kubeconfig(&control_plane, &pair)).await;
    requests(&node).list(&ListParams::default()).await.unwrap();
    control_plane.replace_client_certificate_authority().unwrap();
    assert_eq!(code(requests(&node).list(&ListParams::default()).await.unwrap_err()), 401);
    let newcomer = client(&kubeconfig(&control_plane, &pair)).await;
    assert_eq!(code(requests(&newcomer).list(&ListParams::default()).await.unwrap_err()), 401);
    let pair = enrol(&control_plane, "csr-2", "worker").await;
    let node = client(&kubeconfig(&control_plane, &pair)).await;
    requests(&node).list(&ListParams::default()).await.unwrap();
    requests(&admin(&control_plane).await).delete("csr-1", &DeleteParams::default()).await.unwrap();
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

/// kubectl with a temporary home directory.
struct Kubectl {
    home: tempfile::TempDir,
}

/// A child that is killed when the test ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Kubectl {
    fn with(kubeconfig: &str) -> Self {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("config"), kubeconfig).unwrap();
        Self { home }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = pintle_test_support::kubectl();
        command.args(arguments).env("HOME", self.home.path()).env("KUBECONFIG", self.home.path().join("config"));
        command.env("KUBECACHEDIR", self.home.path().join("cache"));
        command
    }

    async fn run(&self, arguments: &[&str]) -> String {
        let mut command = self.command(arguments);
        let Output { status, stdout, stderr } =
            tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let stderr = String::from_utf8_lossy(&stderr);
        assert!(status.success(), "kubectl {arguments:?}: {stderr}");
        String::from_utf8(stdout).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unmodified_kubectl_lists_describes_approves_watches_and_deletes() {
    let control_plane = control_plane::start(Options { manual_approval: true, ..options() }).await.unwrap();
    let kubectl = Kubectl::with(&control_plane.admin_kubeconfig().unwrap());
    let (client, key) = (bootstrap(&control_plane).await, KeyPair::generate().unwrap());
    let mut object = request("csr-1", KUBELET, "worker", &[], &key);
    object.spec.expiration_seconds = Some(86_400);
    requests(&client).create(&PostParams::default(), &object).await.unwrap();

    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let table = kubectl.run(&["get", "csr"]).await;
    let lines: Vec<_> = table.lines().collect();
    assert_eq!(words(lines[0]), ["NAME", "AGE", "SIGNERNAME", "REQUESTOR", "REQUESTEDDURATION", "CONDITION"]);
    let row = words(lines[1]);
    assert_eq!((row[0].as_str(), row[2].as_str()), ("csr-1", KUBELET));
    assert!(row[3].starts_with("system:bootstrap:"));
    assert_eq!((row[4].as_str(), row[5].as_str()), ("24h", "Pending"));

    let described = kubectl.run(&["describe", "csr", "csr-1"]).await;
    assert!(described.contains("system:node:worker") && described.contains("Pending"), "{described}");

    let mut watching = Running(kubectl.command(&["get", "csr", "-w"]).stdout(Stdio::piped()).spawn().unwrap());
    let reader = std::io::BufReader::new(watching.0.stdout.take().unwrap());
    let (sender, mut lines) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::BufRead::lines(reader).map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    let mut line = async |part: &str| {
        let found = async {
            loop {
                let line = lines.recv().await.unwrap();
                if line.contains(part) {
                    return line;
                }
            }
        };
        tokio::time::timeout(PATIENCE, found).await.unwrap()
    };
    line("Pending").await;
    let approved = kubectl.run(&["certificate", "approve", "csr-1"]).await;
    assert_eq!(approved.trim(), "certificatesigningrequest.certificates.k8s.io/csr-1 approved");
    line("Approved,Issued").await;
    drop(watching);

    let issued = watch_until(&client, "csr-1", |object| leaf_pem(object).is_some()).await;
    assert_eq!(conditions(&issued)["Approved"].0, "KubectlApprove");
    let printed = kubectl.run(&["get", "csr", "csr-1", "-o", "jsonpath={.status.certificate}"]).await;
    assert_eq!(STANDARD.decode(printed).unwrap(), leaf_pem(&issued).unwrap().into_bytes());

    let whoami = kubectl.run(&["auth", "whoami"]).await;
    assert!(whoami.contains("kubernetes-admin") && whoami.contains("X509SHA256="), "{whoami}");
    let may = kubectl.run(&["auth", "can-i", "create", "certificatesigningrequests.certificates.k8s.io"]).await;
    assert_eq!(may.trim(), "yes");
    kubectl.run(&["delete", "csr", "csr-1"]).await;
    assert!(control_plane.certificate_signing_requests().is_empty());

    requests(&client).create(&PostParams::default(), &request("csr-2", KUBELET, "worker", &[], &key)).await.unwrap();
    kubectl.run(&["certificate", "deny", "csr-2"]).await;
    assert!(kubectl.run(&["get", "csr"]).await.contains("Denied"));

    // The node's own identity according to kubectl.
    let node = control_plane.client_kubeconfig("system:node:a", &["system:nodes"], Duration::from_secs(60)).unwrap();
    let node = Kubectl::with(&node);
    assert!(node.run(&["auth", "whoami"]).await.contains("system:node:a"));
    assert!(node.run(&["get", "csr", "csr-2"]).await.contains("Denied"));
}
