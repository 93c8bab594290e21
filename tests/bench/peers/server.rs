//! The common server: HTTP/1.1 over TLS 1.3, for clients with the node's certificate. Its CPU time is not counted.

use std::net::SocketAddr;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::{SupportedKxGroup, aws_lc_rs};
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::authority::{NODE, Pair};
use crate::exact::{ExactCertificates, fast_provider};

/// Write size for large responses, in bytes.
const WRITE_SIZE: usize = 64 << 10;

/// The server's key exchange.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeyExchange {
    /// X25519, which all proxies support.
    Classic,
    /// X25519MLKEM768 if the client offers it, as in current API servers.
    Hybrid,
}

impl KeyExchange {
    pub(crate) fn groups(self) -> Vec<&'static dyn SupportedKxGroup> {
        match self {
            Self::Classic => vec![aws_lc_rs::kx_group::X25519],
            Self::Hybrid => vec![aws_lc_rs::kx_group::X25519MLKEM768, aws_lc_rs::kx_group::X25519],
        }
    }
}

/// Starts a server on its own thread, which runs until the process exits.
pub(crate) fn start(pair: &Pair, clients: Vec<CertificateDer<'static>>, key_exchange: KeyExchange) -> SocketAddr {
    let provider = Arc::new(fast_provider(key_exchange.groups()));
    let mut tls = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_client_cert_verifier(Arc::new(ExactCertificates::verifier(clients, &provider)))
        .with_single_cert(vec![pair.certificate.clone()], pair.private_key())
        .expect("a server's pair");
    // AES-128-GCM regardless of the client's preference, as in Go's server (crypto/tls, processClientHello).
    tls.ignore_client_order = true;
    // No session tickets: a proxy's resumed session would be a cheap handshake for its client.
    tls.send_tls13_tickets = 0;
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.set_nonblocking(true).expect("a listener");
    let address = listener.local_addr().expect("its address");
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let listener = TcpListener::from_std(listener).expect("a listener");
            loop {
                let (stream, _) = listener.accept().await.expect("a connection");
                stream.set_nodelay(true).expect("an option");
                let acceptor = acceptor.clone();
                // A connection's errors are its client's to report.
                tokio::spawn(async move { serve(acceptor.accept(stream).await?).await });
            }
        });
    });
    address
}

async fn serve(mut stream: TlsStream<TcpStream>) -> std::io::Result<()> {
    let mut received = Vec::with_capacity(WRITE_SIZE);
    let piece = vec![b'.'; WRITE_SIZE];
    loop {
        let (head, length) = loop {
            if let Some(head) = received.windows(4).position(|window| window == b"\r\n\r\n") {
                let text = String::from_utf8_lossy(&received[..head]).into_owned();
                received.drain(..head + 4);
                break (text, head);
            }
            if stream.read_buf(&mut received).await? == 0 {
                return stream.shutdown().await;
            }
        };
        assert!(length < WRITE_SIZE, "a request's head is short");
        let line = head.lines().next().unwrap_or_default();
        let path = line.split(' ').nth(1).unwrap_or_default();
        let mut left = content_length(&head).saturating_sub(received.len());
        received.clear();
        while left > 0 {
            received.clear();
            match stream.read_buf(&mut received).await? {
                0 => return Ok(()),
                read => left = left.saturating_sub(read),
            }
        }
        received.clear();
        if let Some(size) = path.strip_prefix("/download/").and_then(|size| size.parse::<usize>().ok()) {
            stream.write_all(head_of("200 OK", size).as_bytes()).await?;
            let mut left = size;
            while left > 0 {
                let count = left.min(WRITE_SIZE);
                stream.write_all(&piece[..count]).await?;
                left -= count;
            }
        } else if path.ends_with("/selfsubjectreviews") {
            let review = serde_json::json!({
                "apiVersion": "authentication.k8s.io/v1",
                "kind": "SelfSubjectReview",
                "status": { "userInfo": { "username": format!("system:node:{NODE}"), "groups": ["system:nodes"] } },
            })
            .to_string();
            stream.write_all((head_of("201 Created", review.len()) + &review).as_bytes()).await?;
        } else {
            let body = "a small answer";
            stream.write_all((head_of("200 OK", body.len()) + body).as_bytes()).await?;
        }
        stream.flush().await?;
    }
}

fn head_of(status: &str, length: usize) -> String {
    format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n")
}

/// The length of the body after these headers.
pub(crate) fn content_length(head: &str) -> usize {
    let field = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    });
    field.unwrap_or_default()
}
