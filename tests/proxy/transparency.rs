//! Bytes pass unchanged.

use std::time::Duration;

use futures::StreamExt as _;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::Request;
use hyper::body::{Bytes, Frame};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use crate::bed::{ApiServer, Authority, Bed, body_of, checksum_of};

const LARGE: u64 = 1_000_000_000;

fn large_body() -> impl hyper::body::Body<Data = Bytes, Error = std::convert::Infallible> + Send + 'static {
    StreamBody::new(body_of(LARGE).map(|bytes| bytes.map(Frame::data)))
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_of_a_gigabyte_pass_both_ways_by_http_1_and_http_2() {
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let epoch = authority.epoch("node", &authority.upstream(&[server.address]));
    let bed = Bed::start(Some(epoch), |_, _| {}).await;
    let expected = checksum_of(body_of(LARGE).map(Result::unwrap).boxed()).await;
    for protocol in ["http/1.1", "h2"] {
        let stream = TokioIo::new(bed.connect(protocol).await.unwrap());
        let upload = Request::post("https://x/upload").header("host", "x").body(large_body().boxed()).unwrap();
        let download = Request::get(format!("https://x/download/{LARGE}"))
            .header("host", "x")
            .body(http_body_util::Empty::new().boxed());
        let (up, down) = if protocol == "h2" {
            let (mut send, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
            tokio::spawn(connection);
            // In parallel.
            let (up, down) = tokio::join!(send.clone().send_request(upload), send.send_request(download.unwrap()));
            (up.unwrap(), down.unwrap())
        } else {
            let (mut send, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
            tokio::spawn(connection);
            let up = send.send_request(upload).await.unwrap();
            let other = TokioIo::new(bed.connect(protocol).await.unwrap());
            let (mut send, connection) = hyper::client::conn::http1::handshake(other).await.unwrap();
            tokio::spawn(connection);
            (up, send.send_request(download.unwrap()).await.unwrap())
        };
        let down = down.into_body().into_data_stream().map(Result::unwrap);
        let (up, down) = tokio::join!(up.into_body().collect(), checksum_of(down.boxed()));
        assert_eq!(up.unwrap().to_bytes(), expected.as_bytes(), "{protocol}, to the server");
        assert_eq!(down, expected, "{protocol}, to the client");
    }
    // The last bytes are counted after they are written, so the client may have read them before.
    crate::bed::until("all bytes are counted", || {
        bed.statistics().bytes_to_server > 2 * LARGE && bed.statistics().bytes_to_client > 2 * LARGE
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_watches_share_a_connection() {
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let epoch = authority.epoch("node", &authority.upstream(&[server.address]));
    let bed = Bed::start(Some(epoch), |_, _| {}).await;
    let stream = TokioIo::new(bed.connect("h2").await.unwrap());
    let (send, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
    tokio::spawn(connection);
    let mut watches = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let mut send = send.clone();
        watches.spawn(async move {
            send.ready().await.unwrap();
            let request = Request::get("https://x/watch/5").body(http_body_util::Empty::<Bytes>::new()).unwrap();
            let mut body = send.send_request(request).await.unwrap().into_body();
            let mut seen = Vec::new();
            while seen.iter().filter(|byte| **byte == b'\n').count() < 50 {
                seen.extend_from_slice(body.frame().await.unwrap().unwrap().data_ref().unwrap());
            }
            let lines: Vec<u64> = String::from_utf8(seen).unwrap().lines().map(|line| line.parse().unwrap()).collect();
            assert!(lines.iter().copied().eq(0..lines.len() as u64));
        });
    }
    watches.join_all().await;
    assert_eq!(bed.open(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_servers_close_reaches_the_client_and_the_clients_close_closes_both() {
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let epoch = authority.epoch("node", &authority.upstream(&[server.address]));
    let bed = Bed::start(Some(epoch), |_, _| {}).await;
    let mut stream = bed.connect("http/1.1").await.unwrap();
    stream.write_all(b"GET /slow/300 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(Duration::from_secs(5), stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.ends_with("node"), "{answer}");
    stream.shutdown().await.unwrap();
    crate::bed::until("both ends are closed", || bed.open() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http_proxy_opens_the_tunnel() {
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy_url = format!("http://user:p%40ss@{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(client.read_u8().await.unwrap());
            }
            let request = String::from_utf8(request).unwrap();
            assert!(request.contains("Proxy-Authorization: Basic dXNlcjpwQHNz\r\n"), "{request}");
            let target = request.split(' ').nth(1).unwrap().to_owned();
            let mut server = tokio::net::TcpStream::connect(target).await.unwrap();
            client.write_all(b"HTTP/1.1 200 Connection established\r\nX: y\r\n\r\n").await.unwrap();
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut client, &mut server).await });
        }
    });
    let upstream = authority.upstream_through(&[server.address], Some(&proxy_url));
    let bed = Bed::start(Some(authority.epoch("node", &upstream)), |_, _| {}).await;
    assert_eq!(bed.get("/whoami").await.unwrap(), "node");
}
