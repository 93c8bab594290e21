//! No request fails, and no connection outlives its certificate (case C19).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use pintle::world::clock::now;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::bed::{ApiServer, Authority, Bed, until};

type HttpClient = Client<hyper_rustls::HttpsConnector<HttpConnector>, Full<Bytes>>;

fn http_client(bed: &Bed, http2: bool) -> HttpClient {
    let https = HttpsConnectorBuilder::new().with_tls_config(bed.client_config(&[])).https_only();
    let mut builder = Client::builder(TokioExecutor::new());
    if http2 {
        builder.http2_only(true).build(https.enable_http2().build())
    } else {
        builder.build(https.enable_http1().build())
    }
}

/// hyper's error for a request that it did not send because the connection was going away. Go's client retries such a
/// request on another connection (`net/http`: errClientConnUnusable); hyper leaves that to its caller. About once in
/// ten thousand requests hyper has sent the request after all: it may start one while it closes a connection without
/// streams.
const NOT_SENT: &str = "GoAway(b\"\", NO_ERROR, Remote)";

async fn ask(client: &HttpClient, bed: &Bed, method: Method, path: &str) -> Result<String, String> {
    loop {
        match ask_once(client, bed, method.clone(), path).await {
            Err(error) if error.contains(NOT_SENT) => {}
            answered => return answered,
        }
    }
}

async fn ask_once(client: &HttpClient, bed: &Bed, method: Method, path: &str) -> Result<String, String> {
    let request = Request::builder()
        .method(method)
        .uri(format!("https://{}{path}", bed.proxy.address()))
        .body(Full::new(Bytes::from_static(b"body")))
        .unwrap();
    let response = client.request(request).await.map_err(|error| format!("{error:?}"))?;
    if !response.status().is_success() {
        return Err(response.status().to_string());
    }
    let body = response.into_body().collect().await.map_err(|error| format!("{error:?}"))?;
    Ok(String::from_utf8(body.to_bytes().to_vec()).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn c19_no_request_fails_in_200_rotations_under_load() {
    const ROTATIONS: u64 = 200;
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let upstream = authority.upstream(&[server.address]);
    let bed = Arc::new(Bed::start(Some(authority.epoch("0", &upstream)), |_, _| {}).await);
    let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut load = tokio::task::JoinSet::new();
    for worker in 0..8 {
        let (bed, stop, asked) = (Arc::clone(&bed), Arc::clone(&stop), Arc::clone(&asked));
        load.spawn(async move {
            // Half of them use HTTP/2, and one in four opens a connection for each request.
            let (http2, fresh) = (worker % 2 == 0, worker >= 6);
            let mut client = http_client(&bed, http2);
            let mut failed = Vec::new();
            for number in 0u64.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                if fresh {
                    client = http_client(&bed, http2);
                }
                // Clients must not retry POST requests by themselves.
                let (method, path) = match number % 3 {
                    0 => (Method::GET, "/whoami"),
                    1 => (Method::POST, "/whoami"),
                    _ => (Method::POST, "/slow/3"),
                };
                if let Err(error) = ask(&client, &bed, method, path).await {
                    failed.push((worker, number, error));
                }
                asked.fetch_add(1, Ordering::Relaxed);
            }
            failed
        });
    }
    for rotation in 1..=ROTATIONS {
        tokio::time::sleep(Duration::from_millis(25)).await;
        bed.proxy.swap(authority.epoch(&rotation.to_string(), &upstream));
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    stop.store(true, Ordering::Relaxed);
    let failed: Vec<_> = load.join_all().await.concat();
    let statistics = bed.statistics();
    println!(
        "{} requests in {ROTATIONS} rotations, {} failed; {statistics:?}",
        asked.load(Ordering::Relaxed),
        failed.len()
    );
    assert!(failed.is_empty(), "{failed:?}");
    let done: u64 = server.seen.requests.lock().unwrap().values().sum();
    assert!(done >= asked.load(Ordering::Relaxed), "{done}");
    assert!(server.requests_of(&ROTATIONS.to_string()) > 0);
    for rotation in 0..ROTATIONS {
        let serial = rotation.to_string();
        let unused = bed.proxy.wait_until_unused(&serial);
        tokio::time::timeout(Duration::from_secs(20), unused).await.expect("an old epoch goes out of use");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn c19_a_watch_survives_a_rotation_and_new_requests_use_the_new_certificate() {
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let upstream = authority.upstream(&[server.address]);
    let bed = Bed::start(Some(authority.epoch("old", &upstream)), |_, _| {}).await;
    let client = http_client(&bed, true);
    let uri = format!("https://{}/watch/10", bed.proxy.address());
    let watch = client.request(Request::get(uri).body(Full::default()).unwrap()).await.unwrap();
    let mut watch = watch.into_body();
    watch.frame().await.unwrap().unwrap();
    bed.proxy.swap(authority.epoch("new", &upstream));
    until("a request uses the new certificate", || {
        server.requests_of("new") > 0 || {
            let asked = tokio::task::block_in_place(|| {
                tokio::runtime::Handle::current().block_on(ask(&client, &bed, Method::GET, "/whoami"))
            });
            asked.unwrap() == "new"
        }
    })
    .await;
    for _ in 0..20 {
        watch.frame().await.unwrap().unwrap();
    }
    let open = bed.statistics().open_connections;
    assert_eq!((open["old"], open["new"]), (1, 1));
    drop(watch);
    let unused = bed.proxy.wait_until_unused("old");
    tokio::time::timeout(Duration::from_secs(10), unused).await.expect("the last stream was its end");
}

#[tokio::test(flavor = "multi_thread")]
async fn c19_an_upgraded_connection_survives_a_rotation_and_is_closed_before_its_certificate_expires() {
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let upstream = authority.upstream(&[server.address]);
    let mut short = authority.epoch("short", &upstream);
    short.not_after = now() + Duration::from_secs(3);
    let bed = Bed::start(Some(short), |_, _| {}).await;
    let mut stream = bed.connect("http/1.1").await.unwrap();
    stream
        .write_all(b"GET /upgrade HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await.unwrap());
    }
    assert!(answer.starts_with(b"HTTP/1.1 101"));
    let mut echo = async |text: &[u8]| {
        stream.write_all(text).await?;
        let mut back = vec![0; text.len()];
        stream.read_exact(&mut back).await?;
        assert_eq!(back, text);
        Ok::<_, std::io::Error>(())
    };
    echo(b"before").await.unwrap();
    bed.proxy.swap(authority.epoch("long", &upstream));
    echo(&[0xfe; 10_000]).await.unwrap();
    // Closed before the certificate expires, and counted.
    while echo(b"HTTP/1.1 200 OK\r\n").await.is_ok() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bed.proxy.wait_until_unused("short").await;
    assert_eq!(bed.failures("cut-at-end"), 1);
    assert_eq!(bed.get("/whoami").await.unwrap(), "long");
}

#[tokio::test(flavor = "multi_thread")]
async fn c19_idle_connections_are_closed_when_draining() {
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let upstream = authority.upstream(&[server.address]);
    let bed = Bed::start(Some(authority.epoch("old", &upstream)), |configuration, _| {
        configuration.drain = Duration::from_secs(1);
    })
    .await;
    let mut idle = bed.connect("http/1.1").await.unwrap();
    idle.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let _ = idle.read(&mut [0; 1000]).await.unwrap();
    bed.proxy.swap(authority.epoch("new", &upstream));
    assert_eq!(bed.proxy.statistics().open_connections["old"], 1);
    let unused = bed.proxy.wait_until_unused("old");
    tokio::time::timeout(Duration::from_secs(5), unused).await.expect("draining ends");
    assert_eq!(idle.read(&mut [0; 10]).await.unwrap(), 0, "a clean close");
    assert_eq!(bed.failures("cut-at-end"), 0, "no request was outstanding");
}

/// A GET of `/` on stream 1 as a client's first bytes: preface, SETTINGS, and HEADERS with three fields of HPACK's
/// static table (RFC 7541, appendix A).
const HTTP2_GET: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x03\x01\x05\0\0\0\x01\x82\x87\x84";

#[tokio::test(flavor = "multi_thread")]
async fn c19_an_idle_connection_is_closed_early_only_if_its_client_was_told() {
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let upstream = authority.upstream(&[server.address]);
    let bed = Bed::start(Some(authority.epoch("old", &upstream)), |_, _| {}).await;
    let mut not_notified = bed.connect("http/1.1").await.unwrap();
    let mut ask = async || {
        not_notified.write_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").await.unwrap();
        let mut answer = [0; 1000];
        let count = not_notified.read(&mut answer).await.unwrap();
        String::from_utf8(answer[..count].to_vec()).unwrap()
    };
    assert!(!ask().await.contains("Connection: close"));
    // This client receives the GOAWAY and ignores it.
    let mut notified = bed.connect("h2").await.unwrap();
    notified.write_all(HTTP2_GET).await.unwrap();
    until("it is answered", || server.requests_of("old") == 2).await;
    bed.proxy.swap(authority.epoch("new", &upstream));
    notified.read_to_end(&mut Vec::new()).await.expect("a clean close, after a while");
    // The other connection has been idle for as long, and would be closed by now.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(bed.statistics().open_connections.get("old"), Some(&1));
    // Its client could not be told, and may have been about to send a request.
    let answer = ask().await;
    assert!(answer.contains("Connection: close") && answer.ends_with("old"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_waits_for_the_first_certificate() {
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let upstream = authority.upstream(&[server.address]);
    let bed = Bed::start(None, |_, _| {}).await;
    let swap = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        bed.proxy.swap(authority.epoch("first", &upstream));
    };
    let (answer, ()) = tokio::join!(bed.get("/whoami"), swap);
    assert_eq!(answer.unwrap(), "first");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_gets_no_certificate_in_time_is_counted() {
    let bed = Bed::start(None, |configuration, _| configuration.handshake_timeout = Duration::from_millis(500)).await;
    assert!(bed.get("/whoami").await.is_err());
    until("it is counted", || !bed.statistics().failures.is_empty()).await;
    assert_eq!(bed.statistics().failures, [("no-certificate".to_owned(), 1)].into());
}
