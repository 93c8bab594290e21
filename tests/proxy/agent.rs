//! The agent with its proxy as a process, with the embedded control plane.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pintle::demo::control_plane::{self, ControlPlane, Options};
use pintle::proxy::ClientFiles;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::bed::until;
use crate::client;

struct Node {
    directory: tempfile::TempDir,
    listener: TcpListener,
    agent: Child,
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

impl Node {
    fn start(control_plane: &ControlPlane) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("bootstrap"), control_plane.bootstrap_kubeconfig()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        let user = rustix::process::getuid().as_raw();
        let configuration = format!(
            "node-name = 'worker'\nkubeconfig = '{}'\nbootstrap-kubeconfig = '{}'\ncert-dir = '{}'\nstate-dir = '{}'\n\
             [proxy]\nuser = '{user}'\nruntime-dir = '{}'\nkubeconfig = '{}'\n",
            path("cluster.kubeconfig"),
            path("bootstrap"),
            path("pki"),
            path("state"),
            path("run"),
            path("kubeconfig"),
        );
        std::fs::write(directory.path().join("config.toml"), configuration).unwrap();
        let agent = Self::run(directory.path(), &listener);
        Self { directory, listener, agent }
    }

    /// Starts pintle as the service manager does, which keeps the listening socket open.
    fn run(directory: &Path, listener: &TcpListener) -> Child {
        let log = std::fs::File::options().create(true).append(true).open(directory.join("log")).unwrap();
        Command::new("/bin/sh")
            .args(["-c", "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"", "sh"])
            .args([env!("CARGO_BIN_EXE_pintle"), "run", "--config"])
            .arg(directory.join("config.toml"))
            .stdin(OwnedFd::from(listener.try_clone().unwrap()))
            .stderr(log)
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn kill(&mut self) {
        self.agent.kill().unwrap();
        self.agent.wait().unwrap();
    }

    fn run_again(&mut self) {
        self.agent = Self::run(self.directory.path(), &self.listener);
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("kubeconfig")
    }

    fn pintle(&self, arguments: &[&str]) -> Output {
        let config = self.directory.path().join("config.toml");
        Command::new(env!("CARGO_BIN_EXE_pintle")).args(arguments).arg("--config").arg(config).output().unwrap()
    }

    /// kubectl with an established watch through the proxy, which needs its key while it is open.
    async fn watch(&self) -> Child {
        let output = self.directory.path().join("watched");
        let watch = pintle_test_support::kubectl()
            .arg("--kubeconfig")
            .arg(self.kubeconfig())
            .args(["get", "csr", "--watch", "--no-headers"])
            .stdout(std::fs::File::create(&output).unwrap())
            .spawn();
        until("kubectl watches", || std::fs::metadata(&output).is_ok_and(|file| file.len() > 0)).await;
        watch.unwrap()
    }

    fn watched(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("watched")).unwrap()
    }

    /// The number of keys in the file backend.
    fn keys(&self) -> usize {
        std::fs::read_dir(self.directory.path().join("state/keys")).unwrap().count()
    }

    /// How often the proxy has changed its certificate.
    fn swaps(&self) -> usize {
        self.log().matches("proxy_swapped").count()
    }

    async fn ready(&self) {
        until("the proxy uses a certificate", || self.log().contains("proxy_swapped")).await;
    }
}

fn kubectl(kubeconfig: &Path, arguments: &[&str]) -> Output {
    pintle_test_support::kubectl().arg("--kubeconfig").arg(kubeconfig).args(arguments).output().unwrap()
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

async fn control_plane() -> ControlPlane {
    control_plane::start(Options { approval_delay: Duration::ZERO, ..Options::default() }).await.unwrap()
}

#[allow(clippy::zombie_processes, reason = "it is waited for in the first of the rotations")]
#[tokio::test(flavor = "multi_thread")]
async fn c18_kubectl_works_across_rotations_and_old_keys_are_destroyed_after_their_last_connection() {
    let control_plane = control_plane().await;
    let node = Node::start(&control_plane);
    node.ready().await;
    let kubeconfig = node.kubeconfig();
    let mut watch = node.watch().await;
    let whoami = || text(&kubectl(&kubeconfig, &["auth", "whoami", "-o", "yaml"]));
    let mut identities = std::collections::BTreeSet::from([whoami()]);
    for rotation in 1..=3 {
        assert!(node.pintle(&["rotate"]).status.success());
        until("the proxy uses the next certificate", || node.swaps() > rotation).await;
        let identity = whoami();
        assert!(identity.contains("username: system:node:worker"), "{identity}");
        identities.insert(identity);
        if rotation == 1 {
            // The watch was opened before the rotation, and needs its key until it ends.
            until("the watch shows the new request", || node.watched().lines().count() >= 2).await;
            assert!(watch.try_wait().unwrap().is_none(), "kubectl is still watching");
            tokio::time::sleep(Duration::from_secs(1)).await;
            let status = text(&node.pintle(&["status", "-o", "wide"]));
            assert!(status.contains("proxy 127.0.0.1:"), "{status}");
            assert_eq!((node.keys(), node.log().matches("keys_retired").count()), (2, 0));
            watch.kill().unwrap();
            watch.wait().unwrap();
        }
        until("the old key is destroyed", || node.keys() == 1).await;
    }
    assert_eq!(identities.len(), 4, "{identities:?}");
}

#[allow(clippy::zombie_processes, reason = "it is waited for before the end")]
#[tokio::test(flavor = "multi_thread")]
async fn rotate_does_not_wait_for_old_connections_and_a_second_request_is_not_lost() {
    let control_plane = control_plane().await;
    let node = Node::start(&control_plane);
    node.ready().await;
    let mut watch = node.watch().await;
    // The old connections have 15 minutes to close by themselves.
    let said = text(&node.pintle(&["rotate", "--wait"]));
    assert!(said.starts_with("rotated: serial ") && said.contains("old key"), "{said}");
    // The command returns once the certificate is held; the proxy uses it just after that.
    until("the proxy uses the new certificate", || node.swaps() == 2).await;
    assert_eq!((node.keys(), node.log().matches("keys_retired").count()), (2, 0));
    text(&node.pintle(&["rotate"]));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!((node.swaps(), node.keys()), (2, 2), "there are never more than two keys");
    watch.kill().unwrap();
    watch.wait().unwrap();
    until("the second requested rotation", || node.swaps() == 3).await;
    until("the old keys are destroyed", || node.keys() == 1).await;
    let said = text(&node.pintle(&["rotate", "--wait"]));
    assert!(said.starts_with("rotated: serial ") && !said.contains("old key"), "{said}");
}

/// Another address for this server, and a counter of connections to it.
async fn by_way(server: SocketAddr) -> (SocketAddr, Arc<AtomicU64>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, count) = (listener.local_addr().unwrap(), Arc::<AtomicU64>::default());
    let counted = Arc::clone(&count);
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(async move {
                let mut far = TcpStream::connect(server).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            });
        }
    });
    (address, count)
}

#[allow(clippy::zombie_processes, reason = "it is waited for before the end")]
#[tokio::test(flavor = "multi_thread")]
async fn a_new_api_server_in_the_kubeconfig_is_used_without_a_rotation() {
    let control_plane = control_plane().await;
    let node = Node::start(&control_plane);
    node.ready().await;
    let path = node.directory.path().join("cluster.kubeconfig");
    let before = std::fs::read_to_string(&path).unwrap();
    let server = before.split("https://").nth(1).unwrap().split_whitespace().next().unwrap().trim_end_matches('"');
    let (address, count) = by_way(server.parse().unwrap()).await;
    let mut watch = node.watch().await;
    std::fs::write(&path, before.replace(server, &address.to_string())).unwrap();
    until("the proxy uses the new address", || node.swaps() == 2).await;
    assert!(watch.try_wait().unwrap().is_none(), "open connections are kept");
    let kubeconfig = node.kubeconfig();
    let asked = count.load(Ordering::Relaxed);
    let served = tokio::task::spawn_blocking(move || kubectl(&kubeconfig, &["auth", "whoami"])).await.unwrap();
    assert!(text(&served).contains("system:node:worker"));
    assert!(count.load(Ordering::Relaxed) > asked);
    watch.kill().unwrap();
    watch.wait().unwrap();
    // While the kubeconfig is incomplete, the proxy keeps its server.
    let whole = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert_eq!((node.swaps(), node.log().matches("rotation_started").count()), (2, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unsupported_proxy_url_is_logged_once_and_shown_in_the_status() {
    let control_plane = control_plane().await;
    let mut node = Node::start(&control_plane);
    node.ready().await;
    node.kill();
    let path = node.directory.path().join("cluster.kubeconfig");
    let before = std::fs::read_to_string(&path).unwrap();
    let server = before.lines().find(|line| line.contains("server:")).unwrap();
    let proxy_url = server.replace("server:", "proxy-url:").replace("https://", "socks5://user:s3cret@");
    std::fs::write(&path, before.replace(server, &format!("{server}\n{}", proxy_url.replace("- ", "  ")))).unwrap();
    let checked = node.pintle(&["config", "check"]);
    let words = String::from_utf8_lossy(&checked.stderr);
    assert_eq!(checked.status.code(), Some(2), "{words}");
    assert!(
        words.contains("socks5://127.0.0.1")
            && words.contains("from proxy-url cannot be used")
            && words.contains("hint:"),
        "{words}"
    );
    node.run_again();
    let status = || String::from_utf8_lossy(&node.pintle(&["status"]).stdout).into_owned();
    until("the status says so", || status().contains(" from proxy-url cannot be used")).await;
    tokio::time::sleep(Duration::from_secs(12)).await;
    let log = node.log();
    assert_eq!(log.lines().filter(|line| line.contains("from proxy-url cannot be used")).count(), 1, "{log}");
    assert!(!log.contains("s3cret") && !status().contains("s3cret"));
    std::fs::write(&path, before).unwrap();
    until("the proxy uses the new kubeconfig", || !status().contains("socks5")).await;
    assert_eq!(node.swaps(), 2);
    assert!(node.pintle(&["config", "check"]).status.success());
}

/// A connection with one complete request.
struct Attempt {
    began: Instant,
    connected: Instant,
    ended: Instant,
    result: std::io::Result<String>,
}

/// Clients that open a connection for each request.
struct Clients {
    address: SocketAddr,
    config: rustls::ClientConfig,
    connected: AtomicU64,
    refused: AtomicU64,
    stop: AtomicBool,
    attempts: Mutex<Vec<Attempt>>,
}

impl Clients {
    fn of(node: &Node) -> Arc<Self> {
        let files = ClientFiles::in_directory(&node.directory.path().join("run/client"));
        Arc::new(Self {
            address: node.listener.local_addr().unwrap(),
            config: client::config(&files, &["http/1.1"]),
            connected: AtomicU64::default(),
            refused: AtomicU64::default(),
            stop: AtomicBool::default(),
            attempts: Mutex::default(),
        })
    }

    /// A single request.
    async fn ask(self: Arc<Self>) {
        let began = Instant::now();
        let Ok(stream) = TcpStream::connect(self.address).await else {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let connected = Instant::now();
        self.connected.fetch_add(1, Ordering::Relaxed);
        let request = async {
            let mut stream = client::secure(stream, self.config.clone()).await?;
            client::get_over(&mut stream, "/version").await
        };
        let late = |_| Err(std::io::ErrorKind::TimedOut.into());
        let result = timeout(Duration::from_secs(60), request).await.unwrap_or_else(late);
        self.attempts.lock().unwrap().push(Attempt { began, connected, ended: Instant::now(), result });
    }

    /// A client that sends requests in a loop.
    async fn go_on_asking(self: Arc<Self>) {
        while !self.stop.load(Ordering::Relaxed) {
            Arc::clone(&self).ask().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// How many connections have been made.
    fn count(&self) -> u64 {
        self.connected.load(Ordering::Relaxed)
    }

    /// Waits until `more` connections have been made since `before`.
    async fn more(&self, what: &str, before: u64, more: u64) {
        until(what, || self.count() >= before + more).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn kill_9_under_load_refuses_no_connection_and_serves_those_made_during_the_restart() {
    /// The number of clients, and of connections made while no agent is running.
    const CLIENTS: u64 = 12;
    let control_plane = control_plane().await;
    let mut node = Node::start(&control_plane);
    node.ready().await;
    let before = text(&kubectl(&node.kubeconfig(), &["config", "view", "--raw"]));
    let clients = Clients::of(&node);
    let mut load = JoinSet::new();
    for _ in 0..CLIENTS {
        load.spawn(Arc::clone(&clients).go_on_asking());
    }
    clients.more("the clients are served", 0, 10 * CLIENTS).await;
    // The times of each kill, exit and restart.
    let mut restarts = Vec::new();
    for restart in 1..=3 {
        let killed = Instant::now();
        node.kill();
        let (dead, before) = (Instant::now(), clients.count());
        for _ in 0..CLIENTS {
            load.spawn(Arc::clone(&clients).ask());
        }
        clients.more("clients connect while no agent is running", before, CLIENTS).await;
        restarts.push((killed, dead, Instant::now()));
        node.run_again();
        clients.more("the clients are served again", clients.count(), 10 * CLIENTS).await;
        let kubeconfig = node.kubeconfig();
        let served = tokio::task::spawn_blocking(move || kubectl(&kubeconfig, &["auth", "whoami"])).await.unwrap();
        assert!(text(&served).contains("system:node:worker"), "{restart}");
    }
    clients.stop.store(true, Ordering::Relaxed);
    load.join_all().await;
    assert_eq!(clients.refused.load(Ordering::Relaxed), 0);
    let (mut during_restart, mut broken) = ([0; 3], 0);
    let attempts = clients.attempts.lock().unwrap();
    for Attempt { began, connected, ended, result } in attempts.iter() {
        let found = restarts.iter().position(|(_, dead, next)| began > dead && connected < next);
        if let Some(restart) = found {
            during_restart[restart] += 1;
        }
        if let Err(error) = result {
            // The killed process may have accepted its connection.
            let was_open = restarts.iter().any(|(killed, dead, _)| began <= dead && ended >= killed);
            assert!(was_open, "in the restart: {found:?}, {:?} before it failed: {error}", *ended - *began);
            broken += 1;
        }
    }
    println!(
        "{} requests; {during_restart:?} connected while no agent was running; {broken} were open",
        attempts.len()
    );
    assert!(during_restart.iter().all(|count| *count >= CLIENTS / 2), "{during_restart:?}");
    assert_eq!(before, text(&kubectl(&node.kubeconfig(), &["config", "view", "--raw"])));
}
