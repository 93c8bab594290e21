//! What changes around an agent in the middle of something, against the real control plane: its credential proxy, its
//! kubeconfig and its current pair, while an old key is to be destroyed, and while a request waits for an approver.

mod device;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use device::served::Served;
use device::{DEADLINE, Node, events};
use pintle_test_support::{Agent, ControlPlane, Options, ScratchDirectory, Token, TokenModule, eventually, forward};
use serde_json::Value;

/// A watch of a pending request ends by itself after five minutes, and then everything is looked at anyhow; what is
/// promised is some tens of seconds.
const SOON: Duration = Duration::from_secs(60);

/// Nothing is approved unless the test does it.
static CLUSTER: LazyLock<ControlPlane> =
    LazyLock::new(|| ControlPlane::start(Options { manual_approval: true, ..Options::default() }));

/// A node with its key in a token of its own, and a proxy.
struct Bed {
    served: Served,
    token: Token,
    _storage: ScratchDirectory,
}

impl Bed {
    fn new(name: &str) -> Self {
        let storage = ScratchDirectory::new();
        let token = Token::new(TokenModule::SoftHsm, storage.join("token"));
        let served = Served::new(Node::new(name), token.environment(), &token.table(), &CLUSTER, "10m");
        Self { served, token, _storage: storage }
    }

    /// Enrols; SHA-256 of the certificate that the proxy speaks as.
    fn enrol(&self) -> (Agent, String) {
        let mut agent = self.served.node.start();
        self.approve();
        self.served.node.ready_after(&mut agent, "");
        let speaks_as = eventually("the proxy speaks as the certificate", DEADLINE, || self.speaks_as());
        (agent, speaks_as)
    }

    /// Waits for the node's request, and approves it.
    #[track_caller]
    fn approve(&self) -> String {
        let prefix = format!("pintle-{}-", self.served.node.name);
        let request = eventually("a request is pending", DEADLINE, || {
            let mut requests = CLUSTER.requests().into_iter();
            requests.find(|request| request.name.starts_with(&prefix) && request.conditions.is_empty())
        });
        CLUSTER.approve(&request.name);
        request.name
    }

    /// SHA-256 of the certificate that the API server sees through the proxy.
    fn speaks_as(&self) -> Option<String> {
        CLUSTER.who_is_in(&self.served.kubeconfig()).ok()?.certificate_sha256
    }

    fn status(&self) -> Value {
        self.served.node.status().unwrap_or_default()
    }

    /// Why the proxy cannot follow; empty while it can.
    fn proxy_trouble(&self) -> Option<String> {
        self.status()["proxy"]["reason"].as_str().map(str::to_owned)
    }

    /// The kubeconfig that names the API server.
    fn kubeconfig(&self) -> PathBuf {
        self.served.node.scratch.join("kubeconfig")
    }

    /// Names a proxy that the agent can use and its credential proxy cannot. Answers what was there before.
    fn use_socks(&self) -> String {
        let before = fs::read_to_string(self.kubeconfig()).expect("readable");
        let server = before.lines().find(|line| line.contains("server:")).expect("a server");
        let indent: String = server.chars().map(|_| ' ').take(server.find("server:").expect("it is there")).collect();
        let proxy_url = format!("{indent}proxy-url: socks5://{}", socks_proxy());
        self.replace_kubeconfig(&before.replace(server, &format!("{server}\n{proxy_url}")));
        before
    }

    fn replace_kubeconfig(&self, content: &str) {
        let next = self.served.node.scratch.write("kubeconfig.next", content);
        fs::rename(next, self.kubeconfig()).expect("renamed");
    }
}

/// Starts a SOCKS5 proxy (RFC 1928) that lets everybody through to IPv4 addresses. It runs until the test ends.
fn socks_proxy() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener.local_addr().expect("it is bound");
    let serve = |mut client: TcpStream| -> std::io::Result<()> {
        let mut greeting = [0; 2];
        client.read_exact(&mut greeting)?;
        client.read_exact(&mut vec![0; greeting[1].into()])?;
        client.write_all(&[5, 0])?;
        let mut request = [0; 4];
        client.read_exact(&mut request)?;
        let host = match request[3] {
            1 => {
                let mut host = [0; 4];
                client.read_exact(&mut host)?;
                Ipv4Addr::from(host).to_string()
            }
            3 => {
                let mut length = [0; 1];
                client.read_exact(&mut length)?;
                let mut host = vec![0; length[0].into()];
                client.read_exact(&mut host)?;
                String::from_utf8(host).map_err(std::io::Error::other)?
            }
            other => return Err(std::io::Error::other(format!("address type {other}"))),
        };
        let mut port = [0; 2];
        client.read_exact(&mut port)?;
        let server = TcpStream::connect((host, u16::from_be_bytes(port)))?;
        client.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0])?;
        forward(client, server)
    };
    std::thread::spawn(move || {
        for client in listener.incoming().filter_map(Result::ok) {
            std::thread::spawn(move || drop(serve(client)));
        }
    });
    address
}

#[test]
fn no_key_is_destroyed_while_the_proxy_cannot_stop_speaking_as_it() {
    let bed = Bed::new("keeps-key");
    let (mut agent, first) = bed.enrol();
    let (keys, swapped) = (bed.token.keys(), events(&agent, "proxy_swapped"));
    assert_eq!(keys.len(), 1);
    let serial = bed.status()["serial"].as_str().expect("a serial number").to_owned();

    let before = bed.use_socks();
    eventually("the proxy cannot go that way", SOON, || {
        bed.proxy_trouble().filter(|trouble| trouble.contains("socks5")).map(drop)
    });
    bed.served.node.rotate();
    bed.approve();
    agent.wait_for("a new certificate is in use", DEADLINE, |_| {
        let status = bed.status();
        (status["serial"].as_str().is_some_and(|new| !new.is_empty() && new != serial)).then_some(())
    });
    let reason = bed.served.node.reason(&mut agent, &["still uses an old key"]);
    assert!(reason.contains("socks5"), "{reason}");
    // It is tried again and again.
    agent.wait_for("another failure", DEADLINE, |agent| (events(agent, "failed") >= 2).then_some(()));
    assert_eq!((bed.token.keys().len(), events(&agent, "keys_retired")), (2, 0), "{reason}");
    assert!(bed.token.keys().iter().any(|key| key.id == keys[0].id), "the old key is there");
    assert_eq!(bed.speaks_as().as_ref(), Some(&first), "and is in use");
    assert_eq!(events(&agent, "proxy_swapped"), swapped);

    bed.replace_kubeconfig(&before);
    agent.wait_for("the old key is destroyed", DEADLINE, |agent| (events(agent, "keys_retired") == 1).then_some(()));
    let left = bed.token.keys();
    assert!(left.len() == 1 && left[0].id != keys[0].id, "{left:?}");
    let now = bed.speaks_as();
    assert!(now.is_some() && now.as_ref() != Some(&first), "{now:?}");
    agent.wait_for("ready", DEADLINE, |_| (bed.status()["state"] == "ready").then_some(()));
    assert_eq!((bed.status()["reason"].as_str(), bed.proxy_trouble().as_deref()), (Some(""), Some("")));
}

#[test]
fn what_changes_while_a_request_is_pending_is_seen_and_put_right() {
    let bed = Bed::new("pending");
    let (mut agent, first) = bed.enrol();
    bed.served.node.rotate();
    let is_pending = || (bed.status()["state"] == "waiting-for-approval").then_some(());
    agent.wait_for("the next request is pending", DEADLINE, |_| is_pending());
    let link = bed.served.node.pair();
    let (pair, file) = (fs::read(&link).expect("a pair"), fs::canonicalize(&link).expect("a file"));
    let kubeconfig = fs::read_to_string(bed.kubeconfig()).expect("readable");

    // The current pair is removed.
    fs::remove_file(&file).expect("removed");
    fs::remove_file(&link).expect("removed");
    eventually("the pair is back", SOON, || fs::read(&link).ok().filter(|found| *found == pair).map(drop));

    // It cannot be put back, which the status says until it can.
    fs::remove_file(&link).expect("removed");
    fs::create_dir(&link).expect("made");
    eventually("the status says what is in the way", SOON, || {
        let status = bed.status();
        let reason = status["reason"].as_str()?;
        (reason.contains(&link.display().to_string()) && status["hint"] != "").then_some(())
    });
    assert_eq!(bed.status()["request"].as_str().map(str::is_empty), Some(false), "the request is still named");
    fs::remove_dir(&link).expect("removed");
    eventually("the pair is back", SOON, || fs::read(&link).ok().filter(|found| *found == pair).map(drop));
    eventually("only the approver is waited for", SOON, || is_pending().filter(|()| bed.status()["reason"] == ""));

    // The kubeconfig is removed.
    fs::remove_file(bed.kubeconfig()).expect("removed");
    eventually("the kubeconfig is back", SOON, || {
        fs::read_to_string(bed.kubeconfig()).ok().filter(|found| found.contains(CLUSTER.server_url())).map(drop)
    });

    // The API server is to be reached in a way that the proxy cannot go, and then as before.
    let before = bed.use_socks();
    eventually("the status says that the proxy cannot follow", SOON, || {
        bed.proxy_trouble().filter(|trouble| trouble.contains("socks5")).map(drop)
    });
    assert_eq!(bed.speaks_as().as_ref(), Some(&first), "it goes on as before");
    bed.replace_kubeconfig(&before);
    eventually("the proxy is well", SOON, || bed.proxy_trouble().filter(String::is_empty).map(drop));
    assert_eq!(before, kubeconfig, "it was written as it was");

    // Through all of that, the request is the same one.
    let request = bed.status()["request"].as_str().expect("a request").to_owned();
    // Before the approval: a moment after it, the new certificate may be in use already.
    let serial = bed.status()["serial"].as_str().expect("a serial number").to_owned();
    assert_eq!(bed.approve(), request);
    bed.served.node.ready_after(&mut agent, &serial);
    let ours = CLUSTER.requests().into_iter().filter(|request| request.name.starts_with("pintle-pending-")).count();
    assert_eq!(ours, 2);
}
