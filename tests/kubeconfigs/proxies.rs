//! Proxy variables with the agent and the credential proxy, and the path of the API server's URL.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use pintle_test_support::{Node, ReservedPorts, holds_within};

use crate::embedded::{DEADLINE, Embedded};
use crate::kubectl_takes;

/// An HTTP proxy that records the targets and the Proxy-Authorization of its requests, and always connects to one
/// server.
struct ConnectProxy {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<(String, String)>>>,
}

impl ConnectProxy {
    fn start(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (noted, server) = (Arc::clone(&asked), server.to_owned());
        std::thread::spawn(move || {
            for client in listener.incoming().filter_map(Result::ok) {
                let (noted, server) = (Arc::clone(&noted), server.clone());
                // The clients report how a connection ends.
                std::thread::spawn(move || drop(tunnel(client, &server, &noted)));
            }
        });
        Self { address, asked }
    }

    fn asked(&self) -> Vec<(String, String)> {
        self.asked.lock().expect("unpoisoned").clone()
    }
}

fn tunnel(client: TcpStream, server: &str, noted: &Mutex<Vec<(String, String)>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let (mut line, mut authorization) = (String::new(), String::new());
    reader.read_line(&mut line)?;
    let target = line.split(' ').nth(1).unwrap_or_default().to_owned();
    loop {
        line.clear();
        if reader.read_line(&mut line)? <= 2 {
            break;
        }
        if let Some((name, value)) = line.split_once(": ")
            && name.eq_ignore_ascii_case("proxy-authorization")
        {
            value.trim().clone_into(&mut authorization);
        }
    }
    noted.lock().expect("unpoisoned").push((target, authorization));
    let server = TcpStream::connect(server)?;
    let (mut to_client, mut to_server) = (client, server.try_clone()?);
    to_client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")?;
    let upward = std::thread::spawn(move || {
        let _ = std::io::copy(&mut reader, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Write);
    });
    let mut server = server;
    let _ = std::io::copy(&mut server, &mut to_client);
    let _ = to_client.shutdown(Shutdown::Both);
    let _ = upward.join();
    Ok(())
}

/// The control plane's address, as HOST:PORT.
fn address_of(control_plane: &Embedded) -> String {
    control_plane.server_url().trim_start_matches("https://").trim_end_matches('/').to_owned()
}

/// A bootstrap kubeconfig with a host name that only a proxy can resolve.
fn by_name(control_plane: &Embedded) -> String {
    let (url, port) = (control_plane.server_url(), address_of(control_plane));
    let port = port.rsplit(':').next().expect("a port");
    let named = format!("https://api.pintle.invalid:{port}\n    tls-server-name: localhost");
    control_plane.bootstrap_kubeconfig().replace(&url, &named)
}

#[test]
fn c37_hosts_in_no_proxy_and_loopback_are_connected_to_directly() {
    let control_plane = Embedded::signing_for(3600);
    let proxy = ConnectProxy::start(&address_of(&control_plane));
    for (name, variables) in [
        (
            "named",
            [
                ("HTTPS_PROXY", format!("http://localhost:{}", proxy.address.port())),
                ("NO_PROXY", "127.0.0.1".to_owned()),
            ],
        ),
        (
            "network",
            [
                ("https_proxy", format!("localhost:{}", proxy.address.port())),
                ("no_proxy", ",127.0.0.0/8,.svc".to_owned()),
            ],
        ),
        ("loopback", [("HTTPS_PROXY", format!("http://{}", proxy.address)), ("NO_PROXY", String::new())]),
    ] {
        let node = Node::new(env!("CARGO_BIN_EXE_pintle"), &format!("no-proxy-{name}"));
        node.give_bootstrap(control_plane.bootstrap_kubeconfig());
        let (port, local) = (ReservedPorts::one(), node.scratch().join("local.kubeconfig"));
        let (listen, runtime) = (format!("127.0.0.1:{}", port.port(0)), node.scratch().join("run"));
        let _ = node.scratch().write(
            "config.toml",
            format!("[proxy]\nlisten = {listen:?}\nruntime-dir = {runtime:?}\nkubeconfig = {local:?}\n"),
        );
        let mut command = node.agent();
        for (variable, value) in variables {
            command = command.environment(variable, value);
        }
        let mut agent = command.start();
        agent.wait_for_log("a certificate is held", DEADLINE, |line| line["event"] == "holding");
        holds_within(DEADLINE, || kubectl_takes(&local).ok()).expect("the credential proxy serves kubectl");
        assert_eq!(proxy.asked(), [], "{name}");
        agent.terminate(DEADLINE);
    }
}

#[test]
fn c37_the_proxy_from_the_environment_is_used_and_not_written_to_kubeconfigs() {
    const PASSWORD: &str = "hunter2-hunter2-hunter2";
    let control_plane = Embedded::signing_for(3600);
    let proxy = ConnectProxy::start(&address_of(&control_plane));
    let node = Node::new(env!("CARGO_BIN_EXE_pintle"), "by-environment");
    node.give_bootstrap(by_name(&control_plane));
    let (port, local) = (ReservedPorts::one(), node.scratch().join("local.kubeconfig"));
    let (listen, runtime) = (format!("127.0.0.1:{}", port.port(0)), node.scratch().join("run"));
    let _ = node.scratch().write(
        "config.toml",
        format!("[proxy]\nlisten = {listen:?}\nruntime-dir = {runtime:?}\nkubeconfig = {local:?}\n"),
    );
    let with =
        |url: &str| node.agent().environment("HTTPS_PROXY", url).environment("NO_PROXY", "other.invalid,10.0.0.0/8");
    // Without a scheme, as is common.
    let mut agent = with(&format!("node:{PASSWORD}@{}", proxy.address)).start();
    agent.wait_for_log("a certificate is held", DEADLINE, |line| line["event"] == "holding");
    let before = proxy.asked().len();
    assert!(before >= 2, "the bootstrap credential and the certificate");
    holds_within(DEADLINE, || kubectl_takes(&local).ok()).expect("the credential proxy serves kubectl");
    let asked = proxy.asked();
    assert!(asked.len() > before, "also for the credential proxy");
    use base64::Engine as _;
    let authorization = base64::engine::general_purpose::STANDARD.encode(format!("node:{PASSWORD}"));
    for (target, given) in asked {
        assert!(target.starts_with("api.pintle.invalid:"), "{target}");
        assert_eq!(given, format!("Basic {authorization}"));
    }
    agent.terminate(DEADLINE);

    let mut agent = with(&format!("http://node:{PASSWORD}@127.0.0.1:1")).start();
    agent.wait_for_log("the certificate is held", DEADLINE, |line| line["event"] == "holding");
    let answer = node.run(&["rotate", "--wait"]);
    assert!(answer.error.contains("the proxy http://127.0.0.1:1 from HTTPS_PROXY"), "{answer:?}");
    let refused = holds_within(DEADLINE, || {
        let _ = kubectl_takes(&local);
        agent.output().contains("the proxy http://127.0.0.1:1 from HTTPS_PROXY: ").then_some(())
    });
    assert!(refused.is_some(), "{}", agent.output());
    let status = node.run(&["status", "-o", "json"]).output;
    for text in [&agent.output(), &status, &answer.error, &answer.output] {
        assert!(!text.contains("hunter2"), "{text}");
    }
    agent.terminate(DEADLINE);
    for path in [node.kubeconfig(), node.journal(), local, node.state_dir().join("cluster.kubeconfig")] {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(!text.contains("hunter2") && !text.contains("proxy-url"), "{}: {text}", path.display());
    }
}

/// Rancher serves every cluster under its own path.
#[test]
fn c40_the_path_of_the_servers_url_is_in_every_written_kubeconfig() {
    let control_plane = Embedded::signing_for(3600);
    for (name, server, listen, wanted) in [
        ("v4", "https://127.0.0.1:1/k8s/clusters/c-m-x1", "127.0.0.1", "https://127.0.0.1:PORT/k8s/clusters/c-m-x1"),
        ("v6", "https://[::1]:1/k8s/clusters/c-m-x1/", "[::1]", "https://[::1]:PORT/k8s/clusters/c-m-x1"),
        ("none", "https://127.0.0.1:1/", "127.0.0.1", "https://127.0.0.1:PORT"),
    ] {
        let node = Node::new(env!("CARGO_BIN_EXE_pintle"), &format!("prefix-{name}"));
        let bootstrap = control_plane.bootstrap_kubeconfig().replace(&control_plane.server_url(), server);
        node.give_bootstrap(bootstrap);
        let (port, local) = (ReservedPorts::one(), node.scratch().join("local.kubeconfig"));
        let (listen, runtime) = (format!("{listen}:{}", port.port(0)), node.scratch().join("run"));
        let _ = node.scratch().write(
            "config.toml",
            format!("[proxy]\nlisten = {listen:?}\nruntime-dir = {runtime:?}\nkubeconfig = {local:?}\n"),
        );
        let wanted = format!("server: {}\n", wanted.replace("PORT", &port.port(0).to_string()));
        let is_wanted = |text: &str| text.replace(['"', '\''], "").contains(&wanted);
        // An existing kubeconfig, for another server.
        let answer = node.run(&["kubeconfig", "--for", "proxy", "--write", &local.display().to_string()]);
        assert_eq!(answer.code, Some(0), "{answer:?}");
        let text = std::fs::read_to_string(&local).expect("written");
        assert!(is_wanted(&text), "{text}");
        std::fs::remove_file(&local).expect("removed");
        let mut agent = node.agent().start();
        let text = agent.wait_for("it is written", DEADLINE, |_| std::fs::read_to_string(&local).ok());
        assert!(is_wanted(&text), "{text}");
        let printed = node.run(&["kubeconfig", "--for", "proxy"]).output;
        assert!(is_wanted(&printed), "{printed}");
        let file = node.run(&["kubeconfig", "--for", "file"]).output;
        assert!(file.contains(server), "{file}");
        agent.kill();
    }
}
