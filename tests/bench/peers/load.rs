//! The load: HTTP/1.1 clients that check the responses.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use crate::server::content_length;

/// Write size for large requests, in bytes.
const WRITE_SIZE: usize = 64 << 10;
const REQUEST: &[u8] = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n";

/// How to connect to a proxy.
#[derive(Clone)]
pub(crate) enum ProxyAddress {
    Tls(SocketAddr, Arc<ClientConfig>),
    Unix(PathBuf),
}

/// The direction of a transfer.
#[derive(Clone, Copy)]
pub(crate) enum Direction {
    ToClient,
    ToServer,
}

pub(crate) struct Connection {
    stream: Box<dyn Stream>,
    received: Vec<u8>,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

impl Connection {
    pub(crate) async fn open(address: &ProxyAddress) -> std::io::Result<Self> {
        let stream: Box<dyn Stream> = match address {
            ProxyAddress::Tls(address, config) => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                let name = ServerName::try_from("localhost").expect("a name");
                Box::new(TlsConnector::from(Arc::clone(config)).connect(name, stream).await?)
            }
            ProxyAddress::Unix(path) => Box::new(UnixStream::connect(path).await?),
        };
        Ok(Self { stream, received: Vec::new() })
    }

    /// Sends a small request and reads the response.
    pub(crate) async fn request(&mut self) -> std::io::Result<()> {
        self.stream.write_all(REQUEST).await?;
        self.stream.flush().await?;
        self.answer().await.map(drop)
    }

    /// Reads a response, and returns the length of its body.
    async fn answer(&mut self) -> std::io::Result<usize> {
        let end = loop {
            if let Some(end) = self.received.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            if self.stream.read_buf(&mut self.received).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        };
        let head = String::from_utf8_lossy(&self.received[..end]);
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        let length = content_length(&head);
        let mut left = length - (self.received.len() - end);
        self.received.clear();
        self.received.reserve(left.min(4 * WRITE_SIZE));
        while left > 0 {
            self.received.clear();
            match self.stream.read_buf(&mut self.received).await? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                read => left -= read,
            }
        }
        self.received.clear();
        Ok(length)
    }

    /// Transfers `size` bytes.
    async fn transfer(&mut self, size: usize, direction: Direction) -> std::io::Result<()> {
        match direction {
            Direction::ToClient => {
                let request = format!("GET /download/{size} HTTP/1.1\r\nHost: localhost\r\n\r\n");
                self.stream.write_all(request.as_bytes()).await?;
                self.stream.flush().await?;
                assert_eq!(self.answer().await?, size);
            }
            Direction::ToServer => {
                let request = format!("PUT /upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n");
                self.stream.write_all(request.as_bytes()).await?;
                let piece = vec![b'.'; WRITE_SIZE];
                let mut left = size;
                while left > 0 {
                    let count = left.min(WRITE_SIZE);
                    self.stream.write_all(&piece[..count]).await?;
                    left -= count;
                }
                self.stream.flush().await?;
                self.answer().await?;
            }
        }
        Ok(())
    }

    /// Closes the connection, and waits until the peer has closed it too, with or without close_notify: not every
    /// proxy relays it.
    async fn close(mut self) -> std::io::Result<()> {
        self.stream.shutdown().await?;
        while let Ok(1..) = self.stream.read_buf(&mut self.received).await {}
        Ok(())
    }
}

/// Opens `count` connections, `at_once` in parallel, sends one request on each, and closes them. Returns the total
/// time.
pub(crate) async fn connections(address: &ProxyAddress, count: usize, at_once: usize) -> std::io::Result<Duration> {
    let (started, begun) = (Instant::now(), Arc::new(AtomicUsize::new(0)));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..at_once {
        let (address, begun) = (address.clone(), Arc::clone(&begun));
        tasks.spawn(async move {
            while begun.fetch_add(1, Ordering::Relaxed) < count {
                let mut connection = Connection::open(&address).await?;
                connection.request().await?;
                connection.close().await?;
            }
            Ok(())
        });
    }
    finish(tasks).await?;
    Ok(started.elapsed())
}

/// The sorted durations of `count` requests over open connections.
pub(crate) async fn requests(connections: Vec<Connection>, count: usize) -> std::io::Result<Vec<Duration>> {
    let share = count / connections.len();
    let mut tasks = tokio::task::JoinSet::new();
    for mut connection in connections {
        tasks.spawn(async move {
            let mut times = Vec::with_capacity(share);
            for _ in 0..share {
                let started = Instant::now();
                connection.request().await?;
                times.push(started.elapsed());
            }
            Ok(times)
        });
    }
    let mut times = finish(tasks).await?.concat();
    times.sort();
    Ok(times)
}

/// Transfers `size` bytes in total over open connections. Returns the total time.
pub(crate) async fn transfer(
    connections: &mut Vec<Connection>,
    size: usize,
    direction: Direction,
) -> std::io::Result<Duration> {
    let (started, share) = (Instant::now(), size / connections.len());
    let mut tasks = tokio::task::JoinSet::new();
    for mut connection in connections.drain(..) {
        tasks.spawn(async move {
            connection.transfer(share, direction).await?;
            Ok(connection)
        });
    }
    connections.extend(finish(tasks).await?);
    Ok(started.elapsed())
}

/// Opens `count` connections and sends one request on each.
pub(crate) async fn open(address: &ProxyAddress, count: usize) -> std::io::Result<Vec<Connection>> {
    let mut connections = Vec::with_capacity(count);
    for _ in 0..count {
        let mut connection = Connection::open(address).await?;
        connection.request().await?;
        connections.push(connection);
    }
    Ok(connections)
}

async fn finish<T: 'static>(mut tasks: tokio::task::JoinSet<std::io::Result<T>>) -> std::io::Result<Vec<T>> {
    let mut results = Vec::with_capacity(tasks.len());
    while let Some(result) = tasks.join_next().await {
        results.push(result.expect("a client does not panic")?);
    }
    Ok(results)
}
