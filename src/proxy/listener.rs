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

/// How many connections the system keeps for us while we are busy, or restarting behind a socket of the service manager.
const BACKLOG: u32 = 4096;
/// How long nothing is accepted after the system ran out of descriptors, at first and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

/// Listening sockets that the service manager has passed on (sd_listen_fds(3)): a restart of pintle refuses no
/// connection, because they go on listening.
#[derive(Debug, Default)]
pub struct Activated {
    tcp: Vec<std::net::TcpListener>,
    unix: Vec<std::os::unix::net::UnixListener>,
}

impl Activated {
    /// Those of this process, if any. To be called once, before any thread is started: it takes LISTEN_FDS out of the
    /// environment.
    ///
    /// # Errors
    /// If one of them is no listening stream socket.
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

    /// Takes those that listen at these addresses.
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

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.tcp.is_empty() && self.unix.is_empty()
    }

    /// The same sockets again, for another try to use them.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            tcp: self.tcp.iter().map(std::net::TcpListener::try_clone).collect::<io::Result<_>>()?,
            unix: self.unix.iter().map(std::os::unix::net::UnixListener::try_clone).collect::<io::Result<_>>()?,
        })
    }

    /// These sockets.
    pub fn of(tcp: Vec<std::net::TcpListener>, unix: Vec<std::os::unix::net::UnixListener>) -> Self {
        Self { tcp, unix }
    }
}

/// A listening socket of either family.
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, User),
}

/// The listeners, and the address of the first TCP one.
pub(super) fn open(
    activated: Activated,
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

/// The service manager's sockets are somebody else's configuration: each of them is looked at.
fn on_loopback(address: SocketAddr) -> io::Result<()> {
    match address.ip().is_loopback() {
        true => Ok(()),
        false => Err(io::Error::other(format!("the credential proxy listens on loopback only, not on {address}"))),
    }
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // Connections of an earlier run linger in TIME_WAIT.
    socket.set_reuseaddr(true)?;
    let failed = |error: io::Error| io::Error::new(error.kind(), format!("{address} cannot be listened on: {error}"));
    socket.bind(address).and_then(|()| socket.listen(BACKLOG)).map_err(failed)
}

fn bind_unix(path: &Path, user: User) -> io::Result<UnixListener> {
    local_authority::create_directory(crate::store::durable::directory_of(path))?;
    // Bound under another name, so that nobody connects before the mode and the owner are right.
    let mut new: PathBuf = path.to_owned();
    new.as_mut_os_string().push(".new");
    let _ = std::fs::remove_file(&new);
    let listener = UnixListener::bind(&new)?;
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600))?;
    std::os::unix::fs::lchown(&new, Some(user.uid), Some(user.gid))?;
    std::fs::rename(&new, path)?;
    Ok(listener)
}

/// Accepts connections for ever, as many at once as are allowed: the others wait in the system's backlog.
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
                        format!("a connection of user {} to the unix socket was refused", peer.unwrap_or(u32::MAX));
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
            // The client was gone before it was accepted.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                // EMFILE, ENFILE, ENOBUFS, ENOMEM: what is open goes on, and its end makes room.
                shared.counters.failed(FailureReason::AcceptFailed, &format!("no connection can be accepted: {error}"));
                tokio::time::sleep(back_off).await;
                back_off = (back_off * 2).min(BACK_OFF.1);
            }
        }
    }
}

fn spawn(shared: &Arc<Shared>, socket: Socket, permit: OwnedSemaphorePermit) {
    let (shared, place) = (Arc::clone(shared), shared.admission.enter());
    tokio::spawn(async move {
        connection::serve(&shared, socket, place).await;
        drop(permit);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_socket_of_the_service_manager_must_be_on_loopback() {
        let bind = |address| std::net::TcpListener::bind(address).expect("bound");
        let user = User { uid: 0, gid: 0 };
        let open_all = |tcp| open(Activated::of(tcp, Vec::new()), ([127, 0, 0, 1], 0).into(), None, user);
        assert!(open_all(vec![bind("127.0.0.1:0"), bind("127.0.0.2:0")]).is_ok());
        let refused = open_all(vec![bind("127.0.0.1:0"), bind("0.0.0.0:0")]).err().expect("refused");
        assert!(refused.to_string().contains("0.0.0.0"), "{refused}");
    }
}
