//! API servers that restart, are slow, or do not respond: results of Go's clients, and the proxy's counters.

use std::net::SocketAddr;
use std::time::Duration;

use pintle_test_support::{Load, LoadReport, ScratchDirectory};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::bed::{ApiServer, Authority, Bed, until};

const FLAGS: [&str; 4] = ["--get=/whoami", "--post=/whoami", "--post=/slow/3", "--interval=5ms"];
/// Enough for every client to receive several responses.
const REQUESTS: u64 = 200;

struct Clients {
    load: Load,
    _scratch: ScratchDirectory,
}

impl Clients {
    /// Two programs and two protocols; three clients that share connections, and one that does not.
    const COUNT: u64 = 16;

    fn start(bed: &Bed) -> Self {
        let scratch = ScratchDirectory::new();
        let mut load = Load::start(&bed.kubeconfig(), &scratch, &FLAGS);
        load.wait_until_running(Duration::from_secs(60));
        Self { load, _scratch: scratch }
    }

    fn stop(self) -> LoadReport {
        let report = self.load.stop();
        println!("{}", report.text);
        report
    }
}

/// Runs new clients, all of whose requests must succeed, until this server has received enough requests.
async fn nothing_fails(bed: &Bed, server: &ApiServer) {
    let before = server.requests();
    let clients = Clients::start(bed);
    until("the API server is asked", || server.requests() >= before + REQUESTS).await;
    let report = clients.stop();
    assert_eq!((report.failed, report.answered), (0, report.requests), "{}", report.text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_api_server_is_restarted_under_load() {
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let address = server.address;
    let bed = Bed::start(Some(authority.epoch("node", &authority.upstream(&[address]))), |_, _| {}).await;
    let clients = Clients::start(&bed);
    until("the API server is asked", || server.requests() >= REQUESTS).await;
    assert_eq!(bed.statistics().failures, [].into());
    drop(server);
    until("its absence is counted", || bed.failures("server-unreachable") >= 10).await;
    let server = ApiServer::start_again(&authority, address).await;
    until("the clients are served again", || server.requests() >= REQUESTS).await;
    let report = clients.stop();
    assert!(report.failed > 0 && report.by.iter().all(|count| count.answered > 0), "{}", report.text);

    let failures = bed.statistics().failures;
    println!("{failures:?}");
    // The restart may have interrupted a connection at any point.
    let expected = ["server-unreachable", "server-handshake", "broken"];
    assert!(failures.keys().all(|reason| expected.contains(&reason.as_str())), "{failures:?}");
    nothing_fails(&bed, &server).await;
    assert_eq!(bed.statistics().failures, failures, "nothing more is counted");
    assert_eq!(bed.open(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_of_two_api_servers_is_restarted_under_load() {
    let authority = Authority::new();
    let (first, second) = (ApiServer::start(&authority).await, ApiServer::start(&authority).await);
    let address = first.address;
    let upstream = authority.upstream(&[address, second.address]);
    let bed = Bed::start(Some(authority.epoch("node", &upstream)), |_, _| {}).await;
    let clients = Clients::start(&bed);
    until("the first one is asked", || first.requests() >= REQUESTS).await;
    assert_eq!(second.requests(), 0, "the first one is preferred");
    drop(first);
    nothing_fails(&bed, &second).await;
    let first = ApiServer::start_again(&authority, address).await;
    until("the first one is found again", || first.requests() >= REQUESTS).await;
    let report = clients.stop();
    let failures = bed.statistics().failures;
    println!("{failures:?}");
    // Each client may have had a request in flight, and another on a connection that it did not yet know to be
    // closed. None had to wait for the first server.
    assert!(report.failed <= 2 * Clients::COUNT, "{}", report.text);
    assert!(failures.keys().all(|reason| reason == "broken"), "{failures:?}");
    nothing_fails(&bed, &first).await;
}

/// A proxy to this server that delays every read in both directions.
async fn long_way(server: SocketAddr, delay: Duration) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            tokio::spawn(async move {
                let far = TcpStream::connect(server).await.unwrap();
                let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
                let one_way = async |mut from: tokio::net::tcp::OwnedReadHalf,
                                     mut to: tokio::net::tcp::OwnedWriteHalf| {
                    let mut piece = vec![0; 64 << 10];
                    while let Ok(count @ 1..) = from.read(&mut piece).await {
                        tokio::time::sleep(delay).await;
                        if to.write_all(&piece[..count]).await.is_err() {
                            break;
                        }
                    }
                };
                tokio::join!(one_way(near_read, far_write), one_way(far_read, near_write));
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_slow_api_server_responds_late_without_failures() {
    /// The timeout of a handshake, which takes four of the delays below.
    const PATIENCE: Duration = Duration::from_secs(3);
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let upstream = authority.upstream(&[long_way(server.address, Duration::from_millis(100)).await]);
    let bed = Bed::start(Some(authority.epoch("old", &upstream)), |configuration, _| {
        configuration.connect_timeout = PATIENCE;
        configuration.handshake_timeout = PATIENCE;
        configuration.signing_deadline = PATIENCE / 3;
    })
    .await;
    // The response takes longer than every timeout.
    let late = bed.get("/slow/8500");
    let rotation = async {
        until("it is asked", || server.requests_of("old") == 1).await;
        bed.proxy.swap(authority.epoch("new", &upstream));
        nothing_fails(&bed, &server).await;
    };
    let (late, ()) = tokio::join!(late, rotation);
    assert_eq!(late.unwrap(), "old");
    assert_eq!(bed.statistics().failures, [].into());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unresponsive_api_server_times_out_and_is_counted() {
    let authority = Authority::new();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = authority.upstream(&[silent.local_addr().unwrap()]);
    let bed = Bed::start(Some(authority.epoch("node", &upstream)), |configuration, _| {
        configuration.handshake_timeout = Duration::from_secs(1);
        configuration.signing_deadline = Duration::from_millis(200);
    })
    .await;
    assert!(bed.get("/whoami").await.is_err());
    until("it is counted", || !bed.statistics().failures.is_empty()).await;
    assert_eq!(bed.statistics().failures, [("server-handshake".to_owned(), 1)].into());
    assert_eq!(bed.open(), 0);

    // A server that stops responding later.
    let server = ApiServer::start(&authority).await;
    let upstream = authority.upstream(&[server.address]);
    let bed = Bed::start(Some(authority.epoch("node", &upstream)), |configuration, _| {
        configuration.idle_timeout = Duration::from_secs(1);
    })
    .await;
    assert!(bed.get("/slow/60000").await.is_err());
    until("it is counted", || !bed.statistics().failures.is_empty()).await;
    assert_eq!(bed.statistics().failures, [("idle-timeout".to_owned(), 1)].into());
    assert_eq!(bed.open(), 0);
}
