//! Bytes passed on between two connections.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::thread;

/// Copies either way until one side closes; then both are closed.
///
/// # Errors
/// What broke the way from the server to the client.
pub fn forward(client: TcpStream, server: TcpStream) -> io::Result<()> {
    let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
    let (mut from_server, mut to_client) = (server, client);
    thread::spawn(move || {
        let _ = io::copy(&mut from_client, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Both);
    });
    let copied = io::copy(&mut from_server, &mut to_client);
    let _ = to_client.shutdown(Shutdown::Both);
    copied.map(drop)
}
