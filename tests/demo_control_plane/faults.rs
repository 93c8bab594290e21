//! The faults that the embedded control plane makes on request.

use super::*;

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
    // C13: nobody in tree approves a serving certificate.
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
async fn the_server_is_overloaded_broken_hung_and_away() {
    let control_plane = control_plane::start(options()).await.unwrap();
    let client = bootstrap(&control_plane).await;
    let list = async || requests(&client).list(&ListParams::default()).await;
    list().await.unwrap();

    // C20: the answer carries Retry-After, in the header and in the Status.
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
async fn c07_with_another_client_ca_old_certificates_get_401_and_bootstrap_goes_on() {
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
