//! A way to the API server on which a third party can answer in its place.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use pintle_test_support::{CertificatePair, forward};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// What is answered instead, in turn: another format, a torn object, bytes, an object without what matters, a list where
/// an object should be, and an issued certificate that is none.
const GARBAGE: [&[u8]; 6] = [
    b"<html><body>502 Bad Gateway</body></html>",
    b"{\"kind\":\"CertificateSigningRequest\",\"apiVersion\":\"certificates.k8s.io/v1\",\"metadata\":{\"na",
    b"\x00\xff\xfe\x80{{{{\r\n\r\n\x00",
    b"{}",
    b"[1, 2, 3]",
    b"{\"kind\":\"CertificateSigningRequest\",\"apiVersion\":\"certificates.k8s.io/v1\",\"metadata\":{\"name\":\"x\"},\
      \"spec\":{\"request\":\"eA==\",\"signerName\":\"x/y\",\"usages\":[]},\"status\":{\"certificate\":\"eA==\"}}",
];

/// Passes connections on to the API server untouched, or answers every request with garbage. Runs until the test ends.
pub(crate) struct Interceptor {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    server: SocketAddr,
    config: Arc<ServerConfig>,
    garbles: AtomicBool,
    /// Requests answered with garbage.
    answered: AtomicUsize,
    /// What is open on the client's side.
    open: Mutex<Vec<TcpStream>>,
}

impl Interceptor {
    /// Starts one in front of `server`, with a certificate that the server's clients trust.
    pub(crate) fn start(server: SocketAddr, pair: &CertificatePair) -> Self {
        let chain = CertificateDer::pem_file_iter(&pair.certificate).expect("a file").map(|found| found.expect("PEM"));
        let key = PrivateKeyDer::from_pem_file(&pair.key).expect("a key");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(chain.collect(), key)
            .expect("a certificate and its key");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let shared = Arc::new(Shared {
            server,
            config: Arc::new(config),
            garbles: AtomicBool::new(false),
            answered: AtomicUsize::new(0),
            open: Mutex::default(),
        });
        let of_listener = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().filter_map(Result::ok) {
                let shared = Arc::clone(&of_listener);
                // How a connection ends is the client's affair.
                std::thread::spawn(move || drop(shared.serve(stream)));
            }
        });
        Self { address, shared }
    }

    /// `https://127.0.0.1:PORT`.
    pub(crate) fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// Begins or stops answering with garbage; connections that are open end.
    pub(crate) fn garble(&self, garbles: bool) {
        self.shared.garbles.store(garbles, Ordering::SeqCst);
        for stream in self.shared.open.lock().expect("not poisoned").drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// How many requests were answered with garbage.
    pub(crate) fn answered(&self) -> usize {
        self.shared.answered.load(Ordering::SeqCst)
    }
}

impl Shared {
    fn serve(&self, client: TcpStream) -> std::io::Result<()> {
        self.open.lock().expect("not poisoned").push(client.try_clone()?);
        match self.garbles.load(Ordering::SeqCst) {
            true => self.answer(client),
            false => forward(client, TcpStream::connect(self.server)?),
        }
    }

    fn answer(&self, client: TcpStream) -> std::io::Result<()> {
        let connection = ServerConnection::new(Arc::clone(&self.config)).map_err(std::io::Error::other)?;
        let mut reader = BufReader::new(StreamOwned::new(connection, client));
        loop {
            let (mut line, mut length) = (String::new(), 0);
            while reader.read_line(&mut line)? > 2 {
                let header = line.to_ascii_lowercase();
                if let Some(value) = header.strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap_or(0);
                }
                line.clear();
            }
            std::io::copy(&mut reader.by_ref().take(length), &mut std::io::sink())?;
            let garbage = GARBAGE[self.answered.fetch_add(1, Ordering::SeqCst) % GARBAGE.len()];
            let stream = reader.get_mut();
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
                garbage.len()
            )?;
            stream.write_all(garbage)?;
            stream.flush()?;
        }
    }
}
