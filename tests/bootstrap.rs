//! First certificates from a real control plane, with every kind of credential in a bootstrap kubeconfig.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use pintle_test_support::{BootstrapCredential, ControlPlane, Node, Options};

const DEADLINE: Duration = Duration::from_secs(120);

static SHARED: LazyLock<ControlPlane> = LazyLock::new(|| ControlPlane::start(Options::default()));

fn bootstrap_kubeconfig(credential: BootstrapCredential) -> String {
    std::fs::read_to_string(SHARED.bootstrap_kubeconfig(credential)).expect("readable")
}

/// The line of the test bed's kubeconfig that contains the token.
fn token_line(kubeconfig: &str) -> (&str, &str) {
    let line = kubeconfig.lines().find(|line| line.trim().starts_with("token: ")).expect("a token");
    (line, line.trim().trim_start_matches("token: "))
}

/// Enrolls a node with this bootstrap kubeconfig, and checks the result.
fn enrol(name: &str, kubeconfig: &str, requester: &str) -> Node {
    let node = Node::new(env!("CARGO_BIN_EXE_pintle"), name);
    node.give_bootstrap(kubeconfig);
    let (code, output) = node.enrol(DEADLINE);
    assert_eq!(code, Some(0), "{name}: {output}");

    let pair = node.current().expect("a pair");
    let written = std::fs::read_to_string(node.kubeconfig()).expect("the kubeconfig is written");
    let current = node.current_path();
    for line in [format!("client-certificate: {}", current.display()), format!("client-key: {}", current.display())] {
        assert!(written.contains(&line), "{name}: {written}");
    }
    let identity = SHARED.who_is_in(&node.kubeconfig()).expect("the API server knows the node");
    assert_eq!(identity.username, format!("system:node:{name}"));
    assert!(identity.groups.iter().any(|group| group == "system:nodes"));
    assert_eq!(identity.certificate_sha256.as_ref(), Some(&pair.sha256));

    let prefix = format!("pintle-{name}-");
    let requests: Vec<_> = SHARED.requests().into_iter().filter(|request| request.name.starts_with(&prefix)).collect();
    assert_eq!(requests.len(), 1, "{name}");
    assert!(requests[0].username.starts_with(requester), "{name}: {}", requests[0].username);
    assert_eq!(requests[0].usages, ["digital signature", "client auth"]);

    let status = node.status();
    assert_eq!((&status["serial"], &status["state"]), (&pair.serial.as_str().into(), &"not-running".into()));
    assert_eq!(status["fingerprint"], pair.sha256.as_str());
    let table = node.run(&["status"]);
    assert!(table.code == Some(0) && table.output.contains(&identity.username), "{table:?}");
    // Proven: the agent itself has authenticated to the API server with the new identity.
    let known = format!("authenticates serial {} as system:node:{name}", pair.serial);
    assert!(output.contains(&known), "{known}: {output}");
    node
}

#[test]
fn every_bootstrap_credential_obtains_a_certificate() {
    let secret = bootstrap_kubeconfig(BootstrapCredential::SecretToken);
    enrol("by-secret-token", &secret, "system:bootstrap:");

    let fixed = bootstrap_kubeconfig(BootstrapCredential::StaticToken);
    enrol("by-static-token", &fixed, "static-bootstrap");

    enrol("by-certificate", &bootstrap_kubeconfig(BootstrapCredential::ClientCertificate), "bootstrap-");

    let files = pintle_test_support::ScratchDirectory::new();
    let (line, token) = token_line(&secret);
    let file = files.write("token", format!("{token}\n"));
    enrol("by-token-file", &secret.replace(line, &format!("    tokenFile: {}", file.display())), "system:bootstrap:");

    let plugin = exec_plugin(files.path(), token);
    enrol("by-exec-plugin", &secret.replace(line, &plugin), "system:bootstrap:");
}

/// A user entry whose token comes from an exec plugin (client.authentication.k8s.io/v1).
fn exec_plugin(directory: &Path, token: &str) -> String {
    let credential = format!(
        r#"{{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{{"token":"{token}"}}}}"#
    );
    let answer = directory.join("credential.json");
    std::fs::write(&answer, credential).expect("writable");
    format!(
        "    exec: {{apiVersion: client.authentication.k8s.io/v1, command: /bin/cat, args: [{}], interactiveMode: Never}}",
        answer.display()
    )
}

#[test]
fn c08_proxy_and_server_name_are_used_and_kept() {
    let proxy = ConnectProxy::start();
    let kubeconfig = bootstrap_kubeconfig(BootstrapCredential::StaticToken);
    let server = format!("    server: {}", SHARED.server_url());
    let with_proxy = format!("{server}\n    proxy-url: http://{}\n    tls-server-name: kubernetes", proxy.address);
    let node = enrol("by-proxy", &kubeconfig.replace(&server, &with_proxy), "static-bootstrap");
    let written = std::fs::read_to_string(node.kubeconfig()).expect("readable");
    assert!(written.contains(&format!("proxy-url: http://{}", proxy.address)), "{written}");
    assert!(written.contains("tls-server-name: kubernetes"), "{written}");
    // From the bootstrap credential, the held one, and kubectl.
    assert!(proxy.connections.load(Ordering::Relaxed) >= 3);

    // Nothing connects directly.
    drop(proxy);
    let mut agent = node.agent().start();
    agent.wait_for_log("the certificate is held", DEADLINE, |line| line["event"] == "holding");
    let answer = node.run(&["rotate", "--wait"]);
    assert!(answer.code == Some(1) && answer.error.contains("cannot be reached"), "{answer:?}");
}

/// An HTTP proxy that supports only CONNECT (RFC 9110, section 9.3.6). After the drop, it refuses connections.
struct ConnectProxy {
    address: std::net::SocketAddr,
    connections: Arc<AtomicUsize>,
    open: Arc<std::sync::atomic::AtomicBool>,
}

impl ConnectProxy {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let connections = Arc::new(AtomicUsize::new(0));
        let open = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let (counter, still_open) = (Arc::clone(&connections), Arc::clone(&open));
        std::thread::spawn(move || {
            for client in listener.incoming().filter_map(Result::ok) {
                if !still_open.load(Ordering::Relaxed) {
                    return;
                }
                let counter = Arc::clone(&counter);
                std::thread::spawn(move || {
                    if tunnel(client, &counter).is_err() {
                        counter.fetch_sub(1, Ordering::Relaxed);
                    }
                });
            }
        });
        Self { address, connections, open }
    }
}

impl Drop for ConnectProxy {
    fn drop(&mut self) {
        self.open.store(false, Ordering::Relaxed);
        // The thread closes the listener at the next connection.
        let _ = TcpStream::connect(self.address);
    }
}

fn tunnel(client: TcpStream, connections: &AtomicUsize) -> std::io::Result<()> {
    connections.fetch_add(1, Ordering::Relaxed);
    let mut reader = BufReader::new(client.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let target = line.strip_prefix("CONNECT ").and_then(|line| line.split(' ').next());
    let target = target.ok_or_else(|| std::io::Error::other("not CONNECT"))?.to_owned();
    while reader.read_line(&mut line)? > 2 {}
    let server = TcpStream::connect(target)?;
    let (mut to_client, mut to_server) = (client, server.try_clone()?);
    to_client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")?;
    let upward = std::thread::spawn(move || {
        let _ = std::io::copy(&mut reader, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Write);
    });
    let mut server = server;
    // The clients report how a connection ends.
    let _ = std::io::copy(&mut server, &mut to_client);
    let _ = to_client.shutdown(Shutdown::Both);
    let _ = upward.join();
    Ok(())
}
