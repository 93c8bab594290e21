//! The embedded control plane as kubectl sees it.

use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kube::api::PostParams;
use pintle::demo::control_plane::{self, Options};
use rcgen::KeyPair;

use crate::{KUBELET, PATIENCE, bootstrap, conditions, leaf_pem, options, request, requests, watch_until};

/// kubectl, with everything that it writes in a temporary directory.
struct Kubectl {
    home: tempfile::TempDir,
}

/// A child that does not outlive its test.
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

    // The node's own identity, as kubectl shows it.
    let node = control_plane.client_kubeconfig("system:node:a", &["system:nodes"], Duration::from_secs(60)).unwrap();
    let node = Kubectl::with(&node);
    assert!(node.run(&["auth", "whoami"]).await.contains("system:node:a"));
    assert!(node.run(&["get", "csr", "csr-2"]).await.contains("Denied"));
}
