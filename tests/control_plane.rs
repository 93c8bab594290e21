//! The test bed itself: its control plane is real, and is removed afterwards.

use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use pintle_test_support::{
    BootstrapCredential, CertificatePair, ControlPlane, Kubelet, KubeletOptions, Options, ScratchDirectory, eventually,
};
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(120);

/// Starting a control plane takes seconds, so the tests of this file share one. A value in a `static` is never
/// dropped: the kernel kills its processes together with this one, and a cleanup process removes its files.
static SHARED: LazyLock<ControlPlane> = LazyLock::new(|| ControlPlane::start(Options::default()));

/// Generates the key NODE.key and a PKCS#10 request with openssl; returns the request in base64.
fn request(scratch: &ScratchDirectory, node: &str) -> String {
    let (key, request) = (scratch.join(format!("{node}.key")), scratch.join(format!("{node}.csr")));
    let status = Command::new("openssl")
        .args(["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"])
        .args(["-subj", &format!("/O=system:nodes/CN=system:node:{node}")])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&request)
        .stderr(std::process::Stdio::null())
        .status()
        .expect("openssl starts");
    assert!(status.success());
    base64(&request)
}

fn base64(file: &Path) -> String {
    let output = Command::new("openssl").args(["base64", "-A", "-in"]).arg(file).output().expect("openssl starts");
    String::from_utf8(output.stdout).expect("base64 is text")
}

/// Requests a node's certificate with openssl and kubectl.
fn submit(control_plane: &ControlPlane, scratch: &ScratchDirectory, kubeconfig: &Path, node: &str) {
    let request = request(scratch, node);
    let object = json!({
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "CertificateSigningRequest",
        "metadata": {"name": node},
        "spec": {
            "request": request,
            "signerName": "kubernetes.io/kube-apiserver-client-kubelet",
            "usages": ["digital signature", "client auth"],
        },
    });
    let file = scratch.write(format!("{node}.json"), object.to_string());
    // Bootstrap credentials may not read the schema that kubectl would validate with.
    let arguments = ["create", "--validate=false", "-f", file.to_str().expect("UTF-8")];
    control_plane.try_kubectl_as(kubeconfig, &arguments).expect("the request is accepted");
}

/// Waits for the certificate of a request and writes the pair.
fn collect(control_plane: &ControlPlane, scratch: &ScratchDirectory, node: &str) -> CertificatePair {
    let certificate = eventually("the certificate is issued", DEADLINE, || control_plane.request(node)?.certificate);
    let encoded = scratch.write(format!("{node}.b64"), certificate);
    let output =
        Command::new("openssl").args(["base64", "-d", "-A", "-in"]).arg(encoded).output().expect("openssl starts");
    CertificatePair {
        certificate: scratch.write(format!("{node}.crt"), output.stdout),
        key: scratch.join(format!("{node}.key")),
    }
}

fn enrol(control_plane: &ControlPlane, scratch: &ScratchDirectory, kubeconfig: &Path, node: &str) -> CertificatePair {
    submit(control_plane, scratch, kubeconfig, node);
    collect(control_plane, scratch, node)
}

/// SHA-256 of the certificate's DER, as in the API server's credential ID.
fn fingerprint(certificate: &Path) -> String {
    let arguments = ["x509", "-noout", "-fingerprint", "-sha256", "-in"];
    let output = Command::new("openssl").args(arguments).arg(certificate).output().expect("openssl starts");
    let line = String::from_utf8(output.stdout).expect("text");
    line.split_once('=').expect("a fingerprint").1.trim().replace(':', "").to_lowercase()
}

#[test]
fn every_bootstrap_credential_obtains_a_certificate() {
    let scratch = ScratchDirectory::new();
    for (credential, requester) in [
        (BootstrapCredential::SecretToken, "system:bootstrap:"),
        (BootstrapCredential::StaticToken, "static-bootstrap"),
        (BootstrapCredential::ClientCertificate, "bootstrap-"),
    ] {
        let node = format!("{credential:?}").to_lowercase();
        let kubeconfig = SHARED.bootstrap_kubeconfig(credential);
        let pair = enrol(&SHARED, &scratch, &kubeconfig, &node);

        let request = SHARED.request(&node).expect("the request is there");
        assert!(request.username.starts_with(requester), "{}", request.username);
        assert!(request.has_condition("Approved") && !request.is_live());

        let identity = SHARED.who_is(&pair).expect("the API server knows the node");
        assert_eq!(identity.username, format!("system:node:{node}"));
        assert!(identity.groups.iter().any(|group| group == "system:nodes"));
        assert_eq!(identity.certificate_sha256.as_ref(), Some(&fingerprint(&pair.certificate)));

        // The audit log also says who requested what, with which credential.
        let events = SHARED.audit_events();
        assert!(events.iter().any(|event| {
            event.username == identity.username && event.certificate_sha256 == identity.certificate_sha256
        }));
        assert!(events.iter().any(|event| {
            event.username == request.username
                && (event.verb.as_str(), event.resource.as_str(), event.code)
                    == ("create", "certificatesigningrequests", 201)
        }));

        let refused = SHARED.try_kubectl_as(&kubeconfig, &["get", "nodes"]);
        assert!(refused.expect_err("a bootstrap credential may not").contains("Forbidden"));
    }
}

#[test]
fn a_kubelet_becomes_ready_with_a_given_pair_and_with_one_that_it_rotates() {
    let scratch = ScratchDirectory::new();
    let bootstrap = SHARED.bootstrap_kubeconfig(BootstrapCredential::SecretToken);
    let pair = enrol(&SHARED, &scratch, &bootstrap, "by-hand");
    let mut by_hand = Kubelet::start(&SHARED, &KubeletOptions::new("by-hand", SHARED.kubeconfig_for(&pair)));

    let mut options = KubeletOptions::new("its-own", scratch.join("kubeconfig"));
    options.bootstrap_kubeconfig = Some(bootstrap);
    options.cert_dir = Some(scratch.join("pki"));
    options.rotate_certificates = true;
    let mut its_own = Kubelet::start(&SHARED, &options);

    by_hand.wait_ready(DEADLINE);
    its_own.wait_ready(DEADLINE);
    assert!(scratch.join("pki/kubelet-client-current.pem").is_symlink());
    let identity = SHARED.who_is_in(&scratch.join("kubeconfig")).expect("the API server knows the node");
    assert_eq!(identity.username, "system:node:its-own");

    let first = eventually("the kubelet has a Lease", DEADLINE, || by_hand.lease_renew_time());
    eventually("the Lease is renewed", DEADLINE, || by_hand.lease_renew_time().filter(|time| *time > first));
}

#[test]
fn servers_can_be_paused_and_restarted_and_everything_is_removed_on_drop() {
    let scratch = ScratchDirectory::new();
    let options = Options { manual_approval: true, cluster_signing_duration: "30s".into(), ..Options::default() };
    let control_plane = ControlPlane::start(options);
    let bootstrap = control_plane.bootstrap_kubeconfig(BootstrapCredential::StaticToken);
    for node in ["approved", "denied"] {
        submit(&control_plane, &scratch, &bootstrap, node);
        assert!(control_plane.request(node).expect("it is there").is_live());
    }

    control_plane.api_server().pause();
    assert!(control_plane.try_kubectl(&["get", "--raw=/readyz", "--request-timeout=1s"]).is_err());
    control_plane.api_server().resume();
    control_plane.api_server().kill();
    assert!(control_plane.try_kubectl(&["get", "--raw=/readyz"]).is_err());
    control_plane.api_server().start();
    control_plane.wait_until_ready();

    control_plane.approve("approved");
    control_plane.deny("denied");
    eventually("the approved one is issued", DEADLINE, || control_plane.request("approved")?.certificate);
    assert!(!control_plane.request("denied").expect("it is there").is_live());

    // As when a cluster's CA is replaced: an unexpired certificate is rejected, and a new one can be issued.
    let (before, lifetime) = (control_plane.authority(), Duration::from_secs(3600));
    let before = before.issue_client("system:node:before", &["system:nodes"], lifetime);
    assert_eq!(control_plane.who_is(&before).expect("a node").username, "system:node:before");
    control_plane.replace_client_authority();
    let refused = control_plane.who_is(&before).expect_err("the CA was replaced");
    assert!(refused.contains("Unauthorized"), "{refused}");
    submit(&control_plane, &scratch, &bootstrap, "after");
    control_plane.approve("after");
    let after = collect(&control_plane, &scratch, "after");
    assert_eq!(control_plane.who_is(&after).expect("a node").username, "system:node:after");

    let processes: Vec<u32> =
        [control_plane.api_server(), control_plane.controller_manager()].iter().filter_map(|it| it.id()).collect();
    assert_eq!(processes.len(), 2);
    let directory = control_plane.directory().to_owned();
    drop(control_plane);
    assert!(!directory.exists());
    for process in processes {
        assert!(!Path::new(&format!("/proc/{process}")).exists());
    }
}
