//! Faults affect only the connections that they have to, and only until a deadline.

use std::io::Read as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pintle::proxy::ClientFiles;
use pintle::proxy::Epoch;
use rustls::sign::{CertifiedKey, Signer, SigningKey};
use rustls::{SignatureAlgorithm, SignatureScheme};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::bed::{ApiServer, Authority, Bed, until};
use crate::client::{self, Client};

#[tokio::test(flavor = "multi_thread")]
async fn another_api_server_takes_over() {
    let authority = Authority::new();
    let second = ApiServer::start(&authority).await;
    let refuses = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    // Connections are accepted by the kernel's backlog, but never answered.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = authority.upstream(&[refuses, silent.local_addr().unwrap(), second.address]);
    let bed = Bed::start(Some(authority.epoch("node", &upstream)), |configuration, _| {
        configuration.handshake_timeout = Duration::from_secs(2);
        configuration.signing_deadline = Duration::from_millis(200);
    })
    .await;
    // The first connection detects the failure, while the local client waits in its handshake.
    until("a request succeeds", || {
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(bed.get("/whoami"))).is_ok()
    })
    .await;
    // Later connections skip the failed server. All failures have been counted by now.
    assert_eq!(bed.get("/whoami").await.unwrap(), "node");
    let found_out = bed.statistics().failures;
    for _ in 0..5 {
        assert_eq!(bed.get("/whoami").await.unwrap(), "node");
    }
    assert_eq!(bed.statistics().failures, found_out);
    drop(silent);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_api_server_is_reported_and_used_again_once_it_is_back() {
    let authority = Authority::new();
    let reserved = tokio::net::TcpSocket::new_v4().unwrap();
    reserved.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let gone = reserved.local_addr().unwrap();
    let server = ApiServer::start(&authority).await;
    let bed = Bed::start(Some(authority.epoch("node", &authority.upstream(&[gone]))), |_, _| {}).await;
    assert!(bed.get("/whoami").await.is_err());
    until("it is counted", || bed.failures("server-unreachable") >= 1).await;
    bed.proxy.swap(authority.epoch("again", &authority.upstream(&[server.address])));
    assert_eq!(bed.get("/whoami").await.unwrap(), "again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_loris_is_disconnected_and_evicts_only_its_own_connections() {
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let upstream = authority.upstream(&[server.address]);
    let bed = Bed::start(Some(authority.epoch("node", &upstream)), |configuration, _| {
        configuration.handshake_timeout = Duration::from_secs(1);
        configuration.maximum_handshakes = 20;
    })
    .await;
    let mut loris = Vec::new();
    for _ in 0..100 {
        let mut stream = TcpStream::connect(bed.proxy.address()).await.unwrap();
        stream.write_all(&[0x16, 3, 1]).await.unwrap();
        loris.push(stream);
    }
    assert_eq!(bed.get("/whoami").await.unwrap(), "node");
    until("the older ones are evicted", || bed.failures("too-many-handshakes") >= 80).await;
    until("the others have timed out", || bed.failures("local-handshake-timeout") >= 15).await;
    for mut stream in loris {
        assert!(matches!(stream.read(&mut [0; 100]).await, Ok(0) | Err(_)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_loris_cannot_use_up_the_connection_limit() {
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let upstream = authority.upstream(&[server.address]);
    let bed = Bed::start(Some(authority.epoch("node", &upstream)), |configuration, _| {
        configuration.handshake_timeout = Duration::from_secs(60);
        configuration.maximum_connections = 20;
    })
    .await;
    let mut loris = Vec::new();
    for _ in 0..50 {
        loris.push(TcpStream::connect(bed.proxy.address()).await.unwrap());
    }
    let served = tokio::time::timeout(Duration::from_secs(20), bed.get("/whoami")).await;
    assert_eq!(served.expect("it is accepted").unwrap(), "node");
    // Each connection evicts an older one, except for the half that may remain.
    assert!(bed.failures("too-many-handshakes") >= 40);
}

/// A key whose device does not respond, as seen through [`pintle::keys`]: an error after the deadline.
#[derive(Debug)]
struct Hung(Arc<AtomicBool>, Arc<dyn SigningKey>);

impl SigningKey for Hung {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        self.1.choose_scheme(offered).map(|signer| Box::new(HungSigner(Arc::clone(&self.0), signer)) as Box<dyn Signer>)
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        self.1.algorithm()
    }
}

#[derive(Debug)]
struct HungSigner(Arc<AtomicBool>, Box<dyn Signer>);

impl Signer for HungSigner {
    fn sign(&self, _: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        tokio::task::block_in_place(|| {
            while !self.0.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        Err(rustls::Error::Other(rustls::OtherError(Arc::new(std::io::Error::other("no answer")))))
    }

    fn scheme(&self) -> SignatureScheme {
        self.1.scheme()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_key_device_fails_new_connections_after_a_deadline_and_open_ones_continue() {
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let upstream = authority.upstream(&[server.address]);
    let bed = Bed::start(Some(authority.epoch("good", &upstream)), |configuration, _| {
        configuration.signing_deadline = Duration::from_millis(500);
    })
    .await;
    let mut open = bed.connect("http/1.1").await.unwrap();
    let mut ask = async || {
        open.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = [0; 1000];
        let count = open.read(&mut answer).await.unwrap();
        String::from_utf8(answer[..count].to_vec()).unwrap()
    };
    assert!(ask().await.contains("good"));
    let certified = authority.certified_key("hung");
    let answers = Arc::new(AtomicBool::new(false));
    let hung = Hung(Arc::clone(&answers), Arc::clone(&certified.key));
    let certificate = Arc::new(CertifiedKey::new(certified.cert.clone(), Arc::new(hung)));
    bed.proxy.swap(Epoch { certificate, ..authority.epoch("hung", &upstream) });
    let bed = Arc::new(bed);
    let mut new = tokio::task::JoinSet::new();
    for _ in 0..60 {
        let bed = Arc::clone(&bed);
        new.spawn(async move { bed.get("/whoami").await.unwrap_err() });
    }
    until("the first signature has timed out", || bed.failures("key-unavailable") > 0).await;
    assert!(ask().await.contains("good"), "an open connection still works");
    answers.store(true, Ordering::Relaxed);
    new.join_all().await;
    until("all are counted", || bed.failures("key-unavailable") == 60).await;
}

/// Set in a process that only runs clients: the address of the proxy.
const CLIENTS_OF: &str = "PINTLE_TEST_CLIENTS_OF";
/// The directory with the clients' files.
const CLIENT_FILES: &str = "PINTLE_TEST_CLIENT_FILES";

#[tokio::test(flavor = "multi_thread")]
async fn five_thousand_idle_connections_cost_little_memory() {
    const CONNECTIONS: usize = 5000;
    if let Ok(proxy) = std::env::var(CLIENTS_OF) {
        let _open = open_and_idle(proxy.parse().unwrap(), CONNECTIONS).await;
        println!("all are open");
        let _ = std::io::stdin().read(&mut [0]);
        return;
    }
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let upstream = authority.upstream(&[server.address]);
    let bed = Bed::start(Some(authority.epoch("node", &upstream)), |_, _| {}).await;
    bed.get("/whoami").await.unwrap();
    let before = resident();
    // The proxy's two sides and the server use 15,000 descriptors in this process. Some systems allow only 20,000.
    let mut clients = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "faults::five_thousand_idle_connections_cost_little_memory", "--nocapture"])
        .env(CLIENTS_OF, bed.proxy.address().to_string())
        .env(CLIENT_FILES, bed.directory.path().join("client"))
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    until("all are open", || bed.open() == CONNECTIONS as u64).await;
    let each = (resident() - before) / CONNECTIONS as u64;
    println!("{CONNECTIONS} idle connections, each {each} kB resident, its server included");
    assert!(each < 100, "{each} kB each");
    assert_eq!(bed.get("/whoami").await.unwrap(), "node");
    drop(clients.stdin.take());
    assert!(tokio::task::block_in_place(|| clients.wait()).unwrap().success());
    until("all are closed", || bed.open() == 0).await;
}

/// Opens connections of both protocols that have finished a request and are idle.
async fn open_and_idle(proxy: SocketAddr, count: usize) -> Vec<Client> {
    let files = ClientFiles::in_directory(Path::new(&std::env::var_os(CLIENT_FILES).unwrap()));
    let mut open = Vec::new();
    for number in 0..count {
        let protocol = if number % 2 == 0 { "http/1.1" } else { "h2" };
        let stream = TcpStream::connect(proxy).await.unwrap();
        let mut stream = client::secure(stream, client::config(&files, &[protocol])).await.unwrap();
        if number % 2 == 0 {
            stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        }
        open.push(stream);
    }
    open
}

/// Set in the process with a low descriptor limit.
const FEW_DESCRIPTORS: &str = "PINTLE_TEST_FEW_DESCRIPTORS";

#[tokio::test(flavor = "multi_thread")]
async fn without_descriptors_it_waits_and_recovers() {
    if std::env::var_os(FEW_DESCRIPTORS).is_none() {
        let status = std::process::Command::new("prlimit")
            .arg("--nofile=256:256")
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "faults::without_descriptors_it_waits_and_recovers"])
            .env(FEW_DESCRIPTORS, "1")
            .status();
        assert!(status.unwrap().success());
        return;
    }
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let upstream = authority.upstream(&[server.address]);
    let bed = Bed::start(Some(authority.epoch("node", &upstream)), |_, _| {}).await;
    assert_eq!(bed.get("/whoami").await.unwrap(), "node");
    let config = bed.client_config(&["http/1.1"]);
    until("the first connection is closed", || bed.open() == 0).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut taken = Vec::new();
    while let Ok(file) = std::fs::File::open("/dev/null") {
        taken.push(file);
    }
    taken.pop();
    // The kernel completes the connection, but the process cannot accept it.
    let request = async {
        let mut stream = bed.connect_with(config).await.unwrap();
        crate::client::get_over(&mut stream, "/whoami").await.unwrap()
    };
    let recovery = async {
        until("it is counted", || bed.failures("accept-failed") >= 2).await;
        taken.clear();
    };
    let (answer, ()) = tokio::join!(request, recovery);
    assert_eq!(answer, "node");
}

/// Resident memory of this process in kB (proc(5)).
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
