//! An unmodified kubelet through the credential proxy, with its key in a device.

mod device;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use device::served::Served;
use device::{DEADLINE, Node, events, tpm_plugin};
use jiff::Timestamp;
use pintle_test_support::{
    AuditEvent, ControlPlane, Kubelet, KubeletOptions, Options, ScratchDirectory, Swtpm, TestProcess, Token,
    TokenModule, eventually,
};

/// Certificates' lifetime: short, so that connections with an old one are rejected during the test.
const LIFE: &str = "40s";
/// Interval between rotations. A scheduled rotation, at 70 % of the lifetime, never comes first. Since a kubelet
/// renews its Lease every 10 s, rotations fall at different times between two renewals.
const PACE: Duration = Duration::from_secs(8);
/// Short in comparison, so that each certificate is mostly used alone.
const DRAIN: &str = "4s";
/// A Lease renewal after more than this is late, though still within half of the Lease's 40 s.
const LATE: Duration = Duration::from_secs(18);
/// The rotation during which a watch is open.
const WATCHED: usize = 3;
/// Errors in the kubelet's log, in lower case: from client-go's Lease controller, and from an API server that rejects
/// the certificate.
const COMPLAINTS: [&str; 5] =
    ["failed to update lease", "failed to update node lease", "failed to ensure lease", "unauthorized", "x509:"];

/// The number of rotations in a test.
fn rotations() -> usize {
    std::env::var("PINTLE_TEST_ROTATIONS").ok().and_then(|text| text.parse().ok()).unwrap_or(20)
}

/// The node's requests by certificate: the number of Lease renewals, and of other requests.
fn requests_by_certificate(events: &[AuditEvent], user: &str) -> BTreeMap<String, (usize, usize)> {
    let mut counts: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    // Without pintle's own requests, which do not go through the proxy.
    for event in events.iter().filter(|event| event.username == user && !event.user_agent.starts_with("pintle")) {
        let certificate = event.certificate_sha256.clone().expect("a node has a certificate");
        let count = counts.entry(certificate).or_default();
        if event.resource == "leases" { count.0 += 1 } else { count.1 += 1 }
    }
    counts
}

/// SHA-256 of every certificate that the cluster has issued, as in a credential ID.
fn issued(cluster: &ControlPlane) -> BTreeSet<String> {
    let requests = cluster.requests().into_iter().filter_map(|request| request.certificate);
    let digest = |certificate: String| {
        let text = BASE64_STANDARD.decode(certificate).expect("base64");
        let leaf = pem::parse(text).expect("PEM");
        digest(&SHA256, leaf.contents()).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    };
    requests.map(digest).collect()
}

/// kubectl with the kubelet's kubeconfig has the node's permissions.
fn kubectl_is_the_node(cluster: &ControlPlane, served: &Served) {
    let (kubeconfig, name) = (served.kubeconfig(), served.node.name.clone());
    let who = cluster.who_is_in(&kubeconfig).expect("known");
    assert_eq!(who.username, format!("system:node:{name}"));
    let got = cluster.try_kubectl_as(&kubeconfig, &["get", "node", &name, "-o", "name"]).expect("its own node");
    assert_eq!(got.trim(), format!("node/{name}"));
    assert!(cluster.try_kubectl_as(&kubeconfig, &["get", "secrets", "-A"]).is_err(), "a node may not");
}

/// Starts a watch with the kubelet's kubeconfig.
fn watch_node(cluster: &ControlPlane, served: &Served) -> TestProcess {
    let columns = "jsonpath=<{.metadata.annotations.watched}>{\"\\n\"}";
    let arguments = ["get", "node", &served.node.name, "--watch", "-o", columns];
    let watch = cluster.kubectl_command(&served.kubeconfig(), &arguments).start();
    eventually("kubectl watches", DEADLINE, || watch.output().contains("<>").then_some(()));
    watch
}

/// Checks that the watch started before a rotation continues after it.
fn watch_goes_on(cluster: &ControlPlane, served: &Served, watch: &mut TestProcess) {
    cluster.kubectl(&["annotate", "node", &served.node.name, "watched=across"]);
    eventually("the watch shows what came after the rotation", DEADLINE, || {
        watch.output().contains("<across>").then_some(())
    });
    // It ends when draining ends: `kubectl get --watch` does not restart a watch, and exits successfully.
    let status = watch.wait(DEADLINE);
    assert!(status.success(), "{status:?}: {}", watch.output());
}

/// Checks everything that a kubelet needs from the proxy across the given number of rotations.
fn a_kubelet_works_across_rotations(cluster: &ControlPlane, served: &Served) {
    let rotations = rotations();
    let mut agent = served.node.start();
    agent.wait_for_log("the proxy uses the first certificate", DEADLINE, |line| line["event"] == "proxy_swapped");
    let mut kubelet = Kubelet::start(cluster, &KubeletOptions::new(served.node.name.as_str(), served.kubeconfig()));
    kubelet.wait_ready(DEADLINE);
    eventually("it has a Lease", DEADLINE, || kubelet.lease_renew_time());
    kubectl_is_the_node(cluster, served);

    // From here on nothing may fail.
    let (quiet, began) = (kubelet.process().output().len(), Timestamp::now());
    let (swapped, start) = (events(&agent, "proxy_swapped"), Instant::now());
    for rotation in 1..=rotations {
        std::thread::sleep((PACE * rotation as u32).saturating_sub(start.elapsed()));
        let mut watch = (rotation == WATCHED).then(|| watch_node(cluster, served));
        let (rotated, said) = served.node.pintle(&["rotate", "--wait"]);
        assert!(rotated, "{said}\n{}", agent.output());
        assert!(kubelet.is_ready(), "{}", kubelet.last_lines());
        if let Some(watch) = &mut watch {
            watch_goes_on(cluster, served, watch);
        }
        agent.process().assert_running();
        kubelet.process().assert_running();
    }
    eventually("the kubelet has used the last certificate", DEADLINE, || {
        let held = served.node.status()?["fingerprint"].as_str()?.to_owned();
        requests_by_certificate(&cluster.audit_events(), &user(served)).contains_key(&held).then_some(())
    });
    assert!(kubelet.is_ready(), "{}", kubelet.last_lines());
    assert_eq!(events(&agent, "proxy_swapped") - swapped, rotations, "no rotation was scheduled");

    let said = kubelet.process().output()[quiet..].to_owned();
    let complaints: Vec<&str> = said
        .lines()
        .filter(|line| COMPLAINTS.iter().any(|complaint| line.to_lowercase().contains(complaint)))
        .collect();
    assert_eq!(complaints, Vec::<&str>::new());
    audit_shows_the_node_alone(cluster, served, began, rotations);
    let status = served.node.status().expect("the agent answers");
    println!("{:#}", status["proxy"]);
}

/// Checks the API server's audit log: all node requests since `began` succeeded.
fn audit_shows_the_node_alone(cluster: &ControlPlane, served: &Served, began: Timestamp, rotations: usize) {
    let user = user(served);
    let log = cluster.audit_events();
    let by_certificate = requests_by_certificate(&log, &user);
    println!("certificate: Lease renewals, other requests through the proxy: {by_certificate:#?}");
    // Every certificate issued has been used for requests.
    let renewing = by_certificate.values().filter(|(leases, _)| *leases > 0).count();
    let (issued, used) = (issued(cluster), by_certificate.into_keys().collect::<BTreeSet<_>>());
    assert_eq!(used, issued);
    assert!(used.len() > rotations && renewing > rotations / 2, "{} certificates, {renewing} with a Lease", used.len());

    let log: Vec<_> = log.iter().filter(|event| received(event) >= began).collect();
    let refused: Vec<_> = log.iter().filter(|event| event.code == 401 || event.code >= 500).collect();
    assert!(refused.is_empty(), "{refused:#?}");
    // The API server has its own Lease.
    let is_renewal =
        |event: &&&AuditEvent| event.resource == "leases" && event.name == served.node.name && event.verb != "get";
    let renewals: Vec<_> = log.iter().filter(is_renewal).collect();
    assert!(renewals.iter().all(|event| event.username == user && event.code == 200), "{renewals:#?}");
    let times = std::iter::once(began).chain(renewals.iter().map(|event| received(event))).chain([Timestamp::now()]);
    let times: Vec<_> = times.collect();
    let apart: Vec<_> = times.windows(2).map(|pair| pair[1].duration_since(pair[0]).unsigned_abs()).collect();
    println!("{rotations} rotations, {} Lease renewals: {apart:.1?} apart", renewals.len());
    assert!(apart.iter().all(|apart| *apart < LATE), "{apart:?}");
    // Other requests came from the administrator, or from the control plane itself.
    let users: BTreeSet<&str> = log.iter().map(|event| event.username.as_str()).collect();
    let known = BTreeSet::from([user.as_str(), "administrator", "system:apiserver"]);
    assert!(users.is_subset(&known), "{users:?}");
}

/// When the API server received the request.
fn received(event: &AuditEvent) -> Timestamp {
    let text = event.object["requestReceivedTimestamp"].as_str().expect("each event has its time");
    text.parse().expect("RFC 3339")
}

fn user(served: &Served) -> String {
    format!("system:node:{}", served.node.name)
}

fn control_plane() -> ControlPlane {
    ControlPlane::start(Options { cluster_signing_duration: LIFE.into(), ..Options::default() })
}

#[test]
fn c18_a_kubelet_works_with_a_key_in_softhsm() {
    let cluster = control_plane();
    let storage = ScratchDirectory::new();
    let token = Token::new(TokenModule::SoftHsm, storage.join("token"));
    let environment = token.environment();
    let served = Served::new(Node::new("kubelet-softhsm"), environment, &token.table(), &cluster, DRAIN);
    a_kubelet_works_across_rotations(&cluster, &served);
}

#[test]
fn c18_a_kubelet_works_with_a_key_in_a_tpm() {
    let cluster = control_plane();
    let node = Node::new("kubelet-tpm");
    let swtpm = Swtpm::new(node.scratch.join("tpm-device"));
    let served = Served::new(node, Vec::new(), &swtpm.table(&tpm_plugin()), &cluster, DRAIN);
    a_kubelet_works_across_rotations(&cluster, &served);
}
