//! Flow of bytes: half-closed connections, back-pressure, and the key exchange.

use std::sync::Arc;
use std::time::Duration;

use pintle::kubernetes::Cluster;
use pintle::proxy::Upstream;
use rustls::NamedGroup;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::server::TlsStream;

use crate::bed::{ApiServer, Authority, Bed, until};

/// Accepts the next connection with a client certificate, skipping those that only negotiate the protocol.
async fn accept_known(listener: &TcpListener, authority: &Authority) -> TlsStream<TcpStream> {
    loop {
        let stream = authority.acceptor().accept(listener.accept().await.unwrap().0).await.unwrap();
        if stream.get_ref().1.peer_certificates().is_some() {
            return stream;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_arrives_after_the_client_has_closed_its_side() {
    const LENGTH: usize = 3_000_000;
    let authority = Authority::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = authority.upstream(&[listener.local_addr().unwrap()]);
    let bed = Bed::start(Some(authority.epoch("node", &upstream)), |_, _| {}).await;
    let server = async {
        let mut stream = accept_known(&listener, &authority).await;
        let mut asked = Vec::new();
        stream.read_to_end(&mut asked).await.unwrap();
        assert!(asked.ends_with(b"\r\n\r\n"), "the whole request arrived before the close");
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        for piece in vec![7; LENGTH].chunks(LENGTH / 10) {
            tokio::time::sleep(Duration::from_millis(50)).await;
            stream.write_all(piece).await.unwrap();
        }
        stream.shutdown().await.unwrap();
    };
    let client = async {
        let mut stream = bed.connect("http/1.1").await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        answer
    };
    let ((), answer) =
        tokio::time::timeout(Duration::from_secs(30), async { tokio::join!(server, client) }).await.unwrap();
    assert_eq!(answer.iter().filter(|byte| **byte == 7).count(), LENGTH);
    until("both ends are closed", || bed.open() == 0).await;
    assert_eq!(bed.statistics().failures, [].into());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_client_slows_down_reading_from_the_server() {
    const LENGTH: u64 = 300_000_000;
    /// Limit on what all sockets' buffers may hold, which the kernel grows.
    const ON_THE_WAY: u64 = 40_000_000;
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let epoch = authority.epoch("node", &authority.upstream(&[server.address]));
    let bed = Bed::start(Some(epoch), |_, _| {}).await;
    let mut stream = bed.connect("http/1.1").await.unwrap();
    let request = format!("GET /download/{LENGTH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    until("the answer has begun", || bed.statistics().bytes_to_client > 100_000).await;
    let mut copied = 0;
    while bed.statistics().bytes_to_client > copied {
        copied = bed.statistics().bytes_to_client;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(copied < ON_THE_WAY, "{copied} bytes for a client that does not read");
    let (mut buffer, mut read) = (vec![0; 1 << 20], 0);
    while let count @ 1.. = stream.read(&mut buffer).await.unwrap() {
        read += count as u64;
    }
    assert!(read > LENGTH, "all of it comes in the end: {read}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_exchange_with_a_capable_api_server_is_post_quantum() {
    let authority = Authority::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::write(path("ca.crt"), authority.pem()).unwrap();
    let kubeconfig = format!(
        "{{apiVersion: v1, kind: Config, current-context: a, contexts: [{{name: a, context: {{cluster: a, user: a}}}}], \
         users: [{{name: a, user: {{}}}}], clusters: [{{name: a, cluster: {{server: 'https://{}', \
         certificate-authority: ca.crt}}}}]}}",
        listener.local_addr().unwrap()
    );
    std::fs::write(path("kubeconfig"), kubeconfig).unwrap();
    let cluster = Cluster::read(&path("kubeconfig")).unwrap();
    let upstream = Arc::new(Upstream::of(&cluster, &[]).unwrap());
    let bed = Bed::start(Some(authority.epoch("node", &upstream)), |_, _| {}).await;
    let (stream, client) = tokio::join!(accept_known(&listener, &authority), bed.connect("http/1.1"));
    client.unwrap();
    let group = stream.get_ref().1.negotiated_key_exchange_group().unwrap();
    assert_eq!(group.name(), NamedGroup::X25519MLKEM768);
}
