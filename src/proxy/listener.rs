//! The sockets that local clients connect to.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::sync::OwnedSemaphorePermit;

use super::connection;
use super::socket::Socket;
use super::{Shared, local_authority};
use crate::telemetry::FailureReason;
use crate::world::User;

/// The kernel queues this many connections while pintle is busy, or restarts behind an activated socket.
const BACKLOG: u32 = 4096;
/// Pause before accepting again after the process ran out of file descriptors: initial and maximum.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

/// Listening sockets passed by the service manager (sd_listen_fds(3)). The service manager keeps them open, so
/// connections are queued, not refused, while pintle restarts.
#[derive(Debug, Default)]
pub struct ActivatedSockets {
    tcp: Vec<std::net::TcpListener>,
    unix: Vec<std::os::unix::net::UnixListener>,
}

impl ActivatedSockets {
    /// Takes the sockets passed to this process, if any. Call once, before any thread starts: it removes LISTEN_FDS
    /// from the environment.
    ///
    /// # Errors
    /// If one of them is not a listening stream socket.
    pub fn from_environment() -> io::Result<Self> {
        let mut passed = listenfd::ListenFd::from_env();
        let mut activated = Self::default();
        for index in 0..passed.len() {
            match passed.take_tcp_listener(index) {
                Ok(listener) => activated.tcp.extend(listener),
                Err(_) => activated.unix.extend(passed.take_unix_listener(index)?),
            }
        }
        Ok(activated)
    }

    /// Takes the sockets that listen at these addresses.
    #[must_use]
    pub fn take(&mut self, listen: SocketAddr, unix_socket: Option<&Path>) -> Self {
        let is_at = |listener: &mut std::net::TcpListener| listener.local_addr().is_ok_and(|address| address == listen);
        let is_named = |listener: &mut std::os::unix::net::UnixListener| {
            let address = listener.local_addr().ok();
            let path = address.as_ref().and_then(std::os::unix::net::SocketAddr::as_pathname);
            path.is_some() && path == unix_socket
        };
        Self { tcp: self.tcp.extract_if(.., is_at).collect(), unix: self.unix.extract_if(.., is_named).collect() }
    }

    /// Whether no sockets were passed, or all have been taken.
    pub fn is_empty(&self) -> bool {
        self.tcp.is_empty() && self.unix.is_empty()
    }

    /// Duplicates the sockets, for another attempt to start.
    ///
    /// # Errors
    /// If the process has no free file descriptor.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            tcp: self.tcp.iter().map(std::net::TcpListener::try_clone).collect::<io::Result<_>>()?,
            unix: self.unix.iter().map(std::os::unix::net::UnixListener::try_clone).collect::<io::Result<_>>()?,
        })
    }

    /// Sockets that were obtained in another way, for tests.
    pub fn of(tcp: Vec<std::net::TcpListener>, unix: Vec<std::os::unix::net::UnixListener>) -> Self {
        Self { tcp, unix }
    }
}

pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, User),
}

/// Opens the listeners. The address is that of the first TCP listener.
pub(super) fn open(
    activated: ActivatedSockets,
    listen: SocketAddr,
    unix_socket: Option<&Path>,
    user: User,
) -> io::Result<(Vec<Listener>, SocketAddr)> {
    let mut listeners = Vec::new();
    for listener in activated.tcp {
        on_loopback(listener.local_addr()?)?;
        listener.set_nonblocking(true)?;
        listeners.push(Listener::Tcp(TcpListener::from_std(listener)?));
    }
    if listeners.is_empty() {
        listeners.push(Listener::Tcp(bind(listen)?));
    }
    let address = match &listeners[0] {
        Listener::Tcp(listener) => listener.local_addr()?,
        Listener::Unix(..) => listen,
    };
    on_loopback(address)?;
    let none_passed = activated.unix.is_empty();
    for listener in activated.unix {
        listener.set_nonblocking(true)?;
        listeners.push(Listener::Unix(UnixListener::from_std(listener)?, user));
    }
    if let Some(path) = unix_socket.filter(|_| none_passed) {
        listeners.push(Listener::Unix(bind_unix(path, user)?, user));
    }
    Ok((listeners, address))
}

/// The service manager's sockets are configured elsewhere, so each of them is checked.
fn on_loopback(address: SocketAddr) -> io::Result<()> {
    match address.ip().is_loopback() {
        true => Ok(()),
        false => Err(io::Error::other(format!("the credential proxy must listen on loopback, not on {address}"))),
    }
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // Connections of the previous run may still be in TIME_WAIT.
    socket.set_reuseaddr(true)?;
    let failed = |error: io::Error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"));
    socket.bind(address).and_then(|()| socket.listen(BACKLOG)).map_err(failed)
}

fn bind_unix(path: &Path, user: User) -> io::Result<UnixListener> {
    local_authority::create_directory(crate::store::durable::directory_of(path))?;
    // Bound under a temporary name, so that no client connects before the mode and owner are set.
    let mut new: PathBuf = path.to_owned();
    new.as_mut_os_string().push(".new");
    let _ = std::fs::remove_file(&new);
    let listener = UnixListener::bind(&new)?;
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600))?;
    std::os::unix::fs::lchown(&new, Some(user.uid), Some(user.gid))?;
    std::fs::rename(&new, path)?;
    Ok(listener)
}

/// Accepts connections until the task is aborted. Above the connection limit, new ones wait in the kernel's backlog.
pub(super) async fn accept(shared: Arc<Shared>, listener: Listener) {
    let mut back_off = BACK_OFF.0;
    loop {
        let Ok(permit) = Arc::clone(&shared.connections).acquire_owned().await else { return };
        let accepted = match &listener {
            Listener::Tcp(listener) => listener.accept().await.map(|(stream, _)| {
                let _ = stream.set_nodelay(true);
                Some(Socket::Tcp(stream))
            }),
            Listener::Unix(listener, user) => listener.accept().await.map(|(stream, _)| {
                let peer = stream.peer_cred().map(|peer| peer.uid());
                let allowed = peer.as_ref().is_ok_and(|uid| *uid == user.uid || *uid == 0);
                if !allowed {
                    let detail =
                        format!("refused a connection of user {} to the unix socket", peer.unwrap_or(u32::MAX));
                    shared.counters.failed(FailureReason::PeerNotAllowed, &detail);
                }
                allowed.then_some(Socket::Unix(stream))
            }),
        };
        match accepted {
            Ok(None) => {}
            Ok(Some(socket)) => {
                back_off = BACK_OFF.0;
                spawn(&shared, socket, permit);
            }
            // The client disconnected before the connection was accepted.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                // EMFILE, ENFILE, ENOBUFS, ENOMEM: open connections continue, and free resources when they close.
                shared.counters.failed(FailureReason::AcceptFailed, &format!("cannot accept connections: {error}"));
                tokio::time::sleep(back_off).await;
                back_off = (back_off * 2).min(BACK_OFF.1);
            }
        }
    }
}

fn spawn(shared: &Arc<Shared>, socket: Socket, permit: OwnedSemaphorePermit) {
    let (shared, handshake) = (Arc::clone(shared), shared.admission.admit());
    tokio::spawn(async move {
        connection::serve(&shared, socket, handshake).await;
        drop(permit);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_activated_socket_must_be_on_loopback() {
        let bind = |address| std::net::TcpListener::bind(address).expect("bound");
        let user = User { uid: 0, gid: 0 };
        let open_all = |tcp| open(ActivatedSockets::of(tcp, Vec::new()), ([127, 0, 0, 1], 0).into(), None, user);
        assert!(open_all(vec![bind("127.0.0.1:0"), bind("127.0.0.2:0")]).is_ok());
        let refused = open_all(vec![bind("127.0.0.1:0"), bind("0.0.0.0:0")]).err().expect("refused");
        assert!(refused.to_string().contains("0.0.0.0"), "{refused}");
    }
}
