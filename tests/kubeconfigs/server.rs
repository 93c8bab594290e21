//! An API server that only serves its version, with any certificate.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

use pintle::tls::{ClientCertificates, Verifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::{Error, ServerConfig, StreamOwned};

/// The response to every request.
const VERSION: &str = r#"{"major":"1","minor":"36","gitVersion":"v1.36.3"}"#;

/// Starts a server with this certificate, which accepts any client certificate and runs until the test process exits.
pub(crate) fn start(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> SocketAddr {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = Verifier::without_signatures(AnyClient, &provider);
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(chain, key)
        .expect("a certificate and its key");
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener.local_addr().expect("it is bound");
    std::thread::spawn(move || {
        for stream in listener.incoming().filter_map(Result::ok) {
            let config = Arc::clone(&config);
            // The clients report how a connection ends.
            std::thread::spawn(move || drop(serve(stream, config)));
        }
    });
    address
}

fn serve(stream: TcpStream, config: Arc<ServerConfig>) -> std::io::Result<()> {
    let connection = rustls::ServerConnection::new(config).map_err(std::io::Error::other)?;
    let mut reader = BufReader::new(StreamOwned::new(connection, stream));
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length:";
    let stream = reader.get_mut();
    write!(stream, "{head} {}\r\n\r\n{VERSION}", VERSION.len())?;
    stream.conn.send_close_notify();
    stream.flush()
}

/// Requests a client certificate and accepts any, including X.509 v1.
#[derive(Debug)]
struct AnyClient;

impl ClientCertificates for AnyClient {
    fn check(&self, _: &CertificateDer<'_>, _: &[CertificateDer<'_>], _: UnixTime) -> Result<(), Error> {
        Ok(())
    }

    fn is_mandatory(&self) -> bool {
        false
    }
}
