//! An unmodified kubectl through the credential proxy, with a real API server: streams and writes while the node's
//! key in SoftHSM is rotated (case C18, C19).
//!
//! The API server's kubelet is a fake that echoes streams. A node may not exec into a pod, so it is allowed to
//! impersonate a user who may (`--as`); the connection is still authenticated as the node.

mod device;
mod echo;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use device::served::Served;
use device::{DEADLINE, Node};
use echo::{Echo, OPERATOR};
use pintle_test_support::{
    ControlPlane, Options, ProcessCommand, ReservedPorts, ScratchDirectory, TestProcess, Token, TokenModule,
    cluster_binary, eventually,
};
use serde_json::{Value, json};

/// Longer than any stream in this file.
const DRAIN: &str = "10m";

/// A control plane, a node whose kubelet echoes streams, and a pod on it.
struct Bed {
    cluster: ControlPlane,
    _kubelet: TestProcess,
    _port: ReservedPorts,
    _scratch: ScratchDirectory,
}

static BED: LazyLock<Bed> = LazyLock::new(|| {
    let (cluster, scratch, port) =
        (ControlPlane::start(Options::default()), ScratchDirectory::new(), ReservedPorts::one());
    let kubelet = ProcessCommand::new(cluster_binary(), scratch.join("echo-kubelet.log"))
        .argument("echo-kubelet")
        .flag("address", format!("127.0.0.1:{}", port.port(0)))
        .start();
    let rules = |name: &str, groups: &[&str], resources: &[&str], verbs: &[&str]| {
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": name},
            "rules": [{"apiGroups": groups, "resources": resources, "verbs": verbs}],
        })
    };
    let binding = |role: &str, kind: &str, name: &str| {
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": role},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name}],
        })
    };
    let streams = ["pods", "pods/exec", "pods/log", "pods/portforward"];
    cluster.create(&json!({"apiVersion": "v1", "kind": "List", "items": [
        rules(OPERATOR, &[""], &streams, &["get", "create"]),
        binding(OPERATOR, "User", OPERATOR),
        rules("acts-as-operator", &[""], &["users"], &["impersonate"]),
        binding("acts-as-operator", "Group", "system:nodes"),
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": "default"}},
        {
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": "echo"},
            "status": {
                "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
                "daemonEndpoints": {"kubeletEndpoint": {"Port": port.port(0)}},
            },
        },
        {
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "echo", "namespace": "default"},
            "spec": {
                "nodeName": "echo", "automountServiceAccountToken": false,
                "containers": [{"name": "echo", "image": "echo"}],
            },
        },
    ]}));
    cluster.kubectl(&["patch", "pod", "echo", "--subresource=status", "--patch", r#"{"status":{"phase":"Running"}}"#]);
    Bed { cluster, _kubelet: kubelet, _port: port, _scratch: scratch }
});

/// A node whose key is in its own token.
fn node(name: &str, drain: &str) -> (Served, Token, ScratchDirectory) {
    let storage = ScratchDirectory::new();
    let token = Token::new(TokenModule::SoftHsm, storage.join("token"));
    let served = Served::new(Node::new(name), token.environment(), &token.table(), &BED.cluster, drain);
    (served, token, storage)
}

/// SHA-256 of the certificate that a new connection uses.
#[track_caller]
fn certificate(served: &Served) -> String {
    let who = BED.cluster.who_is_in(&served.kubeconfig()).expect("the API server knows it");
    who.certificate_sha256.expect("a node has a certificate")
}

/// How many connections the proxy has cut with requests outstanding.
#[track_caller]
fn cut_at_end(served: &Served) -> u64 {
    served.proxy()["statistics"]["failures"]["cut-at-end"].as_u64().unwrap_or_default()
}

#[test]
fn c19_exec_port_forward_and_logs_survive_a_rotation() {
    let (served, token, _storage) = node("streams", DRAIN);
    let mut agent = served.start();
    let first = certificate(&served);
    let serial = served.proxy()["serial"].as_str().expect("a serial number").to_owned();

    let mut streams = Vec::new();
    for (protocol, websockets) in [("WebSocket", true), ("SPDY", false)] {
        streams.push((format!("exec by {protocol}"), Echo::exec(&served, websockets)));
        streams.push((format!("port-forward by {protocol}"), Echo::port_forward(&served, websockets)));
    }
    let follow = ["logs", "--follow", "echo", "--as", OPERATOR];
    let mut follow = BED.cluster.kubectl_command(&served.kubeconfig(), &follow).start();
    let check_streams = |follow: &mut TestProcess, when: &str| {
        for (name, (_, echo)) in &streams {
            echo.wait_for_rounds(&format!("{name} {when}"));
        }
        let lines = |follow: &TestProcess| follow.output().lines().count();
        let before = lines(follow);
        eventually(&format!("the log {when}"), DEADLINE, || (lines(follow) > before + 20).then_some(()));
        follow.assert_running();
    };
    check_streams(&mut follow, "before the rotation");
    // All streams run concurrently during the rotation.
    served.rotate(&mut agent);
    // kubectl has requested the pod over an HTTP/2 connection, which receives a GOAWAY. The streams stay.
    eventually("only the streams use the old certificate", DEADLINE, || {
        (served.proxy()["statistics"]["openConnections"][&serial] == 5).then_some(())
    });
    check_streams(&mut follow, "after the rotation");
    let second = certificate(&served);
    assert_ne!(first, second);
    assert_eq!(token.keys().len(), 2, "the old key is needed");

    for (name, (mut kubectl, echo)) in streams {
        println!("{name}: {} rounds", echo.stop());
        // port-forward runs until it is killed.
        assert!(name.starts_with("port") || kubectl.wait().success(), "{name}");
    }
    let numbers: Vec<usize> = follow.output().lines().map(|line| line.parse().expect("a number")).collect();
    follow.kill();
    println!("the log: {} lines", numbers.len());
    assert!(numbers.iter().copied().eq(0..numbers.len()), "{numbers:?}");
    eventually("the old key is destroyed", DEADLINE, || (token.keys().len() == 1).then_some(()));
    assert_eq!(cut_at_end(&served), 0);

    // The API server attributes each stream to the certificate that it started with. GET is an upgrade to WebSocket,
    // POST to SPDY.
    let user = format!("system:node:{}", served.node.name);
    for (subresource, verbs) in
        [("exec", &["create", "get"][..]), ("portforward", &["create", "get"]), ("log", &["get"])]
    {
        let found = eventually("the audit log shows the streams", DEADLINE, || {
            let events = BED.cluster.audit_events().into_iter();
            let mut found: Vec<_> = events
                .filter(|event| event.username == user && event.subresource == subresource)
                .map(|event| (event.verb, event.certificate_sha256.expect("a certificate")))
                .collect();
            found.sort();
            (found.len() == verbs.len()).then_some(found)
        });
        assert!(
            found
                .iter()
                .map(|(verb, certificate)| (verb.as_str(), certificate))
                .eq(verbs.iter().map(|verb| (*verb, &first))),
            "{found:?}"
        );
    }
}

#[test]
fn c19_exec_is_cut_when_the_drain_time_is_over_and_counted() {
    let (served, token, _storage) = node("cut", "3s");
    let mut agent = served.start();
    let streams = [true, false].map(|websockets| Echo::exec(&served, websockets));
    for (_, echo) in &streams {
        echo.wait_for_rounds("before the rotation");
    }
    served.rotate(&mut agent);
    for (_, echo) in &streams {
        echo.wait_until_closed("it is cut");
    }
    let [(mut by_websocket, _), (mut by_spdy, _)] = streams;
    assert!(!by_websocket.wait().success(), "kubectl reports that it was cut");
    // With SPDY, kubectl mistakes the end of the connection for that of the command.
    by_spdy.wait();
    eventually("the old key is destroyed", DEADLINE, || (token.keys().len() == 1).then_some(()));
    assert_eq!(cut_at_end(&served), 2);

    let (mut kubectl, echo) = Echo::exec(&served, true);
    echo.wait_for_rounds("with the new certificate");
    echo.stop();
    assert!(kubectl.wait().success());
}

/// Objects that a node may write: its Node, by client-side apply, and its Lease, by server-side apply.
fn manifests(node: &str, number: usize) -> [(Value, &'static [&'static str]); 2] {
    [
        (
            json!({
                "apiVersion": "v1", "kind": "Node",
                "metadata": {"name": node, "annotations": {"number": number.to_string()}},
            }),
            &[],
        ),
        (
            json!({
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
                "metadata": {"name": node, "namespace": "kube-node-lease"},
                "spec": {"holderIdentity": node, "leaseDurationSeconds": 40 + number},
            }),
            &["--server-side"],
        ),
    ]
}

#[test]
fn c18_kubectl_apply_works_across_rotations() {
    const ROTATIONS: usize = 3;
    let (served, _token, _storage) = node("applies", DRAIN);
    let mut agent = served.start();
    let (name, kubeconfig) = (served.node.name.clone(), served.kubeconfig());
    let (done, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
    let manifest = served.node.scratch.join("manifest.json");
    let thread = std::thread::spawn({
        let (done, stop) = (Arc::clone(&done), Arc::clone(&stop));
        move || {
            let mut number = 0;
            while !stop.load(Ordering::Relaxed) {
                number += 1;
                for (object, flags) in manifests(&name, number) {
                    std::fs::write(&manifest, object.to_string()).map_err(|error| error.to_string())?;
                    let arguments = [&["apply", "--filename", manifest.to_str().expect("text")], flags].concat();
                    BED.cluster.try_kubectl_as(&kubeconfig, &arguments)?;
                }
                done.store(number as u64, Ordering::Relaxed);
            }
            Ok::<_, String>(number)
        }
    });
    let applied = || {
        let before = done.load(Ordering::Relaxed);
        eventually("something more is applied", DEADLINE, || {
            assert!(!thread.is_finished(), "kubectl failed");
            (done.load(Ordering::Relaxed) > before).then_some(())
        });
    };
    applied();
    for _ in 0..ROTATIONS {
        served.rotate(&mut agent);
        // Requests that start after this use the new certificate.
        applied();
        applied();
    }
    stop.store(true, Ordering::Relaxed);
    let last = thread.join().expect("the thread did not panic").expect("kubectl applies");

    let name = served.node.name.as_str();
    let got = BED.cluster.kubectl(&["get", "node", name, "-o", "jsonpath={.metadata.annotations.number}"]);
    assert_eq!(got, last.to_string());
    let lease = ["get", "lease", name, "-n", "kube-node-lease", "-o", "jsonpath={.spec.leaseDurationSeconds}"];
    assert_eq!(BED.cluster.kubectl(&lease), (40 + last).to_string());
    let user = format!("system:node:{name}");
    let patches = || {
        let events = BED.cluster.audit_events().into_iter();
        events.filter(|event| event.username == user && event.verb == "patch").collect::<Vec<_>>()
    };
    // The first apply of each creates the object; a server-side apply does that with a PATCH too.
    let patches = eventually("the audit log shows all of them", DEADLINE, || {
        Some(patches()).filter(|patches| patches.len() == 2 * last - 1)
    });
    assert!(patches.iter().all(|event| [200, 201].contains(&event.code)), "{patches:#?}");
    let certificates: BTreeSet<_> = patches.iter().filter_map(|event| event.certificate_sha256.as_ref()).collect();
    println!("{} applies of each kind as {} certificates", last, certificates.len());
    assert_eq!(certificates.len(), ROTATIONS + 1);
}
