//! The listener: TLS, HTTP/1.1 and HTTP/2, and closing all connections when the server goes away.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use super::api;
use super::cluster::Cluster;
use super::connection::Connection;

/// Interval between attempts to bind a port that is still in use.
const REBIND_INTERVAL: Duration = Duration::from_millis(20);

/// Timeout of a client's TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Binds a free port of 127.0.0.1 and serves it. The receiver says whether the port is open.
pub(super) async fn start(cluster: Arc<Cluster>) -> io::Result<(SocketAddr, watch::Receiver<bool>, JoinHandle<()>)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    let (listening, receiver) = watch::channel(true);
    Ok((address, receiver, tokio::spawn(serve(cluster, listener, address, listening))))
}

async fn serve(cluster: Arc<Cluster>, first: TcpListener, address: SocketAddr, listening: watch::Sender<bool>) {
    let mut faults = cluster.faults.subscribe();
    let mut listener = first;
    loop {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                // The sender lives in the cluster, so this cannot fail.
                () = async { let _ = faults.wait_for(|faults| faults.unreachable).await; } => break,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => { connections.spawn(serve_connection(Arc::clone(&cluster), stream)); }
                    // Probably out of file descriptors; open connections continue.
                    Err(_) => tokio::time::sleep(REBIND_INTERVAL).await,
                },
                Some(_) = connections.join_next() => {}
            }
        }
        drop(listener);
        // A socket that is bound but does not listen refuses connections, and keeps others from using the port.
        let reserved = bind(address).await;
        connections.shutdown().await;
        listening.send_replace(false);
        let _ = faults.wait_for(|faults| !faults.unreachable).await;
        listener = listen(reserved, address).await;
        listening.send_replace(true);
    }
}

async fn bind(address: SocketAddr) -> TcpSocket {
    loop {
        let bound = TcpSocket::new_v4().and_then(|socket| {
            // Closed connections of this port may still be in TIME_WAIT.
            socket.set_reuseaddr(true)?;
            socket.bind(address)?;
            Ok(socket)
        });
        match bound {
            Ok(socket) => return socket,
            Err(_) => tokio::time::sleep(REBIND_INTERVAL).await,
        }
    }
}

async fn listen(reserved: TcpSocket, address: SocketAddr) -> TcpListener {
    let mut socket = reserved;
    loop {
        match socket.listen(1024) {
            Ok(listener) => return listener,
            Err(_) => {
                tokio::time::sleep(REBIND_INTERVAL).await;
                socket = bind(address).await;
            }
        }
    }
}

async fn serve_connection(cluster: Arc<Cluster>, stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let acceptor = TlsAcceptor::from(cluster.tls());
    let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await else { return };
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default().to_vec();
    let connection = Arc::new(Connection { certificates, authenticated: AtomicBool::new(false) });
    let service = service_fn(move |request| {
        let (cluster, connection) = (Arc::clone(&cluster), Arc::clone(&connection));
        async move { Ok::<_, Infallible>(api::answer(cluster, &connection, request).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new());
    builder.http2().timer(TokioTimer::new());
    // Connections closed by the client are not errors.
    let _ = builder.serve_connection(TokioIo::new(stream), service).await;
}
