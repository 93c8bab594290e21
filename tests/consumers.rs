//! Consumers of a credential without the proxy: a kubeconfig with the pair's path, the exec credential plugin,
//! Prometheus.

mod embedded;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use embedded::{DEADLINE, Embedded};
use pintle_test_support::{Agent, AgentCommand, Node, ReservedPorts, kubectl};
use serde_json::Value;

const HOUR: u64 = 3600;

/// A node with a certificate, and its agent.
fn enrolled(control_plane: &Embedded, name: &str, configuration: &str) -> (Node, Agent) {
    let node = Node::new(env!("CARGO_BIN_EXE_pintle"), name);
    let _ = node.scratch().write("config.toml", configuration);
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    let mut agent = node.agent().start();
    agent.wait_for_log("a certificate is held", DEADLINE, |line| line["event"] == "holding");
    (node, agent)
}

fn succeed(node: &Node, arguments: &[&str]) -> String {
    let answer = node.run(arguments);
    assert_eq!(answer.code, Some(0), "{arguments:?}: {}", answer.error);
    answer.output
}

/// The certificate that kubectl authenticates with when it uses this kubeconfig (`credential-id`).
fn whoami(node: &Node, kubeconfig: &Path) -> String {
    let mut command = kubectl();
    command.arg("--kubeconfig").arg(kubeconfig).args(["auth", "whoami", "-o", "json"]);
    let output = command.env("HOME", node.scratch().path()).output().expect("kubectl starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let review: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let user = &review["status"]["userInfo"];
    assert_eq!(user["username"], format!("system:node:{}", node.name()));
    user["extra"]["authentication.kubernetes.io/credential-id"][0].as_str().expect("a certificate").to_owned()
}

#[test]
fn kubectl_uses_new_certificates_with_a_kubeconfig_for_file_and_for_exec() {
    let control_plane = Embedded::signing_for(HOUR);
    let (node, _agent) = enrolled(&control_plane, "consumer", "");
    let path = |consumer: &str| node.scratch().join(format!("for-{consumer}"));
    for consumer in ["file", "exec"] {
        let printed = succeed(&node, &["kubeconfig", "--for", consumer]);
        let written = path(consumer).display().to_string();
        succeed(&node, &["kubeconfig", "--for", consumer, "--write", &written]);
        assert_eq!(std::fs::read_to_string(path(consumer)).expect("written"), printed);
        assert!(succeed(&node, &["kubeconfig", "--for", consumer, "--write", &written]).contains("already"));
    }
    for _ in 0..2 {
        succeed(&node, &["rotate", "--wait"]);
        let current = format!("X509SHA256={}", node.current().expect("a pair").sha256);
        assert_eq!(whoami(&node, &path("file")), current);
        assert_eq!(whoami(&node, &path("exec")), current);
    }
}

#[test]
fn c08_a_kubeconfig_with_an_inline_certificate_is_fixed_on_request() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = Node::new(env!("CARGO_BIN_EXE_pintle"), "c08-fixed");
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    let inline = control_plane.client_kubeconfig("system:node:c08-fixed", &["system:nodes"], Duration::from_secs(HOUR));
    let inline = inline.expect("a certificate can be issued");
    let _ = node.scratch().write("kubeconfig", format!("{inline}\nextensions: [{{name: mine, extension: kept}}]\n"));
    let mut agent = node.agent().start();
    agent.wait_for_log("it is reported", DEADLINE, |line| {
        line["event"] == "kubeconfig_stale"
            && line["message"].as_str().is_some_and(|message| message.contains("pintle kubeconfig --for file --write"))
    });
    agent.wait_for_log("a certificate is held", DEADLINE, |line| line["event"] == "holding");
    let kubeconfig = node.kubeconfig().display().to_string();
    succeed(&node, &["kubeconfig", "--for", "file", "--write", &kubeconfig]);
    let text = std::fs::read_to_string(&kubeconfig).expect("readable");
    assert!(text.contains("extension: kept") && !text.contains("-key-data"), "{text}");
    succeed(&node, &["rotate", "--wait"]);
    assert_eq!(whoami(&node, &node.kubeconfig()), format!("X509SHA256={}", node.current().expect("a pair").sha256));
}

/// The result of `pintle credential` with this KUBERNETES_EXEC_INFO.
fn credential(node: &Node, info: Option<&str>) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pintle"));
    command.arg("credential").args(node.flags()).env_remove("KUBERNETES_EXEC_INFO");
    command.envs(info.map(|info| ("KUBERNETES_EXEC_INFO", info)));
    let output = command.output().expect("pintle starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn the_exec_plugin_uses_the_clients_api_version_and_rejects_unsupported_requests() {
    let control_plane = Embedded::signing_for(HOUR);
    let (node, _agent) = enrolled(&control_plane, "exec-plugin", "");
    let v1beta1 = r#"{"apiVersion":"client.authentication.k8s.io/v1beta1","kind":"ExecCredential","spec":{}}"#;
    for (info, version) in
        [(None, "client.authentication.k8s.io/v1"), (Some(v1beta1), "client.authentication.k8s.io/v1beta1")]
    {
        let (code, output, error) = credential(&node, info);
        assert_eq!(code, Some(0), "{error}");
        let answer: Value = serde_json::from_str(&output).expect("JSON");
        assert_eq!((&answer["apiVersion"], &answer["kind"]), (&version.into(), &"ExecCredential".into()));
        let status = &answer["status"];
        assert!(status["clientCertificateData"].as_str().is_some_and(|chain| !chain.contains("PRIVATE")));
        assert!(status["clientKeyData"].as_str().is_some_and(|key| key.contains("PRIVATE KEY")));
        // The end of the rotation window, by when there is a new one.
        assert_eq!(status["expirationTimestamp"], node.status()["windowCloses"]);
    }
    let (code, output, error) = credential(&node, Some(&v1beta1.replace("v1beta1", "v1alpha1")));
    assert_eq!((code, output.as_str()), (Some(2), ""));
    assert!(error.contains("v1alpha1") && error.contains("hint: "), "{error}");

    // A pair whose key is in a device.
    let current = node.cert_dir().join("kubelet-client-current.pem");
    let pair = std::fs::read_to_string(&current).expect("readable");
    let chain = &pair[..pair.find("-----BEGIN PRIVATE").expect("a key")];
    let device = Node::new(env!("CARGO_BIN_EXE_pintle"), "exec-plugin-device");
    std::fs::create_dir_all(device.cert_dir()).expect("a directory");
    std::fs::write(device.cert_dir().join("kubelet-client-current.pem"), chain).expect("written");
    let (code, output, error) = credential(&device, None);
    assert_eq!((code, output.as_str()), (Some(1), ""));
    assert!(error.contains("in a device") && error.contains("--for proxy"), "{error}");
    let answer = device.run(&["kubeconfig", "--for", "proxy"]);
    assert_eq!(answer.code, Some(2), "there is no [proxy] table: {}", answer.error);
}

#[test]
fn concurrent_writers_of_a_kubeconfig_do_not_interfere() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = Node::new(env!("CARGO_BIN_EXE_pintle"), "writers");
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    let written = node.scratch().join("written");
    for _ in 0..3 {
        let _ = std::fs::remove_file(&written);
        let write = |consumer: &str| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_pintle"));
            command.args(["kubeconfig", "--for", consumer, "--write"]).arg(&written).args(node.flags());
            command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
            command.spawn().expect("pintle starts")
        };
        let writers: Vec<_> = (0..4).flat_map(|_| ["file", "exec"]).map(write).collect();
        for writer in writers {
            let output = writer.wait_with_output().expect("it ends");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    }
    let left = std::fs::read_dir(node.scratch().path()).expect("listed").filter_map(Result::ok);
    let left: Vec<_> =
        left.map(|entry| entry.file_name()).filter(|name| name.to_string_lossy().contains(".pintle")).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// As started by the packaged service, with the capabilities that a drop-in for proxy.user adds.
#[test]
fn the_proxys_user_has_access_under_the_services_umask_and_capabilities() {
    if !rustix::process::getuid().is_root() {
        return; // Only root can switch to another user.
    }
    let control_plane = Embedded::signing_for(HOUR);
    let node = Node::new(env!("CARGO_BIN_EXE_pintle"), "user");
    std::fs::set_permissions(node.scratch().path(), PermissionsExt::from_mode(0o755)).expect("ours");
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    let (port, local) = (ReservedPorts::one(), node.scratch().join("local/kubeconfig"));
    let (runtime, socket) = (node.scratch().join("run/proxy"), node.scratch().join("run/socket/proxy.sock"));
    let configuration = format!(
        "[proxy]\nlisten = \"127.0.0.1:{}\"\nuser = \"nobody\"\nkubeconfig = {local:?}\nruntime-dir = {runtime:?}\n\
         unix-socket = {socket:?}\n",
        port.port(0)
    );
    let _ = node.scratch().write("config.toml", configuration);
    let service = |capabilities: &str| {
        let script = format!("umask 077; exec setpriv --bounding-set={capabilities} --inh-caps=-all \"$@\"");
        AgentCommand::named("/bin/sh", node.scratch(), "service")
            .arguments(["-c", &script, "sh", env!("CARGO_BIN_EXE_pintle"), "run"])
            .arguments(node.flags())
    };
    // The directory that the operator has created.
    std::fs::create_dir(node.scratch().join("local")).expect("made");
    let refused = |capabilities: &str| {
        let (status, output) = service(capabilities).run(DEADLINE);
        assert_eq!(status.code(), Some(1), "{output}");
        assert!(output.contains("CAP_CHOWN CAP_DAC_READ_SEARCH"), "{capabilities}: {output}");
    };
    refused("-all");
    // A path from which another user can start it.
    let program = node.scratch().join("kubectl");
    std::fs::copy(kubectl().get_program(), &program).expect("copied");
    for _ in ["at first", "restarted"] {
        let mut agent = service("-all,+chown,+dac_read_search").start();
        agent.wait_for_log("a certificate is held", DEADLINE, |line| line["event"] == "holding");
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program).args(kubectl().get_args());
        command.arg("--kubeconfig").arg(&local).args(["auth", "whoami", "-o", "name"]).env("HOME", "/nonexistent");
        let output = command.output().expect("setpriv starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let connect = "use IO::Socket::UNIX; exit(IO::Socket::UNIX->new(Peer => $ARGV[0]) ? 0 : 2)";
        let status = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "perl", "-e", connect])
            .arg(&socket)
            .status();
        assert!(status.expect("setpriv starts").success(), "the unix socket can be reached");
        assert!(agent.terminate(DEADLINE).success());
    }
    refused("-all,+chown");
}

#[test]
fn prometheus_scrapes_the_configured_address() {
    let control_plane = Embedded::signing_for(HOUR);
    let (port, proxy) = (ReservedPorts::one(), ReservedPorts::one());
    let scratch = pintle_test_support::ScratchDirectory::new();
    let configuration = format!(
        "metrics-address = \"127.0.0.1:{}\"\n[proxy]\nlisten = \"127.0.0.1:{}\"\nruntime-dir = {:?}\n",
        port.port(0),
        proxy.port(0),
        scratch.join("run"),
    );
    let (node, _agent) = enrolled(&control_plane, "metrics", &configuration);
    let get = |request: &str| {
        let mut stream = TcpStream::connect(("127.0.0.1", port.port(0))).expect("it listens");
        write!(stream, "{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    };
    let page = get("GET /metrics");
    assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
    assert!(page.contains("content-type: text/plain; version=0.0.4"), "{page}");
    let ttl = page.lines().find_map(|line| line.strip_prefix("kubelet_certificate_manager_client_ttl_seconds "));
    let ttl: u64 = ttl.expect("a kubelet's metric").parse().expect("a number");
    assert!((HOUR - 60..=HOUR).contains(&ttl), "{ttl}");
    assert!(page.contains("pintle_proxy_connections{identity=\"client\",certificate=\"current\"} 0"), "{page}");
    assert!(get("GET /").starts_with("HTTP/1.1 404") && get("POST /metrics").starts_with("HTTP/1.1 405"));

    // Clients that keep their connection open do not block others.
    let kept: Vec<_> = (0..20)
        .map(|_| {
            let mut stream = TcpStream::connect(("127.0.0.1", port.port(0))).expect("it listens");
            stream.set_read_timeout(Some(Duration::from_secs(5))).expect("set");
            write!(stream, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").expect("sent");
            let mut answer = [0; 12];
            stream.read_exact(&mut answer).expect("an answer in time");
            stream
        })
        .collect();
    drop(kept);

    // And with the proxy's kubeconfig.
    let through = node.scratch().join("for-proxy");
    succeed(&node, &["kubeconfig", "--write", &through.display().to_string()]);
    whoami(&node, &through);
    for consumer in ["file", "exec"] {
        succeed(&node, &["kubeconfig", "--for", consumer, "--write", &through.display().to_string()]);
        let text = std::fs::read_to_string(&through).expect("readable");
        assert!(text.contains(control_plane.server_url().as_str()) && !text.contains("ca.crt"), "{consumer}: {text}");
        whoami(&node, &through);
        succeed(&node, &["kubeconfig", "--for", "proxy", "--write", &through.display().to_string()]);
    }
    whoami(&node, &through);
    let page = get("GET /metrics");
    let handshakes = "pintle_proxy_handshakes_total{identity=\"client\",side=\"server\"} ";
    let handshakes = page.lines().find_map(|line| line.strip_prefix(handshakes)).expect("it is there");
    assert_ne!(handshakes, "0");
}
